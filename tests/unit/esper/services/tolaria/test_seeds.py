from __future__ import annotations

import json

from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.enums import SeedState
from esper.contracts.operational import Measurement
from esper.services.tolaria.seeds import SeedBook, SeedRecord

S = SeedState
counts = st.integers(0, 10_000)
numbers = st.floats(allow_nan=False)
measurements = st.builds(
    Measurement, mean=numbers, lower=numbers, upper=numbers, rent=numbers, samples=counts
)
records = st.builds(
    SeedRecord,
    layer=st.sampled_from(["a", "b.0"]),
    slot=st.integers(0, 3),
    state=st.sampled_from(SeedState),
    cycle=st.integers(0, 5),
    blueprint=st.sampled_from(["", "noop", "widen"]),
    kernel=st.sampled_from(["", "k1"]),
    parameters=counts,
    flops=counts,
    rent=st.floats(0, 10),
    alpha=st.floats(0, 1),
    age_epochs=counts,
    passes=counts,
    ready=st.booleans(),
    measurement=st.none() | measurements,
    opens_epoch=counts,
    grafted_epoch=st.none() | counts,
    fossilized_epoch=st.none() | counts,
)


def record(slot: int = 0, state: SeedState = S.TRAINING, **rest: object) -> SeedRecord:
    values = {"layer": "a", "cycle": 0, "blueprint": "widen", **rest}
    return SeedRecord(slot=slot, state=state, **values)  # type: ignore[arg-type]


def book(*found: SeedRecord) -> SeedBook:
    return SeedBook({one.site: one for one in found})


@settings(max_examples=50, deadline=None)
@given(st.lists(records, max_size=6))
def test_a_book_round_trips_through_json(found: list[SeedRecord]) -> None:
    kept = book(*found)
    for epoch, one in enumerate(kept.records.values()):
        kept.open_trial(one, epoch)
        kept.update_trial(one, epoch + 3)
    again = SeedBook.from_state(json.loads(json.dumps(kept.to_state())))
    assert again == kept
    assert list(again.records) == list(kept.records)


def test_a_learning_seed_is_in_training_with_its_gate_closed() -> None:
    seeds = [record(0), record(1, ready=True), record(2, S.GERMINATED), record(3, S.GRAFTING)]
    found = book(*seeds)
    assert [one.slot for one in found.learning()] == [0]
    assert [one.slot for one in found.in_state(S.TRAINING, S.GRAFTING)] == [0, 1, 3]
    assert found.in_state(S.CULLED) == []


def test_counts_name_the_states_that_have_seeds() -> None:
    found = book(record(0), record(1), record(2, S.FOSSILIZED)).counts()
    assert found == {"fossilized": 1, "training": 2}
    assert list(found) == sorted(found)
    assert SeedBook().counts() == {}


def test_the_controller_sees_the_record() -> None:
    measured = Measurement(mean=0.5, lower=0.25, upper=0.75, rent=0.125, samples=10)
    seen = record(
        1, kernel="k", alpha=0.5, age_epochs=3, passes=2, parameters=9, measurement=measured
    ).observation()
    assert (seen.layer, seen.slot, seen.state) == ("a", 1, S.TRAINING)
    assert (seen.blueprint, seen.kernel, seen.alpha) == ("widen", "k", 0.5)
    assert (seen.age_epochs, seen.passes, seen.parameters, seen.ready) == (3, 2, 9, False)
    assert seen.measurement == measured
    bare = record(blueprint="").observation()
    assert (bare.blueprint, bare.kernel, bare.measurement) == (None, None, None)


def test_a_trial_follows_its_record_until_it_ends() -> None:
    one = record(0, S.GERMINATED)
    found = book(one)
    found.open_trial(one, 4)
    one.state = S.TRAINING
    found.update_trial(one, 6)
    (trial,) = found.trials
    assert (trial.started_epoch, trial.ended_epoch, trial.state) == (4, None, S.TRAINING)
    one.measurement = Measurement(mean=0.5, lower=0.25, upper=0.75, rent=0.125, samples=10)
    one.state = S.CULLED
    found.update_trial(one, 9)
    (trial,) = found.trials
    assert (trial.ended_epoch, trial.state, trial.measurement) == (9, S.CULLED, one.measurement)


def test_a_new_cycle_is_a_trial_of_its_own() -> None:
    one = record(0, S.CULLED)
    other = record(1, S.TRAINING)
    found = book(one, other)
    found.open_trial(one, 1)
    found.open_trial(other, 2)
    one.cycle, one.state = 1, S.GERMINATED
    found.open_trial(one, 5)
    one.state = S.FOSSILIZED
    found.update_trial(one, 8)
    assert [(t.slot, t.cycle, t.ended_epoch) for t in found.trials] == [
        (0, 0, None),
        (1, 0, None),
        (0, 1, 8),
    ]


def test_a_record_without_a_trial_changes_nothing() -> None:
    one = record()
    found = book(one)
    found.update_trial(one, 3)
    assert found.trials == []
