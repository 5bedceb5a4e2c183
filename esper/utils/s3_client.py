"""The object store over S3: one pool of connections, bounded retries, every byte verified.

Each method of the port runs a method without `async` in a thread of this client's own, so that a
service that hangs holds up nobody else's threads. Those methods can be called from any thread.

An upload carries the SHA-256 of its bytes, which the service checks before it stores them (parts
of a large one carry a CRC-32, and the whole is only put together once its SHA-256 is right). The
checksum stands among the signed headers, so the body itself need not be digested once more for
the signature, as boto3 does without TLS.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, contextmanager, suppress
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

from botocore.exceptions import BotoCoreError, ClientError

from esper.configs import StorageConfig
from esper.errors import BadInput, ConfigError, StoreUnavailable, one_line
from esper.utils.object_store import is_key, require_key
from esper.utils.s3_connection import code_of, connect, crc32, encoded, translated
from esper.utils.s3_reading import ResumingBody, pause
from esper.utils.transfers import Reading, Receipt, gathered, read_ahead, verified

if TYPE_CHECKING:
    from types_boto3_s3 import S3Client

PART_BYTES = 8 * 2**20
"""From this size on a stream is uploaded in parts, so many of which are in memory at once: """
PARTS_IN_FLIGHT = 4

MAX_PRESIGNED_SECONDS = 7 * 24 * 3600
LISTED_AT_ONCE = 1000

_Result = TypeVar("_Result")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class S3Statistics:
    """Counts since the client was made.

    `attempts` are requests that went out, retries among them; `seconds` is the time that calls
    waited for the service, in all threads together.
    """

    calls: int
    attempts: int
    failures: int
    sent_bytes: int
    received_bytes: int
    seconds: float


class OptimizedS3Client:
    """An `ObjectStore` in a bucket.

    Where the answer to a put is lost and the put is tried again, the client is told that the
    object was there already: then `put` says False although its bytes were the first.

    Args:
        config: bucket, prefix, address, credentials, time limits and retries.

    Raises:
        ConfigError: no bucket is named, the settings contradict each other, or no credentials
            are found.
    """

    def __init__(self, config: StorageConfig) -> None:
        if config.bucket is None:
            raise ConfigError("storage.bucket", None, "the name of a bucket")
        self._config = config
        self._bucket = config.bucket
        self._prefix = config.prefix and f"{config.prefix}/"
        self._verifying = config.checksum == "sha256"
        self._client: S3Client = connect(config)
        self._client.meta.events.register("before-send.s3", self._count_attempt)
        self._threads = ThreadPoolExecutor(config.pool_size, thread_name_prefix="esper-s3")
        self._counting = threading.Lock()
        self._closed = False
        self._calls = self._attempts = self._failures = self._sent = self._received = 0
        self._seconds = 0.0

    def __repr__(self) -> str:
        return f"OptimizedS3Client({self._bucket!r}, {self._prefix!r})"

    # The port

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless it exists; see `ObjectStore.put`."""
        return await self._run(self.upload, key, data)

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], *, sha256: str, max_bytes: int
    ) -> bool:
        """Store what `chunks` gives, if it has that digest; see `ObjectStore.put_stream`."""
        require_key(key)
        receipt = Receipt(key, sha256, max_bytes)
        async with aclosing(gathered(chunks, PART_BYTES, receipt)) as blocks:
            first = await anext(blocks, bytearray())
            second = await anext(blocks, None)
            if second is None:
                return await self._run(self._upload_block, key, first, receipt)
            if not await self.exists(key):
                return await self._upload_parts(key, [first, second], blocks, receipt)
            await self._run(receipt.digest, first)
            await self._run(receipt.digest, second)
            async for block in blocks:
                await self._run(receipt.digest, block)
        receipt.close()
        return False

    async def get(self, key: str, *, sha256: str | None = None) -> bytes | None:
        """The bytes under `key`, None where there are none; see `ObjectStore.get`."""
        return await self._run(self.download, key, sha256)

    async def open_read(
        self, key: str, *, sha256: str | None = None
    ) -> AsyncIterator[bytes] | None:
        """The bytes under `key`, None where there are none; see `ObjectStore.open_read`.

        Where the connection breaks, reading goes on over another from where it was.
        """
        body = await self._run(self._open, key)
        return None if body is None else self._chunks(body, key, sha256)

    async def size(self, key: str) -> int | None:
        """How many bytes the object has, None where there is none."""
        return await self._run(self.stat, key)

    async def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        return await self.size(key) is not None

    async def listed(self, place: str) -> dict[str, int]:
        """The objects below `place` with their sizes in bytes; see `ObjectStore.listed`."""
        return await self._run(self.list_below, place)

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`; whether there was one."""
        return await self._run(self.remove, key)

    async def presigned(self, key: str, seconds: int) -> str | None:
        """An address from which anyone can read the object, for 1 to 604800 seconds.

        Raises:
            BadInput: another time.
        """
        require_key(key)
        if not 1 <= seconds <= MAX_PRESIGNED_SECONDS:
            raise BadInput("seconds", seconds, f"1 to {MAX_PRESIGNED_SECONDS}")
        with self._translating(key):
            return self._client.generate_presigned_url(
                "get_object",
                Params={"Bucket": self._bucket, "Key": self._prefix + key},
                ExpiresIn=seconds,
            )

    async def check(self) -> None:
        """Return if the bucket answers a read as the settings say; raise the reason if not."""
        await self.exists("check")

    async def close(self) -> None:
        """Let go of connections and threads; what waits for an answer is not tried again."""
        self._closed = True
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def answers(self) -> int | None:
        """A number that grows with each answer, and with each block of bytes that came or went."""
        found = self.statistics()
        return found.calls - found.failures + found.sent_bytes + found.received_bytes

    def statistics(self) -> S3Statistics:
        """Counts, for metrics."""
        with self._counting:
            return S3Statistics(
                calls=self._calls,
                attempts=self._attempts,
                failures=self._failures,
                sent_bytes=self._sent,
                received_bytes=self._received,
                seconds=self._seconds,
            )

    # The same for callers without an event loop

    def upload(self, key: str, data: bytes) -> bool:
        """As `put`."""
        return self._put(key, data, hashlib.sha256(data).digest() if self._verifying else None)

    def download(self, key: str, sha256: str | None = None) -> bytes | None:
        """As `get`."""
        body = self._open(key)
        if body is None:
            return None
        chunks = []
        try:
            while chunk := body.read(body.num_bytes):  # all of them, unless the connection broke
                chunks.append(chunk)
        finally:
            body.close()
        return verified(key, b"".join(chunks), sha256)

    def stat(self, key: str) -> int | None:
        """As `size`.

        A read of one byte: HEAD has no body in its answer, so that a missing object, a missing
        bucket and wrong credentials look the same.
        """
        try:
            with self._translating(key, "NoSuchKey", "InvalidRange"):
                found = self._get(key, Range="bytes=0-0")
                found["Body"].read()
        except ClientError as error:
            return None if code_of(error) == "NoSuchKey" else 0
        return int(found.get("ContentRange", f"/{found['ContentLength']}").rpartition("/")[2])

    def list_below(self, place: str) -> dict[str, int]:
        """As `listed`."""
        require_key(place)
        found: dict[str, int] = {}
        with self._translating(place):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket,
                Prefix=f"{self._prefix}{place}/",
                PaginationConfig={"PageSize": LISTED_AT_ONCE},
            )
            for page in pages:
                for entry in page.get("Contents", ()):
                    key = entry["Key"].removeprefix(self._prefix)
                    if is_key(key):  # else something that others have put there
                        found[key] = entry["Size"]
        return dict(sorted(found.items()))

    def remove(self, key: str) -> bool:
        """As `delete`."""
        if self.stat(key) is None:
            return False
        with self._translating(key):
            self._client.delete_object(Bucket=self._bucket, Key=self._prefix + key)
        return True

    # One request

    def _put(self, key: str, data: bytes | bytearray, digest: bytes | None) -> bool:
        require_key(key)
        checksum: dict[str, Any] = {} if digest is None else {"ChecksumSHA256": encoded(digest)}

        def once() -> object:
            return self._client.put_object(
                Bucket=self._bucket,
                Key=self._prefix + key,
                Body=cast("bytes", data),  # any buffer will do
                IfNoneMatch="*",
                **checksum,
            )

        stored = self._unless_there(key, once)
        self._count(sent=len(data))
        return stored

    def _unless_there(self, key: str, once: Callable[[], object]) -> bool:
        """Make a conditional request; whether its condition held.

        "Conflict" means that another writer of the key is at work: then ask again.
        """
        for attempt in range(self._config.attempts):
            if attempt:
                pause(attempt)
            try:
                with self._translating(key, "PreconditionFailed", "ConditionalRequestConflict"):
                    once()
                return True
            except ClientError as error:
                if code_of(error) == "PreconditionFailed":
                    return False
        raise StoreUnavailable(f"object {key}: others were writing it at every attempt")

    def _get(self, key: str, **parameters: str) -> Any:
        require_key(key)
        return self._client.get_object(
            Bucket=self._bucket,
            Key=self._prefix + key,
            **parameters,  # type: ignore[arg-type]
        )

    def _open(self, key: str) -> ResumingBody | None:
        try:
            with self._translating(key, "NoSuchKey"):
                found = self._get(key)
        except ClientError:
            return None

        def again(offset: int) -> Any:
            with self._translating(key):
                return self._get(key, Range=f"bytes={offset}-", IfMatch=found["ETag"])["Body"]

        return ResumingBody(
            key,
            found["ContentLength"],
            found["Body"],
            again,
            attempts=self._config.attempts,
            received=lambda num_bytes: self._count(received=num_bytes),
        )

    async def _chunks(
        self, body: ResumingBody, key: str, sha256: str | None
    ) -> AsyncIterator[bytes]:
        reading = Reading(key, body.read, sha256)
        async with aclosing(read_ahead(self._submit, reading.next_chunk, body.close)) as chunks:
            async for chunk in chunks:
                yield chunk

    def _upload_block(self, key: str, block: bytearray, receipt: Receipt) -> bool:
        receipt.digest(block)
        receipt.close()
        return self._put(key, block, receipt.expected if self._verifying else None)

    # In parts

    async def _upload_parts(
        self, key: str, begun: list[bytearray], rest: AsyncIterator[bytearray], receipt: Receipt
    ) -> bool:
        upload = await self._begun(key)
        sending: deque[Future[Any]] = deque()
        parts: list[Any] = []

        async def send(block: bytearray) -> None:
            await self._run(receipt.digest, block)
            if len(sending) == PARTS_IN_FLIGHT:
                parts.append(await asyncio.wrap_future(sending.popleft()))
            number = len(parts) + len(sending) + 1
            sending.append(self._submit(self._send_part, key, upload, number, block))

        try:
            for block in begun:
                await send(block)
            begun.clear()
            async for block in rest:
                await send(block)
            receipt.close()
            while sending:
                parts.append(await asyncio.wrap_future(sending.popleft()))
            stored = await self._run(self._complete, key, upload, parts)
        except BaseException as error:
            given_up = self._submit(self._give_up, key, upload, sending)
            if not isinstance(error, asyncio.CancelledError):
                await asyncio.wrap_future(given_up)
            raise
        if not stored:
            await self._run(self._give_up, key, upload, sending)
        return stored

    async def _begun(self, key: str) -> str:
        """A new upload. Where whoever wants it is cancelled meanwhile, it is given up again."""
        beginning = self._submit(self._begin, key)

        def give_up(begun: Future[str]) -> None:
            if begun.cancelled() or begun.exception() is not None:
                return  # it never began
            with suppress(StoreUnavailable, RuntimeError):  # the store is closed
                self._submit(self._give_up, key, begun.result(), deque())

        try:
            return await asyncio.wrap_future(beginning)
        except asyncio.CancelledError:
            beginning.add_done_callback(give_up)
            raise

    def _begin(self, key: str) -> str:
        checksum: dict[str, Any] = {"ChecksumAlgorithm": "CRC32"} if self._verifying else {}
        with self._translating(key):
            return self._client.create_multipart_upload(
                Bucket=self._bucket, Key=self._prefix + key, **checksum
            )["UploadId"]

    def _send_part(self, key: str, upload: str, number: int, block: bytearray) -> Any:
        checksum: dict[str, Any] = {"ChecksumCRC32": crc32(block)} if self._verifying else {}
        with self._translating(key):
            sent = self._client.upload_part(
                Bucket=self._bucket,
                Key=self._prefix + key,
                UploadId=upload,
                PartNumber=number,
                Body=cast("bytes", block),
                **checksum,
            )
        self._count(sent=len(block))
        return {"PartNumber": number, "ETag": sent["ETag"], **checksum}

    def _complete(self, key: str, upload: str, parts: list[Any]) -> bool:
        def once() -> object:
            return self._client.complete_multipart_upload(
                Bucket=self._bucket,
                Key=self._prefix + key,
                UploadId=upload,
                MultipartUpload={"Parts": parts},
                IfNoneMatch="*",
            )

        return self._unless_there(key, once)

    def _give_up(self, key: str, upload: str, sending: deque[Future[Any]]) -> None:
        """Remove an upload's parts once none is on its way; they were never to be read."""
        for part in sending:
            part.exception()
        try:
            self._client.abort_multipart_upload(
                Bucket=self._bucket, Key=self._prefix + key, UploadId=upload
            )
        except (ClientError, BotoCoreError) as error:
            _log.warning(
                "parts of an upload are left in the bucket",
                extra={"key": key, "upload": upload, "error": one_line(str(error))},
            )

    # Threads, counts and errors

    def _submit(self, function: Callable[..., _Result], *arguments: object) -> Future[_Result]:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        # The context goes along, so that what is logged there carries the trace id.
        return self._threads.submit(copy_context().run, function, *arguments)

    async def _run(self, function: Callable[..., _Result], *arguments: object) -> _Result:
        return await asyncio.wrap_future(self._submit(function, *arguments))

    @contextmanager
    def _translating(self, key: str, *expected: str) -> Iterator[None]:
        """One call: counted, and its errors made Esper's, but for those of the codes expected."""
        began = time.perf_counter()
        failed = True
        try:
            yield
            failed = False
        except ClientError as error:
            if code_of(error) in expected:
                failed = False
                raise
            raise translated(error, key, self._config) from error
        except BotoCoreError as error:
            raise translated(error, key, self._config) from error
        finally:
            self._count(calls=1, failures=failed, seconds=time.perf_counter() - began)

    def _count_attempt(self, **_: object) -> None:
        if self._closed:
            raise StoreUnavailable("the store is closed")
        with self._counting:
            self._attempts += 1

    def _count(
        self,
        *,
        calls: int = 0,
        failures: int = 0,
        sent: int = 0,
        received: int = 0,
        seconds: float = 0.0,
    ) -> None:
        with self._counting:
            self._calls += calls
            self._failures += failures
            self._sent += sent
            self._received += received
            self._seconds += seconds
