"""`make cluster-api`: a cluster on this machine that trains what is applied, until a signal.

Its pods are processes of this machine. With `--demo` an example is applied, followed to its end and
compared with the same session trained outside of any cluster; what was seen is the last line, JSON.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from tools.cluster.programs import cluster_program
from tools.cluster_demo import Demo, DemoFailed, DemoSession
from tools.local_cluster import LocalCluster
from tools.saying import say
from tools.servers.process import ServerError

FOLDER = Path("runs/cluster")
EXAMPLE = Path("examples/02-digits-cnn/session.yaml")
WATCH_SECONDS = 1.0


def main(argv: Sequence[str] | None = None) -> int:
    """Start, show, wait, stop; 0 where everything started and, with `--demo`, held.

    Ctrl-C and SIGTERM are how it is meant to end: they change nothing about that.
    """
    arguments = _parsed(argv)
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.set())
    told: dict[str, object] | None = None
    try:
        session = DemoSession.read(arguments.session) if arguments.demo else None
        say(f"starting a control plane, the hub, the operator and a node in {arguments.folder}")
        with LocalCluster(arguments.folder) as cluster:
            _show(cluster)
            if session is not None:
                told = Demo(cluster, session, say, stop).run()
            else:
                say("Ctrl-C stops everything")
                _watch(cluster, stop)
            say("stopping")
    except (ServerError, DemoFailed) as error:
        say(f"error: {error}")
        return 1
    say("stopped")
    if told is None:
        return 0
    say(json.dumps(told))
    return 0 if told["holds"] else 1


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make cluster-api", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}")
    parser.add_argument("--demo", action="store_true", help="apply an example and see it through")
    parser.add_argument(
        "--session", type=Path, default=EXAMPLE, help=f"that of --demo (default: {EXAMPLE})"
    )
    return parser.parse_args(argv)


def _show(cluster: LocalCluster) -> None:
    kubectl = cluster_program("kubectl")
    say("in another terminal:")
    say(f"  export KUBECONFIG={cluster.plane.admin}")
    say(f"  export PATH=$PATH:{kubectl.parent}")
    say(f"  kubectl apply -f {EXAMPLE}")
    say("  kubectl get ts,seeds,bp,ck")
    say("  kubectl wait --for=condition=Succeeded --timeout=30m ts/digits-cnn")
    say(f"logs: {cluster.operator.log}, kubectl logs POD")


def _watch(cluster: LocalCluster, stop: threading.Event) -> None:
    """Tell when something has ended."""
    told: set[str] = set()
    while not stop.wait(WATCH_SECONDS):
        if cluster.mend():
            say(f"  the operator had ended and is started anew: {cluster.operator.log}")
        for name, part in cluster.parts.items():
            if not part.running and name not in told:
                say(f"  {name} has ended; its last words are in {part.log}")
                told.add(name)


if __name__ == "__main__":
    sys.exit(main())
