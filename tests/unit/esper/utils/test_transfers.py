"""Chunks read by a thread ahead of whoever takes them."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import pytest

from esper.errors import KernelError
from esper.utils.transfers import CHUNKS_AHEAD, read_ahead


class Source:
    """Gives numbered chunks, never to two threads at once, and counts what was asked of it."""

    def __init__(self, chunks: int, pause: Callable[[], float] = lambda: 0.0, bad: int = -1):
        self._left = iter([str(number).encode() for number in range(chunks)])
        self._pause, self._bad = pause, bad
        self._busy = threading.Lock()
        self.given = self.closed = 0

    def next_chunk(self) -> bytes:
        assert self._busy.acquire(blocking=False), "two threads read at once"
        try:
            time.sleep(self._pause())
            if self.given == self._bad:
                raise KernelError("another digest")
            self.given += 1
            return next(self._left, b"")
        finally:
            self._busy.release()

    def close(self) -> None:
        assert not self._busy.locked(), "closed while it is read"
        self.closed += 1


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(4) as pool:
        yield pool


def taken(
    threads: ThreadPoolExecutor, source: Source, pause: Callable[[], float], most: int = 10**6
) -> list[bytes]:
    async def take() -> list[bytes]:
        found: list[bytes] = []
        async with aclosing(read_ahead(threads.submit, source.next_chunk, source.close)) as chunks:
            async for chunk in chunks:
                found.append(chunk)
                assert source.given <= len(found) + CHUNKS_AHEAD + 1, "no more is held"
                if len(found) == most:
                    break
                await asyncio.sleep(pause())
        return found

    return asyncio.run(asyncio.wait_for(take(), 30))


@pytest.mark.parametrize("reader", [0.0, 0.002])
@pytest.mark.parametrize("taker", [0.0, 0.002])
@pytest.mark.parametrize("chunks", [0, 1, CHUNKS_AHEAD, 150])
def test_every_chunk_comes_once_in_order_whoever_is_faster(
    threads: ThreadPoolExecutor, chunks: int, taker: float, reader: float
) -> None:
    source = Source(chunks, lambda: reader)
    found = taken(threads, source, lambda: taker)
    assert found == [str(number).encode() for number in range(chunks)]
    threads.shutdown()
    assert source.closed == 1


def test_a_reader_and_a_taker_of_changing_speed_never_wait_for_each_other(
    threads: ThreadPoolExecutor,
) -> None:
    for _ in range(40):
        source = Source(60)
        assert len(taken(threads, source, lambda: 0.0)) == 60


def test_what_goes_wrong_is_raised_after_what_came_before(threads: ThreadPoolExecutor) -> None:
    source, found = Source(9, bad=7), []

    async def take() -> None:
        async with aclosing(read_ahead(threads.submit, source.next_chunk, source.close)) as chunks:
            async for chunk in chunks:
                found.append(chunk)  # noqa: PERF401 -- kept, though the next one fails

    with pytest.raises(KernelError):
        asyncio.run(asyncio.wait_for(take(), 30))
    assert len(found) == 7
    threads.shutdown()
    assert source.closed == 1


def test_who_leaves_early_leaves_nothing_open(threads: ThreadPoolExecutor) -> None:
    source = Source(1000, lambda: 0.001)
    assert len(taken(threads, source, lambda: 0.0, most=3)) == 3
    threads.shutdown()
    assert source.closed == 1
    assert source.given <= 3 + 2 * CHUNKS_AHEAD
