"""Where checkpoints lie: each place in turn, over servers that are shared."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from esper.configs import StorageConfig
from esper.utils.s3_client import OptimizedS3Client
from tests.unit.esper.services.tolaria.places import BUCKET, Bucket, Folder, Hub, Place, served
from tests.unit.esper.services.urza.hubs import Place as HubPlace
from tests.unit.esper.services.urza.serving import settings


@pytest.fixture(scope="session")
def connections(s3_server: Any) -> Iterator[tuple[OptimizedS3Client, Any]]:
    s3_server.create_bucket(BUCKET)
    store = OptimizedS3Client(
        StorageConfig(
            bucket=BUCKET,
            endpoint_url=s3_server.url,
            region=s3_server.region,
            access_key_id=s3_server.access_key_id,
            secret_access_key=s3_server.secret_access_key,
        )
    )
    yield store, s3_server.client()
    asyncio.run(store.close())


@pytest.fixture(scope="session")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """The address of a hub and the folder of its objects."""
    folder = tmp_path_factory.mktemp("hub")
    place = HubPlace(f"sqlite+aiosqlite:///{folder}/urza.sqlite", folder)
    with served(settings(place)) as url:
        yield url, place.artifacts


@pytest.fixture(params=["folder", "s3", "hub"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "folder":
        return Folder(tmp_path)
    if request.param == "hub":
        return Hub(*request.getfixturevalue("hub"))
    return Bucket(tmp_path, *request.getfixturevalue("connections"))
