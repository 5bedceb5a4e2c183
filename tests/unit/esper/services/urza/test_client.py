"""The hub in this process, through its port."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.errors import HubUnavailable
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.client import UrzaClient, in_process_urza


def places(folder: Path) -> tuple[DatabaseConfig, StorageConfig]:
    database = DatabaseConfig(url=f"sqlite+aiosqlite:///{folder}/urza.sqlite")
    return database, StorageConfig(folder=str(folder / "artifacts"))


def test_the_hub_in_this_process_keeps_what_it_was_given(tmp_path):
    document = builtin("noop", {})

    async def put(client: UrzaClient) -> str:
        assert await client.health()
        return (await client.put_blueprint(document)).digest

    async def life() -> None:
        async with in_process_urza(*places(tmp_path / "hub")) as client:
            digest = await put(client)
        async with in_process_urza(*places(tmp_path / "hub")) as client:
            assert (await client.blueprint(digest)).document == document

    asyncio.run(life())


def test_a_hub_that_does_not_open_says_so(tmp_path):
    (tmp_path / "urza.sqlite").mkdir()

    async def life() -> None:
        async with in_process_urza(*places(tmp_path)):
            raise AssertionError("it opened")

    with pytest.raises(HubUnavailable, match="unable to open"):
        asyncio.run(life())


@pytest.mark.parametrize(
    "module",
    [
        "esper.services.urza.client",
        "esper.services.urza.http_client",
        "esper.services.oona_client",
        "esper.contracts.operational",
        "esper.contracts.assets",
    ],
)
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


def test_the_hub_in_this_process_keeps_artifacts_in_a_bucket_where_one_is_named(
    tmp_path, s3_server, s3_bucket
):
    database, _ = places(tmp_path)
    storage = StorageConfig(
        bucket=s3_bucket.name,
        endpoint_url=s3_bucket.endpoint_url,
        region=s3_bucket.region,
        access_key_id=s3_bucket.access_key_id,
        secret_access_key=s3_bucket.secret_access_key,
    )
    document = builtin("noop", {})
    layer = LayerGeometry(kind="Linear", inputs=4, outputs=4)
    target = KernelTarget(layer=layer, input_shape=(4,), output_shape=(4,))
    made = compile_kernel(document, target)

    async def life() -> None:
        async with in_process_urza(database, storage) as hub:
            await hub.put_blueprint(document)
            kernel = (await hub.request_kernel(document.digest, target)).kernel
            claim = await hub.claim_next_kernel("forge", 60)
            assert claim is not None
            await hub.complete_kernel(made.metadata, made.data, token=claim.lease)
            assert await hub.artifact(kernel) == made.data

    asyncio.run(life())
    (key,) = s3_server.client().list_objects_v2(Bucket=s3_bucket.name)["Contents"]
    assert key["Size"] == len(made.data)
    assert not (tmp_path / "artifacts").exists()
