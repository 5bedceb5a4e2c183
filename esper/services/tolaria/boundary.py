"""Tolaria's side of a boundary: a packet and its decision over Oona, a kernel through the hub."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, Self

from pydantic import ValidationError

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget, lower
from esper.contracts.enums import BlueprintState, ComponentType, DecisionAction
from esper.contracts.ir import source_of
from esper.contracts.kernels import KernelMetadata
from esper.contracts.messages import KernelReady, KernelRequested, OonaMessage, TopicNames
from esper.contracts.operational import AdaptationDecision, SeedTransition, SystemStatePacket
from esper.errors import BadInput, EsperError, HubUnavailable, KernelError, one_line
from esper.execution.kernel_cache import KernelCache, KernelSource
from esper.services.oona_client import Oona, Subscription
from esper.services.tolaria.growth import BuiltSeed
from esper.services.tolaria.news import News
from esper.services.tolaria.patience import BUS, HUB, IN_PROCESS, Patience, PatienceEnded, Wait
from esper.services.tolaria.randomness import stable_seed
from esper.utils.logging import current_trace_id

CONSUMER_GROUP = "tolaria"
OPEN_STATES = (BlueprintState.PROPOSED, BlueprintState.COMPILING, BlueprintState.VALIDATING)
_RECONNECT_SECONDS = 0.5
_LOOK_SECONDS = 0.05

_log = logging.getLogger(__name__)


class Inbox:
    """What came on a topic, received in the background; `open` makes it.

    Where the bus may be away (`patience.lasting`), it is gone back to for as long as it takes.
    """

    def __init__(self, bus: Oona, topic: TopicNames, patience: Patience) -> None:
        self._bus = bus
        self._topic = topic
        self._patience = patience
        self._came: asyncio.Queue[OonaMessage | EsperError] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, bus: Oona, topic: TopicNames, patience: Patience) -> Self:
        """The inbox of `topic`; what is published from now on comes in.

        Raises:
            BusUnavailable: the bus does not answer, and is not waited for.
        """
        inbox = cls(bus, topic, patience)
        first = None if patience.lasting else await inbox._subscribed()
        inbox._task = asyncio.create_task(inbox._receive(first), name=f"inbox of {topic}")
        return inbox

    async def take(self) -> OonaMessage:
        """The next message; may be cancelled at any time without losing one.

        Raises:
            EsperError: what ended the receiving.
        """
        came = await self._came.get()
        if isinstance(came, EsperError):
            self._came.put_nowait(came)
            raise came
        return came

    async def close(self) -> None:
        """Receive no more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _subscribed(self) -> Subscription:
        return await self._bus.subscribe({self._topic}, group=CONSUMER_GROUP)

    async def _receive(self, subscription: Subscription | None) -> None:
        while True:
            try:
                subscription = subscription or await self._subscribed()
                self._patience.accepted.add(BUS)
                while True:
                    message = await subscription.receive()
                    # A question that was not answered is asked again, so nothing hangs on this.
                    await subscription.acknowledge(message)
                    self._came.put_nowait(message)
            except EsperError as error:
                refused = isinstance(error, BadInput) and not self._patience.once_accepted(error)
                if refused or not self._patience.lasting:
                    self._came.put_nowait(error)
                    return
                _log.warning("nothing is heard on %s at the moment: %s", self._topic, error)
            finally:
                if subscription is not None:
                    with suppress(EsperError):
                        await subscription.close()
            subscription = None
            await asyncio.sleep(_RECONNECT_SECONDS)


class BusController:
    """The controller at the other end of the bus: publishes a packet, waits for its decision.

    In one process patience is endless: the rendezvous is what makes a run repeatable. Over the
    wire a packet is published again and again under one id until its decision comes; news that
    the bus does not take are kept and published in order, later.
    """

    def __init__(
        self, bus: Oona, decisions: Inbox, *, scope: str = "", patience: Patience = IN_PROCESS
    ) -> None:
        """`over` makes it, with its place in the queue of decisions."""
        self._bus = bus
        self._scope = scope
        self._patience = patience
        self._decisions = decisions
        self._outbox: deque[OonaMessage] = deque()

    @classmethod
    async def over(cls, bus: Oona, *, scope: str = "", patience: Patience = IN_PROCESS) -> Self:
        """The controller at the other end of `bus`, for the session whose uid is `scope`.

        Raises:
            BusUnavailable: the bus is closed, or does not answer and is not waited for.
        """
        inbox = await Inbox.open(bus, TopicNames.DECISIONS, patience)
        return cls(bus, inbox, scope=scope, patience=patience)

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        """The decision about `packet`; answers to other packets are passed over.

        When patience ends it is to wait, and the decision says so.

        Raises:
            BusUnavailable: the bus is closed.
            ConfigError: the bus refuses the user, and never has accepted it.
            Interrupted: the run was asked to stop.
        """
        asked = OonaMessage.carrying(
            TopicNames.PACKETS,
            packet,
            ComponentType.TOLARIA,
            trace_id=current_trace_id(),
            scope=self._scope,
        )
        wait = self._patience.begin()
        try:
            while True:
                await wait.outlast(lambda: self._bus.publish(asked))
                answer = self._answer(asked.trace_id)
                if not self._patience.lasting:
                    return await answer
                decision = await wait.within(answer, self._patience.ask_again_seconds)
                if decision is not None:
                    return decision
                _log.info("packet %d got no decision yet, it is sent again", packet.sequence)
        except PatienceEnded as error:
            _log.warning("packet %d got no decision: %s", packet.sequence, error)
            return AdaptationDecision.make(
                packet, DecisionAction.WAIT, f"waited for a decision and got none: {error}"
            )

    async def tell(self, news: Sequence[News]) -> None:
        """Publish what happened, in order, each under its trace.

        What the bus does not take while patience lasts is kept for the next time.

        Raises:
            BusUnavailable: the bus is closed.
            Interrupted: the run was asked to stop.
        """
        self._outbox.extend(self._message(one) for one in news)
        wait = self._patience.begin()
        try:
            while self._outbox:
                message = self._outbox[0]
                await wait.outlast(lambda m=message: self._bus.publish(m))  # type: ignore[misc]
                self._outbox.popleft()
        except PatienceEnded as error:
            _log.warning("%d news are kept for later: %s", len(self._outbox), error)

    async def finish(self) -> None:
        """Get out what the bus has not taken yet, while patience lasts; then listen no more.

        Raises:
            Interrupted: the run was asked to stop; a resumed run tells it again.
        """
        await self.tell(())
        if self._patience.lasting:
            wait = self._patience.begin()
            try:
                while self._bus.statistics().buffered:
                    await wait.within(asyncio.sleep(_LOOK_SECONDS), 1.0)
            except PatienceEnded as error:
                _log.warning("not all news got out: %s", error)
        await self.close()

    async def close(self) -> None:
        """Listen no more."""
        await self._decisions.close()

    async def _answer(self, trace_id: str) -> AdaptationDecision:
        while True:
            answer = await self._decisions.take()
            if answer.trace_id != trace_id:
                continue
            try:
                return AdaptationDecision.model_validate(answer.payload)
            except ValidationError as error:
                if not self._patience.lasting:
                    raise
                reason = one_line(str(error))
                _log.error("decision %s is not of the contract: %s", answer.id, reason)

    def _message(self, news: News) -> OonaMessage:
        transition = isinstance(news.item, SeedTransition)
        message = OonaMessage.carrying(
            TopicNames.TRANSITIONS if transition else TopicNames.EVENTS,
            news.item,
            ComponentType.TOLARIA,
            trace_id=news.trace_id,
            scope=self._scope,
        )
        return message.model_copy(update={"id": news.message_id(self._scope)})


class KernelRequests(Protocol):
    """The part of the hub that Tolaria asks for kernels."""

    async def request_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> CompiledKernel:
        """The kernel of that blueprint for that target, proposed unless it is there.

        `session` is the uid of the session that uses it.
        """


class KernelHub(KernelRequests, KernelSource, Protocol):
    """A hub that also gives out the kernels that it keeps."""


class HubKernels:
    """Kernels from the hub: asked for, awaited, verified by the cache, cloned into a module."""

    def __init__(
        self,
        session: str,
        seed: int,
        bus: Oona,
        hub: KernelHub,
        cache: KernelCache,
        ready: Inbox,
        *,
        scope: str = "",
        patience: Patience = IN_PROCESS,
    ) -> None:
        """`seed` is the session's: with the slot and the IR it fixes a module's first weights.

        `over` makes it, with its place in the queue of answers.
        """
        self._session = session
        self._seed = seed
        self._bus = bus
        self._hub = hub
        self._cache = cache
        self._ready = ready
        self._scope = scope
        self._patience = patience

    @classmethod
    async def over(
        cls,
        session: str,
        seed: int,
        bus: Oona,
        hub: KernelHub,
        cache: KernelCache,
        *,
        scope: str = "",
        patience: Patience = IN_PROCESS,
    ) -> Self:
        """The kernels that `hub` has and that the forge at the other end of `bus` makes.

        Raises:
            BusUnavailable: the bus is closed, or does not answer and is not waited for.
        """
        ready = await Inbox.open(bus, TopicNames.KERNEL_READY, patience)
        return cls(session, seed, bus, hub, cache, ready, scope=scope, patience=patience)

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        """The seed's module, for `growth.KernelSupply`.

        Raises:
            KernelError: the kernel failed to compile or to verify.
            Unavailable: the hub, the bus, the store or the forge did not do its part, in as much
                time as the session gives them.
            Interrupted: the run was asked to stop.
        """
        wait = self._patience.begin()
        return await wait.outlast(lambda: self._built(document, target, layer, slot, wait), by=HUB)

    async def settled(self, document: BlueprintDocument, target: KernelTarget) -> str:
        """The id of the kernel once it is compiled, for `sharing.Kernels`.

        Raises:
            EsperError: as `build`, but for what is wrong with its bytes.
        """
        wait = self._patience.begin()
        kernel = await wait.outlast(lambda: self._settled(document, target, wait), by=HUB)
        return kernel.kernel

    async def fetched(self, kernel_id: str) -> tuple[KernelMetadata, bytes]:
        """A compiled kernel's metadata and artifact, for `sharing.Kernels`.

        Raises:
            EsperError: as `build`.
        """
        wait = self._patience.begin()
        metadata = await wait.outlast(lambda: self._hub.metadata(kernel_id), by=HUB)
        return metadata, await wait.outlast(lambda: self._hub.artifact(kernel_id), by=HUB)

    async def close(self) -> None:
        """Listen no more."""
        await self._ready.close()

    async def _built(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int, wait: Wait
    ) -> BuiltSeed:
        kernel = await self._settled(document, target, wait)
        template = await self._cache.load(kernel.kernel)
        drawn = stable_seed(self._seed, layer, slot, kernel.kernel)
        graph = lower(document, target)
        return BuiltSeed(
            module=self._cache.instantiate(template, generator_seed=drawn),
            kernel=kernel.kernel,
            graph=graph,
            source=source_of(graph),
        )

    async def _settled(
        self, document: BlueprintDocument, target: KernelTarget, wait: Wait
    ) -> CompiledKernel:
        kernel = await self._requested(document, target)
        while kernel.state in OPEN_STATES:
            kernel = await self._compiled(kernel, document, target, wait)
        if kernel.state is BlueprintState.FAILED:
            raise KernelError(f"kernel {kernel.kernel}: {kernel.error}")
        return kernel

    async def _compiled(
        self,
        kernel: CompiledKernel,
        document: BlueprintDocument,
        target: KernelTarget,
        wait: Wait,
    ) -> CompiledKernel:
        """The kernel once it is settled, or after a while in which nothing was heard of it."""
        request = KernelRequested(
            session=self._session,
            kernel=kernel.kernel,
            blueprint=document.name,
            blueprint_digest=document.digest,
            target=target,
        )
        await self._bus.publish(
            OonaMessage.carrying(
                TopicNames.KERNEL_REQUESTED,
                request,
                ComponentType.TOLARIA,
                trace_id=current_trace_id(),
                scope=self._scope,
            )
        )
        if not self._patience.lasting:
            return await self._told(kernel, document, target)
        loop = asyncio.get_running_loop()
        end = loop.time() + self._patience.ask_again_seconds
        while kernel.state in OPEN_STATES and loop.time() < end:
            # The answer may be lost, or go to another session that asked before: look as well.
            told = self._told(kernel, document, target)
            kernel = await wait.within(told, self._patience.look_seconds) or await self._requested(
                document, target
            )
        return kernel

    async def _requested(self, document: BlueprintDocument, target: KernelTarget) -> CompiledKernel:
        return await self._hub.request_kernel(document.digest, target, session=self._scope or None)

    async def _told(
        self, kernel: CompiledKernel, document: BlueprintDocument, target: KernelTarget
    ) -> CompiledKernel:
        """The kernel as it stands once the forge has answered.

        Raises:
            HubUnavailable: the forge gave it back.
        """
        while True:
            message = await self._ready.take()
            try:
                ready = KernelReady.model_validate(message.payload)
            except ValidationError as error:
                reason = one_line(str(error))
                _log.error("answer %s is not of the contract: %s", message.id, reason)
                continue
            if ready.kernel != kernel.kernel:
                continue
            now = await self._requested(document, target)
            if now.state in OPEN_STATES:
                # Unjudged, for want of room or of an answer from the store.
                raise HubUnavailable(
                    f"kernel {kernel.kernel}: {ready.error or 'it is not settled'}"
                )
            return now
