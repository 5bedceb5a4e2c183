"""What a session tells the world: transitions and events, numbered, each under its trace."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from esper.contracts.base import digest_of
from esper.contracts.operational import SeedTransition, SessionEvent


@dataclass(frozen=True, kw_only=True)
class News:
    """Something that happened.

    `number` counts from 0 how often the session has told the same; the same happening has the same
    number after every resumption, so that whoever hears of it twice knows. What an attempt told
    that was lost after its last checkpoint moves no number of others: it may not happen again.
    `trace_id` is that of the health signals that led to it, None where none did.
    """

    item: SeedTransition | SessionEvent
    number: int
    trace_id: str | None = None

    def message_id(self, scope: str) -> str:
        """The id of the message that carries it, within the session whose uid is `scope`."""
        return digest_of(["news", scope, _happening(self.item), self.number])[:32]


class Numbering:
    """Gives what a session tells, in its order, the numbers of `News`."""

    def __init__(self) -> None:
        """Nothing was told yet."""
        self._told: Counter[str] = Counter()

    def news(self, item: SeedTransition | SessionEvent, trace_id: str | None) -> News:
        """What is told next."""
        happening = digest_of(_happening(item))
        self._told[happening] += 1
        return News(item=item, number=self._told[happening] - 1, trace_id=trace_id)


def _happening(item: SeedTransition | SessionEvent) -> dict[str, object]:
    """All of it: what differs in a figure or a word happened otherwise."""
    return {"kind": type(item).__name__, **item.to_wire()}


def packet_trace(scope: str, session: str, sequence: int) -> str:
    """The trace id of a packet, and of everything that it leads to.

    Equal after a resumption: a decision that is replayed belongs to the packet it answered.
    """
    return digest_of(["packet", scope, session, sequence])[:32]
