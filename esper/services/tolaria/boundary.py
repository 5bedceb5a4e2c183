"""Tolaria's side of a boundary: a packet and its decision over Oona, a kernel through the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget, lower
from esper.contracts.enums import BlueprintState, ComponentType
from esper.contracts.ir import source_of
from esper.contracts.messages import KernelReady, KernelRequested, OonaMessage, TopicNames
from esper.contracts.operational import (
    AdaptationDecision,
    SeedTransition,
    SessionEvent,
    SystemStatePacket,
)
from esper.errors import HubUnavailable, KernelError
from esper.execution.kernel_cache import KernelCache
from esper.services.oona_client import Oona
from esper.services.tolaria.engine import stable_seed
from esper.services.tolaria.growth import BuiltSeed

OPEN_STATES = (BlueprintState.PROPOSED, BlueprintState.COMPILING, BlueprintState.VALIDATING)


class BusController:
    """The controller at the other end of the bus: publishes a packet, waits for its decision.

    In one process patience is endless: the rendezvous is what makes a run repeatable.
    """

    def __init__(self, bus: Oona) -> None:
        self._bus = bus
        self._trace: str | None = None
        self._decisions = bus.subscribe({TopicNames.DECISIONS}, group="tolaria")

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        """The decision about `packet`; answers to other packets are passed over.

        Raises:
            BusUnavailable: the bus is closed.
        """
        asked = OonaMessage.carrying(TopicNames.PACKETS, packet, ComponentType.TOLARIA)
        await self._bus.publish(asked)
        while True:
            answer = await self._decisions.receive()
            await self._decisions.acknowledge(answer)
            if answer.trace_id == asked.trace_id:
                self._trace = asked.trace_id
                return AdaptationDecision.model_validate(answer.payload)

    async def tell(self, news: Sequence[SeedTransition | SessionEvent]) -> None:
        """Publish what happened, in order, under the trace of the last decision.

        Raises:
            BusUnavailable: the bus is closed.
        """
        for item in news:
            topic = (
                TopicNames.TRANSITIONS if isinstance(item, SeedTransition) else TopicNames.EVENTS
            )
            await self._bus.publish(
                OonaMessage.carrying(topic, item, ComponentType.TOLARIA, trace_id=self._trace)
            )


class KernelRequests(Protocol):
    """The part of the hub that Tolaria asks for kernels."""

    async def request_kernel(self, blueprint_digest: str, target: KernelTarget) -> CompiledKernel:
        """The kernel of that blueprint for that target, proposed unless it is there."""


class HubKernels:
    """Kernels from the hub: asked for, awaited, verified by the cache, cloned into a module."""

    def __init__(
        self, session: str, seed: int, bus: Oona, hub: KernelRequests, cache: KernelCache
    ) -> None:
        """`seed` is the session's: with the slot and the IR it fixes a module's first weights."""
        self._session = session
        self._seed = seed
        self._bus = bus
        self._hub = hub
        self._cache = cache
        self._ready = bus.subscribe({TopicNames.KERNEL_READY}, group="tolaria")

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        """The seed's module, for `growth.KernelSupply`.

        Raises:
            KernelError: the kernel failed to compile or to verify.
            Unavailable: the hub, the bus, the store or the forge did not do its part.
        """
        kernel = await self._hub.request_kernel(document.digest, target)
        if kernel.state in OPEN_STATES:
            await self._compiled(kernel, document, target)
        elif kernel.state is BlueprintState.FAILED:
            raise KernelError(f"kernel {kernel.kernel}: {kernel.error}")
        template = await self._cache.load(kernel.kernel)
        drawn = stable_seed(self._seed, layer, slot, kernel.kernel)
        graph = lower(document, target)
        return BuiltSeed(
            module=self._cache.instantiate(template, generator_seed=drawn),
            kernel=kernel.kernel,
            graph=graph,
            source=source_of(graph),
        )

    async def _compiled(
        self, kernel: CompiledKernel, document: BlueprintDocument, target: KernelTarget
    ) -> None:
        request = KernelRequested(
            session=self._session,
            kernel=kernel.kernel,
            blueprint=document.name,
            blueprint_digest=document.digest,
            target=target,
        )
        await self._bus.publish(
            OonaMessage.carrying(TopicNames.KERNEL_REQUESTED, request, ComponentType.TOLARIA)
        )
        while True:
            message = await self._ready.receive()
            await self._ready.acknowledge(message)
            ready = KernelReady.model_validate(message.payload)
            if ready.kernel != kernel.kernel:
                continue
            if ready.error is None:
                return
            now = await self._hub.request_kernel(document.digest, target)
            if now.state is BlueprintState.FAILED:
                raise KernelError(f"kernel {kernel.kernel}: {ready.error}")
            # The forge gave it back unjudged, for want of room or of an answer from the store.
            raise HubUnavailable(f"kernel {kernel.kernel}: {ready.error}")
