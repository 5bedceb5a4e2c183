"""Oona, the bus: a port, and the bus of a run that lives in one process."""

from __future__ import annotations

from esper.services.oona.in_process import InProcessOona, InProcessSubscription
from esper.services.oona.port import Oona, OonaStatistics, Subscription

__all__ = [
    "InProcessOona",
    "InProcessSubscription",
    "Oona",
    "OonaStatistics",
    "Subscription",
]
