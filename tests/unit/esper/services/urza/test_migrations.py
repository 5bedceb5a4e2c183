"""Urza's tables through the revisions, with data in them, on both databases."""

import asyncio
import contextlib
import json
import re
import sqlite3
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Enum, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import create_async_engine

import esper.services.urza.migrations as migrations
from esper.contracts.assets import TrainingSession, session_uid
from esper.contracts.enums import BlueprintState, SessionOutcome
from esper.errors import ConfigError, Conflict, HubUnavailable
from esper.services.contracts import SessionFilter
from esper.services.urza.database import Database
from esper.services.urza.migrations import FIRST, HEAD, current_revision, upgrade
from esper.services.urza.models import Base
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DIGEST,
    DOCUMENT,
    Place,
    described,
    opened,
    target,
)

MOMENT = "2026-01-02 03:04:05.000006"
KERNEL = "1" * 40
LEASE = "0123456789abcdef" * 2
BEFORE_REVISIONS = Path(__file__).with_name("before_revisions.sql")
SCRIPTS = ScriptDirectory(str(Path(migrations.__file__).parent))
REVISIONS = [script.revision for script in SCRIPTS.walk_revisions()]


@pytest.fixture
def place(bare_place):
    """Here the tables are still to be made."""
    return bare_place


def test_the_head_is_the_last_revision():
    assert SCRIPTS.get_heads() == [HEAD]
    assert SCRIPTS.get_bases() == [FIRST]


def on_engine(place, call):
    """What `call` returns, run on an engine of its own."""

    async def life():
        engine = create_async_engine(place.url)
        try:
            return await call(engine)
        finally:
            await engine.dispose()

    return asyncio.run(life())


def difference(connection):
    options = {"compare_type": True, "compare_server_default": True}
    context = MigrationContext.configure(connection, opts=options)
    return compare_metadata(context, Base.metadata)


def test_models_and_revisions_do_not_drift(place):
    async def life(engine):
        await upgrade(engine)
        async with engine.connect() as connection:
            return await connection.run_sync(difference)

    assert on_engine(place, life) == []


def test_drift_would_be_seen(place):
    async def life(engine):
        await upgrade(engine)
        async with engine.begin() as connection:
            await connection.execute(text("DROP INDEX ix_training_sessions_name"))
            await connection.execute(text("ALTER TABLE blueprints DROP COLUMN error"))
        async with engine.connect() as connection:
            return await connection.run_sync(difference)

    assert {change[0] for change in on_engine(place, life)} == {"add_index", "add_column"}


def checks(connection):
    """The words that each check of a vocabulary allows; Alembic compares neither."""
    found = {}
    for table in Base.metadata.tables:
        for check in inspect(connection).get_check_constraints(table):
            found[table, check["name"]] = set(re.findall(r"'([^']*)'", check["sqltext"]))
    return found


VOCABULARIES = {
    (table.name, column.type.name): set(column.type.enums)
    for table in Base.metadata.tables.values()
    for column in table.columns
    if isinstance(column.type, Enum)
}


def test_the_revisions_keep_the_words_that_a_column_may_hold(place):
    async def life(engine):
        await upgrade(engine)
        async with engine.connect() as connection:
            return await connection.run_sync(checks)

    assert on_engine(place, life) == VOCABULARIES
    assert VOCABULARIES["training_sessions", "sessionoutcome"] == set(SessionOutcome)
    assert len(VOCABULARIES) == 3


async def fill_first(engine) -> None:
    """A blueprint, a kernel of it and two sessions, as the first revision keeps them."""
    first, kernel = uuid.uuid4(), uuid.uuid4()
    postgres = engine.dialect.name == "postgresql"

    def key(value: uuid.UUID) -> str:
        return f"'{value}'" if postgres else f"'{value.hex}'"

    moment = f"TIMESTAMPTZ '{MOMENT}+00'" if postgres else f"'{MOMENT}'"
    document = json.dumps(DOCUMENT.to_wire()).replace(":", r"\:")
    wanted = json.dumps(target().to_wire()).replace(":", r"\:")
    statements = [
        "INSERT INTO blueprints (id, created_at, updated_at, digest, document, state) VALUES "
        f"({key(first)}, {moment}, {moment}, '{DOCUMENT.digest}', '{document}', 'characterized')",
        "INSERT INTO compiled_kernels (id, created_at, updated_at, kernel, blueprint_id, target, "
        "state, claimed_by, artifact_digest, artifact_bytes) VALUES "
        f"({key(kernel)}, {moment}, {moment}, '{KERNEL}', {key(first)}, '{wanted}', "
        f"'characterized', NULL, '{DIGEST}', {len(DATA)})",
        *(
            "INSERT INTO training_sessions (id, created_at, updated_at, name, outcome, epoch, "
            f"epochs, num_layers, num_slots, seeds) VALUES ({key(uuid.uuid4())}, {moment}, "
            f"{moment}, '{name}', '{outcome}', 3, 10, 2, 1, '[]')"
            for name, outcome in (("running", "Running"), ("done", "Succeeded"))
        ),
    ]
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def check_first(place) -> None:
    """That all which `fill_first` put is there, and that the hub works on it."""
    async with opened(place) as hub:
        stored = await hub.read_blueprint(DOCUMENT.digest)
        assert (stored.version, stored.item.document) == (1, DOCUMENT)
        assert stored.item.state is BlueprintState.CHARACTERIZED
        assert stored.item.created_at.isoformat() == "2026-01-02T03:04:05.000006+00:00"
        kernel = await hub.read_kernel(KERNEL)
        assert (kernel.version, kernel.item.artifact_digest) == (1, DIGEST)
        assert kernel.item.target == target()
        found = (await hub.list_sessions()).items
        sessions = {stored.item.name: stored.item for stored in found}
        assert sessions["running"].uid == session_uid("default", "running")
        assert sessions["running"].ended_at is None
        assert sessions["done"].ended_at == sessions["done"].updated_at
        (live,) = (await hub.list_sessions(SessionFilter(live=True))).items
        assert live.item == sessions["running"]

        same = TrainingSession(name="running", epochs=10, num_layers=2, num_slots=1)
        assert await hub.register_session(same) == sessions["running"]
        renamed = same.changed(id=uuid.uuid4(), uid="another-uid")
        assert (await hub.register_session(renamed)).id == renamed.id
        ended = sessions["running"].changed(outcome=SessionOutcome.FAILED)
        assert (await hub.update_session(ended)).ended_at is not None
        requested = await hub.request_kernel(DOCUMENT.digest, target())
        await hub.complete_kernel(described(requested.kernel), DATA)
        assert await hub.delete_blueprint(DOCUMENT.digest)
        assert await hub.kernels() == ()


async def fill_leased(engine) -> None:
    """A kernel that is being compiled, and a session that uses it, as the second revision keeps."""
    blueprint, kernel, session = uuid.uuid4(), uuid.uuid4(), uuid.uuid4()
    postgres = engine.dialect.name == "postgresql"

    def key(value: uuid.UUID) -> str:
        return f"'{value}'" if postgres else f"'{value.hex}'"

    moment = f"TIMESTAMPTZ '{MOMENT}+00'" if postgres else f"'{MOMENT}'"
    document = json.dumps(DOCUMENT.to_wire()).replace(":", r"\:")
    wanted = json.dumps(target().to_wire()).replace(":", r"\:")
    statements = [
        "INSERT INTO blueprints (id, created_at, updated_at, version, digest, document, state) "
        f"VALUES ({key(blueprint)}, {moment}, {moment}, 2, '{DOCUMENT.digest}', '{document}', "
        "'compiling')",
        "INSERT INTO compiled_kernels (id, created_at, updated_at, version, kernel, blueprint_id, "
        "target, state, claimed_by, lease_token, lease_expires_at) VALUES "
        f"({key(kernel)}, {moment}, {moment}, 2, '{KERNEL}', {key(blueprint)}, '{wanted}', "
        f"'compiling', 'one', '{LEASE}', {moment})",
        "INSERT INTO training_sessions (id, created_at, updated_at, version, name, namespace, uid, "
        f"outcome, epoch, epochs, num_layers, num_slots, seeds) VALUES ({key(session)}, {moment}, "
        f"{moment}, 1, 'running', 'team', 'uid-1', 'Running', 3, 10, 2, 1, '[]')",
        f"INSERT INTO session_kernels (session_id, kernel_id) VALUES ({key(session)}, "
        f"{key(kernel)})",
    ]
    async with engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def check_leased(place) -> None:
    """That all which `fill_leased` put is there, and that the hub works on it."""
    async with opened(place) as hub:
        stored = await hub.read_blueprint(DOCUMENT.digest)
        assert (stored.version, stored.item.state) == (2, BlueprintState.PROPOSED)
        (stored_session,) = (await hub.list_sessions()).items
        session = stored_session.item
        assert (session.namespace, session.uid, session.epoch) == ("team", "uid-1", 3)
        with pytest.raises(Conflict, match="the live session running uses it"):
            await hub.delete_kernel(KERNEL)
        # Nobody else took the work up, so whoever had it may still end it.
        done = await hub.complete_kernel(described(KERNEL), DATA, token=LEASE)
        assert done.state is BlueprintState.CHARACTERIZED
        claim = await hub.claim_next_blueprint("one", 60)
        assert claim is not None
        assert claim.digest == DOCUMENT.digest


async def fill_second(engine) -> None:
    """Credentials of sessions in three namespaces, as the second revision keeps them."""
    await fill_leased(engine)
    postgres = engine.dialect.name == "postgresql"

    def moment(year: int) -> str:
        text = f"{year}{MOMENT[4:]}"
        return f"TIMESTAMPTZ '{text}+00'" if postgres else f"'{text}'"

    async with engine.begin() as connection:
        for uid, namespace, until, revoked in (
            ("uid-1", "team-a", 2027, "false"),
            ("uid-2", "team-a", 2028, "false"),
            ("uid-3", "team-b", 2027, "false"),
            ("uid-4", "team-c", 2027, "true"),
        ):
            await connection.execute(
                text(
                    "INSERT INTO session_credentials (uid, namespace, created_at, expires_at, "
                    f"revoked) VALUES ('{uid}', '{namespace}', {moment(2026)}, {moment(until)}, "
                    f"{revoked})"
                )
            )


async def check_second(place) -> None:
    """That the namespaces whose users were set again until now are known."""
    await check_leased(place)
    async with opened(place) as hub:
        assert len(await hub.list_credentials()) == 4
        given = {one.namespace: one.expires_at.year for one in await hub.list_namespaces()}
        assert given == {"team-a": 2028, "team-b": 2027}


async def fill_third(engine) -> None:
    """The credentials of a namespace, as the third revision keeps them."""
    await fill_leased(engine)
    moment = f"TIMESTAMPTZ '{MOMENT}+00'" if engine.dialect.name == "postgresql" else f"'{MOMENT}'"
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "INSERT INTO namespace_credentials (namespace, created_at, expires_at) VALUES "
                f"('team-z', {moment}, {moment})"
            )
        )


async def check_third(place) -> None:
    """That they are there."""
    await check_leased(place)
    async with opened(place) as hub:
        assert [one.namespace for one in await hub.list_namespaces()] == ["team-z"]


async def check_fourth(place) -> None:
    """That the credentials are there, and what their sessions keep stays."""
    async with opened(place) as hub:
        found = await hub.list_credentials()
        assert [(one.uid, one.removes) for one in found] == [
            (f"uid-{number}", False) for number in (1, 2, 3, 4)
        ]


FILLED = {
    "0001": (fill_first, check_first),
    "0002": (fill_second, check_second),
    "0003": (fill_third, check_third),
    "0004": (fill_second, check_fourth),
}


@pytest.mark.parametrize("revision", [revision for revision in REVISIONS if revision != HEAD])
def test_each_revision_comes_to_the_head_with_its_data(place, revision):
    fill, check = FILLED[revision]

    async def life(engine):
        await upgrade(engine, revision)
        async with engine.connect() as connection:
            assert await connection.run_sync(current_revision) == revision
        await fill(engine)

    on_engine(place, life)
    asyncio.run(check(place))


def test_a_file_from_before_the_revisions_is_adopted_with_its_data(tmp_path):
    place = Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)
    with contextlib.closing(sqlite3.connect(tmp_path / "urza.sqlite")) as connection:
        connection.executescript(BEFORE_REVISIONS.read_text())
    on_engine(place, fill_first)

    asyncio.run(check_first(place))

    async def life(engine):
        async with engine.connect() as connection:
            return await connection.run_sync(difference), await connection.run_sync(checks)

    changes, words = on_engine(place, life)
    assert changes == []
    assert words == VOCABULARIES


def test_a_database_at_head_is_left_alone(place):
    async def life():
        for _ in range(3):
            async with Database(place.config()) as database:
                assert await database.health()

    asyncio.run(life())


def test_processes_that_start_together_make_the_tables_once(place):
    program = """
import asyncio, sys
from esper.configs import DatabaseConfig
from esper.services.urza.database import Database

async def main():
    sys.stdin.readline()
    async with Database(DatabaseConfig(url=sys.argv[1])) as database:
        assert await database.health()

asyncio.run(main())
"""
    command = [sys.executable, "-c", program, place.url]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    told = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], told


def test_a_migration_that_fails_leaves_all_as_it_was(place):
    async def life(engine):
        await upgrade(engine, FIRST)
        await fill_first(engine)
        async with engine.begin() as connection:
            # What the second revision is about to make is in its way.
            await connection.execute(text("CREATE TABLE session_credentials (uid INTEGER)"))
        with pytest.raises(Exception, match="session_credentials"):
            await upgrade(engine)
        async with engine.begin() as connection:
            assert await connection.run_sync(current_revision) == FIRST
            count = await connection.scalar(text("SELECT count(*) FROM compiled_kernels"))
            assert count == 1
            await connection.execute(text("DROP TABLE session_credentials"))
        await upgrade(engine)

    on_engine(place, life)
    asyncio.run(check_first(place))


def test_a_database_of_a_later_version_is_refused(place):
    async def life():
        async with Database(place.config()) as database, database.transaction() as session:
            await session.execute(text("UPDATE alembic_version SET version_num = '9999'"))
        with pytest.raises(ConfigError, match=r"database\.url: got a database at revision 9999"):
            async with Database(place.config()):
                raise AssertionError("it opened")

    asyncio.run(life())


def test_foreign_keys_hold_after_the_migration(place):
    async def life():
        key = str(uuid.uuid4()) if place.is_postgres else uuid.uuid4().hex
        insert = text(f"INSERT INTO session_kernels VALUES ('{key}', '{key}')")
        async with (
            Database(place.config(pool_size=1)) as database,
            database.transaction() as session,
        ):
            with pytest.raises(IntegrityError):
                await session.execute(insert)
            await session.rollback()

    asyncio.run(life())


def test_after_an_open_that_failed_foreign_keys_hold(tmp_path, monkeypatch):
    place = Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)
    on_engine(place, lambda engine: upgrade(engine, FIRST))

    def broken(*_):
        raise OSError("no room for a moment")

    async def life():
        database = Database(place.config(pool_size=1))
        with monkeypatch.context() as patched:
            patched.setattr(migrations, "_upgrade", broken)
            with pytest.raises(HubUnavailable):
                await database.open()
        # Meanwhile another process has brought the tables on.
        async with Database(place.config()) as other:
            assert await other.health()
        await database.open()
        async with database.transaction() as session:
            assert await session.scalar(text("PRAGMA foreign_keys")) == 1
        await database.close()

    asyncio.run(life())


def test_the_configuration_of_alembic_needs_no_file():
    config = Config()
    config.set_main_option("script_location", str(Path(migrations.__file__).parent))
    assert ScriptDirectory.from_config(config).get_current_head() == HEAD
