"""Kernels that arrive in a thread of their own, and a cache that many threads use."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections import Counter

import pytest

from esper.contracts.kernels import KernelMetadata
from esper.errors import HubUnavailable, KernelError, Unavailable
from esper.execution.artifact import KernelTemplate
from esper.execution.fetching import FetchingThread
from esper.execution.kernel_cache import KernelCache
from tests.unit.esper.execution.kernel_shelf import Shelf, room_for


class Living(Shelf):
    """A shelf that says on which thread it is used, and when it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self.threads: set[int] = set()
        self.closed = threading.Event()

    async def __aenter__(self) -> Living:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.closed.set()

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        self.threads.add(threading.get_ident())
        return await super().metadata(kernel_id)


def test_kernels_arrive_while_the_training_thread_is_busy() -> None:
    shelf = Living()
    kernels = [shelf.stock(units) for units in (2, 3)]
    with FetchingThread(shelf) as fetching:
        cache = KernelCache(fetching.source, loop=fetching.loop)
        cache.prefetch(kernels)
        # No event loop runs in this thread.
        while any(cache.get(kernel) is None for kernel in kernels):
            assert fetching.loop.is_running()
        loaded = asyncio.run(cache.load(kernels[0]))
        assert loaded is cache.get(kernels[0])
        missing = Shelf().stock(4)
        with pytest.raises(KernelError, match="unknown"):
            asyncio.run(cache.load(missing))
        assert not shelf.closed.is_set()
    assert shelf.closed.is_set()
    assert shelf.threads
    assert threading.get_ident() not in shelf.threads


def test_two_threads_share_one_fetch() -> None:
    shelf = Living()
    kernel = shelf.stock(3)
    loaded: list[KernelTemplate] = []
    with FetchingThread(shelf) as fetching:
        cache = KernelCache(fetching.source, loop=fetching.loop)
        threads = [
            threading.Thread(target=lambda: loaded.append(asyncio.run(cache.load(kernel))))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len({id(template) for template in loaded}) == 1
    assert shelf.asked[kernel] == 1


def test_a_fetch_that_is_broken_off_can_be_tried_again() -> None:
    shelf = Living()
    kernel = shelf.stock(3)
    outcomes: list[BaseException | None] = []
    with FetchingThread(shelf) as fetching:
        cache = KernelCache(fetching.source, loop=fetching.loop)
        fetching.loop.call_soon_threadsafe(shelf.open.clear)

        def ask() -> None:
            try:
                asyncio.run(cache.load(kernel))
            except Unavailable as error:
                outcomes.append(error)

        asking = threading.Thread(target=ask)
        asking.start()
        while not shelf.asked[kernel]:
            assert asking.is_alive()
    asking.join()
    assert "broken off" in str(outcomes[0])
    shelf.open = asyncio.Event()
    shelf.open.set()
    with FetchingThread(shelf) as again:
        cache = KernelCache(again.source, loop=again.loop)
        assert asyncio.run(cache.load(kernel)).manifest.kernel == kernel


def test_a_source_that_can_not_be_opened_says_so() -> None:
    class Broken(Living):
        async def __aenter__(self) -> Living:
            raise HubUnavailable("hub: away")

    with pytest.raises(HubUnavailable, match="away"), FetchingThread(Broken()):
        raise AssertionError("never entered")


def test_hits_of_many_threads_are_counted_and_whole() -> None:
    shelf = Shelf()
    kernels = [shelf.stock(units) for units in range(2, 8)]
    cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels))
    for kernel in kernels:
        asyncio.run(cache.load(kernel))
    found: Counter[str] = Counter()
    interval = sys.getswitchinterval()

    def hit() -> None:
        own: Counter[str] = Counter()
        for number in range(3_000):
            kernel = kernels[number % len(kernels)]
            template = cache.get(kernel)
            own["hits"] += template is not None
            own["wrong"] += template is not None and template.manifest.kernel != kernel
        found.update(own)

    def hold() -> None:
        for number in range(1_000):
            cache.pin(kernels[number % len(kernels)])
            cache.unpin(kernels[number % len(kernels)])

    threads = [threading.Thread(target=hit) for _ in range(3)] + [threading.Thread(target=hold)]
    try:
        sys.setswitchinterval(1e-6)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert found["wrong"] == 0
    assert found["hits"] == cache.statistics().hits
    assert cache.statistics().entries == len(kernels)
    assert cache.statistics().num_bytes == room_for(shelf, kernels)
