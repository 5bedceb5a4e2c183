"""The hub in this process, through its port."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.contracts.blueprints import builtin
from esper.errors import HubUnavailable
from esper.services.urza.client import UrzaClient, in_process_urza
from esper.services.urza.database import DatabaseConfig


def settings(folder: Path) -> DatabaseConfig:
    return DatabaseConfig(url=f"sqlite+aiosqlite:///{folder}/urza.sqlite")


def test_the_hub_in_this_process_keeps_what_it_was_given(tmp_path):
    document = builtin("noop", {})

    async def put(client: UrzaClient) -> str:
        assert await client.health()
        return (await client.put_blueprint(document)).digest

    async def life() -> None:
        async with in_process_urza(settings(tmp_path / "hub"), tmp_path / "artifacts") as client:
            digest = await put(client)
        async with in_process_urza(settings(tmp_path / "hub"), tmp_path / "artifacts") as client:
            assert (await client.blueprint(digest)).document == document

    asyncio.run(life())


def test_a_hub_that_does_not_open_says_so(tmp_path):
    (tmp_path / "urza.sqlite").mkdir()

    async def life() -> None:
        async with in_process_urza(settings(tmp_path), tmp_path / "artifacts"):
            raise AssertionError("it opened")

    with pytest.raises(HubUnavailable, match="unable to open"):
        asyncio.run(life())


@pytest.mark.parametrize("module", ["esper.services.urza.client", "esper.contracts.assets"])
def test_whoever_speaks_to_a_hub_needs_neither_database_nor_torch(module):
    program = (
        "import sys\n"
        "for name in ('sqlalchemy', 'aiosqlite', 'torch', 'redis'): sys.modules[name] = None\n"
        f"import {module}\n"
    )

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )

    assert done.returncode == 0, done.stderr
