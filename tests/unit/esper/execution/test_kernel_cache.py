"""The cache: verified once, fetched once, bounded in bytes; and the modules made from it."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
import torch

import esper.execution
from esper.contracts.blueprints import builtin, infer, kernel_id, lower
from esper.contracts.kernels import KernelManifest, KernelMetadata
from esper.errors import HubUnavailable, KernelError
from esper.execution.artifact import artifact_digest, pack
from esper.execution.kernel_cache import DEFAULT_MAX_BYTES, KernelCache, instantiate
from tests.unit.esper.kernel_targets import linear_place

TARGET = linear_place(6, 4).target


class Shelf:
    """Kernels in memory, behind the port that the hub satisfies."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.known: dict[str, KernelMetadata] = {}
        self.asked: Counter[str] = Counter()
        self.open = asyncio.Event()
        self.open.set()

    def stock(self, units: int, **tensors: torch.Tensor) -> str:
        document = builtin("bottleneck-mlp", {"units": units})
        graph = lower(document, TARGET)
        identity = kernel_id(document.digest, TARGET)
        manifest = KernelManifest.describing(
            identity, document.digest, graph, TARGET, infer(graph, TARGET)
        )
        data = pack(graph, TARGET, manifest, {f"op_up.{name}": t for name, t in tensors.items()})
        self.artifacts[identity] = data
        self.known[identity] = KernelMetadata(
            kernel=identity,
            blueprint_digest=document.digest,
            artifact_digest=artifact_digest(data),
            artifact_bytes=len(data),
        )
        return identity

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        self.asked[kernel_id] += 1
        await self.open.wait()
        if kernel_id not in self.known:
            raise KernelError(f"kernel {kernel_id}: unknown")
        return self.known[kernel_id]

    async def artifact(self, kernel_id: str) -> bytes:
        await asyncio.sleep(0)
        return self.artifacts[kernel_id]


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

    asyncio.run(scenario())


def room_for(shelf: Shelf, kernels: list[str]) -> int:
    return sum(len(shelf.artifacts[kernel]) for kernel in kernels)


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
        cache = KernelCache(shelf, max_bytes=max(map(len, shelf.artifacts.values())))
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


def test_taking_a_pin_off_makes_room() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernels = [shelf.stock(units) for units in (2, 3)]
        cache = KernelCache(shelf, max_bytes=room_for(shelf, kernels[:1]))
        for kernel in kernels:
            cache.pin(kernel)
            await cache.load(kernel)
        assert cache.statistics().entries == 2
        cache.unpin(kernels[0])
        assert cache.statistics().entries == 1
        assert cache.statistics().evictions == 1

    asyncio.run(scenario())


def test_modules_of_one_template_are_their_own() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        template = await KernelCache(shelf).load(shelf.stock(3))
        first, again, other = (instantiate(template, seed) for seed in (1, 1, 2))
        assert torch.equal(first.op_down.weight, again.op_down.weight)
        assert not torch.equal(first.op_down.weight, other.op_down.weight)
        with torch.no_grad():
            first.op_down.weight.zero_()
        assert again.op_down.weight.count_nonzero()

    asyncio.run(scenario())


def test_fixed_weights_are_copied_into_each_module() -> None:
    async def scenario() -> None:
        shelf = Shelf()
        weight = torch.randn(4, 3)
        template = await KernelCache(shelf).load(shelf.stock(3, weight=weight))
        first, other = (instantiate(template, seed) for seed in (1, 2))
        assert torch.equal(first.op_up.weight, weight)
        assert first.op_up.weight.requires_grad
        with torch.no_grad():
            first.op_up.weight.zero_()
        assert torch.equal(other.op_up.weight, weight)
        assert torch.equal(template.tensors["op_up.weight"], weight)

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
