"""Artifacts to and from S3: `OptimizedS3Client` beside boto3 that verifies SHA-256 as well.

Both sides know the digest in the end: boto3, with its defaults, is given each artifact's SHA-256
for the service to check, and digests what it reads. Like is compared with like: calls of a thread
with calls of a thread; what a coroutine awaits with boto3 in `asyncio.to_thread`.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import os
import tempfile
from collections.abc import AsyncIterator, Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.execution_timing import Call, Timings, joined
from benchmarks.services_timing import Bars, Figures, bars_of, in_processes, rounds_of, speed
from esper.configs import StorageConfig
from esper.utils.s3_client import OptimizedS3Client
from esper.utils.transfers import CHUNK_BYTES
from tools.servers.s3 import S3Server

BUCKET = "artifacts"
LIMIT = 0.95
WHOLE = {"64KiB": 2**16, "1MiB": 2**20, "16MiB": 2**24}
AWAITED = {"1MiB": 2**20}
STREAMED = {"16MiB": 2**24}
SECONDS, QUICK_SECONDS = 8.0, 2.0
"""About so long each comparison takes in each process."""


def measure(quick: bool) -> tuple[Figures, Bars]:
    """Figures and bars of whole and of streamed artifacts, there and back."""
    parts = in_processes(_measured, quick, QUICK_SECONDS if quick else SECONDS)
    figures = {
        name: speed(timings, "esper", "boto3", "boto3Again", LIMIT)
        for name, timings in joined(parts).items()
    }
    return figures, bars_of(figures, "5.3.store-")


def _measured(process: int, seconds: float) -> dict[str, Timings]:
    with tempfile.TemporaryDirectory() as folder, S3Server(Path(folder)) as server:
        server.create_bucket(BUCKET)
        config = StorageConfig(
            bucket=BUCKET,
            endpoint_url=server.url,
            region=server.region,
            access_key_id=server.access_key_id,
            secret_access_key=server.secret_access_key,
        )
        store, client = OptimizedS3Client(config), server.client()
        with asyncio.Runner() as runner:
            comparing = _Comparing(runner, store, client)
            timings = {}
            for name, size in WHOLE.items():
                data = os.urandom(size)
                timings[f"put-{name}"] = comparing.putting(data, seconds, process)
                timings[f"get-{name}"] = comparing.getting(data, seconds, process)
            for name, size in AWAITED.items():
                data = os.urandom(size)
                timings[f"put-awaited-{name}"] = comparing.putting_awaited(data, seconds, process)
                timings[f"get-awaited-{name}"] = comparing.getting_awaited(data, seconds, process)
            for name, size in STREAMED.items():
                data = os.urandom(size)
                timings[f"put-streamed-{name}"] = comparing.streaming_up(data, seconds, process)
                timings[f"get-streamed-{name}"] = comparing.streaming_down(data, seconds, process)
            runner.run(store.close())
        client.close()
    return timings


class _Comparing:
    """One server, and the two ways to it."""

    def __init__(self, runner: asyncio.Runner, store: OptimizedS3Client, client: Any) -> None:
        # Not `runner.run`: Python 3.11's formats the result, all bytes of it, on its way out.
        self._run = runner.get_loop().run_until_complete
        self._store = store
        self._client = client
        self._numbers = count()

    def putting(self, data: bytes, seconds: float, process: int) -> Timings:
        def esper(key: str) -> None:
            assert self._store.upload(key, data)

        return self._writing(esper, partial(self._boto3_puts, data), seconds, process)

    def putting_awaited(self, data: bytes, seconds: float, process: int) -> Timings:
        def esper(key: str) -> None:
            assert self._run(self._store.put(key, data))

        def boto3(key: str) -> None:
            self._run(asyncio.to_thread(self._boto3_puts, data, key))

        return self._writing(esper, boto3, seconds, process)

    def streaming_up(self, data: bytes, seconds: float, process: int) -> Timings:
        expected = hashlib.sha256(data).hexdigest()

        def esper(key: str) -> None:
            stream = _pieces(data)
            stored = self._store.put_stream(key, stream, sha256=expected, max_bytes=len(data))
            assert self._run(stored)

        def uploaded(key: str) -> None:
            digest = hashlib.sha256()
            for piece in _cut(data):
                digest.update(piece)
            assert digest.hexdigest() == expected
            self._client.upload_fileobj(io.BytesIO(data), BUCKET, key)

        def boto3(key: str) -> None:
            self._run(asyncio.to_thread(uploaded, key))

        return self._writing(esper, boto3, seconds, process)

    def getting(self, data: bytes, seconds: float, process: int) -> Timings:
        key, expected = self._kept(data)

        def esper() -> None:
            assert self._store.download(key, expected) is not None

        return _compared(esper, partial(self._boto3_gets, key, expected), seconds, process)

    def getting_awaited(self, data: bytes, seconds: float, process: int) -> Timings:
        key, expected = self._kept(data)

        def esper() -> None:
            assert self._run(self._store.get(key, sha256=expected)) is not None

        def boto3() -> None:
            self._run(asyncio.to_thread(self._boto3_gets, key, expected))

        return _compared(esper, boto3, seconds, process)

    def streaming_down(self, data: bytes, seconds: float, process: int) -> Timings:
        key, expected = self._kept(data)

        async def read() -> None:
            chunks = await self._store.open_read(key, sha256=expected)
            assert chunks is not None
            assert sum([len(chunk) async for chunk in chunks]) == len(data)

        def downloaded() -> None:
            digest = hashlib.sha256()
            body = self._client.get_object(Bucket=BUCKET, Key=key)["Body"]
            for chunk in body.iter_chunks(CHUNK_BYTES):
                digest.update(chunk)
            assert digest.hexdigest() == expected

        def esper() -> None:
            self._run(read())

        def boto3() -> None:
            self._run(asyncio.to_thread(downloaded))

        return _compared(esper, boto3, seconds, process)

    def _boto3_puts(self, data: bytes, key: str) -> None:
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data, ChecksumSHA256=digest)

    def _boto3_gets(self, key: str, expected: str) -> None:
        came = self._client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        assert hashlib.sha256(came).hexdigest() == expected

    def _writing(
        self,
        esper: Callable[[str], None],
        boto3: Callable[[str], None],
        seconds: float,
        process: int,
    ) -> Timings:
        """Each put has a new key, removed when all are done: an object is only written once."""
        keys: list[str] = []

        def anew(put: Callable[[str], None]) -> None:
            keys.append(f"written-{next(self._numbers)}")
            put(keys[-1])

        timings = _compared(partial(anew, esper), partial(anew, boto3), seconds, process)
        for key in keys:
            self._client.delete_object(Bucket=BUCKET, Key=key)
        return timings

    def _kept(self, data: bytes) -> tuple[str, str]:
        key = f"kept-{next(self._numbers)}"
        self._client.put_object(Bucket=BUCKET, Key=key, Body=data)
        return key, hashlib.sha256(data).hexdigest()


def _compared(esper: Call, boto3: Call, seconds: float, process: int) -> Timings:
    arms = {"esper": esper, "boto3": boto3, "boto3Again": boto3}
    trial = rounds_of(arms, 2, process)
    a_round = sum(trial.microseconds(arm) for arm in arms) / 1e6
    return rounds_of(arms, max(5, round(seconds / a_round)), process)


def _cut(data: bytes, size: int = 2**16) -> list[memoryview]:
    view = memoryview(data)
    return [view[start : start + size] for start in range(0, len(data), size)]


async def _pieces(data: bytes) -> AsyncIterator[bytes]:
    """As an HTTP server gives a body."""
    for piece in _cut(data):
        yield bytes(piece)
