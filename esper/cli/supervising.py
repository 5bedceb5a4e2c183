"""One node's ranks of a session under torchrun, from their start to an end that is told truthfully.

torchrun starts crashed ranks again, but ends with 1 for whatever else happens: a signal, another
node that is gone, the store of node 0 that is. So it runs as a child. Ranks tell how they ended
(`outcomes`), and where nothing final was told torchrun is launched once more.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from esper.cli.elastic_agent import CRASHED, LOST
from esper.cli.launch_folder import launch_folder
from esper.cli.outcomes import FINAL, Ended, Note, Outcome, Outcomes, deciding
from esper.cli.process_tree import adopt_orphans, kill_children, status_of
from esper.configs import launch_environment

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGENT = (sys.executable, "-m", "esper.cli.elastic_agent")

_log = logging.getLogger(__name__)

JOIN_SECONDS = 600
"""How long nodes wait for each other: a new pod may need an image first."""
FRESH_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""A store of their own for the ranks, each time they meet. The one that torch 2.15 keeps from start
to start holds the addresses of ranks that are gone: who comes before rank 0 fails after three tries
at them. And a node that comes anew is told nothing of it, and every node fails after a minute."""
LEAVE_SECONDS = 5.0
"""For torchrun, once its ranks have told their ends: it would wait for nodes that are gone."""
LOOK_SECONDS = 0.1
PAUSE_SECONDS = 1.0
MOST_PAUSE_SECONDS = 30.0
KILL_SECONDS = 5.0


@dataclass(frozen=True, kw_only=True)
class Placement:
    """How many processes run here, and which of the session's nodes this is.

    `host` and `port` are where node 0 keeps the store that the nodes meet at; a single node has
    its own on a free port. `meeting` tells this session's nodes from others'.
    """

    processes: int
    meeting: str
    nodes: int = 1
    node: int = 0
    host: str = "127.0.0.1"
    port: int = 0

    def options(self) -> list[str]:
        """The same as options of torchrun."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        first = str(self.node == 0).lower()
        alone = ["--local-addr=127.0.0.1"] if self.nodes == 1 else []
        return [
            f"--nnodes={self.nodes}",
            f"--nproc-per-node={self.processes}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={host}:{self.port}",
            f"--rdzv-id={self.meeting}",
            f"--rdzv-conf=is_host={first},join_timeout={JOIN_SECONDS}",
            *alone,
        ]


class Requests:
    """How often a signal has asked this process to stop."""

    def __init__(self) -> None:
        self.number = 0

    def __bool__(self) -> bool:
        return self.number > 0

    def ask(self, _number: int = 0, _frame: FrameType | None = None) -> None:
        """Ask once more; a signal handler."""
        self.number += 1


@contextmanager
def heeding_signals() -> Iterator[Requests]:
    """SIGINT and SIGTERM are requests inside.

    Entered early: the first process of a container never gets a signal that it has no handler for.
    """
    requests = Requests()
    before = {number: signal.signal(number, requests.ask) for number in SIGNALS}
    try:
        yield requests
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass(frozen=True)
class _Launch:
    """A launch that has ended: torchrun's exit status, and whether a request has ended it.

    `met`: the ranks here had met all others when the request came.
    """

    status: int
    stopped: bool
    met: bool = True


class Supervisor:
    """Launches torchrun until the ranks have told their end.

    It is the sole work of its process: every child that a launch leaves over is killed.

    Args:
        placement: what runs where.
        rank: the program of a rank and its arguments; `--outcomes FOLDER` is added to them.
        restarts: how often ranks are started again without progress, by torchrun after crashes and
            here after losses of other nodes.
        stop_seconds: for the ranks, from the first signal to their end.
        progress: the epoch of the newest checkpoint, or any number that grows with it.
        agent: the program that runs torchrun.
    """

    def __init__(
        self,
        placement: Placement,
        rank: Sequence[str],
        *,
        restarts: int,
        stop_seconds: float,
        progress: Callable[[], int] = lambda: 0,
        agent: Sequence[str] = AGENT,
    ) -> None:
        self._placement = placement
        self._rank = tuple(rank)
        self._restarts = restarts
        self._stop_seconds = stop_seconds
        self._progress = progress
        self._agent = tuple(agent)

    def run(self, requests: Requests) -> Ended:
        """How the ranks ended; none of their processes is left.

        They are asked to stop with the first of `requests`, and killed at the second.
        """
        adopt_orphans()
        reached, used = self._progress(), 0
        with launch_folder() as place:
            while True:
                folder = place / f"launch-{time.monotonic_ns()}"
                folder.mkdir()
                outcomes = Outcomes(folder)
                launch = self._launched(folder, outcomes, requests)
                notes, begun = outcomes.notes(), outcomes.begun()
                at_work = begun if launch.met else set()
                ended = judged(notes, at_work, requests.number, stopped=launch.stopped)
                if ended is not None:
                    return ended
                now = self._progress()
                if now > reached:
                    reached, used = now, 0
                elif launch.status == CRASHED:
                    used = self._restarts  # torchrun has used them
                told = deciding(notes, begun)
                if used >= self._restarts:
                    return _given_up(told, self._restarts)
                why = told.message if told is not None else "other nodes or the store were lost"
                _log.warning("the ranks are launched again: %s", why)
                self._pause(used, requests)
                used += 1

    def _launched(self, folder: Path, outcomes: Outcomes, requests: Requests) -> _Launch:
        """Run torchrun to its end."""
        if requests or not self._store_is_there(requests):
            return _Launch(LOST, bool(requests))
        arguments = [
            *self._placement.options(),
            f"--max-restarts={self._restarts}",
            f"--shutdown-timeout={math.ceil(self._stop_seconds)}",
            f"--log-dir={folder}",
            "--no-python",
            *self._rank,
            *("--outcomes", str(folder)),
        ]
        agent = subprocess.Popen(
            [*self._agent, str(os.getpid()), str(folder), *arguments],
            env=launch_environment(self._placement.processes) | FRESH_STORE,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # signals of a terminal come through this process alone
        )
        try:
            return self._attended(agent, outcomes, requests)
        finally:
            kill_children(KILL_SECONDS)

    def _attended(
        self, agent: subprocess.Popen[bytes], outcomes: Outcomes, requests: Requests
    ) -> _Launch:
        """Wait for torchrun, ask it to stop when asked, and end it when its time is over."""
        stopped, end, told = False, math.inf, math.inf
        while (status := status_of(agent)) is None:
            if requests and not stopped:
                stopped = True
                outcomes.stop()
                if len(outcomes.met()) < self._placement.processes:
                    # There is nothing to save yet. One that waits for another, which was stopped
                    # before it could come, hears no signal.
                    agent.kill()
                    return _Launch(agent.wait(), stopped, met=False)
                agent.terminate()  # it passes the signal on, once, and waits for its ranks
                end = time.monotonic() + self._stop_seconds
            # torchrun may start ranks again that have told an end: then it is none.
            told = min(told, time.monotonic()) if self._all_told(outcomes, requests) else math.inf
            if time.monotonic() > min(end, told + LEAVE_SECONDS) or requests.number > 1:
                agent.kill()
                return _Launch(agent.wait(), stopped)
            time.sleep(LOOK_SECONDS)
        return _Launch(status, stopped)

    def _all_told(self, outcomes: Outcomes, requests: Requests) -> bool:
        """Whether every rank here has told its end, and other nodes need not be waited for."""
        notes, begun = outcomes.notes(), outcomes.begun()
        ends = [note.ended for note in notes if note.ended.outcome is not Outcome.CRASHED]
        if len(ends) < self._placement.processes:
            return False
        # Where neither holds, the store here may be in use by the node of rank 0.
        return bool(requests) or 0 in begun or ends[0].outcome is Outcome.INTERRUPTED

    def _store_is_there(self, requests: Requests) -> bool:
        """Wait for node 0: torchrun itself would give up after a minute."""
        place = self._placement
        end = time.monotonic() + JOIN_SECONDS
        while place.node and not requests and time.monotonic() < end:
            with suppress(OSError):
                socket.create_connection((place.host, place.port), timeout=1.0).close()
                return True
            time.sleep(LOOK_SECONDS)
        return not place.node

    def _pause(self, used: int, requests: Requests) -> None:
        end = time.monotonic() + min(PAUSE_SECONDS * 2**used, MOST_PAUSE_SECONDS)
        while not requests and time.monotonic() < end:
            time.sleep(LOOK_SECONDS)


def judged(notes: Sequence[Note], begun: set[int], requests: int, *, stopped: bool) -> Ended | None:
    """How a launch ended, None: the ranks are to be started again.

    `requests` to stop have come so far, and the ranks were `stopped` by one. Interrupted without a
    request were those whose other nodes were asked, or whose torchrun was: here they go on.
    """
    told = deciding(notes, begun)
    final = FINAL | {Outcome.INTERRUPTED} if requests else FINAL
    if told is not None and told.outcome in final:
        return told
    if not stopped:
        return None
    if not begun:
        return Ended(Outcome.INTERRUPTED, "Interrupted", "asked to stop while no rank was at work")
    if requests > 1:
        return Ended(Outcome.CRASHED, "Killed", "a second signal ended the ranks at once")
    return told or Ended(
        Outcome.CRASHED,
        "StopFailed",
        "the ranks ended without a checkpoint, or not in time (tolaria.stop_seconds)",
    )


def _given_up(told: Ended | None, restarts: int) -> Ended:
    after = f"given up after {restarts} restarts without a newer checkpoint"
    if told is None:
        return Ended(Outcome.CRASHED, "RanksLost", f"other nodes or the store were lost; {after}")
    return Ended(Outcome.CRASHED, told.reason, f"{told.message}; {after}")
