"""Oona, the bus: a port, and the bus of a run that lives in one process.

Delivery is at least once: a message stays with the subscription that received it until it is
acknowledged, and goes back to its group when that subscription closes. Receivers therefore do
their work idempotently, by the message's id or by content, and acknowledge afterwards.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import Collection
from typing import NamedTuple, Protocol

from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import BusUnavailable


class Subscription(Protocol):
    """One receiver of a group; once closed, `receive` and `acknowledge` raise BusUnavailable."""

    async def receive(self) -> OonaMessage:
        """The group's oldest message on the subscribed topics; waits until there is one."""
        ...

    async def acknowledge(self, message: OonaMessage) -> None:
        """The message is dealt with. One that this subscription doesn't hold is passed over."""
        ...

    def pending(self) -> int:
        """How many messages were received here and are not acknowledged yet."""
        ...

    async def close(self) -> None:
        """Stop; what is pending goes back to the group, at its old place in the order."""
        ...


class Oona(Protocol):
    """The bus; once closed, `publish`, `subscribe` and all of `receive` raise BusUnavailable."""

    async def publish(self, message: OonaMessage) -> None:
        """Hand `message` to every group that has subscribed to its topic."""
        ...

    def subscribe(self, topics: Collection[TopicNames], group: str) -> Subscription:
        """A receiver for `topics` in `group`.

        From now on the group keeps messages on these topics, also while none of its receivers
        lives. Each message goes to one receiver of a group, and to all groups.
        """
        ...

    async def health(self) -> bool:
        """Whether the bus takes messages."""
        ...

    async def close(self) -> None:
        """Stop; whoever waits in `receive` gets BusUnavailable."""
        ...


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
        self._sequence = 0
        self._closed = False
        self._changed = asyncio.Event()

    async def publish(self, message: OonaMessage) -> None:
        """Hand `message` to every group of its topic.

        Raises:
            BusUnavailable: the bus is closed.
        """
        self._require_open()
        self._sequence += 1
        text = message.model_dump_json(by_alias=True)
        entry = _Entry(self._sequence, message.id, message.topic, text)
        for queue in self._queues[message.topic].values():
            heapq.heappush(queue, entry)
        self._wake()

    def subscribe(self, topics: Collection[TopicNames], group: str) -> InProcessSubscription:
        """A receiver for `topics` in `group`.

        Raises:
            BusUnavailable: the bus is closed.
        """
        self._require_open()
        queues = {topic: self._queues[topic].setdefault(group, []) for topic in topics}
        return InProcessSubscription(self, queues)

    async def health(self) -> bool:
        """Whether the bus takes messages."""
        return not self._closed

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
