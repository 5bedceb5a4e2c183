"""Checkpoints in an object store, as in S3, where nothing can be renamed.

Every checkpoint that is written has a name of its own, so that its parts never mix with those of
another one of the same epoch. The parts go first and the manifest last: with it the checkpoint is
there.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

from esper.errors import ConfigError, ManifestError
from esper.services.tolaria.checkpoint_manifest import MANIFEST, CheckpointManifest, epoch_of
from esper.utils.object_store import ObjectStore

ADDRESS_FIELD = "spec.storage.uri"
BLOCK_BYTES = 2**20

_Result = TypeVar("_Result")


class BucketCheckpoints:
    """A `CheckpointPlace` below a key of an object store.

    Args:
        store: closed with this place.
        uri: the store's address in the session's manifest, for messages.
        below: the key that those of the checkpoints begin with.
    """

    def __init__(self, store: ObjectStore, uri: str, below: str) -> None:
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
        newest_first = sorted(found, key=lambda name: (epoch_of(name), name), reverse=True)
        return {name: found[name] for name in newest_first}

    def part(self, name: str, part: str) -> bytes | None:
        """The bytes of one part; see `CheckpointPlace.part`."""
        return self._waited(self._store.get(self._key(name, part)))

    def name(self, manifest: CheckpointManifest) -> str:
        """A name that only this one has: its epoch, when it was written, and a digest."""
        digest = hashlib.sha256(manifest.encoded()).hexdigest()
        return f"epoch-{manifest.epoch:06d}-{manifest.time:%Y%m%dt%H%M%S%f}-{digest[:8]}"

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
