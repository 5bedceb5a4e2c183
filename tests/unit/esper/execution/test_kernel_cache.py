"""The cache: verified once, fetched once, bounded in bytes."""

from __future__ import annotations

import asyncio
import gc
import threading

import pytest

import esper.execution
from esper.contracts.kernels import KernelMetadata
from esper.errors import EsperError, HubUnavailable, KernelError, Unavailable
from esper.execution.kernel_cache import DEFAULT_MAX_BYTES, KernelCache
from tests.unit.esper.execution.kernel_shelf import Shelf, room_for, size


def test_a_kernel_is_fetched_once_and_then_at_hand() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        cache = KernelCache(shelf)
        first = await cache.load(kernel)
        assert await cache.load(kernel) is first
        assert first.manifest.kernel == kernel
        assert shelf.asked[kernel] == 1
        found = cache.statistics()
        assert (found.hits, found.misses, found.entries) == (1, 1, 1)
        assert found.num_bytes == first.nbytes
        assert found.max_bytes == DEFAULT_MAX_BYTES == 512 * 2**20

    asyncio.run(scenario())


def test_however_many_ask_one_fetch_answers() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        cache = KernelCache(shelf)
        templates = await asyncio.gather(*(cache.load(kernel) for _ in range(10)))
        assert len({id(template) for template in templates}) == 1
        assert shelf.asked[kernel] == 1
        found = cache.statistics()
        assert (found.hits, found.misses, found.shared) == (0, 1, 9)

    asyncio.run(scenario())


def test_one_that_gives_up_does_not_stop_the_others() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        shelf.open.clear()
        cache = KernelCache(shelf)
        impatient, patient = (asyncio.create_task(cache.load(kernel)) for _ in range(2))
        await asyncio.sleep(0)
        impatient.cancel()
        shelf.open.set()
        assert (await patient).manifest.kernel == kernel
        assert impatient.cancelled()
        assert shelf.asked[kernel] == 1

    asyncio.run(scenario())


def test_a_failure_that_nobody_waits_for_any_more_is_no_news() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        shelf.open.clear()
        cache = KernelCache(shelf)
        news: list[dict[str, object]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: news.append(context))
        impatient = asyncio.create_task(cache.load(Shelf().stock(3)))
        await asyncio.sleep(0)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        shelf.open.set()
        await asyncio.gather(*cache._tasks)
        for _ in range(5):
            await asyncio.sleep(0)
        del impatient
        gc.collect()  # which is when a loop speaks up for an error that nobody took
        assert cache.statistics().failures == 1
        assert not news

    asyncio.run(scenario())


def test_a_failure_reaches_all_who_wait_and_is_forgotten() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = Shelf().stock(3)
        cache = KernelCache(shelf)
        outcomes = await asyncio.gather(
            *(cache.load(kernel) for _ in range(3)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [KernelError] * 3
        shelf.stock(3)
        assert (await cache.load(kernel)).manifest.kernel == kernel
        assert shelf.asked[kernel] == 2

    asyncio.run(scenario())


def test_a_source_that_is_away_is_asked_again() -> None:
    class Away(Shelf):
        async def metadata(self, kernel_id: str) -> KernelMetadata:
            if not self.asked[kernel_id]:
                self.asked[kernel_id] += 1
                raise HubUnavailable("hub: no answer")
            return await super().metadata(kernel_id)

    async def scenario() -> None:
        shelf = Away()
        kernel = shelf.stock(3)
        cache = KernelCache(shelf)
        with pytest.raises(HubUnavailable):
            await cache.load(kernel)
        assert (await cache.load(kernel)).manifest.kernel == kernel

    asyncio.run(scenario())


def test_changed_bytes_never_enter() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        shelf.artifacts[kernel] = shelf.artifacts[kernel][:-1] + b"\x01"
        cache = KernelCache(shelf)
        with pytest.raises(KernelError, match="SHA-256"):
            await cache.load(kernel)
        assert cache.statistics().entries == 0

    asyncio.run(scenario())


def test_another_kernels_artifact_never_enters() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        asked, given = shelf.stock(3), shelf.stock(4)
        shelf.known[asked] = shelf.known[given]
        shelf.artifacts[asked] = shelf.artifacts[given]
        with pytest.raises(KernelError, match=f"got the artifact of kernel {given}"):
            await KernelCache(shelf).load(asked)

    asyncio.run(scenario())


def test_a_kernel_larger_than_the_cache_is_not_fetched() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        with pytest.raises(KernelError, match="allowed: at most 100, the kernel cache's size"):
            await KernelCache(shelf, max_bytes=100).load(kernel)
        assert not shelf.fetched
        with pytest.raises(KernelError, match=r"see component\.kernel_cache_bytes"):
            await KernelCache(shelf, max_bytes=size(shelf, kernel) - 1).load(kernel)
        assert (await KernelCache(shelf, max_bytes=size(shelf, kernel)).load(kernel)).nbytes

    asyncio.run(scenario())


def test_the_least_recently_used_goes_first() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3, 4)]
        cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels[:2]))
        await cache.load(kernels[0])
        await cache.load(kernels[1])
        await cache.load(kernels[0])
        await cache.load(kernels[2])
        assert cache.statistics().evictions == 1
        assert cache.statistics().num_bytes <= cache.statistics().max_bytes
        await cache.load(kernels[0])
        assert shelf.asked[kernels[0]] == 1
        await cache.load(kernels[1])
        assert shelf.asked[kernels[1]] == 2

    asyncio.run(scenario())


def test_pinned_kernels_stay_until_the_last_pin_goes() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3)]
        cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels[:1]))
        for _ in range(2):
            cache.pin(kernels[0])
        await cache.load(kernels[0])
        for pins_left in (2, 1):
            assert (await cache.load(kernels[1])).manifest.kernel == kernels[1]
            assert (cache.statistics().entries, cache.statistics().pinned) == (1, 1)
            await cache.load(kernels[0])
            assert shelf.asked[kernels[0]] == 1, f"with {pins_left} pins left"
            cache.unpin(kernels[0])
        await cache.load(kernels[1])
        assert (cache.statistics().entries, cache.statistics().pinned) == (1, 0)
        await cache.load(kernels[0])
        assert shelf.asked[kernels[0]] == 2
        with pytest.raises(ValueError, match="allowed: a pinned kernel"):
            cache.unpin(kernels[0])

    asyncio.run(scenario())


def test_what_pinned_kernels_leave_no_room_for_is_handed_over_and_not_kept() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3)]
        cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels[:1]))
        for kernel in kernels:
            cache.pin(kernel)
            assert (await cache.load(kernel)).manifest.kernel == kernel
        found = cache.statistics()
        assert (found.entries, found.uncached, found.evictions) == (1, 1, 0)
        assert found.num_bytes <= found.max_bytes
        assert cache.get(kernels[1]) is None
        cache.unpin(kernels[0])
        await cache.load(kernels[1])
        assert cache.get(kernels[1]) is not None
        found = cache.statistics()
        assert (found.entries, found.uncached, found.evictions) == (1, 1, 1)

    asyncio.run(scenario())


def test_get_answers_at_once_and_keeps_what_it_is_asked_for() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3, 4)]
        cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels[:2]))
        assert cache.get(kernels[0]) is None
        first, other = [await cache.load(kernel) for kernel in kernels[:2]]
        assert cache.get(kernels[0]) is first
        await cache.load(kernels[2])
        assert cache.get(kernels[0]) is first
        assert cache.get(kernels[1]) is None
        cache.pin(kernels[0])
        assert cache.get(kernels[0]) is first
        assert other.manifest.kernel == kernels[1]
        assert (cache.statistics().hits, cache.statistics().misses) == (3, 3)

    asyncio.run(scenario())


def test_a_kernel_in_use_is_pinned_and_let_go_whatever_happens() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3)
        cache = KernelCache(shelf)
        async with cache.using(kernel) as template:
            assert template.manifest.kernel == kernel
            assert cache.statistics().pinned == 1
        assert cache.statistics().pinned == 0
        missing = Shelf().stock(4)
        with pytest.raises(KernelError):
            async with cache.using(missing):
                raise AssertionError("never entered")
        with pytest.raises(ValueError, match="allowed: a pinned kernel"):
            cache.unpin(missing)

    asyncio.run(scenario())


def test_what_was_fetched_and_what_failed_is_counted() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel, missing = shelf.stock(3), Shelf().stock(4)
        cache = KernelCache(shelf)
        await cache.load(kernel)
        with pytest.raises(KernelError):
            await cache.load(missing)
        found = cache.statistics()
        assert (found.failures, found.misses, found.entries) == (1, 2, 1)
        assert found.fetched_bytes == len(shelf.artifacts[kernel])
        assert found.fetch_seconds > 0

    asyncio.run(scenario())


def test_a_prefetch_fills_the_cache_and_keeps_its_failures_to_itself() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3)]
        cache = KernelCache(shelf)
        cache.prefetch([kernels[0], Shelf().stock(9), kernels[1]])
        assert (await cache.load(kernels[1])).manifest.kernel == kernels[1]
        await asyncio.gather(*cache._tasks)
        assert (cache.statistics().entries, cache.statistics().failures) == (2, 1)
        cache.prefetch(kernels)
        await asyncio.gather(*cache._tasks)
        assert [shelf.asked[kernel] for kernel in kernels] == [1, 1]
        assert (cache.statistics().failures, cache.statistics().hits) == (1, 0)

    asyncio.run(scenario())


def test_the_package_exports_what_the_audit_names() -> None:
    assert esper.execution.KernelCache is KernelCache
    assert esper.execution.__all__ == [
        "KasminaLayer",
        "KasminaStateLayout",
        "KernelCache",
        "SeedLifecycleState",
    ]
    for name in esper.execution.__all__:
        assert getattr(esper.execution, name).__name__ == name
    with pytest.raises(AttributeError, match="KernelCaches"):
        _ = esper.execution.KernelCaches


class Moody(Shelf):
    """Hangs, or raises, until it is well."""

    mood: Exception | None = None
    hangs = False

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        if self.hangs:
            await asyncio.sleep(3600)
        if self.mood is not None:
            raise self.mood
        return await super().metadata(kernel_id)


def test_a_fetch_whose_loop_was_left_standing_is_begun_anew() -> None:
    shelf = Moody()
    kernel = shelf.stock(3)
    shelf.hangs = True
    cache = KernelCache(shelf)
    loop = asyncio.new_event_loop()
    with pytest.raises(TimeoutError):
        loop.run_until_complete(asyncio.wait_for(cache.load(kernel), 0.01))
    shelf.hangs = False
    template = asyncio.run(asyncio.wait_for(cache.load(kernel), 10))
    assert template.manifest.kernel == kernel
    assert cache.statistics().entries == 1
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(asyncio.sleep(0))  # the first one ends, and takes nothing away
    loop.close()
    assert cache.get(kernel) is template


def test_who_waits_for_a_fetch_that_is_broken_off_is_told() -> None:
    shelf = Moody()
    kernel = shelf.stock(3)
    shelf.hangs = True
    cache = KernelCache(shelf)
    refusals: list[str] = []
    begun = threading.Event()

    def wait() -> None:
        begun.wait()
        with pytest.raises(Unavailable, match="broken off") as refusal:
            asyncio.run(asyncio.wait_for(cache.load(kernel), 10))
        refusals.append(str(refusal.value))

    async def ask() -> None:
        asking = asyncio.create_task(cache.load(kernel))
        await asyncio.sleep(0)
        begun.set()
        while not cache.statistics().shared and waiting.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        asking.cancel()

    waiting = threading.Thread(target=wait)
    waiting.start()
    asyncio.run(ask())
    waiting.join(10)
    assert len(refusals) == 1


def test_a_cache_that_outlives_its_loop_says_so_every_time() -> None:
    shelf = Shelf()
    kernel = shelf.stock(3)
    loop = asyncio.new_event_loop()
    loop.close()
    cache = KernelCache(shelf, loop=loop)
    for _ in range(2):
        with pytest.raises(Unavailable, match="event loop that fetches kernels has ended"):
            asyncio.run(asyncio.wait_for(cache.load(kernel), 10))


@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (ConnectionResetError("reset by peer"), Unavailable),
        (TimeoutError(), Unavailable),
        (LookupError("gone"), KernelError),
        (HubUnavailable("away"), HubUnavailable),
    ],
)
def test_what_a_source_lets_through_becomes_an_error_of_ours(
    raised: Exception, expected: type[EsperError]
) -> None:
    async def scenario() -> None:
        shelf = Moody()
        kernels = [shelf.stock(units) for units in (2, 3)]
        shelf.mood = raised
        cache = KernelCache(shelf)
        with pytest.raises(expected) as refusal:
            await cache.load(kernels[0])
        assert type(refusal.value) is expected
        assert str(raised) in str(refusal.value)
        cache.prefetch(kernels)
        shelf.mood = None
        for kernel in kernels:
            assert (await cache.load(kernel)).manifest.kernel == kernel

    asyncio.run(scenario())


def test_a_kernel_stays_while_a_seed_lives_on_it() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        first, second, third = (shelf.stock(units) for units in (2, 3, 4))
        cache = KernelCache(shelf, room_for(shelf, [second, third]))
        module = cache.instantiate(await cache.load(first), generator_seed=0)
        assert cache.statistics().pinned == 1
        for kernel in (second, third, second):
            await cache.load(kernel)
        assert cache.get(first) is not None
        del module
        gc.collect()
        assert cache.statistics().pinned == 0
        for kernel in (second, third):
            await cache.load(kernel)
        assert cache.get(first) is None

    asyncio.run(scenario())
