"""What a trainer's health endpoints count, told by the trainer as it goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.services.health import ServiceHealth
from esper.services.tolaria.snapshots import Snapshot


class HealthObserver:
    """An observer that keeps /metrics up to date."""

    def __init__(self, health: ServiceHealth) -> None:
        self._health = health
        self._totals = dict.fromkeys(
            ("decisions_total", "transitions_total", "events_total", "checkpoints_total"), 0
        )
        health.count(self._totals)

    def epoch(self, row: Mapping[str, Any]) -> None:
        """The newest epoch and its numbers."""
        self._health.count(
            {
                "epoch": row["epoch"],
                "train_loss": row["trainLoss"],
                "validation_loss": row["validationLoss"],
                "parameters": row["parameters"],
                "flops": row["flops"],
            }
        )

    def transition(self, transition: SeedTransition) -> None:
        """One more."""
        self._one_more("transitions_total")

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """One more."""
        self._one_more("decisions_total")

    def event(self, epoch: int, reason: str, message: str) -> None:
        """One more."""
        self._one_more("events_total")

    def checkpoint(self, snapshot: Snapshot) -> None:
        """One more."""
        self._one_more("checkpoints_total")

    def _one_more(self, name: str) -> None:
        self._totals[name] += 1
        self._health.count({name: self._totals[name]})
