"""What every object store does with bytes on their way: count, digest, refuse."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterable, Callable
from concurrent.futures import Future

from esper.errors import BadInput, KernelError

CHUNK_BYTES = 2**20
"""How many bytes are read at a time, at most."""

CHUNKS_AHEAD = 4
"""How many chunks are held for a reader at most."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Receipt:
    """Counts and digests what is being put, and refuses what was not announced.

    `expected` is the digest that was announced.

    Raises:
        BadInput: `sha256` is no digest.
    """

    def __init__(self, key: str, sha256: str, max_bytes: int) -> None:
        if not _SHA256.fullmatch(sha256):
            raise BadInput("sha256", sha256, "64 lower-case hexadecimal digits")
        self._key = key
        self.expected = bytes.fromhex(sha256)
        self._max_bytes = max_bytes
        self._hash = hashlib.sha256()
        self.num_bytes = 0

    def count(self, num_bytes: int) -> None:
        """Take note that so many bytes more came, before they are kept anywhere.

        Raises:
            BadInput: they are too many.
        """
        self.num_bytes += num_bytes
        if self.num_bytes > self._max_bytes:
            raise BadInput(
                f"object {self._key}",
                f"more than {self._max_bytes} bytes",
                f"at most {self._max_bytes} bytes",
            )

    def digest(self, block: bytearray) -> None:
        """Take in bytes that were counted."""
        self._hash.update(block)

    def close(self) -> None:
        """Compare the digests, at the end.

        Raises:
            BadInput: they differ.
        """
        if self._hash.digest() != self.expected:
            raise BadInput(
                f"SHA-256 of object {self._key}", self._hash.hexdigest(), self.expected.hex()
            )


class Reading:
    """What `read` gives, chunk by chunk; the last one is held back until all of it is verified.

    Args:
        key: whose bytes they are, for the error.
        read: gives at most so many bytes, none at the end.
        sha256: the digest that all of it must have; None verifies nothing.
    """

    def __init__(self, key: str, read: Callable[[int], bytes], sha256: str | None) -> None:
        self._key = key
        self._read = read
        self._expected = sha256
        self._hash = hashlib.sha256()
        self._held = b""

    def next_chunk(self) -> bytes:
        """The next chunk, empty at the end.

        Raises:
            KernelError: they have another digest.
        """
        if self._expected is None:
            return self._read(CHUNK_BYTES)
        while True:
            chunk = self._read(CHUNK_BYTES)
            self._hash.update(chunk)
            held, self._held = self._held, chunk
            if not chunk:
                _compare(self._key, self._hash.hexdigest(), self._expected)
            if held or not chunk:
                return held


async def read_ahead(
    submit: Callable[[Callable[[], None]], Future[None]],
    next_chunk: Callable[[], bytes],
    close: Callable[[], None],
) -> AsyncGenerator[bytes]:
    """What `next_chunk` gives until it gives nothing, read by a thread ahead of the caller.

    `submit` has a thread do something; `close` is called at the end, once nothing is read any
    more. A few chunks are read at a time: if each were handed from the thread to the event loop
    and asked for anew, the connection would be idle meanwhile.
    """
    loop = asyncio.get_running_loop()
    ready: deque[bytes] = deque()
    news = asyncio.Event()

    def fill() -> None:
        while len(ready) < CHUNKS_AHEAD:
            chunk = next_chunk()
            ready.append(chunk)
            loop.call_soon_threadsafe(news.set)
            if not chunk:
                return

    def filling_anew() -> Future[None]:
        begun = submit(fill)
        # Only once it counts as done: whoever wakes up looks at that.
        begun.add_done_callback(lambda _: loop.call_soon_threadsafe(news.set))
        return begun

    filling = filling_anew()
    try:
        while True:
            while not ready:
                if filling.done():
                    filling.result()
                    filling = filling_anew()
                news.clear()
                if not ready and not filling.done():
                    await news.wait()
            chunk = ready.popleft()
            if not chunk:
                return
            if len(ready) <= CHUNKS_AHEAD // 2 and filling.done():
                filling.result()
                filling = filling_anew()
            yield chunk
    finally:
        # Not from here: it would wait for a read that is under way.
        filling.add_done_callback(lambda _: close())
        filling.cancel()


def verified(key: str, data: bytes, sha256: str | None) -> bytes:
    """`data`, if it has that digest or None is asked for.

    Raises:
        KernelError: it has another.
    """
    if sha256 is not None:
        _compare(key, hashlib.sha256(data).hexdigest(), sha256)
    return data


async def gathered(
    chunks: AsyncIterable[bytes], least_bytes: int, receipt: Receipt
) -> AsyncGenerator[bytearray]:
    """The chunks, counted, in blocks of at least so many bytes; only the last is smaller."""
    block = bytearray()
    async for chunk in chunks:
        receipt.count(len(chunk))
        block += chunk
        if len(block) >= least_bytes:
            yield block
            block = bytearray()
    if block:
        yield block


def _compare(key: str, came: str, sha256: str) -> None:
    if came != sha256:
        raise KernelError(f"object {key}: got bytes with SHA-256 {came}; allowed: {sha256}")
