"""`esper worker`: one node of a session of many processes, as a pod runs it.

Exit codes: 0 done, 75 interrupted with a checkpoint, 78 bad input, 1 anything else; 2 if the
command line or the settings can't be used. Where a pod looks for it, the reason stands as JSON.
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from esper.cli.termination import add_termination_log, leave

if TYPE_CHECKING:
    from esper.cli.outcomes import Ended
    from esper.cli.supervising import Placement, Requests
    from esper.configs import EsperConfig
    from esper.contracts.resources.session import TrainingSession

HELP = "train with many processes: supervises torchrun on one node"

RESTARTS = 3
FAILED = 1
MOST = {"processes": 64, "nodes": 4096, "node_rank": 4095, "restarts": 1000}
LEAST = {"processes": 1, "nodes": 1, "node_rank": 0, "restarts": 0}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The command's own arguments."""
    command.add_argument("file", type=Path, metavar="FILE", help="the session's manifest")
    command.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="D",
        help="where the run writes, and goes on",
    )
    command.add_argument(
        "--processes", metavar="N", help="ranks on this node (default: workers.processesPerWorker)"
    )
    command.add_argument("--nodes", metavar="K", help="nodes (default: workers.replicas)")
    command.add_argument(
        "--node-rank", metavar="I", help="which of the nodes this is, from 0; 0 keeps the store"
    )
    command.add_argument(
        "--rendezvous", metavar="HOST:PORT", help="where node 0 is found by the others"
    )
    command.add_argument(
        "--rendezvous-id", metavar="ID", help="the same on all nodes (default: the session's name)"
    )
    command.add_argument(
        "--local-address",
        metavar="ADDR",
        help="where the other nodes find this one (default: its host's name)",
    )
    command.add_argument(
        "--restarts",
        metavar="R",
        help=f"restarts of the ranks without a newer checkpoint between (default: {RESTARTS})",
    )
    add_termination_log(command)
    command.add_argument(
        "--json", action="store_true", help="print the result as JSON, last line of standard output"
    )


def execute(arguments: argparse.Namespace, config: EsperConfig) -> int:
    """Train; the exit code says how it ended, which is also left in the termination log."""
    from esper.cli.outcomes import Ended
    from esper.cli.supervising import heeding_signals

    with heeding_signals() as requests:
        try:
            ended = _supervised(arguments, config, requests)
        except Exception as error:
            if arguments.debug:
                import traceback

                traceback.print_exc()
            ended = Ended.by(error)
        leave(arguments, ended.reason, ended.message)
    if ended.status:
        mark = "error: " if ended.status != 75 else ""
        sys.stderr.write(f"esper: {mark}{ended.message}\n")
    return ended.status


def _supervised(arguments: argparse.Namespace, config: EsperConfig, requests: Requests) -> Ended:
    from esper.cli.accelerators import require_any_accelerator
    from esper.cli.supervising import Supervisor
    from esper.contracts.manifests import load_manifest
    from esper.errors import AcceleratorMissing, BadInput
    from esper.services.tolaria.backends import backend

    if find_spec("torch") is None:
        raise BadInput("torch", "not installed", "with it: pip install 'esper[runtime]'")
    session = load_manifest(arguments.file).session
    given = _given(arguments)
    placement = placement_of(session, given)
    try:
        require_any_accelerator(session)
    except AcceleratorMissing:
        over = backend(gpus=True)
        sys.stderr.write(f"esper: not launched: {placement.processes} processes over {over}\n")
        raise
    supervisor = Supervisor(
        placement,
        rank_program(arguments),
        restarts=_number(given, "restarts", RESTARTS),
        stop_seconds=config.tolaria.stop_seconds,
        progress=lambda: newest_checkpoint(arguments.output_dir),
    )
    ended = supervisor.run(requests)
    if ended.status == FAILED and placement.node == 0:
        _fail(arguments.output_dir, ended)
    return ended


def rank_program(arguments: argparse.Namespace) -> list[str]:
    """The program of a rank: it gets what the command got."""
    words = [sys.executable, "-m", "esper.cli.rank", str(arguments.file)]
    words += ["--output-dir", str(arguments.output_dir)]
    if arguments.config is not None:
        words += ["--config", str(arguments.config)]
    for assignment in arguments.assignments:
        words += ["--set", assignment]
    return [*words, *(["--json"] if arguments.json else []), *(["--debug"] * arguments.debug)]


def placement_of(session: TrainingSession, given: dict[str, tuple[str, str]]) -> Placement:
    """Where this node stands, from options and variables, else from the session.

    Raises:
        ConfigError: a value is not one, or is missing with several nodes.
    """
    from esper.cli.supervising import Placement
    from esper.errors import ConfigError

    workers = session.spec.workers
    processes = _number(given, "processes", workers.processes_per_worker)
    nodes = _number(given, "nodes", workers.replicas)
    meeting = given.get("rendezvous_id", (session.metadata.name, ""))[0]
    if nodes == 1:
        return Placement(processes=processes, meeting=meeting)
    several = f"given with {nodes} nodes (one node: --nodes 1)"
    for name in ("node_rank", "rendezvous"):
        if name not in given:
            raise ConfigError(_option(name), "nothing", several)
    node = _number(given, "node_rank", 0)
    if node >= nodes:
        raise ConfigError(given["node_rank"][1], node, f"0 to {nodes - 1}, for {nodes} nodes")
    address, origin = given["rendezvous"]
    host, _, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(origin, address, "HOST:PORT, with a port from 1 to 65535")
    return Placement(
        processes=processes,
        meeting=meeting,
        nodes=nodes,
        node=node,
        host=host,
        port=int(port),
        address=given.get("local_address", ("", ""))[0],
    )


def newest_checkpoint(output_dir: Path) -> int:
    """The epoch of the newest checkpoint that the run's status names, -1 without one."""
    from esper.errors import EsperError
    from esper.utils.documents import read_documents

    path = output_dir / "status.yaml"
    try:
        documents = read_documents(path.read_text(encoding="utf-8"), str(path))
        return int(documents[0].data["status"]["checkpoint"]["epoch"])
    except (OSError, EsperError, ValueError, LookupError, TypeError):
        return -1


def _fail(output_dir: Path, ended: Ended) -> None:
    """Have the run's status say that the session failed, where its ranks could not."""
    from esper.errors import EsperError
    from esper.services.tolaria.status import break_off

    try:
        break_off(output_dir / "status.yaml", f"{ended.reason}: {ended.message}")
    except (OSError, EsperError) as error:
        sys.stderr.write(f"esper worker: the status does not say so: {error}\n")


def _given(arguments: argparse.Namespace) -> dict[str, tuple[str, str]]:
    """What options and variables say, each with its origin."""
    from esper.configs import TORCHRUN, torchrun_variables

    options = {name: getattr(arguments, name) for name in TORCHRUN}
    return torchrun_variables() | {
        name: (text, _option(name)) for name, text in options.items() if text is not None
    }


def _number(given: dict[str, tuple[str, str]], name: str, default: int) -> int:
    from esper.errors import ConfigError

    text, origin = given.get(name, (str(default), ""))
    least, most = LEAST[name], MOST[name]
    if not text.strip().isdecimal() or not least <= int(text) <= most:
        raise ConfigError(origin, text, f"a whole number from {least} to {most}")
    return int(text)


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")
