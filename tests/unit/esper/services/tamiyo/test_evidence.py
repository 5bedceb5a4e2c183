from __future__ import annotations

import math
from statistics import NormalDist

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.operational import Measurement
from esper.services.tamiyo.policies.evidence import confidence, least_gain, most_gain


def test_gains_are_the_bounds_with_the_rent_taken_off(build):
    seed = build.seed(measurement=build.measured(0.231, half=0.027, rent=0.002))
    assert least_gain(seed) == pytest.approx(0.202)
    assert most_gain(seed) == pytest.approx(0.256)


@pytest.mark.parametrize(
    "measurement",
    [
        None,
        Measurement(mean=math.nan, lower=math.nan, upper=math.nan, rent=0, samples=0),
        Measurement(mean=1, lower=-math.inf, upper=math.inf, rent=0, samples=1),
        Measurement(mean=1, lower=math.inf, upper=-math.inf, rent=0, samples=1),
        Measurement(mean=1, lower=0.5, upper=1.5, rent=math.inf, samples=9),
    ],
)
def test_what_is_missing_or_not_finite_is_no_evidence_either_way(build, measurement):
    seed = build.seed(measurement=measurement)
    assert (least_gain(seed), most_gain(seed), confidence(seed)) == (-math.inf, math.inf, 0.0)


@pytest.mark.parametrize(
    ("mean", "half", "rent", "expected"),
    [
        (0.1, 0.05, 0.1, 0.5),
        (0.1, 0.05, 0.05, 0.95),
        (0.1, 0.05, 0.15, 0.05),
        (0.1, 0.0, 0.05, 1.0),
        (0.1, 0.0, 0.15, 0.0),
        (0.0, 0.0, 0.0, 0.5),
    ],
)
def test_confidence_is_the_normal_probability_of_earning_the_rent(
    build, mean, half, rent, expected
):
    seed = build.seed(measurement=build.measured(mean, half=half, rent=rent))
    assert confidence(seed) == pytest.approx(expected, abs=1e-4)


def test_confidence_of_bounds_at_another_level_is_off_as_documented(build):
    bounds_at_80 = build.measured(0.1, half=NormalDist().inv_cdf(0.8) * 0.05, rent=0.02)
    truth = NormalDist(0.1, 0.05).cdf(0.18)
    assert confidence(build.seed(measurement=bounds_at_80)) > truth


floats = st.floats()


@settings(deadline=None)
@given(floats, floats, floats, floats)
def test_confidence_is_a_probability_whatever_comes(build, mean, lower, upper, rent):
    measurement = Measurement(mean=mean, lower=lower, upper=upper, rent=rent, samples=5)
    assert 0 <= confidence(build.seed(measurement=measurement)) <= 1
