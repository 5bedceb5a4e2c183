"""`make cluster`, `make cluster-down`: a cluster whose pods are containers, on this machine."""

from __future__ import annotations

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tools.cluster.containers.kind import KindCluster, docker_answers
from tools.cluster.containers.layout import KIND, SOURCE, BadState, Layout, layout
from tools.cluster.containers.packages import require_root
from tools.cluster.containers.source import SourceCluster
from tools.cluster.programs import cluster_program
from tools.saying import say
from tools.servers.process import ServerError


def main(argv: Sequence[str] | None = None) -> int:
    """Do one thing; 0 where it is done, 1 where it can't be."""
    arguments = _parsed(argv)
    try:
        cluster = layout(arguments.state)
        if arguments.command == "exec":  # it may last
            return _exec(cluster, arguments)
        if arguments.command == "up":  # nothing is written where it can't be
            arguments.way = way_to_make(cluster, arguments.way)
        with _claimed(cluster, making=arguments.command == "up"):
            return _CHANGES[arguments.command](cluster, arguments)
    except (ServerError, BadState) as error:
        say(f"error: {error}")
        return 1


def way_to_make(cluster: Layout, asked: str | None = None) -> str:
    """Which way the cluster is made: as it was before, as asked, else as this machine can.

    Raises:
        ServerError: from source, and this is not root.
    """
    way = cluster.way or asked or (KIND if docker_answers() else SOURCE)
    if way == SOURCE:
        require_root()
    return way


def _up(cluster: Layout, arguments: argparse.Namespace) -> int:
    way: str = cluster.way or arguments.way
    cluster.mark.write_text(way)
    if way == KIND:
        say("Docker answers: a cluster of kind")
        changed = KindCluster(cluster, say).up()
    else:
        say("a cluster from source, in namespaces of this machine (no Docker is asked)")
        changed = SourceCluster(cluster, say).up()
    say("it is up" if changed else "it was up")
    kubectl = cluster_program("kubectl")
    say(f"export KUBECONFIG={cluster.admin} PATH={kubectl.parent}:$PATH")
    return 0


def _down(cluster: Layout, arguments: argparse.Namespace) -> int:
    way = cluster.way
    if way == KIND:
        KindCluster(cluster, say).down()
    elif way == SOURCE:
        SourceCluster(cluster, say).down()
    say(f"nothing is left of it: {cluster.state}" if way else f"no cluster: {cluster.state}")
    return 0


def _load(cluster: Layout, arguments: argparse.Namespace) -> int:
    if cluster.way == KIND:
        KindCluster(cluster, say).load(arguments.archive)
    else:
        _source(cluster).load_archive(arguments.archive)
    return 0


def _exec(cluster: Layout, arguments: argparse.Namespace) -> int:
    """Run a command on a node, as one who is logged in there."""
    node = _source(cluster).node(arguments.node)
    words = arguments.words[1:] if arguments.words[:1] == ["--"] else arguments.words
    return subprocess.run(node.machine.inside(words or ["bash"])).returncode


def _node(cluster: Layout, arguments: argparse.Namespace) -> int:
    source = _source(cluster)
    match arguments.action:
        case "add":
            source.add_node(arguments.name, arguments.images)
        case "lose":
            source.lose_node(arguments.name)
        case "cut":
            source.cut_node(arguments.name)
        case "join":
            source.cut_node(arguments.name, joined=True)
        case "remove":
            source.remove_node(arguments.name)
    return 0


def _source(cluster: Layout) -> SourceCluster:
    if cluster.way != SOURCE:
        raise ServerError(f"{cluster.state}: got no cluster from source; allowed: make cluster")
    return SourceCluster(cluster, say)


_CHANGES = {"up": _up, "down": _down, "load": _load, "node": _node}


@contextmanager
def _claimed(cluster: Layout, *, making: bool) -> Iterator[None]:
    """Have the folder for oneself; with `making`, take one that is empty or not there."""
    if making and not cluster.mark.exists():
        if cluster.state.is_dir() and any(cluster.state.iterdir()):
            raise ServerError(
                f"{cluster.state}: got a folder with other files; allowed: an own one"
            )
        cluster.state.mkdir(parents=True, exist_ok=True)
    if not cluster.state.is_dir():
        yield
        return
    descriptor = os.open(cluster.state, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tools.cluster.containers", description=__doc__)
    parser.add_argument("--state", type=Path, help="its folder (default: ESPER_CLUSTER_STATE)")
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start what does not run")
    up.add_argument("--way", choices=(KIND, SOURCE), help="default: kind where Docker answers")
    commands.add_parser("down", help="end it and remove all of it")
    load = commands.add_parser("load", help="import images")
    load.add_argument("archive", type=Path, help="an OCI archive")
    run = commands.add_parser("exec", help="run a command on a node")
    run.add_argument("--node", default="esper-1")
    run.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND")
    node = commands.add_parser("node", help="a further node")
    node.add_argument("action", choices=("add", "lose", "cut", "join", "remove"))
    node.add_argument("name", nargs="?", default="esper-2")
    node.add_argument("--images", nargs="*", help="with add: which it is given (default: all)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
