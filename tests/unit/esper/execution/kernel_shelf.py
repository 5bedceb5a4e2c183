"""A source of compiled kernels for tests: small ones, in memory."""

from __future__ import annotations

import asyncio
from collections import Counter

import torch

from esper.contracts.blueprints import builtin, infer, kernel_id, lower
from esper.contracts.kernels import KernelManifest, KernelMetadata
from esper.errors import KernelError
from esper.execution.artifact import artifact_digest, pack, unpack
from tests.unit.esper.kernel_targets import linear_place

TARGET = linear_place(6, 4).target


class Shelf:
    """Kernels in memory, behind the port that the hub satisfies."""

    def __init__(self) -> None:
        self.artifacts: dict[str, bytes] = {}
        self.known: dict[str, KernelMetadata] = {}
        self.asked: Counter[str] = Counter()
        self.fetched: Counter[str] = Counter()
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
        self.fetched[kernel_id] += 1
        await asyncio.sleep(0)
        return self.artifacts[kernel_id]


def size(shelf: Shelf, kernel: str) -> int:
    return unpack(shelf.artifacts[kernel], shelf.known[kernel].artifact_digest).nbytes


def room_for(shelf: Shelf, kernels: list[str]) -> int:
    return sum(size(shelf, kernel) for kernel in kernels)
