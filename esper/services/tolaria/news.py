"""What a session tells the world: transitions and events, numbered, each under its trace."""

from __future__ import annotations

from dataclasses import dataclass

from esper.contracts.base import digest_of
from esper.contracts.operational import SeedTransition, SessionEvent


@dataclass(frozen=True, kw_only=True)
class News:
    """Something that happened.

    `number` counts from 0 what the session has told; the same happening has the same number after
    every resumption, so that whoever hears of it twice knows. `trace_id` is that of the health
    signals that led to it, None where none did.
    """

    item: SeedTransition | SessionEvent
    number: int
    trace_id: str | None = None

    def message_id(self, scope: str) -> str:
        """The id of the message that carries it, within the session whose uid is `scope`."""
        return digest_of(["news", scope, self.item.session, self.number])[:32]


def packet_trace(scope: str, session: str, sequence: int) -> str:
    """The trace id of a packet, and of everything that it leads to.

    Equal after a resumption: a decision that is replayed belongs to the packet it answered.
    """
    return digest_of(["packet", scope, session, sequence])[:32]
