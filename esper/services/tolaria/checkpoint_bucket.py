"""Checkpoints in an object store, as in S3, where nothing can be renamed.

Every checkpoint that is written has a name of its own, so that its parts never mix with those of
another one of the same epoch. The parts go first and the manifest last: with it the checkpoint is
there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from esper.errors import ConfigError, ManifestError
from esper.services.tolaria.checkpoint_manifest import (
    MANIFEST,
    CheckpointManifest,
    epoch_of,
    newest_first,
)

ADDRESS_FIELD = "spec.storage.uri"
BLOCK_BYTES = 2**20
ATTEMPTS = "attempts"
"""Below it each attempt that has begun leaves an object, named by its number."""
RESULTS = "results"

_Result = TypeVar("_Result")


class Objects(Protocol):
    """What of `esper.utils.object_store.ObjectStore` is needed, as the hub has it too."""

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` unless the key exists."""

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], *, sha256: str, max_bytes: int
    ) -> bool:
        """Store what `chunks` gives if it has that digest, unless the key exists."""

    async def get(self, key: str) -> bytes | None:
        """The bytes under `key`, None where there are none."""

    async def listed(self, place: str) -> dict[str, int]:
        """The objects below `place` with their sizes in bytes."""

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`."""

    async def check(self) -> None:
        """Return if the store can be used; raise the reason if not."""

    def answers(self) -> int | None:
        """A number that grows as long as the store answers; None where nothing of it is known."""

    async def close(self) -> None:
        """Let go of connections."""


class BucketCheckpoints:
    """A `CheckpointPlace` below a key of an object store.

    Args:
        store: closed with this place.
        uri: the store's address in the session's manifest, for messages.
        below: the key that those of the checkpoints begin with.
    """

    def __init__(self, store: Objects, uri: str, below: str) -> None:
        self.path = f"{uri.rstrip('/')}/{below}"
        self._store = store
        self._uri = uri
        self._below = below

    def listed(self) -> dict[str, dict[str, int]]:
        """Every checkpoint, newest first; see `CheckpointPlace.listed`."""
        found: dict[str, dict[str, int]] = {}
        for key, size in self._waited(self._store.listed(self._below)).items():
            name, _, part = key.removeprefix(f"{self._below}/").partition("/")
            if epoch_of(name) is not None and part:
                found.setdefault(name, {})[part] = size
        return {name: found[name] for name in newest_first(found)}

    def part(self, name: str, part: str) -> bytes | None:
        """The bytes of one part; see `CheckpointPlace.part`."""
        return self._waited(self._store.get(self._key(name, part)))

    def name(self, manifest: CheckpointManifest) -> str:
        """A name that only this one has: its label, when it was written, and a digest."""
        digest = hashlib.sha256(manifest.encoded()).hexdigest()
        return f"{manifest.label}-{manifest.time:%Y%m%dt%H%M%S%f}-{digest[:8]}"

    def write(
        self,
        name: str,
        manifest: CheckpointManifest,
        parts: Mapping[str, bytes],
        *,
        replaced: bool,
    ) -> None:
        """Store a checkpoint; see `CheckpointPlace.write`."""
        del replaced  # names are never used twice
        self._waited(self._write(name, manifest, parts))

    def remove(self, name: str) -> None:
        """Delete a checkpoint; see `CheckpointPlace.remove`."""
        self._waited(self._remove(name))

    def begin(self, attempt: int) -> None:
        """Leave word that an attempt has begun; see `CheckpointPlace.begin`."""
        self._waited(self._store.put(f"{self._below}/{ATTEMPTS}/{attempt:09d}", b"begun\n"))

    def begun(self) -> int:
        """The newest attempt that has begun; see `CheckpointPlace.begun`."""
        found = self._waited(self._store.listed(f"{self._below}/{ATTEMPTS}"))
        numbers = [key.rpartition("/")[2] for key in found]
        return max((int(number) for number in numbers if number.isdecimal()), default=0)

    def keep(self, name: str, data: bytes) -> None:
        """Store a file of a finished run; see `CheckpointPlace.keep`."""
        self._waited(self._keep(f"{self._beside(RESULTS)}/{name}", data))

    def kept(self) -> dict[str, bytes]:
        """The files of a finished run; see `CheckpointPlace.kept`."""
        return self._waited(self._kept(self._beside(RESULTS)))

    def shown(self, name: str) -> str:
        """What the checkpoint's keys begin with, relative to the session's storage."""
        return f"{self._below}/{name}"

    def check(self) -> None:
        """Return if the store answers as the settings say; raise the reason if not."""
        self._waited(self._store.check())

    def answers(self) -> int | None:
        """A number that grows as long as the store answers."""
        return self._store.answers()

    def close(self) -> None:
        """Let go of connections."""
        self._waited(self._store.close())

    async def _write(
        self, name: str, manifest: CheckpointManifest, parts: Mapping[str, bytes]
    ) -> None:
        # Where a put says that there is such an object, an earlier try of it has stored it: its
        # answer was lost.
        for part, data in parts.items():
            await self._store.put_stream(
                self._key(name, part),
                _blocks(data),
                sha256=manifest.parts[part].sha256,
                max_bytes=len(data),
            )
        await self._store.put(self._key(name, MANIFEST), manifest.encoded())

    async def _remove(self, name: str) -> None:
        await self._store.delete(self._key(name, MANIFEST))
        for key in await self._store.listed(f"{self._below}/{name}"):
            await self._store.delete(key)

    async def _keep(self, key: str, data: bytes) -> None:
        await self._store.delete(key)
        digest = hashlib.sha256(data).hexdigest()
        await self._store.put_stream(key, _blocks(data), sha256=digest, max_bytes=len(data))

    async def _kept(self, place: str) -> dict[str, bytes]:
        keys = await self._store.listed(place)
        found = {key.removeprefix(f"{place}/"): await self._store.get(key) for key in keys}
        return {name: data for name, data in found.items() if data is not None}

    def _beside(self, folder: str) -> str:
        parent, _, _ = self._below.rpartition("/")
        return f"{parent}/{folder}" if parent else folder

    def _waited(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """What `work` comes to, on a loop of its own: the caller's may be at work already."""
        with naming(self._uri):
            try:
                asyncio.get_running_loop()
            except RuntimeError:
                return asyncio.run(work)
            with ThreadPoolExecutor(1) as thread:
                return thread.submit(asyncio.run, work).result()

    def _key(self, name: str, part: str) -> str:
        return f"{self._below}/{name}/{part}"


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """An error about the bucket names the manifest's field, since that is where it stands."""
    try:
        yield
    except ConfigError as error:
        if error.field != "storage.bucket":
            raise
        raise ManifestError(ADDRESS_FIELD, uri, error.allowed) from error


async def _blocks(data: bytes) -> AsyncIterator[bytes]:
    view = memoryview(data)
    for start in range(0, len(view), BLOCK_BYTES):
        yield bytes(view[start : start + BLOCK_BYTES])
