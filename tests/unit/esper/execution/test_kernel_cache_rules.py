"""The cache under every order of loads, pins, failures and evictions that hypothesis finds."""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from functools import cache
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from esper.contracts.blueprints import builtin, infer, kernel_id, lower
from esper.contracts.kernels import KernelManifest, KernelMetadata
from esper.errors import HubUnavailable, KernelError
from esper.execution.artifact import KernelTemplate, artifact_digest, pack, unpack
from esper.execution.kernel_cache import KernelCache
from tests.unit.esper.kernel_targets import linear_place

TARGET = linear_place(6, 4).target


@cache
def stock() -> tuple[dict[str, bytes], dict[str, KernelMetadata], dict[str, int]]:
    """A few kernels of different sizes: artifacts, metadata and bytes in memory, by id."""
    artifacts, known, sizes = {}, {}, {}
    for name in ("noop", "low-rank", "bottleneck-mlp", "affine"):
        document = builtin(name, {})
        graph = lower(document, TARGET)
        identity = kernel_id(document.digest, TARGET)
        cost = infer(graph, TARGET)
        manifest = KernelManifest.describing(identity, document.digest, graph, TARGET, cost)
        data = pack(graph, TARGET, manifest)
        artifacts[identity] = data
        known[identity] = KernelMetadata(
            kernel=identity,
            blueprint_digest=document.digest,
            artifact_digest=artifact_digest(data),
            artifact_bytes=len(data),
        )
        sizes[identity] = unpack(data, artifact_digest(data)).nbytes
    return artifacts, known, sizes


KERNELS = st.integers(0, 3)


class Gate:
    """A source that answers when it is told to, and how it is told to."""

    def __init__(self) -> None:
        self.answer: BaseException | str | None = None
        self.open = asyncio.Event()
        self.asked: Counter[str] = Counter()

    async def metadata(self, kernel_id: str) -> KernelMetadata:
        self.asked[kernel_id] += 1
        await self.open.wait()
        if isinstance(self.answer, BaseException):
            raise self.answer
        return stock()[1][kernel_id]

    async def artifact(self, kernel_id: str) -> bytes:
        data = stock()[0][kernel_id]
        return data[:-1] + b"?" if self.answer == "changed" else data


class Watched(OrderedDict[str, KernelTemplate]):
    """What a cache holds unpinned; after each entry the whole must be within the limit."""

    owner: KernelCache
    limit: int

    def __setitem__(self, kernel_id: str, template: KernelTemplate) -> None:
        super().__setitem__(kernel_id, template)
        held = {**self.owner._pinned, **self}
        assert sum(kept.nbytes for kept in held.values()) <= self.limit


class WatchedPins(dict[str, KernelTemplate]):
    """What a cache holds pinned, watched alike."""

    owner: KernelCache
    limit: int

    def __setitem__(self, kernel_id: str, template: KernelTemplate) -> None:
        super().__setitem__(kernel_id, template)
        held = {**self.owner._recent, **self}
        assert sum(kept.nbytes for kept in held.values()) <= self.limit


class Rules(RuleBasedStateMachine):
    """A model of the cache: what it holds, in order of use, beside the real one."""

    @initialize(share=st.floats(0.2, 1.2))
    def open(self, share: float) -> None:
        self.kernels = list(stock()[1])
        self.sizes = stock()[2]
        self.limit = int(sum(self.sizes.values()) * share)
        self.loop = asyncio.new_event_loop()
        self.source = Gate()
        self.cache = KernelCache(self.source, max_bytes=self.limit)
        recent, pinned = Watched(), WatchedPins()
        recent.owner = pinned.owner = self.cache
        recent.limit = pinned.limit = self.limit
        self.cache._recent, self.cache._pinned = recent, pinned
        self.order: list[str] = []
        self.pins: Counter[str] = Counter()
        self.expected: Counter[str] = Counter()
        self.waiting: list[tuple[str, asyncio.Task[KernelTemplate]]] = []

    def teardown(self) -> None:
        if not hasattr(self, "loop"):
            return
        self.source.open.set()
        self.loop.run_until_complete(self._settled())
        self.loop.run_until_complete(self.loop.shutdown_default_executor())
        self.loop.close()

    async def _settled(self) -> list[Any]:
        outcomes = await asyncio.gather(*(task for _, task in self.waiting), return_exceptions=True)
        await asyncio.gather(*self.cache._tasks)
        return outcomes

    def _run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    @rule(index=KERNELS)
    def ask(self, index: int) -> None:
        """A load that finds the kernel, or waits for the gate to open."""
        kernel = self.kernels[index]

        async def begun() -> asyncio.Task[KernelTemplate]:
            task = asyncio.create_task(self.cache.load(kernel))
            for _ in range(3):
                await asyncio.sleep(0)
            return task

        under_way = kernel in {name for name, _ in self.waiting}
        task = self._run(begun())
        if kernel in self.order:
            self.expected["hits"] += 1
            self.order.remove(kernel)
            self.order.append(kernel)
            assert task.done()
            assert task.result().manifest.kernel == kernel
        else:
            self.expected["shared" if under_way else "misses"] += 1
            assert not task.done()
            self.waiting.append((kernel, task))

    @rule(index=st.integers(0, 20))
    def give_up(self, index: int) -> None:
        """One of those that wait is cancelled; the others still get theirs."""
        if index >= len(self.waiting):
            return
        kernel, task = self.waiting[index]
        if sum(name == kernel for name, _ in self.waiting) < 2:
            return
        self.waiting.pop(index)
        task.cancel()
        self._run(asyncio.gather(task, return_exceptions=True))
        assert task.cancelled()

    @rule(answer=st.sampled_from(["right", "right", "right", "away", "gone", "changed"]))
    def answer(self, answer: str) -> None:
        """The gate opens: every fetch under way comes to the same end."""
        self.source.answer = {
            "away": HubUnavailable("hub: away"),
            "gone": KernelError("kernel: gone"),
        }.get(answer, answer)
        asked = list(dict.fromkeys(name for name, _ in self.waiting))
        self.source.open.set()
        before = list(self.order)
        outcomes = self._run(self._settled())
        self.source.open.clear()
        for (kernel, _), outcome in zip(self.waiting, outcomes, strict=True):
            fits = self.sizes[kernel] <= self.limit
            if answer == "right" and fits:
                assert outcome.manifest.kernel == kernel
            else:
                assert type(outcome) is (HubUnavailable if answer == "away" else KernelError)
        self.waiting.clear()
        entered = [kernel for kernel in self.cache._pinned if kernel not in before]
        entered += [kernel for kernel in self.cache._recent if kernel not in before]
        if answer != "right":
            self.expected["failures"] += len(asked)
            assert not entered
            return
        too_large = [kernel for kernel in asked if self.sizes[kernel] > self.limit]
        self.expected["failures"] += len(too_large)
        held = {*self.cache._pinned, *self.cache._recent}
        assert held <= {*before, *asked}
        # Verified in threads, several may enter in any order; one alone enters as the model says.
        if len(asked) == 1 and not too_large:
            self._enter(asked[0])
        else:
            self.order = [*self.cache._pinned, *self.cache._recent]
            gone = [kernel for kernel in before if kernel not in held]
            assert not [kernel for kernel in gone if self.pins[kernel]]

    def _enter(self, kernel: str) -> None:
        pinned = sum(self.sizes[name] for name in self.order if self.pins[name])
        if pinned + self.sizes[kernel] > self.limit:
            self.expected["uncached"] += 1
            return
        self.order.append(kernel)
        while sum(self.sizes[name] for name in self.order) > self.limit:
            self.order.remove(next(name for name in self.order if not self.pins[name]))

    @rule(index=KERNELS)
    def look(self, index: int) -> None:
        kernel = self.kernels[index]
        template = self.cache.get(kernel)
        assert (template is not None) == (kernel in self.order)
        if template is not None:
            self.expected["hits"] += 1
            self.order.remove(kernel)
            self.order.append(kernel)

    @rule(index=KERNELS)
    def pin(self, index: int) -> None:
        self.cache.pin(self.kernels[index])
        self.pins[self.kernels[index]] += 1

    @rule(index=KERNELS)
    def unpin(self, index: int) -> None:
        kernel = self.kernels[index]
        if not self.pins[kernel]:
            with pytest.raises(ValueError, match="allowed: a pinned kernel"):
                self.cache.unpin(kernel)
            return
        self.cache.unpin(kernel)
        self.pins[kernel] -= 1
        if not self.pins[kernel] and kernel in self.order:
            # Let go of, it counts as used just now.
            self.order.remove(kernel)
            self.order.append(kernel)

    @invariant()
    def holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "cache"):
            return
        found = self.cache.statistics()
        held = {*self.cache._pinned, *self.cache._recent}
        assert held == set(self.order)
        assert set(self.cache._pinned) == {name for name in self.order if self.pins[name]}
        assert list(self.cache._recent) == [name for name in self.order if not self.pins[name]]
        assert found.num_bytes == sum(self.sizes[kernel] for kernel in held) <= self.limit
        assert found.entries == len(held)
        for name in ("hits", "misses", "shared", "failures"):
            assert getattr(found, name) == self.expected[name], name
        assert sum(self.source.asked.values()) == found.misses
        under_way = len({kernel for kernel, _ in self.waiting})
        entered = found.misses - under_way - found.failures - found.uncached
        assert entered - found.evictions == found.entries


TestRules = Rules.TestCase
TestRules.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
