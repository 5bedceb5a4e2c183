"""A server as a process of its own: started until it answers, stopped, killed, frozen, restarted.

A server never outlives whoever started it: a shell beside it holds the other end of a pipe, and
kills the server when that pipe closes without a word, however its owner ended.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

HOST = "127.0.0.1"
START_SECONDS = 60.0
STOP_SECONDS = 20.0
PROBE_SECONDS = 2.0
"""Without an answer for so long, a server does not answer."""
_ATTEMPTS = 20
_KEEPER = 'read word; [ "$word" = done ] || kill -KILL "$1"'


class ServerError(RuntimeError):
    """A server that can't be had; the message says which and holds the end of its log."""


def free_port() -> int:
    """A port of the loopback that nobody listens on at this moment."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


def new_password() -> str:
    """A password that needs no quoting anywhere."""
    return secrets.token_hex(16)


def keeper_of(process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
    """What kills `process` when this process ends without having called `dismiss`."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "keeper", str(process.pid)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def dismiss(keeper: subprocess.Popen[bytes]) -> None:
    """Let go of a keeper whose process has ended."""
    if keeper.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            keeper.stdin.write(b"done\n")
            keeper.stdin.close()
    keeper.wait()


class ServerProcess:
    """One server over one folder. A restart finds the same port and the same data.

    Usable as a context manager. Subclasses say how it is started (`_command`), prepared
    (`_prepare`) and asked whether it answers (`_answers`).
    """

    name = "server"

    def __init__(self, folder: Path, *, port: int = 0) -> None:
        """`folder` is made if it is missing; port 0 means a free one, kept from then on."""
        self.folder = Path(folder).resolve()
        self.port = port
        self._process: subprocess.Popen[bytes] | None = None
        self._keeper: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> Path:
        """What the server has written to its standard streams."""
        return self.folder / f"{self.name}.log"

    @property
    def pid(self) -> int:
        """The server's process id.

        Raises:
            ServerError: it doesn't run.
        """
        if self._process is None:
            raise ServerError(f"{self.name} is not started")
        return self._process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives; a frozen one does."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> Self:
        """Start and wait until it answers; one that runs is only thawed.

        Raises:
            ServerError: it ended, or did not answer within `START_SECONDS`.
        """
        if self.running:
            self.thaw()
            return self
        self._forget()
        self.folder.mkdir(parents=True, exist_ok=True)
        chosen = self.port
        # A port can be taken between the look and the start; the children of a killed process can
        # hold its data for a moment.
        for _ in range(_ATTEMPTS):
            self.port = chosen or free_port()
            self._prepare()
            if self._started():
                return self
            if self._process is not None:
                break
            time.sleep(0.1)
        self.kill()
        raise ServerError(f"{self.name} did not start in {self.folder}: {self._last_words()}")

    def answers(self) -> bool:
        """Whether it runs, and answers at this moment."""
        return self.running and self._answers()

    def stop(self) -> None:
        """End it in its own orderly way; twice is as once."""
        if self._process is None:
            return
        self.thaw()
        self._signal(self._stop_signal())
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
        self._forget()

    def kill(self) -> None:
        """End it at once (SIGKILL), as a machine that fails would."""
        if self._process is None:
            return
        children = self._family()[1:]
        self._signal(signal.SIGKILL)
        self._process.wait()
        with contextlib.suppress(psutil.Error):
            psutil.wait_procs(children, timeout=STOP_SECONDS)
        self._forget()

    def freeze(self) -> None:
        """Stop it from doing anything, its connections open (SIGSTOP), until `thaw`."""
        self._signal_all(signal.SIGSTOP)
        stopped = {psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE}
        deadline = time.monotonic() + STOP_SECONDS
        while any(_status(process) not in stopped for process in self._family()):
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} can't be frozen")
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let a frozen server go on; any other is left as it is."""
        self._signal_all(signal.SIGCONT)

    def restart(self) -> None:
        """Stop in order and start again, on the same port and data."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def _prepare(self) -> None:
        """Write what the server reads when it starts."""

    def _command(self) -> Sequence[str]:
        raise NotImplementedError

    def _environment(self) -> Mapping[str, str]:
        return {}

    def _answers(self) -> bool:
        raise NotImplementedError

    def _stop_signal(self) -> int:
        return signal.SIGTERM

    def _started(self) -> bool:
        """Whether it answered before it ended (then it is forgotten) or the time was up."""
        command = self._command()  # which may build the program first
        deadline = time.monotonic() + START_SECONDS
        with self.log.open("ab") as log:
            # A session of its own: an interrupt from the terminal is for its owner to act on.
            self._process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=os.environ | self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            self._keeper = keeper_of(self._process)
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                self._forget()
                return False
            if self._answers():
                return True
            time.sleep(0.02)
        return False

    def _forget(self) -> None:
        """Let go of a process that has ended, and of its keeper."""
        keeper, self._keeper, self._process = self._keeper, None, None
        if keeper is not None:
            dismiss(keeper)

    def _family(self) -> list[psutil.Process]:
        """The server and its children; empty once it has ended."""
        if not self.running:
            return []
        try:
            parent = psutil.Process(self.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _signal(self, number: int) -> None:
        if self.running:
            os.kill(self.pid, number)

    def _signal_all(self, number: int) -> None:
        # The parent first, so that it makes no child that is missed.
        self._signal(number)
        for process in self._family()[1:]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def _last_words(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return " | ".join(lines[-5:]) or "it wrote nothing"


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def answers_tcp(port: int) -> bool:
    """Whether somebody accepts connections on `port` of the loopback."""
    try:
        with socket.create_connection((HOST, port), timeout=1):
            return True
    except OSError:
        return False
