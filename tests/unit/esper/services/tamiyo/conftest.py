"""Packets of one small real shape: the MLP of example 01, its three layers and their candidates."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from esper.contracts.enums import ControllerPolicy, SeedState, SystemHealth
from esper.contracts.operational import (
    Candidate,
    ControllerSettings,
    HealthSignal,
    LayerDescription,
    Measurement,
    SeedObservation,
    SystemStatePacket,
    TrialRecord,
)
from esper.services.tamiyo.policies.survey import first_survey_epoch

LEFT = 50
"""Epochs that a session of `Build.epochs` has left when its first survey begins."""


class Build:
    """Contracts with every field sensible; a keyword replaces one."""

    @staticmethod
    def settings(**fields: Any) -> ControllerSettings:
        return ControllerSettings(
            **{
                "policy": ControllerPolicy.HEURISTIC,
                "seed": 7,
                "interval_epochs": 1,
                "minimum_confidence": 0.8,
                "active_seeds": 1,
                "passes": 2,
                "dwell_epochs": 5,
                "age_epochs": 10,
                "ramp_epochs": 3,
                "hold_epochs": 2,
                **fields,
            }
        )

    @staticmethod
    def candidate(
        layer: str = "fc1", blueprint: str = "bottleneck-mlp", **fields: Any
    ) -> Candidate:
        known = {"noop": (0, True), "low-rank": (300, True), "bottleneck-mlp": (2000, False)}
        parameters, folds = known.get(blueprint, (900, False))
        return Candidate(
            **{
                "layer": layer,
                "blueprint": blueprint,
                "parameters": parameters,
                "flops": 6 * parameters,
                "folds": folds,
                **fields,
            }
        )

    @staticmethod
    def measured(mean: float, half: float = 0.02, rent: float = 0.002) -> Measurement:
        return Measurement(mean=mean, lower=mean - half, upper=mean + half, rent=rent, samples=500)

    @staticmethod
    def seed(
        layer: str = "fc1", blueprint: str | None = "bottleneck-mlp", **fields: Any
    ) -> SeedObservation:
        return SeedObservation(
            **{
                "layer": layer,
                "slot": 0,
                "state": SeedState.TRAINING,
                "blueprint": blueprint,
                "age_epochs": 5,
                "parameters": Build.candidate(layer, blueprint or "unnamed").parameters,
                **fields,
            }
        )

    @staticmethod
    def ready(layer: str, blueprint: str, mean: float, **fields: Any) -> SeedObservation:
        return Build.seed(
            layer, blueprint, **{"ready": True, "measurement": Build.measured(mean), **fields}
        )

    @staticmethod
    def trial(layer: str = "fc1", blueprint: str = "bottleneck-mlp", **fields: Any) -> TrialRecord:
        return TrialRecord(
            **{
                "layer": layer,
                "slot": 0,
                "blueprint": blueprint,
                "cycle": 0,
                "started_epoch": 5,
                "ended_epoch": 9,
                "state": SeedState.CULLED,
                **fields,
            }
        )

    @staticmethod
    def signal(layer: str = "fc1", **fields: Any) -> HealthSignal:
        return HealthSignal(
            **{
                "session": "small",
                "epoch": 10,
                "layer": layer,
                "gradient_norm": 0.1,
                "gradient_variance": 0.01,
                "gradient_to_weight_ratio": 0.01,
                "activation_rank": 0.8,
                "dead_fraction": 0.1,
                **fields,
            }
        )

    @staticmethod
    def packet(settings: dict[str, Any] | None = None, **fields: Any) -> SystemStatePacket:
        epoch = fields.get("epoch", 10)
        layers = ("fc1", "fc2", "fc3")
        return SystemStatePacket(
            **{
                "session": "small",
                "sequence": epoch,
                "epoch": epoch,
                "epochs": 100,
                "train_loss": 1.5,
                "validation_loss": 1.6,
                "parameters_base": 1098,
                "parameters": 1098,
                "remaining_parameters": 5000,
                "remaining_epochs": 100 - epoch,
                "settings": Build.settings(**(settings or {})),
                "layers": tuple(
                    LayerDescription(name=name, kind="Linear", parameters=366, slots=1)
                    for name in layers
                ),
                "edges": (("fc1", "fc2"), ("fc2", "fc3")),
                "signals": tuple(Build.signal(name, epoch=epoch) for name in layers),
                "candidates": tuple(
                    Build.candidate(layer, blueprint)
                    for blueprint in ("bottleneck-mlp", "low-rank", "noop")
                    for layer in reversed(layers)
                ),
                "health": SystemHealth.HEALTHY,
                **fields,
            }
        )

    @staticmethod
    @cache
    def epochs() -> int:
        """The length of a session that has `LEFT` epochs left when its first survey begins."""
        return next(
            epochs
            for epochs in range(LEFT + 1, 100 * LEFT)
            if epochs - first_survey_epoch(Build.packet(epochs=epochs)) == LEFT
        )

    @staticmethod
    def start() -> int:
        """The epoch at which the first survey of `Build.epochs` begins."""
        return Build.epochs() - LEFT

    @staticmethod
    def open_trial(layer: str = "fc1", blueprint: str = "bottleneck-mlp") -> TrialRecord:
        """A trial under way since the first survey began."""
        under_way = {"ended_epoch": None, "state": SeedState.TRAINING}
        return Build.trial(layer, blueprint, started_epoch=Build.start(), **under_way)

    @staticmethod
    def surveying(
        settings: dict[str, Any] | None = None, *, left: int = LEFT, **fields: Any
    ) -> SystemStatePacket:
        """A packet `left` epochs before the end; as a rule, where the first survey begins."""
        place = {"epochs": Build.epochs(), "epoch": Build.epochs() - left, "remaining_epochs": left}
        return Build.packet(settings, **{**place, **fields})


@pytest.fixture(scope="session")
def build() -> type[Build]:
    return Build
