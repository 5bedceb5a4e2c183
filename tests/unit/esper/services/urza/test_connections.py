"""The hub's connections to a real Postgres: bounded, replaced, given up on, told of in one line."""

import asyncio
import json
import subprocess
import sys
import time
import traceback

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url

from esper.configs import DatabaseConfig
from esper.contracts.assets import TrainingSession
from esper.errors import BadInput, ConfigError, HubUnavailable
from esper.services.contracts import BlueprintFilter
from esper.services.urza.api.readiness import Readiness
from esper.services.urza.database import Database, PoolStatistics
from tests.unit.esper.services.urza.hubs import DOCUMENT, Place, opened
from tests.unit.esper.services.urza.serving import serving, settings

CLIENTS = """
import asyncio, json, sys
from pathlib import Path
from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.blueprints import BlueprintDocument
from esper.services.urza.client import in_process_urza

async def main():
    url, folder, document, clients = sys.argv[1:]
    blueprint = BlueprintDocument.model_validate_json(document)
    settings = DatabaseConfig(url=url, pool_size=4)
    async with in_process_urza(settings, StorageConfig(folder=folder)) as hub:
        print("ready", flush=True)
        sys.stdin.readline()
        made = await asyncio.gather(*(hub.put_blueprint(blueprint) for _ in range(int(clients))))
        print(json.dumps(sorted({str(one.id) for one in made})), flush=True)
        sys.stdin.readline()

asyncio.run(main())
"""
LIMIT = 4
OWN = "application_name = 'esper-urza' AND datname = current_database()"


def database_of(place):
    return make_url(place.url).database


def connections(server, place):
    count = server.execute(f"SELECT count(*) FROM pg_stat_activity WHERE {OWN}", database_of(place))
    return int(count)


def terminate(server, place):
    server.execute(
        f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {OWN}", database_of(place)
    )


def test_32_clients_of_two_hubs_leave_one_row(place):
    command = [sys.executable, "-c", CLIENTS, place.url, str(place.folder / "artifacts")]
    command += [json.dumps(DOCUMENT.to_wire()), "16"]
    started = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    try:
        assert [process.stdout.readline() for process in started] == ["ready\n"] * 2
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        ids = [json.loads(process.stdout.readline()) for process in started]
    finally:
        for process in started:
            process.communicate(timeout=300)
    assert [process.returncode for process in started] == [0, 0]
    assert ids[0] == ids[1]
    assert len(ids[0]) == 1

    async def life():
        async with opened(place) as hub:
            (row,) = (await hub.list_blueprints()).items
            assert (str(row.item.id), row.version) == (ids[0][0], 1)

    asyncio.run(life())


def test_the_pool_never_exceeds_its_limit(postgres_server, postgres_place):
    async def life():
        async with Database(postgres_place.config(pool_size=LIMIT)) as database:
            seen: list[PoolStatistics] = []

            async def one():
                async with database.transaction() as session:
                    await session.execute(text("SELECT pg_sleep(0.05)"))
                    seen.append(database.statistics())

            work = asyncio.gather(*(one() for _ in range(40)))
            counts = []
            while not work.done():
                counts.append(await asyncio.to_thread(connections, postgres_server, postgres_place))
            await work
            assert max(counts) <= LIMIT
            assert max(statistics.in_use for statistics in seen) == LIMIT
            assert {statistics.limit for statistics in seen} == {LIMIT}
            assert database.statistics() == PoolStatistics(limit=LIMIT, in_use=0)
        assert connections(postgres_server, postgres_place) == 0

    asyncio.run(life())


def test_a_killed_connection_is_replaced(postgres_server, postgres_place):
    async def life():
        async with opened(postgres_place, pool_size=2) as hub:
            for _ in range(3):
                await asyncio.gather(*(hub.put_blueprint(DOCUMENT) for _ in range(4)))
                terminate(postgres_server, postgres_place)
                assert await hub.health()
                assert await hub.blueprint(DOCUMENT.digest)
            assert connections(postgres_server, postgres_place) <= 2

    asyncio.run(life())


def test_a_connection_that_is_killed_at_work_is_a_hub_that_does_not_answer(
    postgres_server, postgres_place
):
    async def life():
        async with Database(postgres_place.config(pool_size=1)) as database:

            async def work():
                async with database.transaction() as session:
                    await session.execute(text("SELECT 1"))
                    terminate(postgres_server, postgres_place)
                    await session.execute(text("SELECT 2"))

            with pytest.raises(HubUnavailable, match=r"does not answer: .*database\.url"):
                await work()
            assert await database.health()
            assert database.statistics().in_use == 0

    asyncio.run(life())


def test_without_pre_ping_one_call_finds_out(postgres_server, postgres_place):
    async def life():
        async with opened(postgres_place, pool_size=1, pre_ping=False) as hub:
            await hub.put_blueprint(DOCUMENT)
            terminate(postgres_server, postgres_place)
            with pytest.raises(HubUnavailable):
                await hub.blueprint(DOCUMENT.digest)
            assert await hub.blueprint(DOCUMENT.digest)

    asyncio.run(life())


def test_a_statement_that_takes_too_long_is_ended(postgres_place):
    async def life():
        settings = postgres_place.config(pool_size=1, statement_timeout_seconds=0.2)
        async with Database(settings) as database:
            began = time.monotonic()
            with pytest.raises(HubUnavailable, match="statement timeout"):
                async with database.transaction() as session:
                    await session.execute(text("SELECT pg_sleep(30)"))
            assert time.monotonic() - began < 20
            assert await database.health()

    asyncio.run(life())


def test_a_postgres_that_is_killed_is_found_again(private_postgres, tmp_path):
    async def life():
        place = Place(private_postgres.create_database("hub"), tmp_path)
        async with opened(place, pool_size=2) as hub:
            await hub.put_blueprint(DOCUMENT)
            private_postgres.kill()
            assert not await hub.health()
            with pytest.raises(HubUnavailable, match=r"database\.url"):
                await hub.blueprint(DOCUMENT.digest)
            private_postgres.start()
            assert await hub.blueprint(DOCUMENT.digest)

    asyncio.run(life())


def test_a_postgres_that_stops_answering_is_given_up_on(private_postgres, tmp_path):
    async def life():
        place = Place(private_postgres.create_database("hub"), tmp_path)
        limits = {"statement_timeout_seconds": 0.2, "pool_timeout_seconds": 1.0}
        async with opened(place, pool_size=2, **limits) as hub:
            await hub.put_blueprint(DOCUMENT)
            private_postgres.freeze()
            try:
                began = time.monotonic()
                with pytest.raises(HubUnavailable):
                    await asyncio.wait_for(hub.blueprint(DOCUMENT.digest), timeout=60)
                assert time.monotonic() - began < 30
            finally:
                private_postgres.thaw()
            assert await hub.blueprint(DOCUMENT.digest)

    asyncio.run(life())


def opening(url):
    """What opening that database raises."""

    async def life():
        async with Database(DatabaseConfig(url=url, pool_timeout_seconds=5)):
            raise AssertionError("it opened")

    with pytest.raises((ConfigError, HubUnavailable)) as caught:
        asyncio.run(life())
    return caught.value


@pytest.mark.parametrize(
    ("change", "allowed"),
    [
        ({"password": "hush-hush"}, "a user with the right password"),
        ({"username": "nobody", "password": "hush-hush"}, "a user with the right password"),
        ({"database": "nothing"}, "a database that exists"),
    ],
)
def test_a_database_that_refuses_is_a_setting_to_mend(postgres_server, change, allowed):
    url = make_url(postgres_server.url).set(**change).render_as_string(hide_password=False)
    error = opening(url)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("database.url: got postgresql+asyncpg://")
    assert str(error).endswith(f"allowed: {allowed}")
    assert ":***@" in str(error)
    told = "".join(traceback.format_exception(error))
    assert "hush-hush" not in told
    assert postgres_server.password not in told


def test_a_user_without_rights_is_a_setting_to_mend(postgres_server, postgres_place):
    database = database_of(postgres_place)
    postgres_server.execute("CREATE ROLE weak LOGIN PASSWORD 'hush-hush'")
    try:
        url = make_url(postgres_place.url).set(username="weak", password="hush-hush")
        error = opening(url.render_as_string(hide_password=False))
        assert isinstance(error, ConfigError)
        assert "may use and make Urza's tables" in str(error)
    finally:
        postgres_server.execute("DROP OWNED BY weak", database)
        postgres_server.execute("DROP ROLE weak")


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://u:hush-hush@127.0.0.1:1/db",
        "postgresql+asyncpg://u:hush-hush@a-host.invalid/db",
    ],
)
def test_a_server_that_can_not_be_reached_is_one_line(url):
    error = opening(url)
    assert isinstance(error, HubUnavailable)
    assert "database.url" in str(error)
    assert "\n" not in str(error)
    assert "hush-hush" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "url",
    [
        "postgresql+asyncpg://u:hush-hush@host:port/db",
        "postgresql+asyncpg://u:hush-hush@[::1/db",
    ],
)
def test_a_url_that_can_not_be_read_does_not_show_its_password(url):
    error = opening(url)
    assert isinstance(error, ConfigError)
    assert str(error).startswith("database.url: got postgresql+asyncpg://u:***@")
    assert "hush-hush" not in "".join(traceback.format_exception(error))


SECRET = "hush-hush"


def with_query(url, query):
    """That address with the password in its query, and `query` too."""
    parsed = make_url(url)
    bare = parsed.set(password=None).render_as_string(hide_password=False)
    return f"{bare}?{query}"


@pytest.mark.parametrize(
    ("query", "told"),
    [
        ("sslmode=require", "sslmode is none"),
        ("hush-hush=1", "options"),
        ("statement_cache_size=hush-hush", "options"),
        ("prepared_statement_cache_size=hush-hush", "a database URL"),
        ("ssl=hush-hush", "options"),
        ("port=99999", "a port up to 65535"),
    ],
)
def test_an_option_that_the_driver_refuses_is_a_setting_to_mend(postgres_server, query, told):
    error = opening(f"{postgres_server.url}?{query}")
    assert isinstance(error, ConfigError)
    assert error.field == "database.url"
    assert told in error.allowed
    assert postgres_server.password not in str(error)
    assert "hush-hush=" not in str(error).partition("allowed")[0]
    assert error.came.endswith("?***")
    assert f"={SECRET}" not in "".join(traceback.format_exception(error))


def test_a_port_that_is_none_is_a_setting_to_mend():
    error = opening("postgresql+asyncpg://u:hush-hush@127.0.0.1:99999/db")
    assert isinstance(error, ConfigError)
    assert str(error).startswith("database.url: got postgresql+asyncpg://u:***@127.0.0.1:99999/db")


@pytest.mark.parametrize("name", ["password", "pass%77ord"])
def test_a_password_in_the_query_is_shown_nowhere(postgres_server, postgres_url, tmp_path, name):
    query = f"{name}={postgres_server.password}"
    place = Place(with_query(postgres_url, query), tmp_path)

    async def life():
        async with serving(settings(place), role=None) as client:
            assert (await client.get("/readyz")).status_code == 200
            database = database_of(place)
            postgres_server.execute(f"DROP DATABASE {database} WITH (FORCE)")
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert "database.url" in answer.text
            assert "a database that exists" in answer.text
            assert postgres_server.password not in answer.text

    asyncio.run(life())
    error = opening(place.url)
    assert isinstance(error, ConfigError)
    assert postgres_server.password not in "".join(traceback.format_exception(error))
    postgres_server.create_database(database_of(place))


def test_readiness_is_told_in_time_beside_a_frozen_postgres(private_postgres, tmp_path):
    place = Place(private_postgres.create_database("hub"), tmp_path)

    async def life():
        async with serving(settings(place), role=None) as client:
            client.app.state.urza._readiness._limit = 0.5
            assert (await client.get("/readyz")).status_code == 200
            private_postgres.freeze()
            try:
                for _ in range(4):
                    began = time.monotonic()
                    answer = await client.get("/readyz")
                    assert time.monotonic() - began < 5
                    assert answer.status_code == 503
                    assert "database.url: no answer within 0.5 s" in answer.text
                # However often it is asked, one question waits.
                assert client.app.state.urza.database.statistics().in_use <= 2
            finally:
                private_postgres.thaw()
            for _ in range(100):
                if (await client.get("/readyz")).status_code == 200:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("it did not come back")

    asyncio.run(life())


def test_a_check_that_breaks_off_unforeseen_is_a_thing_that_is_not_ready():
    async def broken():
        raise RuntimeError("with a hush-hush in it")

    async def life():
        readiness = Readiness({"redis.url": broken})
        assert await readiness.problems() == {"redis.url": "the check broke off with RuntimeError"}

    asyncio.run(life())


def test_values_that_the_database_has_no_room_for_are_bad_input(place):
    async def life():
        async with opened(place) as hub:
            large = TrainingSession(name="s", epochs=2**70, epoch=2**70, num_layers=1, num_slots=1)
            with pytest.raises(BadInput):
                await hub.register_session(large)
            if place.is_postgres:
                with pytest.raises(BadInput, match="NUL"):
                    await hub.list_blueprints(BlueprintFilter(name="a\0b"))
            assert await hub.health()

    asyncio.run(life())
