"""The modules made from a template: each its own, on a device that may be full."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest
import torch

from esper.errors import KernelError, Unavailable
from esper.execution import kernel_cache
from esper.execution.artifact import KernelTemplate
from esper.execution.builders import build
from esper.execution.kernel_cache import KernelCache, instantiate
from esper.execution.staging import Staging, take
from tests.unit.esper.execution.kernel_shelf import Shelf


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


@pytest.mark.parametrize("fixed", [False, True])
def test_no_memory_is_a_passing_state_and_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, fixed: bool
) -> None:
    async def scenario() -> None:
        shelf = Shelf()
        tensors = {"weight": torch.randn(4, 3)} if fixed else {}
        template = await KernelCache(shelf).load(shelf.stock(3, **tensors))
        built: list[weakref.ref[torch.Tensor]] = []

        def full(module: torch.nn.Module, *_: object) -> None:
            built.extend(map(weakref.ref, module.parameters()))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

        with monkeypatch.context() as patch:
            patch.setattr(kernel_cache, "draw_weights", full)
            with pytest.raises(Unavailable, match="no memory left on cpu for") as caught:
                instantiate(template, 1)
        gc.collect()
        assert caught.value.__cause__ is not None
        assert built
        assert not any(reference() for reference in built)
        assert instantiate(template, 1).op_up.weight.shape == (4, 3)

    asyncio.run(scenario())


def test_a_device_that_has_no_room_for_fixed_weights_may_have_it_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        shelf = Shelf()
        kernel = shelf.stock(3, weight=torch.randn(4, 3))
        cache = KernelCache(shelf)

        def full(*_: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory")

        with monkeypatch.context() as patch:
            patch.setattr(KernelCache, "_placed", full)
            with pytest.raises(Unavailable, match="no memory left"):
                await cache.load(kernel)
        assert cache.statistics().entries == 0
        assert (await cache.load(kernel)).manifest.kernel == kernel

    asyncio.run(scenario())


def test_more_memory_than_any_machine_has_is_no_memory() -> None:
    with pytest.raises(RuntimeError) as refused:
        torch.empty(2**56)
    template = asyncio.run(_loaded())
    translated = kernel_cache._translated(refused.value, template)
    assert isinstance(translated, Unavailable)
    assert isinstance(kernel_cache._translated(RuntimeError("no kernel"), template), KernelError)


async def _loaded() -> KernelTemplate:
    shelf = Shelf()
    return await KernelCache(shelf).load(shelf.stock(3))


def test_a_module_is_the_one_that_the_builder_makes() -> None:
    template = asyncio.run(_loaded())
    ours = instantiate(template, 7)
    built = build(template.graph, template.target, generator_seed=7)
    assert ours.code == built.code
    states = ours.state_dict(), built.state_dict()
    assert list(states[0]) == list(states[1])
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: no CUDA device")
def test_fixed_weights_reach_a_gpu_by_the_staging_buffers() -> None:
    device = torch.device("cuda:0")
    tensors = {
        "long": torch.randn(1000, 37),
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "none": torch.empty(0),
        "half": torch.randn(3, 3).to(torch.bfloat16),
    }
    staging = Staging(device, chunk_bytes=1001)
    for _ in range(2):
        landed, arrival = staging.copy(tensors)
        take(landed, arrival)
        for name, tensor in tensors.items():
            assert torch.equal(landed[name].cpu(), tensor)
            assert landed[name].dtype == tensor.dtype
