from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.operational import Measurement
from esper.services.tolaria.gates import (
    Judgement,
    Verdict,
    describe,
    embargo_epochs,
    judge_recovery,
    judge_shadow,
    paired_measurement,
    recovery_due,
    rent_of,
)
from tests.unit.esper.services.tolaria.sessions import gates

GATES = gates(passes=2, dwell_epochs=5, age_epochs=10)
NAN = math.nan

samples = st.lists(st.floats(-100, 100), min_size=2, max_size=30)


def measured(lower: float, *, rent: float = 0.01, mean: float | None = None) -> Measurement:
    mean = lower + 0.1 if mean is None else mean
    return Measurement(mean=mean, lower=lower, upper=2 * mean - lower, rent=rent, samples=100)


GOOD = measured(0.02)


# -- rent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "flops", "rent"),
    [(0, 0, 0.0), (1_000_000, 0, 5.0), (0, 1_000_000_000, 0.5), (2000, 4_000_000, 0.012)],
)
def test_rent_is_a_price_on_parameters_and_flops(parameters: int, flops: int, rent: float) -> None:
    prices = gates(rent_per_million_parameters=5.0, rent_per_gigaflop=0.5)
    assert rent_of(parameters, flops, prices) == pytest.approx(rent)


# -- the paired measurement ---------------------------------------------------------------------


def test_the_measurement_is_the_mean_of_paired_differences_with_normal_bounds() -> None:
    found = paired_measurement(
        [3.0, 2.0, 4.0, 3.0], [2.0, 2.0, 2.0, 2.0], rent=0.5, confidence_level=0.95
    )
    assert found is not None
    deviation = math.sqrt((0 + 1 + 1 + 0) / 3)
    margin = 1.6448536269514722 * deviation / 2
    assert found.mean == 1.0
    assert found.lower == pytest.approx(1.0 - margin)
    assert found.upper == pytest.approx(1.0 + margin)
    assert (found.rent, found.samples) == (0.5, 4)


def test_pairing_removes_what_both_arms_share() -> None:
    hard = [0.0, 50.0, 100.0, 7.0]
    found = paired_measurement(hard, [loss - 0.25 for loss in hard], rent=0, confidence_level=0.99)
    assert found is not None
    assert found.lower == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("without", "with_seed"),
    [
        ([], []),
        ([1.0], [0.5]),
        ([1.0, 2.0], [1.0]),
        ([1.0, 2.0], []),
        ([1.0, NAN], [1.0, 1.0]),
        ([1.0, 1.0], [1.0, NAN]),
        ([math.inf, 1.0], [1.0, 1.0]),
        ([math.inf, 1.0], [math.inf, 1.0]),
        ([1.0, 1.0], [-math.inf, 1.0]),
        ([1.7e308, 1.0], [-1.7e308, 1.0]),
        ([1e200, 1.0], [0.0, 1.0]),
        ([1.7e308, 1.7e308, 1.7e308], [0.0, 0.0, 0.0]),
    ],
)
def test_too_few_or_not_finite_samples_are_no_measurement(
    without: list[float], with_seed: list[float]
) -> None:
    assert paired_measurement(without, with_seed, rent=0.0, confidence_level=0.95) is None


@given(samples, st.data())
def test_the_bounds_hold_the_mean_between_them_and_widen_with_confidence(
    without: list[float], data: st.DataObject
) -> None:
    with_seed = data.draw(
        st.lists(st.floats(-100, 100), min_size=len(without), max_size=len(without))
    )
    found = [
        paired_measurement(without, with_seed, rent=0.1, confidence_level=level)
        for level in (0.501, 0.6, 0.8, 0.95, 0.99, 0.9999)
    ]
    assert all(one is not None and one.lower <= one.mean <= one.upper for one in found)
    for less, more in pairwise(found):
        assert less is not None
        assert more is not None
        assert more.mean == less.mean
        assert more.lower <= less.lower
        assert more.upper >= less.upper
        assert less.passes() or not more.passes()


@given(samples)
def test_exchanging_the_arms_turns_the_measurement_around(without: list[float]) -> None:
    with_seed = [loss / 2 for loss in without]
    one = paired_measurement(without, with_seed, rent=0, confidence_level=0.9)
    other = paired_measurement(with_seed, without, rent=0, confidence_level=0.9)
    assert one is not None
    assert other is not None
    assert (one.mean, one.lower, one.upper) == (-other.mean, -other.upper, -other.lower)


@given(samples)
def test_an_arm_against_itself_never_passes(losses: list[float]) -> None:
    found = paired_measurement(losses, losses, rent=0.0, confidence_level=0.51)
    assert found is not None
    assert (found.mean, found.lower, found.upper) == (0, 0, 0)
    assert not found.passes()


# -- the shadow gate ----------------------------------------------------------------------------

SHADOW = [
    # age, passes before, measurement, verdict, passes after
    (0, 0, GOOD, Verdict.CONTINUE, 1),
    (4, 9, GOOD, Verdict.CONTINUE, 10),  # passed often, but dwells
    (5, 0, GOOD, Verdict.CONTINUE, 1),  # dwelt, but passed once
    (5, 1, GOOD, Verdict.READY, 2),
    (9, 1, GOOD, Verdict.READY, 2),
    (10, 1, GOOD, Verdict.READY, 2),  # ready at the age limit counts
    (10, 0, GOOD, Verdict.CULL, 1),
    (11, 0, GOOD, Verdict.CULL, 1),
    (5, 7, None, Verdict.CONTINUE, 0),  # passes in a row start again
    (10, 7, None, Verdict.CULL, 0),
    (5, 7, measured(0.01, rent=0.01), Verdict.CONTINUE, 0),  # at the rent is not above it
    (5, 7, measured(-0.5, mean=3.0), Verdict.CONTINUE, 0),  # the bound counts, not the mean
    (5, 7, measured(NAN), Verdict.CONTINUE, 0),
    (5, 7, measured(math.inf), Verdict.CONTINUE, 0),
    (5, 7, measured(0.1, rent=NAN), Verdict.CONTINUE, 0),
    (10, 7, measured(NAN), Verdict.CULL, 0),
]


@pytest.mark.parametrize(("age", "passes", "measurement", "verdict", "after"), SHADOW)
def test_the_shadow_gate(
    age: int, passes: int, measurement: Measurement | None, verdict: Verdict, after: int
) -> None:
    found = judge_shadow(age_epochs=age, passes=passes, measurement=measurement, gates=GATES)
    assert (found.verdict, found.passes) == (verdict, after)
    assert found.reason.startswith(describe(measurement))


def test_reasons_say_what_decided() -> None:
    ready = judge_shadow(age_epochs=5, passes=1, measurement=GOOD, gates=GATES)
    assert ready.reason.endswith("passed 2 times in a row")
    old = judge_shadow(age_epochs=10, passes=0, measurement=None, gates=GATES)
    assert old.reason == "no finite measurement at the age limit of 10 epochs"


@given(
    st.integers(0, 30),
    st.integers(0, 30),
    st.none() | st.builds(measured, st.floats(), rent=st.floats(0, 10)),
    st.integers(1, 5),
    st.integers(0, 10),
    st.integers(0, 10),
)
def test_nothing_but_enough_passes_in_a_row_opens_the_shadow_gate(
    age: int,
    passes: int,
    measurement: Measurement | None,
    needed: int,
    dwell: int,
    extra: int,
) -> None:
    thresholds = gates(passes=needed, dwell_epochs=dwell, age_epochs=dwell + extra)
    found = judge_shadow(age_epochs=age, passes=passes, measurement=measurement, gates=thresholds)
    passed = measurement is not None and measurement.passes()
    assert found.passes == (passes + 1 if passed else 0)
    if found.verdict is Verdict.READY:
        assert passed
        assert passes + 1 >= needed
        assert age >= dwell
    elif found.verdict is Verdict.CULL:
        assert age >= thresholds.age_epochs
    else:
        assert found.verdict is Verdict.CONTINUE
        assert age < thresholds.age_epochs


@given(st.lists(st.booleans(), min_size=1, max_size=20), st.integers(1, 4))
def test_one_failure_sets_the_count_of_passes_to_zero(course: list[bool], needed: int) -> None:
    thresholds = gates(passes=needed, dwell_epochs=0, age_epochs=100)
    passes = run = 0
    for good in course:
        found = judge_shadow(
            age_epochs=1,
            passes=passes,
            measurement=GOOD if good else None,
            gates=thresholds,
        )
        passes, run = found.passes, run + 1 if good else 0
        assert passes == run
        assert (found.verdict is Verdict.READY) == (run >= needed)


# -- the recovery gate --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measurement", "verdict"),
    [
        (GOOD, Verdict.FOSSILIZE),
        (None, Verdict.CULL),
        (measured(0.01, rent=0.01), Verdict.CULL),
        (measured(-0.1), Verdict.CULL),
        (measured(NAN), Verdict.CULL),
        (measured(math.inf), Verdict.CULL),
        (measured(-math.inf), Verdict.CULL),
    ],
)
def test_the_recovery_gate(measurement: Measurement | None, verdict: Verdict) -> None:
    found = judge_recovery(measurement)
    assert found == Judgement(verdict=verdict, reason=f"recovery trial: {describe(measurement)}")


# -- times --------------------------------------------------------------------------------------


def test_the_embargo_doubles_with_every_cycle_up_to_32_fold() -> None:
    thresholds = gates(embargo_epochs=3)
    found = [embargo_epochs(cycle, thresholds) for cycle in range(8)]
    assert found == [3, 6, 12, 24, 48, 96, 96, 96]


@given(st.integers(0, 1000))
def test_without_an_embargo_a_slot_opens_at_once(cycle: int) -> None:
    assert embargo_epochs(cycle, gates(embargo_epochs=0)) == 0


@pytest.mark.parametrize(
    ("age", "ramp", "hold", "due"),
    [(4, 3, 2, False), (5, 3, 2, True), (6, 3, 2, True), (0, 0, 0, True), (0, 0, 1, False)],
)
def test_recovery_is_due_when_ramp_and_hold_are_over(
    age: int, ramp: int, hold: int, due: bool
) -> None:
    assert recovery_due(age, gates(ramp_epochs=ramp, hold_epochs=hold)) is due


def test_a_measurement_in_words() -> None:
    assert describe(None) == "no finite measurement"
    assert describe(measured(0.02, mean=0.05)) == (
        "gain +0.0500 nats, at least +0.0200, above the rent of 0.0100 (100 samples)"
    )
    assert "at least -0.1000, not above the rent" in describe(measured(-0.1))
