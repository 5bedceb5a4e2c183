"""Every test of the hub's store runs over both databases."""

import pytest

from tests.unit.esper.services.urza.hubs import Place


@pytest.fixture(params=["sqlite", "postgres"])
def place(request, tmp_path):
    """A hub's place with an empty database: a SQLite file, or a database of a real Postgres."""
    if request.param == "sqlite":
        return Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)
    return Place(request.getfixturevalue("postgres_url"), tmp_path)
