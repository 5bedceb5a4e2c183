"""The kernel cache: hits beside the plain structures, misses that share, its limit, a seed's load.

python -m benchmarks.execution_cache [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any

import cachetools
import numpy as np
import torch
from torch import nn

from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin
from esper.contracts.kernels import KernelMetadata
from esper.core import wrap
from esper.execution.kernel_cache import KernelCache
from esper.execution.state_layout import SeedLifecycleState
from esper.services.tezzeret.compiler import CompiledArtifact, compile_kernel

REPEATS = 5
KERNELS = 64
HITS, QUICK_HITS = 200_000, 20_000
BLOCK = 100
MISSES = 1_000
OPERATIONS, QUICK_OPERATIONS = 5_000, 500
LOADS, QUICK_LOADS = 100, 20
WIDTH = 256
UNITS = 195
"""Of a bottleneck beside Linear(256, 256): 100,291 parameters."""

HIT_BAR_MICROSECONDS = 1.0
LOAD_BAR_MILLISECONDS = 1.0


class Shelf:
    """Compiled kernels in memory; each `metadata` that is asked for counts as a fetch."""

    def __init__(self) -> None:
        self.artifacts: dict[str, CompiledArtifact] = {}
        self.fetches: Counter[str] = Counter()

    def stock(self, units: int, target: KernelTarget) -> str:
        """Compile a bottleneck of that many units; its kernel's id."""
        artifact = compile_kernel(builtin("bottleneck-mlp", {"units": units}), target)
        self.artifacts[artifact.metadata.kernel] = artifact
        return artifact.metadata.kernel

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        """For `KernelSource`."""
        self.fetches[kernel_id] += 1
        await asyncio.sleep(0)
        return self.artifacts[kernel_id].metadata

    async def artifact(self, kernel_id: str) -> bytes:
        """For `KernelSource`."""
        await asyncio.sleep(0)
        return self.artifacts[kernel_id].data


def measure(quick: bool) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Figures and bars of the cache."""
    shelf = Shelf()
    kernels = [shelf.stock(units, _target(16)) for units in range(1, KERNELS + 1)]
    hits = _hits(shelf, kernels, QUICK_HITS if quick else HITS)
    fetches = asyncio.run(_fetches_for_misses(kernels[0], shelf))
    limit = asyncio.run(
        _bytes_over_limit(shelf, kernels, QUICK_OPERATIONS if quick else OPERATIONS)
    )
    load = _load(QUICK_LOADS if quick else LOADS)
    figures = {"hits": hits, "misses": fetches, "limit": limit, "load": load}
    bars = {
        "4.3.hit-p99-microseconds": _below(
            hits["cache"]["single"]["p99Microseconds"], HIT_BAR_MICROSECONDS
        ),
        "4.3.fetches-for-1000-misses": {
            "figure": fetches["fetches"],
            "bar": 1,
            "holds": fetches["fetches"] == 1,
        },
        "4.3.bytes-over-limit": {
            "figure": limit["bytesOverLimit"],
            "bar": 0,
            "holds": limit["bytesOverLimit"] == 0,
        },
        "4.4.load-milliseconds": _below(load["milliseconds"], LOAD_BAR_MILLISECONDS),
    }
    return figures, bars


def _below(figure: float, bar: float) -> dict[str, Any]:
    return {"figure": figure, "bar": bar, "holds": figure < bar}


def _target(width: int) -> KernelTarget:
    return KernelTarget(
        layer=LayerGeometry(kind="Linear", inputs=width, outputs=width),
        input_shape=(width,),
        output_shape=(width,),
    )


def _hits(shelf: Shelf, kernels: list[str], calls: int) -> dict[str, Any]:
    """What a hit costs, the arms interleaved in shuffled order, best of the repeats.

    `single` times each call with the clock's own reading in it, `block` the mean of a hundred
    calls with the loop's turns in it; nothing is subtracted, and `clock` says what an empty call
    of the kind measures.
    """
    cache = KernelCache(shelf)

    async def fill() -> None:
        for kernel in kernels:
            await cache.load(kernel)

    asyncio.run(fill())
    templates = {kernel: cache.get(kernel) for kernel in kernels}
    ordered = OrderedDict(templates)
    bounded: cachetools.LRUCache[str, Any] = cachetools.LRUCache(len(kernels))
    bounded.update(templates)

    def from_ordered(kernel: str) -> Any:
        template = ordered[kernel]
        ordered.move_to_end(kernel)
        return template

    def load(kernel: str) -> None:
        coroutine = cache.load(kernel)
        try:
            coroutine.send(None)
        except StopIteration:
            return
        raise AssertionError("a hit that waited")

    pinning = KernelCache(shelf)
    for kernel in kernels:
        pinning.pin(kernel)

    async def fill_pinned() -> None:
        for kernel in kernels:
            await pinning.load(kernel)

    asyncio.run(fill_pinned())
    arms: dict[str, Callable[[str], Any]] = {
        "cache": cache.get,
        "cache-pinned": pinning.get,
        "cache-load-coroutine": load,
        "ordered-dict": from_ordered,
        "cachetools": bounded.__getitem__,
        "clock": _nothing,
    }
    draw = random.Random(0)
    keys = [draw.choice(kernels) for _ in range(BLOCK)]
    single: dict[str, list[Any]] = {arm: [] for arm in arms}
    block: dict[str, list[Any]] = {arm: [] for arm in arms}
    for _ in range(REPEATS):
        singles: dict[str, list[int]] = {arm: [] for arm in arms}
        blocks: dict[str, list[float]] = {arm: [] for arm in arms}
        for _ in range(calls // BLOCK):
            for arm in draw.sample(list(arms), len(arms)):
                _time_singly(arms[arm], keys, singles[arm])
                blocks[arm].append(_time_block(arms[arm], keys))
        for arm in arms:
            single[arm].append(np.percentile(singles[arm], (50, 99)))
            block[arm].append(np.percentile(blocks[arm], (50, 99)))
    return {arm: {"single": _best(single[arm]), "block": _best(block[arm])} for arm in arms}


def _nothing(kernel: str) -> None:
    """The empty call that shows what the clock costs."""


def _time_singly(call: Callable[[str], Any], keys: list[str], times: list[int]) -> None:
    clock = time.perf_counter_ns
    for key in keys:
        began = clock()
        call(key)
        times.append(clock() - began)


def _time_block(call: Callable[[str], Any], keys: list[str]) -> float:
    began = time.perf_counter_ns()
    for key in keys:
        call(key)
    return (time.perf_counter_ns() - began) / len(keys)


def _best(repeats: list[Any]) -> dict[str, float]:
    """The percentiles of the repeat with the lowest p99, from nanoseconds."""
    p50, p99 = min(repeats, key=lambda percentiles: percentiles[1])
    return {
        "p50Microseconds": round(float(p50) / 1e3, 4),
        "p99Microseconds": round(float(p99) / 1e3, 4),
    }


async def _fetches_for_misses(kernel: str, shelf: Shelf) -> dict[str, Any]:
    shelf.fetches.clear()
    cache = KernelCache(shelf)
    began = time.perf_counter()
    loaded = await asyncio.gather(*(cache.load(kernel) for _ in range(MISSES)))
    seconds = time.perf_counter() - began
    return {
        "loads": len(loaded),
        "templates": len({id(template) for template in loaded}),
        "fetches": shelf.fetches[kernel],
        "milliseconds": round(seconds * 1e3, 3),
    }


async def _bytes_over_limit(shelf: Shelf, kernels: list[str], operations: int) -> dict[str, Any]:
    """Loads, pins and unpins at random in a cache that holds a quarter of the kernels."""
    probe = KernelCache(shelf)
    sizes = {kernel: (await probe.load(kernel)).nbytes for kernel in kernels}
    cache = KernelCache(shelf, max_bytes=sum(sizes.values()) // 4)
    draw = random.Random(1)
    pinned: list[str] = []
    highest = 0
    for _ in range(operations):
        wanted = draw.sample(kernels, 3)
        if draw.random() < 0.5:
            pinned.append(wanted[0])
            cache.pin(wanted[0])
        elif pinned and draw.random() < 0.9:
            cache.unpin(pinned.pop(draw.randrange(len(pinned))))
        await asyncio.gather(*map(cache.load, wanted))
        # Not by the cache's own account: that could be wrong.
        held = sum(size for kernel, size in sizes.items() if cache.get(kernel) is not None)
        highest = max(highest, held)
    found = cache.statistics()
    return {
        "operations": operations,
        "maxBytes": found.max_bytes,
        "highestBytes": highest,
        "bytesOverLimit": max(0, highest - found.max_bytes),
        "evictions": found.evictions,
        "uncached": found.uncached,
    }


def _load(loads: int) -> dict[str, Any]:
    """A cached kernel into a dormant slot: median of the loads, best and worst of the repeats."""
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU()), torch.randn(2, WIDTH))
    layer = model.morphology.layers["0"]
    shelf = Shelf()
    kernel = shelf.stock(UNITS, model.morphology.target("0"))
    cache = KernelCache(shelf)

    async def medians() -> list[float]:
        await cache.load(kernel)
        return [await repeat() for _ in range(REPEATS)]

    async def repeat() -> float:
        seconds = []
        for number in range(loads):
            began = time.perf_counter()
            await layer.load_kernel(0, kernel, cache, generator_seed=number)
            seconds.append(time.perf_counter() - began)
            layer.unload_kernel(0)
            layer.transition(0, SeedLifecycleState.DORMANT)
        return statistics.median(seconds) * 1e3

    found = asyncio.run(medians())
    return {
        "parameters": shelf.artifacts[kernel].manifest.parameters,
        "milliseconds": round(min(found), 4),
        "worstMilliseconds": round(max(found), 4),
        "threads": torch.get_num_threads(),
    }


def main() -> int:
    """Measure and print; `benchmarks.execution` writes the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer calls, the same cases")
    figures, bars = measure(parser.parse_args().quick)
    sys.stdout.write(json.dumps({"figures": figures, "bars": bars}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
