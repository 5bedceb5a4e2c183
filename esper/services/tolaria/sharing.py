"""Boundaries of a session of several ranks: rank 0 asks, and all ranks act on its answer.

Rank 0 alone talks to bus and hub. A decision is told to all. A graft is a protocol: rank 0 has the
kernel settled and sends its bytes; every rank verifies and builds it, and all commit or none does:
whatever goes wrong on one rank is raised on all. That the modules are equal is proven by a digest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from esper.contracts.blueprints import BlueprintDocument, KernelTarget, lower
from esper.contracts.ir import source_of
from esper.contracts.kernels import KernelMetadata
from esper.contracts.operational import AdaptationDecision, SystemStatePacket
from esper.errors import KernelError
from esper.execution.kernel_cache import KernelCache
from esper.services.tolaria.distribution import Ranks, as_wire, first_failure
from esper.services.tolaria.flat import module_digest
from esper.services.tolaria.growth import BuiltSeed
from esper.services.tolaria.news import News
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.trainer import Controller


class SharedController:
    """The controller of a session of several ranks: rank 0's, its decisions told to all."""

    def __init__(self, ranks: Ranks, controller: Controller | None) -> None:
        """`controller` is rank 0's; the others have none."""
        self._ranks = ranks
        self._controller = controller

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        """The decision about `packet`; every rank has made the same one.

        Raises:
            EsperError: what rank 0 was answered, or was asked to stop meanwhile.
        """

        async def asked() -> Any:
            assert self._controller is not None
            return (await self._controller.decide(packet)).to_wire()

        return AdaptationDecision.model_validate(await self._ranks.awaited(asked))

    async def tell(self, news: Sequence[News]) -> None:
        """Have rank 0 publish what happened; the others wait as long as it does."""

        async def told() -> None:
            assert self._controller is not None
            await self._controller.tell(news)

        await self._ranks.awaited(told)


class Kernels(Protocol):
    """Where rank 0 gets kernels."""

    async def settled(self, document: BlueprintDocument, target: KernelTarget) -> str:
        """The id of the kernel, once it is compiled."""
        ...

    async def fetched(self, kernel_id: str) -> tuple[KernelMetadata, bytes]:
        """A compiled kernel's metadata and artifact."""
        ...


class Delivery:
    """A kernel source that holds what came last; for `KernelCache`."""

    def __init__(self) -> None:
        self._kernel = ""
        self._metadata: KernelMetadata | None = None
        self._data = b""

    def bring(self, kernel_id: str, metadata: KernelMetadata, data: bytes) -> None:
        """Hold this kernel until the next one comes."""
        self._kernel, self._metadata, self._data = kernel_id, metadata, data

    async def metadata(self, kernel_id: str, /) -> KernelMetadata:
        """The metadata of the kernel held.

        Raises:
            KernelError: it is another one.
        """
        if self._metadata is None or kernel_id != self._kernel:
            raise KernelError(f"kernel {kernel_id}: was not brought to this rank")
        return self._metadata

    async def artifact(self, kernel_id: str, /) -> bytes:
        """The bytes of the kernel held.

        Raises:
            KernelError: it is another one.
        """
        await self.metadata(kernel_id)
        return self._data


class SharedKernels:
    """Seeds built on every rank or on none, for `growth.KernelSupply`."""

    def __init__(self, ranks: Ranks, seed: int, kernels: Kernels | None, max_bytes: int) -> None:
        """`kernels` is rank 0's; `seed` the session's; `max_bytes` what a rank's cache holds."""
        self._ranks = ranks
        self._seed = seed
        self._kernels = kernels
        self._delivery = Delivery()
        self._cache = KernelCache(self._delivery, max_bytes=max_bytes)

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        """The seed's module, equal on all ranks.

        Raises:
            EsperError: what went wrong on the lowest rank on which something did.
        """

        async def settled() -> str:
            assert self._kernels is not None
            return await self._kernels.settled(document, target)

        kernel: str = await self._ranks.awaited(settled)
        missing = any(self._ranks.exchanged(self._cache.get(kernel) is None))
        brought = await self._brought(kernel) if missing else None
        module: nn.Module | None = None
        try:
            if brought is not None:
                self._delivery.bring(kernel, *brought)
            template = await self._cache.load(kernel)
            drawn = stable_seed(self._seed, layer, slot, kernel)
            module = self._cache.instantiate(template, generator_seed=drawn)
            outcome: dict[str, Any] = {"digest": module_digest(module)}
        except Exception as error:
            outcome = as_wire(error)
        outcomes = self._ranks.exchanged(outcome)
        failure = first_failure(outcomes)
        if failure is not None:
            raise failure
        digests = [one["digest"] for one in outcomes]
        if len(set(digests)) > 1 or module is None:
            raise KernelError(
                f"kernel {kernel}: got modules of digests {', '.join(d[:12] for d in digests)}; "
                "allowed: the same on every rank"
            )
        graph = lower(document, target)
        return BuiltSeed(module=module, kernel=kernel, graph=graph, source=source_of(graph))

    async def _brought(self, kernel: str) -> tuple[KernelMetadata, bytes]:
        """What rank 0 fetches of the kernel, on every rank."""
        data = b""

        async def fetched() -> Any:
            nonlocal data
            assert self._kernels is not None
            metadata, data = await self._kernels.fetched(kernel)
            return metadata.model_dump(mode="json", by_alias=True)

        metadata = KernelMetadata.model_validate(await self._ranks.awaited(fetched))
        return metadata, self._ranks.told_bytes(data if self._ranks.rank == 0 else None)
