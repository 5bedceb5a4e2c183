"""A machine of a cluster: a process with namespaces of its own for network, mounts, process ids.

Whatever runs on it, and whatever is mounted there, is gone with that one process.
"""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import IO

import psutil

from tools.cluster.containers.daemons import Daemon
from tools.servers.process import ServerError

_PREPARE = """
set -eu
hostname {name}
for folder in /run /var/lib /var/log; do mount -t tmpfs -o mode=755 tmpfs $folder; done
mkdir -p /run/lock /run/netns /var/lib/kubelet /var/log/pods
mount --make-rshared /
ip link set lo up
sysctl -qw net.ipv4.ip_forward=1
"""
"""Folders that a node's programs write whatever they are told are hidden by others of its own."""


@dataclass(frozen=True)
class Machine:
    """Namespaces, kept by a process that does nothing else.

    Attributes:
        name: its host name.
        folder: where its processes' logs and ids lie.
        pause: the program that does nothing.
    """

    name: str
    folder: Path
    pause: Path

    @property
    def _keeper(self) -> Daemon:
        return Daemon("machine", self.folder)

    @property
    def running(self) -> bool:
        """Whether it is there."""
        return self._keeper.running

    @property
    def pid(self) -> int:
        """The process that keeps the namespaces.

        Raises:
            ServerError: it is not there.
        """
        process = self._keeper.process
        if process is None:
            raise ServerError(f"machine {self.name} does not run")
        return process.pid

    def start(self) -> bool:
        """Make it; False where it was there."""
        if self.running:
            return False
        self._keeper.start(
            [
                *("unshare", "--mount", "--net", "--pid", "--uts", "--ipc", "--fork"),
                # Mounts that end outside end here too, none of here is seen outside.
                *("--propagation", "slave", "--mount-proc", str(self.pause)),
            ],
            inner=True,
        )
        # The child is there before its /proc is.
        program = self.pause.name
        self._keeper.await_(lambda: _runs(self.pid, program))
        self.run(["sh", "-c", _PREPARE.format(name=shlex.quote(self.name))])
        return True

    def stop(self) -> None:
        """End it with all that runs on it, as a machine that loses its power."""
        self._keeper.kill()

    def inside(self, command: Sequence[str]) -> list[str]:
        """A command line that runs `command` on it."""
        return ["nsenter", f"--target={self.pid}", *_NAMESPACES, "--", *command]

    def run(self, command: Sequence[str], *, given: str | None = None) -> str:
        """What a command prints that runs on it.

        Raises:
            ServerError: it failed; the message tells what it said.
        """
        return run(self.inside(command), given=given)

    def wire(self, command: Sequence[str]) -> None:
        """Run a command in its network only: so it knows other machines' processes by their ids.

        Raises:
            ServerError: it failed; the message tells what it said.
        """
        run(["nsenter", f"--target={self.pid}", "--net", "--", *command])

    def daemon(self, name: str) -> Daemon:
        """A process on it by its name."""
        return Daemon(name, self.folder)

    def start_daemon(self, name: str, command: Sequence[str]) -> Daemon:
        """Start a process on it, where it does not run."""
        daemon = self.daemon(name)
        if not daemon.running:
            own = self.folder / "tmp"  # what is killed leaves files there, which go with the folder
            own.mkdir(exist_ok=True)
            environment = {**_ENVIRONMENT, "TMPDIR": str(own)}
            daemon.start(self.inside(command), inner=True, environment=environment)
        return daemon


_ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
"""A node knows nothing of who has made it, such as proxies of theirs."""
_NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")


def run(
    command: Sequence[str], *, given: str | IO[bytes] | None = None, folder: Path | None = None
) -> str:
    """What a command prints; `given` is its standard input, `folder` where it runs.

    Raises:
        ServerError: it failed, or there is no such program; the message tells what it said.
    """
    run_it = partial(subprocess.run, command, cwd=folder, capture_output=True, text=True)
    try:
        is_text = given is None or isinstance(given, str)
        done = run_it(input=given or "") if is_text else run_it(stdin=given)
    except FileNotFoundError as error:
        raise ServerError(f"{command[0]}: there is no such program") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-1000:]
        raise ServerError(f"{' '.join(command)}: {said or f'exit code {done.returncode}'}")
    return done.stdout


def _runs(pid: int, program: str) -> bool:
    try:
        return psutil.Process(pid).name() == program
    except psutil.Error:
        return False
