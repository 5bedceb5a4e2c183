"""The controller's loop: every packet is analysed, decided on, and answered exactly once.

A trainer waits at the interval boundary for its answer, so the loop answers whatever happens: a
policy that fails costs its decision, not the run.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import NamedTuple

from pydantic import ValidationError

from esper.contracts.base import digest_of
from esper.contracts.enums import ComponentType, ControllerPolicy, DecisionAction
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import AdaptationDecision, SystemStatePacket
from esper.errors import BusUnavailable, one_line
from esper.services.listening import keep_listening, listen
from esper.services.oona_client import Oona, Subscription
from esper.services.tamiyo.analyzer import KEPT_SESSIONS, ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import POLICIES, Policy
from esper.services.tamiyo.policies.room import wait

CONSUMER_GROUP = "tamiyo"
KEPT_ANSWERS = 1024

_log = logging.getLogger(__name__)


class _Seen(NamedTuple):
    """The last packet of a session that the averages know: its number, its message's id."""

    sequence: int
    id: str


class TamiyoService:
    """Answers each packet on the bus with one decision of the same trace.

    It holds no state but the analyzer's averages. Over the wire (`lasting`) it outlasts a bus that
    is away, and rebuilds the averages of a session from the packets that the bus still keeps,
    whenever a packet does not follow the last one it has seen: it is new, or another Tamiyo of the
    same namespace got those between. A message is acknowledged after its answer is published: a
    crash in between makes the same decision again, with the same id, and the trainer applies an
    id once.
    """

    def __init__(
        self,
        bus: Oona,
        *,
        analyzer: ModelGraphAnalyzer | None = None,
        policies: Mapping[ControllerPolicy, Policy] = POLICIES,
        lasting: bool = False,
    ) -> None:
        """Args: `bus` to listen and answer on; `policies` by the name a session gives them."""
        self._bus = bus
        self._analyzer = analyzer or ModelGraphAnalyzer()
        self._policies = policies
        self._lasting = lasting
        self._seen: OrderedDict[tuple[str, str], _Seen] = OrderedDict()
        self._answered: OrderedDict[str, AdaptationDecision] = OrderedDict()
        self._task: asyncio.Task[None] | None = None
        self.counts = dict.fromkeys(("decisions_total", "replayed_total"), 0)

    @property
    def running(self) -> bool:
        """Whether packets are being answered."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Subscribe and answer from now on; a second call while running changes nothing.

        Packets published after this returns are answered. A stopped service can be started again.
        """
        if self.running:
            return
        if self._lasting:
            listening = keep_listening(self._subscribe, self._handle)
        else:
            listening = self._listen(await self._subscribe())
        self._task = asyncio.create_task(listening, name="tamiyo")

    async def stop(self) -> None:
        """Stop answering; returns when the loop has ended.

        Raises:
            Exception: whatever ended the loop before, so that no failure goes unseen.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended

    def replay(self, packets: Iterable[SystemStatePacket], scope: str = "") -> None:
        """Rebuild the averages from past packets, oldest first, without deciding anew."""
        for packet in packets:
            self._analyzer.analyze(packet, scope)

    def decide(self, packet: SystemStatePacket, scope: str = "") -> AdaptationDecision:
        """The decision on `packet`; a policy that fails waits and says why."""
        try:
            state = self._analyzer.analyze(packet, scope)
            return self._policies[packet.settings.policy](packet, state)
        except Exception as error:
            _log.exception("no decision for %s at epoch %d", packet.session, packet.epoch)
            return wait(
                packet,
                f"The policy {packet.settings.policy} failed and nothing is changed:"
                f" {type(error).__name__}: {one_line(str(error))}",
            )

    async def _subscribe(self) -> Subscription:
        return await self._bus.subscribe({TopicNames.PACKETS}, group=CONSUMER_GROUP)

    async def _listen(self, subscription: Subscription) -> None:
        try:
            await listen(subscription, self._handle)
        except BusUnavailable as error:
            _log.warning("the bus is gone, packets are no longer answered: %s", error)

    async def _handle(self, message: OonaMessage) -> None:
        # A packet that comes again, after others, must not move the averages back.
        asked = digest_of([message.scope, message.payload])
        decision = self._answered.get(asked)
        if decision is None:
            if self._lasting:
                await self._catch_up(message)
            decision = self._answer(message)
        if decision is None:
            return
        await self._bus.publish(
            OonaMessage.carrying(
                TopicNames.DECISIONS,
                decision,
                ComponentType.TAMIYO,
                trace_id=message.trace_id,
                scope=message.scope,
            )
        )
        self._answered[asked] = decision
        if len(self._answered) > KEPT_ANSWERS:
            self._answered.popitem(last=False)
        self.counts["decisions_total"] += 1
        _log.info(
            "decision %s for %s at epoch %d: %s, because %s",
            *(decision.id, decision.session, decision.epoch, decision.action.value),
            decision.reason,
        )

    async def _catch_up(self, message: OonaMessage) -> None:
        """Replay what came in the packet's session since the last one seen of it."""
        packet = _packet_of(message)
        if packet is None:
            return
        session = (message.scope, packet.session)
        last = self._seen.get(session)
        if last is None or packet.sequence != last.sequence + 1:
            missed = await self._missed(message, packet, last)
            self.replay(missed, message.scope)
            self.counts["replayed_total"] += len(missed)
        self._seen[session] = _Seen(packet.sequence, message.id)
        self._seen.move_to_end(session)
        if len(self._seen) > KEPT_SESSIONS:
            self._seen.popitem(last=False)

    async def _missed(
        self, message: OonaMessage, packet: SystemStatePacket, last: _Seen | None
    ) -> list[SystemStatePacket]:
        """The session's packets that the bus keeps, from after `last` to before `message`.

        A trainer that went back to a checkpoint numbers its packets anew, so it is the order of the
        bus that counts. Where `last` itself is no longer kept, it is the number after all.
        """
        found: list[SystemStatePacket] = []
        kept = last is None
        async for past in self._bus.history({TopicNames.PACKETS}, message.scope):
            if past.id == message.id:
                break
            if last is not None and past.id == last.id:
                found, kept = [], True
                continue
            earlier = _packet_of(past)
            if earlier is not None and earlier.session == packet.session:
                found.append(earlier)
        if last is None or kept:
            return found
        return [earlier for earlier in found if earlier.sequence > last.sequence]

    def _answer(self, message: OonaMessage) -> AdaptationDecision | None:
        try:
            packet = SystemStatePacket.model_validate(message.payload)
        except ValidationError as error:
            _log.exception("packet %s is not of the contract", message.id)
            return _unreadable(message, error)
        return self.decide(packet, message.scope)


def _packet_of(message: OonaMessage) -> SystemStatePacket | None:
    """The packet that a message carries; None where it breaks its contract."""
    with suppress(ValidationError):
        return SystemStatePacket.model_validate(message.payload)
    return None


def _unreadable(message: OonaMessage, error: ValidationError) -> AdaptationDecision | None:
    """A wait for whoever sent a packet that breaks its contract; None if nobody can be told."""
    session, epoch = message.payload.get("session"), message.payload.get("epoch")
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"])
    try:
        return AdaptationDecision.model_validate(
            {
                "id": digest_of(["unreadable", session, epoch])[:32],
                "session": session,
                "epoch": epoch,
                "action": DecisionAction.WAIT,
                "confidence": 1.0,
                "reason": f"The packet can't be read and nothing is changed: {field}:"
                f" got {one_line(first['input'])}; {first['msg']}",
            }
        )
    except ValidationError:
        return None
