"""Urza's database, on real SQLite files."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from uuid import uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import select, text
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import IntegrityError

import esper.configs
from esper.contracts.enums import BlueprintState
from esper.errors import ConfigError, HubUnavailable, StorageFull
from esper.services.urza import models
from esper.services.urza.database import Database, DatabaseConfig

MOMENT = datetime(2026, 1, 1, 12, tzinfo=timezone(timedelta(hours=5)))


def config(path: Path, **fields: object) -> DatabaseConfig:
    return DatabaseConfig.model_validate({"url": f"sqlite+aiosqlite:///{path}", **fields})


def blueprint(digest: str = "a" * 64, **fields: object) -> models.Blueprint:
    row = {"created_at": MOMENT, "updated_at": MOMENT, "document": {}}
    state = BlueprintState.PROPOSED
    return models.Blueprint(id=uuid4(), digest=digest, state=state, **{**row, **fields})


def kernel(blueprint_id: object, name: str = "0" * 40) -> models.CompiledKernel:
    return models.CompiledKernel(
        id=uuid4(),
        created_at=MOMENT,
        updated_at=MOMENT,
        kernel=name,
        blueprint_id=blueprint_id,
        target={},
        state=BlueprintState.PROPOSED,
    )


async def count(database: Database, model: type[models.Base]) -> int:
    async with database.transaction() as session:
        return len((await session.scalars(select(model))).all())


@pytest.mark.parametrize("option", ["unknown=s3cret", "mode=ro"])
def test_an_option_that_sqlite_would_pass_over_is_refused(tmp_path, option):
    with pytest.raises(ConfigError, match=r"database\.url.*options that the driver") as caught:
        Database(config(tmp_path / f"urza.sqlite?{option}"))
    assert "s3cret" not in str(caught.value)
    Database(config(tmp_path / "urza.sqlite?timeout=3"))


def test_the_configuration_is_the_one_from_configs():
    assert DatabaseConfig is esper.configs.DatabaseConfig


@pytest.mark.parametrize(
    ("setting", "value"),
    [("journal_mode", "wal"), ("foreign_keys", 1), ("synchronous", 2)],
)
def test_every_connection_is_prepared(tmp_path, setting, value):
    async def life() -> list[object]:
        async with (
            Database(config(tmp_path / "hub.sqlite")) as database,
            database.transaction() as one,
            database.transaction() as two,
        ):
            query = text(f"PRAGMA {setting}")
            return [await one.scalar(query), await two.scalar(query)]

    assert asyncio.run(life()) == [value, value]


def test_the_file_and_its_folders_are_made_and_kept(tmp_path):
    path = tmp_path / "run" / "hub" / "urza.sqlite"

    async def life() -> int:
        async with Database(config(path)) as database, database.transaction() as session:
            session.add(blueprint())
        async with Database(config(path)) as database:
            return await count(database, models.Blueprint)

    assert asyncio.run(life()) == 1
    assert path.is_file()


def test_a_database_in_memory_is_one_for_all_its_users():
    async def life() -> int:
        async with Database(DatabaseConfig(url="sqlite+aiosqlite:///:memory:")) as database:

            async def add(number: int) -> None:
                async with database.transaction() as session:
                    session.add(blueprint(f"{number:064x}"))

            await asyncio.gather(*(add(number) for number in range(20)))
            return await count(database, models.Blueprint)

    assert asyncio.run(life()) == 20


def test_an_exception_undoes_the_transaction(tmp_path):
    async def life() -> int:
        async with Database(config(tmp_path / "hub.sqlite")) as database:

            async def fail_midway() -> None:
                async with database.transaction() as session:
                    session.add(blueprint())
                    await session.flush()
                    raise RuntimeError("midway")

            with pytest.raises(RuntimeError, match="midway"):
                await fail_midway()
            return await count(database, models.Blueprint)

    assert asyncio.run(life()) == 0


@pytest.mark.parametrize("through", ["the session", "the database"])
def test_kernels_go_with_their_blueprint(tmp_path, through):
    async def life() -> tuple[int, int]:
        async with Database(config(tmp_path / "hub.sqlite")) as database:
            doomed, other = blueprint("a" * 64), blueprint("b" * 64)
            async with database.transaction() as session:
                session.add_all([doomed, other])
                await session.flush()
                session.add_all([kernel(doomed.id, f"{n:040x}") for n in range(3)])
                session.add(kernel(other.id, "f" * 40))
            async with database.transaction() as session:
                if through == "the session":
                    await session.delete(await session.get(models.Blueprint, doomed.id))
                else:
                    await session.execute(
                        text("DELETE FROM blueprints WHERE digest = :d"), {"d": "a" * 64}
                    )
            return (
                await count(database, models.Blueprint),
                await count(database, models.CompiledKernel),
            )

    assert asyncio.run(life()) == (1, 1)


@pytest.mark.parametrize(
    "rows",
    [
        lambda: [blueprint("a" * 64), blueprint("a" * 64)],
        lambda: [kernel(uuid4())],
    ],
    ids=["a digest twice", "a kernel without a blueprint"],
)
def test_the_database_itself_keeps_rows_consistent(tmp_path, rows):
    async def life() -> None:
        async with Database(config(tmp_path / "hub.sqlite")) as database:
            with pytest.raises(IntegrityError):
                async with database.transaction() as session:
                    session.add_all(rows())
            assert await count(database, models.Blueprint) == 0

    asyncio.run(life())


@given(st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.timezones()))
def test_times_are_stored_in_utc_and_come_back_aware(moment):
    column, dialect = models.UtcDateTime(), sqlite.dialect()
    stored = column.process_bind_param(moment, dialect)
    assert stored is not None
    for read in (stored, stored.replace(tzinfo=None)):
        came = column.process_result_value(read, dialect)
        assert came == moment.astimezone(UTC)
        assert came.utcoffset() == timedelta(0)
    assert column.process_bind_param(None, dialect) is None
    assert column.process_result_value(None, dialect) is None


def test_times_come_back_from_the_file_aware_and_equal(tmp_path):
    async def life() -> models.Blueprint:
        async with Database(config(tmp_path / "hub.sqlite")) as database:
            async with database.transaction() as session:
                session.add(blueprint())
            async with database.transaction() as session:
                return await session.scalar(select(models.Blueprint))

    assert asyncio.run(life()).created_at == MOMENT


def test_what_was_committed_outlasts_kill_9(tmp_path):
    program = """
import asyncio, sys
from datetime import UTC, datetime
from pathlib import Path
from uuid import uuid4
from esper.services.urza.database import Database, DatabaseConfig
from esper.services.urza.models import Blueprint

async def main():
    async with Database(DatabaseConfig(url=f"sqlite+aiosqlite:///{sys.argv[1]}")) as database:
        for number in range(100_000):
            now = datetime.now(UTC)
            row = Blueprint(id=uuid4(), digest=f"{number:064x}", document={"n": number},
                            state="proposed", created_at=now, updated_at=now)
            async with database.transaction() as session:
                session.add(row)
            print(row.digest, flush=True)

asyncio.run(main())
"""
    path = tmp_path / "hub.sqlite"
    command = [sys.executable, "-c", program, str(path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        seen = [process.stdout.readline().strip() for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        seen += process.stdout.read().split("\n")[:-1]
    assert process.returncode == -signal.SIGKILL

    async def digests() -> set[str]:
        async with Database(config(path)) as database, database.transaction() as session:
            assert await session.scalar(text("PRAGMA integrity_check")) == "ok"
            return set((await session.scalars(select(models.Blueprint.digest))).all())

    assert len(seen) >= 25
    assert set(seen) <= asyncio.run(digests())


def test_a_file_that_is_no_database_is_refused_and_closed(tmp_path):
    path = tmp_path / "hub.sqlite"
    path.write_bytes(b"this is no database at all" * 100)

    async def life() -> None:
        async with Database(config(path)):
            raise AssertionError("it opened")

    threads = threading.active_count()
    with pytest.raises(HubUnavailable, match="file is not a database"):
        asyncio.run(life())
    assert threading.active_count() <= threads


def test_a_folder_that_can_not_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_bytes(b"")

    async def life() -> None:
        async with Database(config(tmp_path / "file" / "hub.sqlite")):
            raise AssertionError("it opened")

    with pytest.raises(HubUnavailable, match="can't be opened") as caught:
        asyncio.run(life())
    assert isinstance(caught.value.__cause__, OSError)


def test_a_url_that_can_not_be_read_is_refused():
    settings = DatabaseConfig().model_copy(update={"url": "no url"})

    with pytest.raises(ConfigError, match=r"database\.url: got no url"):
        Database(settings)


def test_no_room_is_storage_full(tmp_path):
    async def life() -> None:
        async with Database(config(tmp_path / "hub.sqlite", pool_size=1)) as database:
            async with database.transaction() as session:
                await session.execute(text("PRAGMA max_page_count = 1"))
            with pytest.raises(StorageFull, match="no room left"):
                async with database.transaction() as session:
                    session.add(blueprint(document={"much": "x" * 100_000}))
            assert await database.health()

    asyncio.run(life())


def test_a_pool_without_a_free_connection_does_not_answer(tmp_path):
    async def life() -> None:
        settings = config(tmp_path / "hub.sqlite", pool_size=1, pool_timeout_seconds=0.05)
        async with Database(settings) as database, database.transaction() as session:
            await session.execute(text("SELECT 1"))
            assert not await database.health()
            with pytest.raises(HubUnavailable, match="does not answer"):
                async with database.transaction() as second:
                    await second.execute(text("SELECT 1"))

    asyncio.run(life())


def test_two_writers_of_one_file_wait_for_each_other(tmp_path):
    async def life() -> int:
        path = tmp_path / "hub.sqlite"
        async with Database(config(path)) as one, Database(config(path)) as two:

            async def add(database: Database, number: int) -> None:
                async with database.transaction() as session:
                    session.add(blueprint(f"{number:064x}"))

            await asyncio.gather(*(add((one, two)[n % 2], n) for n in range(40)))
            return await count(two, models.Blueprint)

    assert asyncio.run(life()) == 40
