"""Urza's tables through the versions of Esper: each revision takes the tables a step further."""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from esper.errors import ConfigError

HEAD = "0005"
"""The revision of the tables that `esper.services.urza.models` describes."""

FIRST = "0001"
_VERSION_TABLE = "alembic_version"
# The same number in every process; "urza" in ASCII.
_ADVISORY_LOCK = 0x75727A61


async def upgrade(engine: AsyncEngine, revision: str = HEAD) -> None:
    """Bring the tables to `revision`, from nothing or from any earlier one, with their rows.

    All of it is one transaction under a lock: a second process waits and finds the work done,
    and after a crash the tables are as they were. Tables made before there were revisions are
    taken for the first.

    Raises:
        ConfigError: the database is at a revision that this version does not know.
        SQLAlchemyError: what the database says to it.
    """
    async with engine.connect() as connection:
        if await connection.run_sync(current_revision) == revision:
            return
        await connection.rollback()
        try:
            await _lock(connection)
            await connection.run_sync(_upgrade, revision)
            await connection.commit()
            if _is_sqlite(connection):
                await connection.exec_driver_sql("PRAGMA foreign_keys = ON")
        except BaseException:
            # It may keep no foreign keys: nobody else may get it from the pool.
            await connection.invalidate()
            raise


def current_revision(connection: Connection) -> str | None:
    """The tables' revision; the first for tables without one, None where there are no tables."""
    tables = inspect(connection).get_table_names()
    if _VERSION_TABLE in tables:
        found = connection.exec_driver_sql(f"SELECT version_num FROM {_VERSION_TABLE}").scalar()
        if found is not None:
            return str(found)
    return FIRST if "blueprints" in tables else None


async def _lock(connection: AsyncConnection) -> None:
    """Be the only process that migrates, until the transaction ends."""
    if _is_sqlite(connection):
        # A table is changed by making it anew: without this, dropping the old one would take all
        # rows along that refer to it. It can't be set inside a transaction.
        await connection.exec_driver_sql("PRAGMA foreign_keys = OFF")
        await connection.exec_driver_sql("BEGIN IMMEDIATE")
    else:
        await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_ADVISORY_LOCK})")


def _upgrade(connection: Connection, revision: str) -> None:
    # Here, because most processes find nothing to do, and these take a moment to import.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    found = current_revision(connection)
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    known = {script.revision for script in ScriptDirectory.from_config(config).walk_revisions()}
    if found is not None and found not in known:
        raise ConfigError(
            "database.url",
            f"a database at revision {found}",
            f"one at {HEAD} or before; a later version of Esper has changed its tables",
        )
    if found == FIRST:
        command.stamp(config, FIRST)
    command.upgrade(config, revision)


def _is_sqlite(connection: AsyncConnection) -> bool:
    return connection.dialect.name == "sqlite"
