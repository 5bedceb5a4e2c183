"""The gates of a seed's life: pure decisions over measurements. A missing one fails the gate."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import NormalDist

from esper.contracts.operational import Measurement
from esper.services.tolaria.config import GatesConfig


class Verdict(StrEnum):
    """What a gate says."""

    CONTINUE = "continue"
    READY = "ready"
    FOSSILIZE = "fossilize"
    CULL = "cull"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A verdict, its reason in one line, and how many shadow measurements passed in a row."""

    verdict: Verdict
    reason: str
    passes: int = 0


def rent_of(parameters: int, flops: int, gates: GatesConfig) -> float:
    """The price in nats of `parameters` and of `flops` (per sample, forward and backward)."""
    return (
        gates.rent_per_million_parameters * parameters / 1e6 + gates.rent_per_gigaflop * flops / 1e9
    )


def paired_measurement(
    without: Sequence[float], with_seed: Sequence[float], *, rent: float, confidence_level: float
) -> Measurement | None:
    """What the seed contributes: the mean of the paired differences, in nats per sample.

    The bounds are one-sided at `confidence_level` each, from the normal law of the mean of
    paired differences. None where fewer than two samples came, or one that is not finite or too
    large to square: no measurement is better than a wrong one.
    """
    if len(without) != len(with_seed) or len(without) < 2:
        return None
    differences = [a - b for a, b in zip(without, with_seed, strict=True)]
    if not all(math.isfinite(value) for value in differences):
        return None
    count = len(differences)
    try:
        mean = math.fsum(differences) / count
        variance = math.fsum((value - mean) ** 2 for value in differences) / (count - 1)
    except OverflowError:
        return None
    margin = NormalDist().inv_cdf(confidence_level) * math.sqrt(variance / count)
    return Measurement(
        mean=mean, lower=mean - margin, upper=mean + margin, rent=rent, samples=count
    )


def judge_shadow(
    *, age_epochs: int, passes: int, measurement: Measurement | None, gates: GatesConfig
) -> Judgement:
    """Whether a seed in training may be grafted, goes on, or has had its time.

    `age_epochs` counts epochs in training, `passes` the measurements in a row that passed before
    this one.
    """
    passed = measurement is not None and measurement.passes()
    passes = passes + 1 if passed else 0
    told = describe(measurement)
    if passes >= gates.passes and age_epochs >= gates.dwell_epochs:
        return Judgement(
            verdict=Verdict.READY, passes=passes, reason=f"{told}; passed {passes} times in a row"
        )
    if age_epochs >= gates.age_epochs:
        return Judgement(
            verdict=Verdict.CULL,
            passes=passes,
            reason=f"{told} at the age limit of {gates.age_epochs} epochs",
        )
    return Judgement(verdict=Verdict.CONTINUE, passes=passes, reason=told)


def judge_recovery(measurement: Measurement | None) -> Judgement:
    """Whether a grafted seed becomes part of the model: its recovery trial must pass."""
    told = describe(measurement)
    if measurement is not None and measurement.passes():
        return Judgement(verdict=Verdict.FOSSILIZE, reason=f"recovery trial: {told}")
    return Judgement(verdict=Verdict.CULL, reason=f"recovery trial: {told}")


def embargo_epochs(cycle: int, gates: GatesConfig) -> int:
    """How long a culled slot stays closed: doubling with every cycle, at most 32-fold."""
    return gates.embargo_epochs << min(cycle, 5)


def recovery_due(age_epochs: int, gates: GatesConfig) -> bool:
    """Whether the ramp and the hold are over."""
    return age_epochs >= gates.ramp_epochs + gates.hold_epochs


def describe(measurement: Measurement | None) -> str:
    """A measurement in words."""
    if measurement is None:
        return "no finite measurement"
    relation = "above" if measurement.passes() else "not above"
    return (
        f"gain {measurement.mean:+.4f} nats, at least {measurement.lower:+.4f}, {relation} "
        f"the rent of {measurement.rent:.4f} ({measurement.samples} samples)"
    )
