"""The bus of a run that lives in one process."""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict, deque
from collections.abc import AsyncIterator, Collection
from typing import NamedTuple

from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import BusUnavailable
from esper.services.oona.port import OonaStatistics

KEPT_MESSAGES = 128
"""How many messages of each topic `history` knows."""


class _Entry(NamedTuple):
    """A message in a queue; the sequence is unique, so it alone orders entries."""

    sequence: int
    id: str
    topic: TopicNames
    text: str


_Queue = list[_Entry]  # a heap


class InProcessOona:
    """The `Oona` of one process and one event loop. First in, first out within a group.

    Messages cross as JSON, as on a wire: no receiver sees what another does with its copy.
    """

    def __init__(self) -> None:
        self._queues: defaultdict[TopicNames, dict[str, _Queue]] = defaultdict(dict)
        self._kept: defaultdict[TopicNames, deque[_Entry]] = defaultdict(
            lambda: deque(maxlen=KEPT_MESSAGES)
        )
        self._sequence = 0
        self._received = 0
        self._closed = False
        self._changed = asyncio.Event()

    async def publish(self, *messages: OonaMessage) -> None:
        """Hand the messages, in this order, to every group of their topics.

        Raises:
            BusUnavailable: the bus is closed.
        """
        self._require_open()
        for message in messages:
            self._sequence += 1
            text = message.model_dump_json(by_alias=True)
            entry = _Entry(self._sequence, message.id, message.topic, text)
            self._kept[message.topic].append(entry)
            for queue in self._queues[message.topic].values():
                heapq.heappush(queue, entry)
        self._wake()

    async def subscribe(
        self, topics: Collection[TopicNames], group: str, *, prefetch: int | None = None
    ) -> InProcessSubscription:
        """A receiver for `topics` in `group`; it takes one message at a time, never ahead.

        Raises:
            BusUnavailable: the bus is closed.
        """
        del prefetch
        self._require_open()
        queues = {topic: self._queues[topic].setdefault(group, []) for topic in topics}
        return InProcessSubscription(self, queues)

    async def history(
        self, topics: Collection[TopicNames], scope: str | None = None
    ) -> AsyncIterator[OonaMessage]:
        """The last `KEPT_MESSAGES` of each of `topics`, oldest first, received or not.

        Raises:
            BusUnavailable: the bus is closed.
        """
        self._require_open()
        for entry in sorted(entry for topic in set(topics) for entry in self._kept[topic]):
            message = OonaMessage.model_validate_json(entry.text)
            if scope is None or message.scope == scope:
                yield message

    async def check(self) -> None:
        """Return if the bus takes messages.

        Raises:
            BusUnavailable: the bus is closed.
        """
        self._require_open()

    async def health(self) -> bool:
        """Whether the bus takes messages."""
        return not self._closed

    def statistics(self) -> OonaStatistics:
        """Counts since the bus was made."""
        return OonaStatistics(published=self._sequence, received=self._received)

    async def close(self) -> None:
        """Stop; whoever waits in `receive` gets BusUnavailable. Twice is as once."""
        self._closed = True
        self._wake()

    def _require_open(self) -> None:
        if self._closed:
            raise BusUnavailable("the bus in this process is closed")

    def _wake(self) -> None:
        """Let everyone who waits look again, in the order in which they came."""
        self._changed.set()
        self._changed = asyncio.Event()


class InProcessSubscription:
    """A `Subscription` of the in-process bus; `InProcessOona.subscribe` makes it."""

    def __init__(self, bus: InProcessOona, queues: dict[TopicNames, _Queue]) -> None:
        self._bus = bus
        self._queues = queues
        self._pending: list[_Entry] = []
        self._closed = False

    async def receive(self) -> OonaMessage:
        """The group's oldest message on the subscribed topics; waits until there is one.

        Raises:
            BusUnavailable: the bus or this subscription is closed, before or while waiting.
        """
        while True:
            self._require_open()
            filled = [queue for queue in self._queues.values() if queue]
            if filled:
                entry = heapq.heappop(min(filled, key=lambda queue: queue[0]))
                self._pending.append(entry)
                self._bus._received += 1
                return OonaMessage.model_validate_json(entry.text)
            await self._bus._changed.wait()

    async def acknowledge(self, message: OonaMessage) -> None:
        """The message is dealt with. One that this subscription doesn't hold is passed over.

        Raises:
            BusUnavailable: the bus or this subscription is closed.
        """
        self._require_open()
        for entry in self._pending:
            if entry.id == message.id:
                self._pending.remove(entry)
                return

    def pending(self) -> int:
        """How many messages were received here and are not acknowledged yet."""
        return len(self._pending)

    async def close(self) -> None:
        """Stop; what is pending goes back to the group, at its old place in the order."""
        self._closed = True
        for entry in self._pending:
            heapq.heappush(self._queues[entry.topic], entry)
        self._pending.clear()
        self._bus._wake()

    def _require_open(self) -> None:
        self._bus._require_open()
        if self._closed:
            raise BusUnavailable("this subscription is closed")
