"""The port of the bus.

Delivery is at least once: a message stays with the subscription that received it until it is
acknowledged, and goes back to its group when that subscription closes or its process dies.
Receivers therefore do their work idempotently, by the message's id or by content, and acknowledge
afterwards.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from dataclasses import dataclass
from typing import Protocol

from esper.contracts.messages import OonaMessage, TopicNames


@dataclass(frozen=True)
class OonaStatistics:
    """What a bus has done since it was made, and what it holds now; all are numbers of messages."""

    published: int = 0
    """Accepted by the bus."""
    buffered: int = 0
    """Held in this process now, because the bus did not take them yet."""
    dropped: int = 0
    """Telemetry given up for want of room in the buffer; closing without an answer counts too."""
    retried: int = 0
    """Sent once more because it was not known whether they had arrived."""
    received: int = 0
    """Handed to receivers of this process, those that came again included."""
    claimed: int = 0
    """Taken over from receivers that left them."""
    dead: int = 0
    """Set aside, because nobody could deal with them."""
    trimmed: int = 0
    """Given up by the bus, for want of room, before their receivers had dealt with them.

    Who publishes counts those that a group had not received; who takes over from a receiver that
    left counts those that it finds gone.
    """


class Subscription(Protocol):
    """One receiver of a group; once closed, `receive` and `acknowledge` raise BusUnavailable."""

    async def receive(self) -> OonaMessage:
        """The group's oldest message on the subscribed topics; waits until there is one.

        Messages of one topic and one scope come in the order in which they were published.
        """
        ...

    async def acknowledge(self, message: OonaMessage) -> None:
        """The message is dealt with. One that this subscription doesn't hold is passed over.

        The bus learns of it after everything that this process has published before, so that an
        answer is never lost with its question acknowledged.
        """
        ...

    def pending(self) -> int:
        """How many messages were received here and are not acknowledged yet."""
        ...

    async def close(self) -> None:
        """Stop; what is pending goes back to the group, at its old place in the order."""
        ...


class Oona(Protocol):
    """The bus; once closed, `publish`, `subscribe` and all of `receive` raise BusUnavailable."""

    async def publish(self, *messages: OonaMessage) -> None:
        """Hand the messages, in this order, to every group that has subscribed to their topics."""
        ...

    async def subscribe(
        self, topics: Collection[TopicNames], group: str, *, prefetch: int | None = None
    ) -> Subscription:
        """A receiver for `topics` in `group`.

        From now on the group keeps messages on these topics, also while none of its receivers
        lives. Each message goes to one receiver of a group, and to all groups.

        `prefetch` is how many messages the receiver may take from the group at once; None leaves
        that to the bus. Whoever works long on each asks for 1, so that others get the rest.
        """
        ...

    def history(
        self, topics: Collection[TopicNames], scope: str | None = None
    ) -> AsyncIterator[OonaMessage]:
        """What is still kept of `topics`, oldest first, received or not; receives nothing.

        `scope` is that of one session; None means every scope that this bus sees.
        """
        ...

    async def check(self) -> None:
        """Return if the bus takes messages and gives them out.

        Raises:
            BusUnavailable: it does not answer, has no room, or is closed.
            ConfigError: it refuses what the settings say.
        """
        ...

    async def health(self) -> bool:
        """Whether the bus takes messages."""
        ...

    def statistics(self) -> OonaStatistics:
        """Counts since the bus was made."""
        ...

    async def close(self) -> None:
        """Stop; whoever waits in `receive` gets BusUnavailable."""
        ...
