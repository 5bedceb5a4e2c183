"""Processes that outlive whoever started them, known again by their id and time of start."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tools.servers.process import ServerError

STOP_SECONDS = 10.0
START_SECONDS = 60.0
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class Daemon:
    """A process of a name over a folder: its log and its id lie there."""

    name: str
    folder: Path

    @property
    def log(self) -> Path:
        """What it writes to its standard streams."""
        return self.folder / f"{self.name}.log"

    @property
    def _file(self) -> Path:
        return self.folder / f"{self.name}.pid"

    @property
    def process(self) -> psutil.Process | None:
        """The process, while it lives; another one with its id is not taken for it."""
        try:
            told = json.loads(self._file.read_text())
            found = psutil.Process(told["pid"])
            if found.create_time() == told["started"] and found.status() != psutil.STATUS_ZOMBIE:
                return found
        except (FileNotFoundError, psutil.NoSuchProcess):
            pass
        return None

    @property
    def running(self) -> bool:
        """Whether it lives."""
        return self.process is not None

    def start(
        self,
        command: Sequence[str],
        *,
        inner: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> psutil.Process:
        """Start it.

        Args:
            command: its words.
            inner: whether the command only forks, and waits for, the process that is meant.
            environment: all of its variables; by default this process's.

        Raises:
            ServerError: it ended at once.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            started = subprocess.Popen(
                command,
                cwd="/",
                env=None if environment is None else dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        process = psutil.Process(started.pid)
        if inner:
            process = self._inner(started)
        self._file.write_text(json.dumps({"pid": process.pid, "started": process.create_time()}))
        return process

    def await_(self, answers: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait until it answers.

        Raises:
            ServerError: it ended, or the time was up; the message holds its last words.
        """
        deadline = time.monotonic() + seconds
        while not answers():
            if not self.running or time.monotonic() > deadline:
                what = "does not answer" if self.running else "has ended"
                raise ServerError(f"{self.name} {what}: {self.last_words()}")
            time.sleep(_POLL_SECONDS)

    def stop(self, seconds: float = STOP_SECONDS) -> None:
        """End it in its own orderly way, at once where that takes too long."""
        process = self.process
        if process is not None:
            process.terminate()
            try:
                process.wait(seconds)
            except psutil.TimeoutExpired:
                process.kill()
                process.wait(seconds)
        self._file.unlink(missing_ok=True)

    def kill(self) -> None:
        """End it at once (SIGKILL)."""
        process = self.process
        if process is not None:
            process.kill()
            process.wait(STOP_SECONDS)
        self._file.unlink(missing_ok=True)

    def last_words(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " | ".join(lines[-5:])[-1500:] or "it wrote nothing"

    def _inner(self, outer: subprocess.Popen[bytes]) -> psutil.Process:
        """The process that `outer` forks; then `outer`, which only waits, is ended."""
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and outer.poll() is None:
            for child in psutil.Process(outer.pid).children():
                os.kill(outer.pid, signal.SIGKILL)
                outer.wait()
                return child
            time.sleep(0.005)
        raise ServerError(f"{self.name} did not start: {self.last_words()}")
