"""What the bus says of sessions: how each stands, and which kernels it asks for.

Every snapshot is whole, so only the newest of each session is kept. What was heard is acknowledged
before it is written anywhere: the newest of each session is read again by whoever begins to listen,
for whoever listened before may have ended in between. A request is made again by who waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Collection, Iterable

from pydantic import ValidationError

from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelReady, KernelRequested, OonaMessage, TopicNames
from esper.contracts.operational import SessionSnapshot
from esper.errors import EsperError, one_line
from esper.services.listening import listen
from esper.services.oona_client import OonaClient
from esper_operator.views import KernelView

TOPICS = (TopicNames.STATUS, TopicNames.KERNEL_REQUESTED)
RETRY_SECONDS = 2.0
MAX_SESSIONS = 20_000
MAX_REQUESTS = 256
"""Requests remembered of one session, which is not trusted; more are passed over."""
_log = logging.getLogger(__name__)


class Reports:
    """The newest snapshot and the open requests of each session, by its uid."""

    def __init__(self, concerned: Callable[[str], None]) -> None:
        """`concerned` is told the uid of a session of which something was heard."""
        self._concerned = concerned
        self._snapshots: dict[str, SessionSnapshot] = {}
        self._heard: dict[str, float] = {}
        self._requests: dict[str, dict[str, KernelRequested]] = {}
        self._bus: OonaClient | None = None
        self.hearing_since: float | None = None
        """Since when the bus has answered without a break; None: it does not."""

    def snapshot(self, uid: str) -> SessionSnapshot | None:
        """The newest of a session; None where none was heard."""
        return self._snapshots.get(uid)

    def heard(self, uid: str) -> float | None:
        """When the newest of a session was heard, in seconds since the epoch."""
        return self._heard.get(uid)

    def requests(self, uid: str) -> tuple[KernelRequested, ...]:
        """The kernels that a session has asked for."""
        return tuple(self._requests.get(uid, {}).values())

    def keep_only(self, uids: Collection[str]) -> None:
        """Forget what was heard of other sessions than these."""
        for held in (self._snapshots, self._heard, self._requests):
            for uid in [uid for uid in held if uid not in uids]:
                del held[uid]

    def asking(self, kernel: str) -> tuple[str, ...]:
        """The uids of the sessions that have asked for a kernel and were not answered."""
        return tuple(uid for uid, asked in self._requests.items() if kernel in asked)

    async def answer(self, uid: str, namespace: str, ready: KernelReady) -> None:
        """Tell a session what came of its request; without a bus it is told when it asks again."""
        if self._bus is None:
            return
        message = OonaMessage.carrying(
            TopicNames.KERNEL_READY, ready, ComponentType.TEZZERET, scope=uid
        )
        await self._bus.publish(message, namespace=namespace)
        self._requests.get(uid, {}).pop(ready.kernel, None)

    async def run(
        self,
        connect: Callable[[], Awaitable[OonaClient]],
        sessions: Callable[[], Iterable[tuple[str, str]]],
        group: str,
    ) -> None:
        """Listen for ever; each time that the bus is away, `connect` to it anew.

        `sessions` gives the namespace and the uid of each session that there is. Each message goes
        to one operator of a `group`: those that stand in for each other.
        """
        said = ""
        while True:
            try:
                self._bus = bus = await connect()
                subscription = await bus.subscribe(TOPICS, group)
                # Of sessions made from now on all is heard.
                async for message in bus.newest(TopicNames.STATUS, sessions()):
                    await self.take(message)
                self.hearing_since = time.time()
                said = ""
                await listen(subscription, self.take)
            except EsperError as error:
                if str(error) != said:
                    _log.warning("sessions are not heard at the moment: %s", error)
                said = str(error)
            except Exception:
                _log.exception("a message could not be taken; it will come again")
            finally:
                self.hearing_since = None
                left, self._bus = self._bus, None
                if left is not None:
                    await left.close()
            await asyncio.sleep(RETRY_SECONDS)

    async def take(self, message: OonaMessage) -> None:
        """Remember what a message says; one that is no message of its topic says nothing."""
        try:
            payload = message.open()
        except ValidationError as error:
            _log.warning(
                "%s of session %s says nothing: %s",
                message.topic,
                message.scope,
                one_line(str(error)),
            )
            return
        uid = message.scope
        if isinstance(payload, SessionSnapshot):
            known = self._snapshots.get(uid)
            if known is not None and _age(payload) <= _age(known):
                return
            if known is None and len(self._snapshots) >= MAX_SESSIONS:
                return
            self._snapshots[uid] = payload
            self._heard[uid] = time.time()
        elif isinstance(payload, KernelRequested):
            requests = self._requests.setdefault(uid, {})
            if payload.kernel in requests or len(requests) >= MAX_REQUESTS:
                return
            requests[payload.kernel] = payload
        self._concerned(uid)


def kernel_ready(kernel: KernelView) -> KernelReady | None:
    """What a session is told of a kernel; None while it is being compiled."""
    status = kernel.status()
    ready = next((c for c in status.get("conditions", ()) if c["type"] == "Ready"), None)
    if ready is None or ready["status"] == "Unknown":
        return None
    done = ready["status"] == "True"
    return KernelReady(
        kernel=kernel.name,
        blueprint=kernel.blueprint,
        artifact_digest=status.get("digest") if done else None,
        error=None if done else str(ready.get("message") or ready["reason"]),
    )


def _age(snapshot: SessionSnapshot) -> tuple[int, int]:
    return snapshot.attempt, snapshot.sequence
