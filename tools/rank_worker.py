"""`esper worker` as a process that can be killed in parts, and what its run tells meanwhile."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Self

import psutil

from tools.servers.process import dismiss, keeper_of

MARK = "RANKS_SESSION"
"""A variable that every process of a worker inherits, whoever its parent is by then."""
SECONDS = 900.0
"""Longer than anything that is waited for takes."""
LOOK_SECONDS = 0.002
RANK, AGENT = "esper.cli.rank", "esper.cli.elastic_agent"
_EPOCH = re.compile(r"^epoch +(\d+)/")


class WorkerEnded(RuntimeError):  # noqa: N818
    """A worker ended, or nothing happened for long, while something of it was waited for."""


class Worker:
    """`esper worker` on one node; a context manager that nothing of it outlives."""

    def __init__(
        self, manifest: Path, directory: Path, processes: int, log: Path, *options: str
    ) -> None:
        """Start it; what it says is added to `log`."""
        self.directory = directory
        self.log = log
        self._before = len(starts(log))
        self._mark = secrets.token_hex(8)
        with log.open("ab") as stream:
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "esper", "worker", str(manifest)),
                    *("--output-dir", str(directory), "--nodes", "1"),
                    *("--processes", str(processes), *options),
                ],
                env=os.environ | {"OMP_NUM_THREADS": "1", MARK: self._mark},
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
        self._keeper = keeper_of(self._process)

    @property
    def pid(self) -> int:
        """The worker's own process id."""
        return self._process.pid

    def starts(self) -> int:
        """How often its ranks have begun to train, as the log tells."""
        return len(starts(self.log)) - self._before

    def agent(self) -> int | None:
        """The process id of torchrun."""
        return next((p.pid for p in self._processes() if _runs(p, AGENT)), None)

    def ranks(self) -> dict[int, int]:
        """The ranks' process ids, in the order of the ranks."""
        found: dict[int, int] = {}
        for process in self._processes():
            with suppress(psutil.Error):
                parent = process.parent()
                # What a rank has forked looks like it.
                if _runs(process, RANK) and parent is not None and _runs(parent, AGENT):
                    found[int(process.environ()["RANK"])] = process.pid
        return dict(sorted(found.items()))

    def alive(self) -> list[int]:
        """Its processes that live, whatever became of their parents."""
        return [process.pid for process in self._processes()]

    def signal(self, number: int) -> None:
        """Send a signal to the worker itself."""
        self._process.send_signal(number)

    def wait(self, seconds: float = SECONDS) -> int | None:
        """Its exit status, None where it took longer."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None

    def until(self, condition: Callable[[], bool], look_seconds: float = LOOK_SECONDS) -> None:
        """Return once `condition` holds, which is looked at so often.

        Raises:
            WorkerEnded: it does not, and the worker is at its end, or `SECONDS` are over.
        """
        end = time.monotonic() + SECONDS
        while not condition():
            if self._process.poll() is not None or time.monotonic() > end:
                raise WorkerEnded(f"exit status {self._process.poll()}; see {self.log}")
            time.sleep(look_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        dismiss(self._keeper)
        for process in self._processes():
            with suppress(psutil.Error):
                process.kill()

    def _processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            # One that has ended, and is nobody's yet, has no environment.
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self._mark:
                    found.append(process)
        return found


def _runs(process: psutil.Process, module: str) -> bool:
    """Whether it is Python with this module; torchrun names the rank's after its own."""
    with suppress(psutil.Error, ValueError, IndexError):
        words = process.cmdline()
        return words[words.index("-m") + 1] == module
    return False


def starts(log: Path) -> list[list[int]]:
    """For each time that a session's ranks began to train, the epochs that rank 0 then told."""
    found: list[list[int]] = []
    for line in log.read_text(errors="replace").splitlines() if log.exists() else ():
        told = _EPOCH.match(line)
        if line.startswith("session "):
            found.append([])
        elif told and found:
            found[-1].append(int(told[1]))
    return found


def lost_epochs(log: Path) -> list[int]:
    """For each start but the first, how many whole epochs had to be trained again."""
    lost, last = [], 0
    for number, epochs in enumerate(starts(log)):
        if not epochs:
            continue
        if number:
            lost.append(last - (epochs[0] - 1))
        last = epochs[-1]
    return lost


def last_epoch(directory: Path) -> int:
    """The last epoch in the run's metrics, 0 without one."""
    with suppress(OSError, IndexError, ValueError):
        end = (directory / "metrics.jsonl").read_bytes().rpartition(b"\n")[0]
        return int(json.loads(end.rpartition(b"\n")[2])["epoch"])
    return 0


def writing(directory: Path) -> bool:
    """Whether a checkpoint is being written at this moment."""
    return any((directory / "checkpoints").glob(".epoch-*.partial"))
