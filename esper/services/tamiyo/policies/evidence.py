"""What a seed's measurement is worth once its rent is paid, in nats per sample.

A missing or non-finite measurement is never evidence, neither for a seed nor against it.
"""

from __future__ import annotations

import math
from statistics import NormalDist

from esper.contracts.operational import SeedObservation

ONE_SIDED_95 = 1.645
"""Standard errors from the mean to a one-sided 95 % bound under a normal."""
SMALLEST_ERROR = 1e-12
"""Floor of the standard error, so that an exact measurement has a confidence too."""


def least_gain(seed: SeedObservation) -> float:
    """Lower bound of the contribution minus the rent; -inf without finite numbers."""
    if seed.measurement is None:
        return -math.inf
    gain = seed.measurement.lower - seed.measurement.rent
    return gain if math.isfinite(gain) else -math.inf


def most_gain(seed: SeedObservation) -> float:
    """Upper bound of the contribution minus the rent; +inf without finite numbers."""
    if seed.measurement is None:
        return math.inf
    gain = seed.measurement.upper - seed.measurement.rent
    return gain if math.isfinite(gain) else math.inf


def confidence(seed: SeedObservation) -> float:
    """One-sided probability that the seed contributes more than its rent; 0 unmeasured.

    Under a normal around the mean. A packet does not carry the level of its bounds, so the
    standard error is read from the lower bound as if it were one-sided at 95 %: below that level
    this is too bold, above it too timid, and it never replaces the gate that came before.
    """
    measured = seed.measurement
    if measured is None or not all(
        map(math.isfinite, (measured.mean, measured.lower, measured.rent))
    ):
        return 0.0
    error = max((measured.mean - measured.lower) / ONE_SIDED_95, SMALLEST_ERROR)
    deviation = (measured.mean - measured.rent) / error
    return 0.0 if math.isnan(deviation) else NormalDist().cdf(deviation)
