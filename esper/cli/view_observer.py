"""Tells a live view what a trainer tells its observers, as the run directory's records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.cli.live import LiveView
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.services.tolaria.snapshots import Snapshot


class ViewObserver:
    """Shows a trainer's news in the live view."""

    def __init__(self, view: LiveView) -> None:
        """`view` has been entered."""
        self._view = view

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Show the epoch."""
        self._view.epoch(row)

    def transition(self, transition: SeedTransition) -> None:
        """Show the transition."""
        self._view.transition({"type": "transition"} | transition.to_wire())

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """Show the decision."""
        self._view.decision(decision.to_wire() | {"applied": applied, "outcome": outcome})

    def event(self, epoch: int, reason: str, message: str) -> None:
        """Show the event."""
        self._view.transition(
            {"type": "event", "epoch": epoch, "reason": reason, "message": message}
        )

    def checkpoint(self, snapshot: Snapshot) -> None:
        """Checkpoints are the status's business."""
