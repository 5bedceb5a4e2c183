"""Places where checkpoints lie, for tests that hold in all of them."""

from __future__ import annotations

import asyncio
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from esper.configs import EsperConfig, HubConfig, StorageConfig
from esper.services.tolaria.checkpoint_bucket import BucketCheckpoints
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints
from esper.services.urza.auth import Role
from esper.services.urza.http_objects import HubObjects
from esper.utils.s3_client import OptimizedS3Client
from tests.unit.esper.services.tolaria.checkpointing import OWNER
from tests.unit.esper.services.urza.serving import listening, token

BUCKET = f"checkpoints-{uuid.uuid4().hex[:12]}"


class Place:
    """Where checkpoints lie, and what lies behind it for a look that does not go through it."""

    def open(self, keep: int = 5, owner: Owner = OWNER) -> Checkpoints:
        """The checkpoints as a new process has them."""
        raise NotImplementedError

    def files(self) -> dict[str, bytes]:
        """All that lies there, by NAME/PART."""
        raise NotImplementedError

    def put(self, file: str, data: bytes | None) -> None:
        """Change a file; None removes it."""
        raise NotImplementedError

    def beside(self, folder: str) -> dict[str, bytes]:
        """The files of a folder beside that of the checkpoints, by name."""
        raise NotImplementedError

    def names(self) -> list[str]:
        return sorted({file.partition("/")[0] for file in self.files()})

    def file_of(self, epoch: int, part: str) -> str:
        """The file of the checkpoint of that epoch."""
        (found,) = [
            file
            for file in self.files()
            if file.startswith(f"epoch-{epoch:06d}") and file.endswith(f"/{part}")
        ]
        return found

    def change(self, epoch: int, part: str, change: Callable[[bytes], bytes | None]) -> str:
        file = self.file_of(epoch, part)
        self.put(file, change(self.files()[file]))
        return file.partition("/")[0]


class Folder(Place):
    def __init__(self, folder: Path) -> None:
        self.run = folder
        self.folder = folder / "checkpoints"

    def open(self, keep: int = 5, owner: Owner = OWNER) -> Checkpoints:
        return open_checkpoints(self.run, owner, keep, uri=None, storage=StorageConfig())

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def put(self, file: str, data: bytes | None) -> None:
        if data is None:
            (self.folder / file).unlink()
        else:
            (self.folder / file).write_bytes(data)

    def beside(self, folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder.parent / folder).iterdir()}


class Bucket(Place):
    """A place of its own in the bucket of all these tests, over their one connection."""

    def __init__(self, folder: Path, store: OptimizedS3Client, client: Any) -> None:
        self.run = folder
        self.uri = f"s3://{BUCKET}"
        self.store = store
        self.client = client
        self.above = uuid.uuid4().hex
        self.below = f"{self.above}/checkpoints/"

    def open(self, keep: int = 5, owner: Owner = OWNER) -> Checkpoints:
        below = self.below.rstrip("/")
        return Checkpoints(
            BucketCheckpoints(self.store, self.uri, below), owner, keep, portable=True
        )

    def files(self) -> dict[str, bytes]:
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=self.below).get("Contents", [])
        keys = [entry["Key"] for entry in found]
        read = {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(self.below): data for key, data in read.items()}

    def put(self, file: str, data: bytes | None) -> None:
        place = {"Bucket": BUCKET, "Key": self.below + file}
        if data is None:
            self.client.delete_object(**place)
        else:
            self.client.put_object(Body=data, **place)

    def beside(self, folder: str) -> dict[str, bytes]:
        place = f"{self.above}/{folder}/"
        found = self.client.list_objects_v2(Bucket=BUCKET, Prefix=place).get("Contents", [])
        keys = [entry["Key"] for entry in found]
        read = {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
        return {key.removeprefix(place): data for key, data in read.items()}


class Hub(Place):
    """What a session of its own keeps at a hub that is served, with the session's own token."""

    def __init__(self, url: str, artifacts: Path) -> None:
        self.uid = uuid.uuid4().hex
        own = SecretStr(token(Role.SESSION, self.uid, namespace="default"))
        self.config = HubConfig(url=url, token=own, backoff_seconds=0.01)
        self.folder = artifacts / "sessions" / self.uid / "checkpoints"

    def open(self, keep: int = 5, owner: Owner = OWNER) -> Checkpoints:
        place = BucketCheckpoints(HubObjects(self.config, self.uid), "hub", "checkpoints")
        return Checkpoints(place, owner, keep, portable=True)

    def files(self) -> dict[str, bytes]:
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in paths}

    def put(self, file: str, data: bytes | None) -> None:
        if data is None:
            (self.folder / file).unlink()
        else:
            (self.folder / file).write_bytes(data)

    def beside(self, folder: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.folder.parent / folder).iterdir()}


@contextmanager
def served(config: EsperConfig) -> Iterator[str]:
    """A hub that is served by a thread of its own; gives its address."""
    loop, stop = asyncio.new_event_loop(), asyncio.Event()
    address: list[str] = []
    there = threading.Event()

    async def life() -> None:
        async with listening(config) as url:
            address.append(url)
            there.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: loop.run_until_complete(life()), daemon=True)
    thread.start()
    assert there.wait(30)
    try:
        yield address[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(30)
        loop.close()
