"""Compiled kernels, kept in memory: bounded in bytes, each fetched once however many ask.

A forward pass never looks anything up here: a layer holds the module that `instantiate` made of a
template. The cache saves fetching, verifying and parsing when a kernel is used again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import fx

from esper.contracts.kernels import KernelMetadata
from esper.errors import KernelError
from esper.execution.artifact import KernelTemplate, unpack
from esper.execution.builders import build

DEFAULT_MAX_BYTES = 512 * 2**20


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

    `shared` counts loads that waited for a fetch which another load had begun.
    """

    hits: int
    misses: int
    shared: int
    evictions: int
    entries: int
    pinned: int
    num_bytes: int
    max_bytes: int


class KernelCache:
    """Least recently used templates go first; pinned ones stay."""

    def __init__(self, source: KernelSource, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._source = source
        self._max_bytes = max_bytes
        self._templates: OrderedDict[str, KernelTemplate] = OrderedDict()
        self._fetches: dict[str, asyncio.Task[KernelTemplate]] = {}
        self._pins: Counter[str] = Counter()
        self._num_bytes = 0
        self._counts: Counter[str] = Counter()

    async def load(self, kernel_id: str) -> KernelTemplate:
        """The verified template of a kernel, from memory or from the source.

        Raises:
            KernelError: the kernel is unknown or failed, is larger than the cache, its bytes do
                not match its digest, or they are another kernel's.
            Unavailable: the source does not answer.
        """
        template = self._templates.get(kernel_id)
        if template is not None:
            self._templates.move_to_end(kernel_id)
            self._counts["hits"] += 1
            return template
        fetch = self._fetches.get(kernel_id)
        if fetch is None:
            self._counts["misses"] += 1
            fetch = asyncio.create_task(self._fetch(kernel_id))
            self._fetches[kernel_id] = fetch
            fetch.add_done_callback(lambda done: self._finish(kernel_id, done))
        else:
            self._counts["shared"] += 1
        # One of several that wait may be cancelled; the fetch goes on for the others.
        return await asyncio.shield(fetch)

    def pin(self, kernel_id: str) -> None:
        """Keep the kernel while a seed lives on it; each pin needs its own `unpin`."""
        self._pins[kernel_id] += 1

    def unpin(self, kernel_id: str) -> None:
        """Undo one `pin`.

        Raises:
            ValueError: the kernel is not pinned.
        """
        if self._pins[kernel_id] < 1:
            raise ValueError(f"unpin: got {kernel_id}; allowed: a pinned kernel")
        self._pins[kernel_id] -= 1
        self._evict()

    def statistics(self) -> CacheStatistics:
        """Counts and sizes now."""
        return CacheStatistics(
            hits=self._counts["hits"],
            misses=self._counts["misses"],
            shared=self._counts["shared"],
            evictions=self._counts["evictions"],
            entries=len(self._templates),
            pinned=sum(self._pins[kernel_id] > 0 for kernel_id in self._templates),
            num_bytes=self._num_bytes,
            max_bytes=self._max_bytes,
        )

    async def _fetch(self, kernel_id: str) -> KernelTemplate:
        metadata = await self._source.metadata(kernel_id)
        if metadata.artifact_bytes > self._max_bytes:
            raise KernelError(
                f"kernel {kernel_id}: got {metadata.artifact_bytes} bytes; allowed: at most "
                f"{self._max_bytes}, the kernel cache's size"
            )
        template = unpack(await self._source.artifact(kernel_id), metadata.artifact_digest)
        if template.manifest.kernel != kernel_id:
            raise KernelError(
                f"kernel {kernel_id}: got the artifact of kernel {template.manifest.kernel}"
            )
        self._templates[kernel_id] = template
        self._num_bytes += template.nbytes
        self._evict()
        return template

    def _finish(self, kernel_id: str, fetch: asyncio.Task[KernelTemplate]) -> None:
        del self._fetches[kernel_id]
        if not fetch.cancelled():
            fetch.exception()  # taken note of, also where whoever asked no longer waits

    def _evict(self) -> None:
        for kernel_id in list(self._templates):
            if self._num_bytes <= self._max_bytes:
                return
            if self._pins[kernel_id] == 0:
                self._num_bytes -= self._templates.pop(kernel_id).nbytes
                self._counts["evictions"] += 1


def instantiate(template: KernelTemplate, generator_seed: int) -> fx.GraphModule:
    """A trainable module: fixed weights copied, the others drawn from `generator_seed`.

    The template stays as it is; every seed has parameters of its own.
    """
    module = build(template.graph, template.target, generator_seed=generator_seed)
    with torch.no_grad():
        for name, tensor in template.tensors.items():
            module.get_parameter(name).copy_(tensor)
    return module
