"""Every test of the hub's store runs over both databases, on tables that were made once."""

import asyncio
import shutil
import uuid

import pytest

from tests.unit.esper.services.urza.hubs import Place, opened


def make_tables(place):
    async def life() -> None:
        async with opened(place):
            pass

    asyncio.run(life())


@pytest.fixture(scope="session")
def sqlite_tables(tmp_path_factory):
    """A SQLite file with the hub's tables and nothing in them."""
    folder = tmp_path_factory.mktemp("tables")
    make_tables(Place(f"sqlite+aiosqlite:///{folder}/urza.sqlite", folder))
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="session")
def postgres_tables(postgres_server, tmp_path_factory):
    """The name of a database with the hub's tables and nothing in them."""
    name = "tables"
    make_tables(Place(postgres_server.create_database(name), tmp_path_factory.mktemp("tables")))
    return name


@pytest.fixture
def sqlite_place(sqlite_tables, tmp_path):
    """A hub's place in a SQLite file."""
    shutil.copy(sqlite_tables, tmp_path / "urza.sqlite")
    return Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)


@pytest.fixture
def postgres_place(postgres_server, postgres_tables, tmp_path):
    """A hub's place in a database of a real Postgres; dropped afterwards."""
    name = f"hub_{uuid.uuid4().hex[:12]}"
    yield Place(postgres_server.create_database(name, template=postgres_tables), tmp_path)
    postgres_server.drop_database(name)


@pytest.fixture(params=["sqlite", "postgres"])
def place(request):
    """A hub's place, over either database."""
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture(params=["sqlite", "postgres"])
def bare_place(request, tmp_path):
    """A place whose database has no tables yet."""
    if request.param == "sqlite":
        return Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)
    return Place(request.getfixturevalue("postgres_url"), tmp_path)
