"""Urza's database: the engine, its connections, and what goes wrong with them."""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

from sqlalchemy import URL, event, make_url, text
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.pool import AsyncAdaptedQueuePool, ConnectionPoolEntry

from esper.configs import DatabaseConfig
from esper.errors import ConfigError, EsperError, HubUnavailable, StorageFull, one_line
from esper.services.urza.models import Base

__all__ = ["Database", "DatabaseConfig"]


class Database:
    """Transactions on Urza's tables; `async with Database(config)` opens and closes it.

    SQLite runs with a write-ahead log that is synced at each commit: what was committed is there
    after a kill at any moment, and readers never wait for the writer.

    Raises:
        ConfigError: the configured URL can't be read.
    """

    def __init__(self, config: DatabaseConfig) -> None:
        try:
            self._url = make_url(config.url)
        except ArgumentError as error:
            raise ConfigError("database.url", config.url, "a database URL") from error
        self._engine = _engine(config, self._url)
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

    async def open(self) -> None:
        """Make the file and its tables where they are missing.

        Raises:
            HubUnavailable: the file can't be made or is no database.
            StorageFull: no room is left.
        """
        if not _in_memory(self._url):
            await asyncio.to_thread(_make_file, Path(str(self._url.database)))
        try:
            async with self._engine.begin() as connection:
                await connection.run_sync(Base.metadata.create_all)
        except SQLAlchemyError as error:
            raise _translated(error) from error

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """A session whose work is committed at the end, or undone by any exception.

        Raises:
            IntegrityError: SQLAlchemy's own, for whoever inserts what may exist.
            HubUnavailable: the database does not answer.
            StorageFull: no room is left.
        """
        try:
            async with self._sessions.begin() as session:
                yield session
        except IntegrityError:
            raise
        except SQLAlchemyError as error:
            raise _translated(error) from error

    async def health(self) -> bool:
        """Whether the database answers."""
        try:
            async with self.transaction() as session:
                await session.execute(text("SELECT 1"))
        except EsperError:
            return False
        return True

    async def close(self) -> None:
        """Close every connection."""
        await self._engine.dispose()


def _engine(config: DatabaseConfig, url: URL) -> AsyncEngine:
    # A database in memory lives and dies with its one connection; its users take turns.
    engine = create_async_engine(
        url,
        poolclass=AsyncAdaptedQueuePool,
        pool_size=1 if _in_memory(url) else config.pool_size,
        max_overflow=0,
        pool_timeout=config.pool_timeout_seconds,
        pool_pre_ping=config.pre_ping,
        connect_args={"timeout": config.pool_timeout_seconds},
    )
    event.listen(engine.sync_engine, "connect", _prepare)
    return engine


def _prepare(connection: DBAPIConnection, entry: ConnectionPoolEntry) -> None:
    """SQLite's settings of one connection; it keeps foreign keys off unless asked."""
    cursor = connection.cursor()
    for setting in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
        cursor.execute(f"PRAGMA {setting}")
    cursor.close()


def _in_memory(url: URL) -> bool:
    return url.database in {None, "", ":memory:"}


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


def _translated(error: SQLAlchemyError) -> EsperError:
    cause = error.orig if isinstance(error, DBAPIError) else None
    if getattr(cause, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
        return StorageFull("Urza's database: no room left where it writes")
    return HubUnavailable(f"Urza's database does not answer: {one_line(str(cause or error))}")
