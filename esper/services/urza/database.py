"""Urza's database, SQLite or Postgres: the engine, its connections, and what goes wrong."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from sqlalchemy import URL, AdaptedConnection, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    InvalidatePoolError,
    NoSuchModuleError,
    SAWarning,
)
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry, PoolProxiedConnection

from esper.configs import DatabaseConfig, without_password
from esper.errors import ConfigError, EsperError, HubUnavailable
from esper.services.urza.database_errors import DRIVER_ERRORS, translated, unusable
from esper.services.urza.migrations import upgrade

__all__ = ["Database", "DatabaseConfig", "PoolStatistics"]


@dataclass(frozen=True)
class PoolStatistics:
    """Connections: how many there may be, and how many are at work now."""

    limit: int
    in_use: int


class Database:
    """Transactions on Urza's tables; `async with Database(config)` opens and closes it.

    There are never more connections than `pool_size`; one that the server ended is replaced.
    SQLite runs with a write-ahead log that is synced at each commit: what was committed is there
    after a kill at any moment, and readers never wait for the writer.

    Raises:
        ConfigError: the configured URL can't be read.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        shown = without_password(config.url)
        try:
            self._url = make_url(config.url)
            with warnings.catch_warnings():
                # SQLite's driver only warns of options that it passes over.
                warnings.simplefilter("error", SAWarning)
                self._engine = _engine(config, self._url)
        except SAWarning:
            raise ConfigError("database.url", shown, "options that the driver takes") from None
        except (ArgumentError, NoSuchModuleError, TypeError, ValueError) as error:
            # Not chained: the library's message has the URL in it, and so the password.
            raise ConfigError("database.url", shown, "a database URL") from (
                None if shown != config.url else error
            )
        self._limit = _num_connections(config, self._url)
        self._sessions = async_sessionmaker(self._engine, expire_on_commit=False)

    async def __aenter__(self) -> Self:
        try:
            await self.open()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.close()

    @property
    def is_sqlite(self) -> bool:
        """Whether this is SQLite, where one transaction writes at a time."""
        return _is_sqlite(self._url)

    async def open(self) -> None:
        """Bring the tables to what this version needs, made where they are missing.

        Processes that open one database at the same time take turns.

        Raises:
            ConfigError: the driver refuses what stands in the URL, or Postgres the user, the
                password or the database's name; or the database was brought further by a later
                version of Esper.
            HubUnavailable: the file can't be made or is no database, or Postgres does not answer.
            StorageFull: no room is left.
        """
        if self.is_sqlite and not _in_memory(self._url):
            await asyncio.to_thread(_make_file, Path(str(self._url.database)))
        await self.server_version()
        try:
            await upgrade(self._engine)
        except DRIVER_ERRORS as error:
            raise translated(error, self._url) from error

    async def server_version(self) -> str:
        """The version of what answers, asked as the settings say; changes nothing in it.

        Raises:
            ConfigError: the driver refuses what stands in the URL, or Postgres the user, the
                password or the database's name.
            HubUnavailable: it does not answer.
        """
        try:
            async with self._engine.connect() as connection:
                found = connection.dialect.server_version_info or ()
                return ".".join(map(str, found))
        except Exception as error:
            refused = unusable(error, self._url)
            if refused is not None:
                raise refused from None
            if isinstance(error, DRIVER_ERRORS):
                raise translated(error, self._url) from error
            raise

    @asynccontextmanager
    async def transaction(self, *, writing: bool = False) -> AsyncIterator[AsyncSession]:
        """A session whose work is committed at the end, or undone by any exception.

        Args:
            writing: on SQLite, be the one writer from the beginning, so that nothing changes
                between a look and what follows from it; on Postgres rows are locked instead.

        Raises:
            IntegrityError: SQLAlchemy's own, for whoever inserts what may exist.
            BadInput: a value that the database has no room for.
            ConfigError: Postgres refuses the user, the password or the database's name.
            HubUnavailable: the database does not answer.
            StorageFull: no room is left.
        """
        session = self._sessions()
        try:
            async with session.begin():
                if writing and self.is_sqlite:
                    await session.execute(text("BEGIN IMMEDIATE"))
                yield session
        except IntegrityError:
            raise
        except TimeoutError as error:
            # Its answer may still come; no one else may get this connection and read it.
            await session.invalidate()
            raise translated(error, self._url) from error
        except DRIVER_ERRORS as error:
            raise translated(error, self._url) from error
        finally:
            await session.close()

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncSession]:
        """A session for one statement that only reads.

        On Postgres it is a transaction by itself, and its beginning and end are not sent.

        Raises:
            ConfigError: Postgres refuses the user, the password or the database's name.
            HubUnavailable: the database does not answer.
        """
        async with self.transaction() as session:
            if not self.is_sqlite:
                await session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
            yield session

    async def health(self) -> bool:
        """Whether the database answers."""
        try:
            await self.probe()
        except EsperError:
            return False
        return True

    async def probe(self) -> None:
        """Ask the database for an answer.

        Raises:
            ConfigError: Postgres refuses the user, the password or the database's name.
            HubUnavailable: the database does not answer.
        """
        async with self.reading() as session:
            await session.execute(text("SELECT 1"))

    def statistics(self) -> PoolStatistics:
        """How much of the pool is at work."""
        pool = self._engine.pool
        assert isinstance(pool, AsyncAdaptedQueuePool)
        return PoolStatistics(limit=self._limit, in_use=pool.checkedout())

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def _engine(config: DatabaseConfig, url: URL) -> AsyncEngine:
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=_num_connections(config, url),
        max_overflow=0,
        pool_timeout=config.pool_timeout_seconds,
        pool_recycle=-1 if _in_memory(url) else int(config.pool_recycle_seconds),
        connect_args=_connect_arguments(config, url),
        # Parameters hold manifests and digests: nothing that a log needs.
        hide_parameters=True,
    )
    if _is_sqlite(url):
        event.listen(engine.sync_engine, "connect", _prepare)
    elif config.pre_ping:
        event.listen(engine.sync_engine, "checkout", _refuse_dead)
    return engine


def _refuse_dead(
    connection: AdaptedConnection, entry: ConnectionPoolEntry, borrowed: PoolProxiedConnection
) -> None:
    """Have the pool replace a connection that has ended, before anything is asked over it.

    SQLAlchemy's own pre-ping sends three messages, a transaction around nothing; one is enough.
    """
    # Here, because SQLite needs none of it.
    from asyncpg import InterfaceError, PostgresError

    try:
        connection.run_async(_ping)
    except (PostgresError, InterfaceError, OSError) as error:
        raise InvalidatePoolError from error


async def _ping(connection: Any) -> None:
    """Have asyncpg's `connection` answer something."""
    await connection.execute("SELECT 1")


def _num_connections(config: DatabaseConfig, url: URL) -> int:
    # A database in memory lives and dies with its one connection; its users take turns.
    return 1 if _in_memory(url) else config.pool_size


def _connect_arguments(config: DatabaseConfig, url: URL) -> dict[str, object]:
    if _is_sqlite(url):
        return {"timeout": config.pool_timeout_seconds}
    limit = config.statement_timeout_seconds
    return {
        "timeout": config.pool_timeout_seconds,
        # The server ends a statement that takes too long; a server that has stopped answering is
        # given up on a little later from here.
        "command_timeout": limit + 1.0,
        "server_settings": {
            "application_name": "esper-urza",
            "statement_timeout": str(max(1, int(limit * 1000))),
            "idle_in_transaction_session_timeout": str(max(1, int(limit * 2000))),
        },
    }


def _prepare(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    """SQLite's settings of one connection; it keeps foreign keys off unless asked."""
    cursor = connection.cursor()
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _is_sqlite(url: URL) -> bool:
    return url.get_backend_name() == "sqlite"


def _in_memory(url: URL) -> bool:
    return _is_sqlite(url) and url.database in {None, "", ":memory:"}


def _make_file(path: Path) -> None:
    """Make the database file, or find out that it can't be used.

    Before any pooled connection: the threads of one that can't be opened outlive it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(sqlite3.connect(path)) as connection:
            connection.execute("PRAGMA schema_version")
    except (OSError, sqlite3.Error) as error:
        raise HubUnavailable(f"Urza's database {path} can't be opened: {error}") from error
