"""One start of a container: a process, and whatever it starts, known by a mark they inherit."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

MARK = "PROCESS_KUBELET_CONTAINER"
NODE_MARK = "PROCESS_KUBELET_NODE"

_KEEPER = """
read word; [ "$word" = done ] && exit
while found=$(grep -lzsF "$1" /proc/[0-9]*/environ); [ -n "$found" ]; do
  for path in $found; do path=${path#/proc/}; kill -KILL "${path%/environ}" 2>/dev/null; done
done
"""


class ContainerProcess:
    """A command at work. Its end is that of its first process: the rest is killed then.

    Args:
        identity: what no other start of a container has.
        command: the program and its arguments.
        folder: where it starts.
        environment: all of it.
        log: where its output goes.
    """

    def __init__(
        self,
        identity: str,
        command: Sequence[str],
        *,
        folder: Path,
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.identity = identity
        self.log = log
        self.out_of_memory = False
        self._command = list(command)
        self._folder = folder
        self._environment = {**environment, MARK: identity}
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of its first process, while that lives."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def start(self) -> None:
        """Start it.

        Raises:
            OSError: there is no such program, or it can't be run.
        """
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                cwd=self._folder,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )

    async def wait(self) -> int:
        """How its first process ended; nothing of it is left then."""
        assert self._process is not None
        returned = await self._process.wait()
        await asyncio.to_thread(kill_marked, f"{MARK}={self.identity}")
        return returned

    def kill(self) -> None:
        """End all of it at once."""
        if self.pid is not None:
            os.kill(self.pid, signal.SIGKILL)

    def run_out_of_memory(self) -> None:
        """End all of it as the kernel ends a container that is over its limit."""
        self.out_of_memory = True
        self.kill()

    async def stop(self, seconds: float) -> None:
        """Ask its first process to end, and end all of it if that takes longer than `seconds`."""
        if self._process is None or self.pid is None:
            return
        with contextlib.suppress(ProcessLookupError, TimeoutError):
            self._process.terminate()
            await asyncio.wait_for(self._process.wait(), seconds)
        self.kill()

    async def run_beside(self, command: Sequence[str], seconds: float) -> int | None:
        """The exit code of a further command in it, or None: it took too long."""
        try:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self._folder,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            return 127
        try:
            return await asyncio.wait_for(process.wait(), seconds)
        except TimeoutError:
            process.kill()
            await process.wait()
            return None


def kill_marked(mark: str) -> None:
    """End every process whose environment says `mark`, and those that they start meanwhile."""
    while found := [process for process in psutil.process_iter() if _says(process, mark)]:
        for process in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(found, timeout=1)


def keep_node(node: str) -> subprocess.Popen[bytes]:
    """What kills every container of the node once the node has ended, however it did."""
    return subprocess.Popen(
        ["/bin/sh", "-c", _KEEPER, "keeper", f"{NODE_MARK}={node}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _says(process: psutil.Process, mark: str) -> bool:
    try:
        with open(f"/proc/{process.pid}/environ", "rb") as environ:
            return mark.encode() in environ.read().split(b"\0")
    except OSError:
        return False
