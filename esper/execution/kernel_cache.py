"""Compiled kernels, kept in memory: bounded in bytes, each fetched once however many ask.

A forward pass never looks anything up here: a layer holds the module that `instantiate` made of a
template. The cache saves fetching, verifying and building when a kernel is used again.

Threads: hits take no lock, because a thread that holds one may be put aside for milliseconds. Each
of their steps on a dictionary is atomic, and what changes the dictionaries takes the lock and makes
a template known in its new place before it leaves the old one.
"""

from __future__ import annotations

import asyncio
import threading
import time
import traceback
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import AsyncIterator, Coroutine, Iterable
from concurrent.futures import Future
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Protocol

import torch
from torch import fx

from esper.contracts.kernels import KernelMetadata
from esper.errors import EsperError, KernelError, Unavailable, one_line
from esper.execution.artifact import KernelTemplate, unpack
from esper.execution.builders import cloned, draw_weights
from esper.execution.staging import Staging, take

DEFAULT_MAX_BYTES = 512 * 2**20
# What torch raises where a device has no room, fails or is not there.
_REFUSALS = (RuntimeError, MemoryError, AssertionError)


class KernelSource(Protocol):
    """Where kernels come from: the hub for what is known of them, the store for their bytes.

    Both methods raise KernelError for a kernel that is unknown, not compiled or failed, and an
    Unavailable error when the other side does not answer.
    """

    async def metadata(self, kernel_id: str, /) -> KernelMetadata:
        """The artifact's digest and size."""
        ...

    async def artifact(self, kernel_id: str, /) -> bytes:
        """The artifact's bytes."""
        ...


@dataclass(frozen=True)
class CacheStatistics:
    """Counts since the cache was made, and what it holds now.

    `shared` counts loads that waited for a fetch which another load had begun, `failures` fetches
    that ended in an error, `uncached` kernels that were fetched while pinned ones left no room.
    `fetched_bytes` and `fetch_seconds` add up what came and how long it took, until it was built.
    """

    hits: int
    misses: int
    shared: int
    evictions: int
    failures: int
    uncached: int
    entries: int
    pinned: int
    num_bytes: int
    max_bytes: int
    fetched_bytes: int
    fetch_seconds: float


@dataclass(eq=False)
class _Fetch:
    """A fetch under way, and the loop that carries it on."""

    loop: asyncio.AbstractEventLoop
    outcome: Future[KernelTemplate] = field(default_factory=Future)


class KernelCache:
    """Least recently used templates go first; pinned ones stay.

    What it holds never exceeds `max_bytes`: room is made before a template enters. One for which
    pinned templates leave no room is handed to whoever asked and not kept.

    Args:
        source: where kernels come from.
        max_bytes: the limit on the templates held, as their `nbytes` count them.
        loop: the event loop that `source` lives on, in a thread of its own, so that kernels arrive
            while the training thread is busy; None means the loop of whoever asks.
    """

    def __init__(
        self,
        source: KernelSource,
        max_bytes: int = DEFAULT_MAX_BYTES,
        *,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._loop = loop
        self._lock = threading.Lock()
        self._recent: OrderedDict[str, KernelTemplate] = OrderedDict()
        self._pinned: dict[str, KernelTemplate] = {}
        self._pins: Counter[str] = Counter()
        self._left: deque[str] = deque()  # what `instantiate` pinned and no longer lives
        self._fetches: dict[str, _Fetch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._staging: dict[torch.device, Staging] = {}
        self._hits = 0
        self._counts: Counter[str] = Counter()
        self._num_bytes = 0
        self._pinned_bytes = 0
        self._fetch_seconds = 0.0

    def get(self, kernel_id: str) -> KernelTemplate | None:
        """The template, None where the cache does not hold it; from any thread, without waiting."""
        try:
            self._recent.move_to_end(kernel_id)
            template = self._recent[kernel_id]
        except KeyError:
            pinned = self._pinned.get(kernel_id)
            if pinned is None:
                return None
            template = pinned
        self._hits += 1
        return template

    async def load(self, kernel_id: str) -> KernelTemplate:
        """The verified template of a kernel, from memory or from the source.

        Raises:
            KernelError: the kernel is unknown or failed, is larger than the cache, its bytes do
                not match its digest, or they are another kernel's.
            Unavailable: the source does not answer, or the device has no memory left.
        """
        template = self.get(kernel_id)
        if template is not None:
            return template
        return await _outcome(self._begin(kernel_id))

    @asynccontextmanager
    async def using(self, kernel_id: str) -> AsyncIterator[KernelTemplate]:
        """`load`, with the kernel pinned inside the block.

        Raises:
            KernelError, Unavailable: as `load`.
        """
        self.pin(kernel_id)
        try:
            yield await self.load(kernel_id)
        finally:
            self.unpin(kernel_id)

    def instantiate(self, template: KernelTemplate, generator_seed: int) -> fx.GraphModule:
        """The function `instantiate`; the kernel stays pinned as long as the module lives.

        Raises:
            KernelError, Unavailable: as the function.
        """
        module = instantiate(template, generator_seed)
        kernel_id = template.manifest.kernel
        self.pin(kernel_id)
        # A module can go at any moment, also while this thread holds the lock.
        weakref.finalize(module, self._left.append, kernel_id).atexit = False
        return module

    def prefetch(self, kernel_ids: Iterable[str]) -> None:
        """Have kernels fetched in the background, one after the other.

        A failure is counted and otherwise left to whoever loads the kernel. Without a loop of the
        cache's own this works inside a coroutine only.
        """
        self._start(self._prefetch(tuple(kernel_ids)))

    def pin(self, kernel_id: str) -> None:
        """Keep the kernel, once it is here, until `unpin`; each pin needs its own."""
        with self._lock:
            self._let_go()
            self._pins[kernel_id] += 1
            template = self._recent.get(kernel_id)
            if template is not None:
                self._pinned[kernel_id] = template
                self._pinned_bytes += template.nbytes
                del self._recent[kernel_id]

    def unpin(self, kernel_id: str) -> None:
        """Undo one `pin`.

        Raises:
            ValueError: the kernel is not pinned.
        """
        with self._lock:
            self._unpin(kernel_id)

    def statistics(self) -> CacheStatistics:
        """Counts and sizes now."""
        with self._lock:
            self._let_go()
            return CacheStatistics(
                hits=self._hits,
                misses=self._counts["misses"],
                shared=self._counts["shared"],
                evictions=self._counts["evictions"],
                failures=self._counts["failures"],
                uncached=self._counts["uncached"],
                entries=len(self._recent) + len(self._pinned),
                pinned=len(self._pinned),
                num_bytes=self._num_bytes,
                max_bytes=self._max_bytes,
                fetched_bytes=self._counts["fetched_bytes"],
                fetch_seconds=self._fetch_seconds,
            )

    def _begin(self, kernel_id: str) -> Future[KernelTemplate]:
        """The fetch of a kernel, begun unless it is under way."""
        with self._lock:
            fetch = self._fetches.get(kernel_id)
            if fetch is not None and not self._stranded(fetch):
                self._counts["shared"] += 1
                return fetch.outcome
            # It may have arrived since the caller looked.
            template = self.get(kernel_id)
            if template is not None:
                arrived: Future[KernelTemplate] = Future()
                arrived.set_result(template)
                return arrived
            self._counts["misses"] += 1
            mine = self._fetches[kernel_id] = _Fetch(self._loop or asyncio.get_running_loop())
        if fetch is not None:
            self._tasks = {task for task in self._tasks if task.get_loop() is not fetch.loop}
            fetch.outcome.set_exception(_broken_off(kernel_id))
        work = self._fetch(kernel_id, mine)
        try:
            self._start(work)
        except RuntimeError as error:  # the loop is closed
            work.close()
            with self._lock:
                del self._fetches[kernel_id]
            raise Unavailable(
                f"kernel {kernel_id}: the event loop that fetches kernels has ended"
            ) from error
        return mine.outcome

    def _stranded(self, fetch: _Fetch) -> bool:
        """Whether nobody carries the fetch on: the loop of whoever began it stands still."""
        return self._loop is None and not fetch.loop.is_running()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        """Run `work` on the source's loop."""
        if self._loop is None or self._loop is _running_loop():
            self._keep_running(work)
        else:
            self._loop.call_soon_threadsafe(self._keep_running, work)

    def _keep_running(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # a loop alone would let go of it
        task.add_done_callback(self._tasks.discard)

    async def _prefetch(self, kernel_ids: tuple[str, ...]) -> None:
        for kernel_id in kernel_ids:
            if kernel_id not in self._recent and kernel_id not in self._pinned:
                with suppress(EsperError):
                    await _outcome(self._begin(kernel_id))

    async def _fetch(self, kernel_id: str, fetch: _Fetch) -> None:
        started = time.perf_counter()
        found: KernelTemplate | BaseException
        try:
            found = await self._fetched(kernel_id)
        except BaseException as error:
            found = error
        with self._lock:
            self._fetch_seconds += time.perf_counter() - started
            if self._fetches.get(kernel_id) is not fetch:
                return  # whoever waited was told that it had been broken off
            del self._fetches[kernel_id]
            if isinstance(found, KernelTemplate):
                self._keep(kernel_id, found)
            else:
                self._counts["failures"] += 1
        if isinstance(found, KernelTemplate):
            fetch.outcome.set_result(found)
        elif isinstance(found, Exception):
            fetch.outcome.set_exception(_own(found, kernel_id))
        else:
            fetch.outcome.set_exception(_broken_off(kernel_id))
            raise found

    async def _fetched(self, kernel_id: str) -> KernelTemplate:
        metadata = await self._source.metadata(kernel_id)
        self._refuse_larger(kernel_id, metadata.artifact_bytes)
        data = await self._source.artifact(kernel_id)
        with self._lock:
            self._counts["fetched_bytes"] += len(data)
        template = await asyncio.to_thread(self._prepared, data, metadata.artifact_digest)
        if template.manifest.kernel != kernel_id:
            raise KernelError(
                f"kernel {kernel_id}: got the artifact of kernel {template.manifest.kernel}"
            )
        self._refuse_larger(kernel_id, template.nbytes)
        return template

    def _refuse_larger(self, kernel_id: str, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise KernelError(
                f"kernel {kernel_id}: got {num_bytes} bytes; allowed: at most "
                f"{self._max_bytes}, the kernel cache's size; see component.kernel_cache_bytes"
            )

    def _prepared(self, data: bytes, digest: str) -> KernelTemplate:
        """The template of an artifact, its fixed tensors on the layer's device or on their way."""
        template = unpack(data, digest)
        if not template.tensors:
            return template
        try:
            return self._placed(template, torch.device(template.target.device))
        except _REFUSALS as error:
            raise _translated(error, template) from error

    def _placed(self, template: KernelTemplate, device: torch.device) -> KernelTemplate:
        if device.type == "cuda":
            with self._lock:
                staging = self._staging.get(device)
                if staging is None:
                    staging = self._staging[device] = Staging(device)
            landed, arrival = staging.copy(template.tensors)
            return replace(template, tensors=MappingProxyType(landed), arrival=arrival)
        landed = {name: tensor.to(device) for name, tensor in template.tensors.items()}
        return replace(template, tensors=MappingProxyType(landed))

    def _unpin(self, kernel_id: str) -> None:
        if self._pins[kernel_id] < 1:
            raise ValueError(f"unpin: got {kernel_id}; allowed: a pinned kernel")
        self._pins[kernel_id] -= 1
        if self._pins[kernel_id]:
            return
        del self._pins[kernel_id]
        template = self._pinned.get(kernel_id)
        if template is not None:
            self._recent[kernel_id] = template
            self._pinned_bytes -= template.nbytes
            del self._pinned[kernel_id]

    def _let_go(self) -> None:
        """Unpin what `instantiate` pinned for modules that are gone."""
        while self._left:
            self._unpin(self._left.popleft())

    def _keep(self, kernel_id: str, template: KernelTemplate) -> None:
        """Take a template in, if there is room for it beside the pinned ones; holds the lock."""
        self._let_go()
        if self._pinned_bytes + template.nbytes > self._max_bytes:
            self._counts["uncached"] += 1
            return
        while self._num_bytes + template.nbytes > self._max_bytes:
            _, evicted = self._recent.popitem(last=False)
            self._num_bytes -= evicted.nbytes
            self._counts["evictions"] += 1
        self._num_bytes += template.nbytes
        if kernel_id in self._pins:
            self._pinned_bytes += template.nbytes
            self._pinned[kernel_id] = template
        else:
            self._recent[kernel_id] = template


def instantiate(template: KernelTemplate, generator_seed: int) -> fx.GraphModule:
    """A trainable module: fixed weights copied, the others drawn from `generator_seed`.

    The template stays as it is; every seed has parameters of its own.

    Raises:
        Unavailable: the device has no memory left for it.
        KernelError: torch can't build it on the target's device.
    """
    try:
        return _instantiated(template, generator_seed)
    except _REFUSALS as error:
        # The half-built module would live, and keep its memory, as long as the error does.
        traceback.clear_frames(error.__traceback__)
        raise _translated(error, template) from error


@torch.no_grad()
def _instantiated(template: KernelTemplate, generator_seed: int) -> fx.GraphModule:
    module = cloned(template.skeleton, template.target.device)
    draw_weights(module, template.graph, generator_seed)
    if template.arrival is not None:
        take(template.tensors, template.arrival)
    for name, tensor in template.tensors.items():
        module.get_parameter(name).copy_(tensor)
    return module


def _translated(error: Exception, template: KernelTemplate) -> EsperError:
    """Memory that has run out may come back; anything else that torch refuses stays refused."""
    kernel, device = template.manifest.kernel, template.target.device
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate" in str(error):
        needed = sum(parameter.nbytes for parameter in template.skeleton.parameters())
        return Unavailable(
            f"kernel {kernel}: no memory left on {device} for {needed} bytes of weights; allowed: "
            "as much as is free; see growth.budget.activeSeeds"
        )
    return KernelError(f"kernel {kernel}: can't be built on {device}: {one_line(str(error))}")


def _own(error: Exception, kernel_id: str) -> EsperError:
    """A source's own errors as they are; what it let through may heal if the system said it."""
    if isinstance(error, EsperError):
        return error
    reason = f"kernel {kernel_id}: its source failed: {type(error).__name__}"
    kind = Unavailable if isinstance(error, OSError | asyncio.TimeoutError) else KernelError
    translated = kind(f"{reason}: {one_line(str(error))}" if str(error) else reason)
    translated.__cause__ = error
    return translated


def _broken_off(kernel_id: str) -> Unavailable:
    return Unavailable(f"kernel {kernel_id}: its fetch was broken off")


async def _outcome(fetch: Future[KernelTemplate]) -> KernelTemplate:
    """What a fetch ends in; one of several that wait may be cancelled, the fetch goes on."""
    waiting = asyncio.wrap_future(fetch)
    waiting.add_done_callback(_take_note)
    return await asyncio.shield(waiting)


def _take_note(waiting: asyncio.Future[KernelTemplate]) -> None:
    """Take note of an error also where whoever asked no longer waits."""
    if not waiting.cancelled():
        waiting.exception()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    with suppress(RuntimeError):
        return asyncio.get_running_loop()
    return None
