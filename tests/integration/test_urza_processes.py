"""Urza as real processes over one Postgres: one row each, bounded pools, secrets kept."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from esper.configs import HubConfig
from esper.contracts.blueprints import builtin
from esper.errors import HubUnavailable, Unauthorized
from esper.services.urza.auth import Role
from esper.services.urza.http_client import HttpUrza
from tests.unit.esper.services.urza.serving import KEY, bearer, token

SERVE = """
import asyncio, logging, signal, sys
from esper.configs import EsperConfig
from esper.errors import EsperError
from esper.services.urza.main import serve
logging.basicConfig(level=logging.DEBUG)

async def main():
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await serve(EsperConfig.load(), stop=stop, started=lambda url: print(url, flush=True))

try:
    asyncio.run(main())
except EsperError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""
CLIENTS = 32
POOL = 3


def environment(folder: Path, database: str, **settings: str) -> dict[str, str]:
    return {
        **os.environ,
        "ESPER_DATABASE__URL": database,
        "ESPER_DATABASE__POOL_SIZE": str(POOL),
        "ESPER_STORAGE__FOLDER": str(folder / "artifacts"),
        "ESPER_URZA__SIGNING_KEY": KEY,
        "ESPER_URZA__PORT": "0",
        "ESPER_URZA__UPKEEP_SECONDS": "0.1",
        **settings,
    }


@contextmanager
def hub(folder: Path, database: str, log: list[str], **settings: str) -> Iterator[str]:
    """A hub's process; what it logged is in `log` afterwards. It ends by SIGTERM, with status 0."""
    folder.mkdir(exist_ok=True)
    errors = folder / f"log-{len(log)}-{os.urandom(4).hex()}"
    with (
        errors.open("w") as written,
        subprocess.Popen(
            [sys.executable, "-c", SERVE],
            stdout=subprocess.PIPE,
            stderr=written,
            env=environment(folder, database, **settings),
            text=True,
        ) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address, errors.read_text()
            yield address
        finally:
            process.terminate()
            status = process.wait(30)
            log.append(errors.read_text())
    assert status == 0, log[-1]


def client(url: str, role: Role = Role.ADMIN, **fields: Any) -> HttpUrza:
    return HttpUrza(HubConfig.model_validate({"url": url, "token": token(role), **fields}))


def test_clients_of_two_hubs_leave_one_row(postgres_server, postgres_url, tmp_path):
    document = builtin("low-rank", {"rank": 2})
    log: list[str] = []

    async def one(url: str) -> tuple[int, str]:
        async with httpx.AsyncClient(headers=bearer(), timeout=300) as session:
            made = await session.post(f"{url}/api/v1/blueprints/", json=document.to_wire())
            return made.status_code, made.json()["id"]

    async def life(urls: list[str]) -> None:
        came = await asyncio.gather(*(one(urls[number % 2]) for number in range(CLIENTS)))
        assert sorted(status for status, _ in came) == [200] * (CLIENTS - 1) + [201]
        assert len({made for _, made in came}) == 1
        async with client(urls[0]) as first, client(urls[1]) as second:
            assert len(await first.blueprints()) == 1
            assert await first.blueprints() == await second.blueprints()
        database = postgres_url.rpartition("/")[2]
        counted = f"SELECT count(*) FROM pg_stat_activity WHERE datname = '{database}'"
        assert int(postgres_server.execute(counted)) <= 2 * POOL

    with hub(tmp_path, postgres_url, log) as first, hub(tmp_path, postgres_url, log) as second:
        asyncio.run(life([first, second]))
    password = postgres_server.password
    for text in log:
        assert text
        assert KEY not in text
        assert password not in text
        assert token().split(".")[2] not in text


def test_a_killed_connection_is_replaced(postgres_server, postgres_url, tmp_path):
    database = postgres_url.rpartition("/")[2]
    kill = (
        "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
        f"WHERE datname = '{database}'"
    )

    async def life(url: str) -> None:
        async with client(url, backoff_seconds=0.05) as session:
            first = await session.put_blueprint(builtin("noop", {}))
            for _ in range(3):
                assert int(postgres_server.execute(kill)) > 0
                assert await session.blueprints() == (first,)

    with hub(tmp_path, postgres_url, []) as url:
        asyncio.run(life(url))


def test_a_hub_outlives_its_database(private_postgres, tmp_path):
    url = private_postgres.create_database("hub")

    async def life(address: str) -> None:
        async with client(address, attempts=1) as session:
            await session.put_blueprint(builtin("noop", {}))
            assert await session.health()
            private_postgres.kill()
            with pytest.raises(HubUnavailable):
                await session.blueprints()
            async with httpx.AsyncClient() as plain:
                assert (await plain.get(f"{address}/healthz")).status_code == 200
                ready = await plain.get(f"{address}/readyz")
                assert ready.status_code == 503
                assert "database.url" in ready.json()["detail"]
                assert private_postgres.password not in ready.text
            private_postgres.start()
            for _ in range(200):
                if await session.health():
                    break
                await asyncio.sleep(0.05)
            assert len(await session.blueprints()) == 1

    with hub(tmp_path, url, []) as address:
        asyncio.run(life(address))


def test_a_hub_waits_for_a_database_that_comes_later(private_postgres, tmp_path):
    url = private_postgres.create_database("hub")
    private_postgres.stop()
    with hub(tmp_path, url, []) as address:
        refused = httpx.get(f"{address}/api/v1/blueprints/", headers=bearer())
        assert refused.status_code == 503
        assert refused.headers["Retry-After"] == "1"
        assert httpx.get(f"{address}/readyz").status_code == 503
        private_postgres.start()
        for _ in range(200):
            ready = httpx.get(f"{address}/readyz", timeout=120)
            if ready.status_code == 200:
                break
        assert ready.status_code == 200, ready.text
        found = httpx.get(f"{address}/api/v1/blueprints/", headers=bearer())
        assert found.status_code == 200


@pytest.mark.parametrize(
    ("setting", "value", "named"),
    [
        ("ESPER_URZA__SIGNING_KEY", "", "urza.signing_key"),
        ("ESPER_URZA__HOST", "203.0.113.7", "urza.host"),
        (
            "ESPER_DATABASE__URL",
            "postgresql+asyncpg://esper:not-it@{host}/postgres",
            "database.url",
        ),
    ],
)
def test_bad_settings_end_the_process_with_one_line(
    postgres_server, tmp_path, setting, value, named
):
    shown = value.format(host=f"127.0.0.1:{postgres_server.port}")
    sqlite = f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite"
    done = subprocess.run(
        [sys.executable, "-c", SERVE],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(tmp_path, sqlite) | {setting: shown},
    )
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ConfigError: ")
    assert named in last
    assert "not-it" not in done.stderr
    assert KEY not in done.stderr


def test_a_wrong_token_names_its_setting(tmp_path):
    sqlite = f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite"

    async def life(url: str) -> None:
        wrong = HubConfig.model_validate({"url": url, "token": "not-a-token"})
        async with HttpUrza(wrong) as session:
            with pytest.raises(Unauthorized, match=r"hub\.token") as caught:
                await session.blueprints()
            assert "not-a-token" not in str(caught.value)
        async with client(url, Role.READER) as session:
            with pytest.raises(Unauthorized, match=r"hub\.token.*reader"):
                await session.put_blueprint(builtin("noop", {}))

    with hub(tmp_path, sqlite, []) as url:
        asyncio.run(life(url))
