"""What one client of the bus counts while it works."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class ReceivingCounts:
    """Numbers of messages, over all subscriptions of a client."""

    received: int = 0
    claimed: int = 0
    dead: int = 0
    trimmed: int = 0
