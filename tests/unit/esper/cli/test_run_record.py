from hypothesis import given
from hypothesis import strategies as st

from esper.cli.run_record import ResultRecord, grown_from, lives_of
from esper.contracts.enums import SeedState
from esper.contracts.operational import Measurement, SeedTransition

S = SeedState


def step(epoch, current, layer="a", slot=0, cycle=0, blueprint="b", measurement=None):
    return SeedTransition(
        session="s",
        epoch=epoch,
        layer=layer,
        slot=slot,
        cycle=cycle,
        previous=S.DORMANT,
        current=current,
        blueprint=blueprint,
        reason=f"to {current}",
        measurement=measurement,
    )


MEASURED = Measurement(mean=0.1, lower=0.05, upper=0.15, rent=0.01, samples=100)


def test_a_life_from_germination_to_a_fossil():
    steps = [
        step(2, S.GERMINATED),
        step(3, S.TRAINING),
        step(8, S.GRAFTING, blueprint=None),
        step(12, S.FOSSILIZED, blueprint=None, measurement=MEASURED),
    ]
    (life,) = lives_of(steps, 20)
    assert [(span.state, span.start, span.end) for span in life.spans] == [
        (S.GERMINATED, 2, 3),
        (S.TRAINING, 3, 8),
        (S.GRAFTING, 8, 12),
        (S.FOSSILIZED, 12, 20),
    ]
    assert (life.started, life.decided, life.grafted) == (2, 12, True)
    assert (life.blueprint, life.reason, life.measurement) == ("b", "to fossilized", MEASURED)
    (part,) = grown_from([life])
    assert (part.epoch, part.contribution.lower, part.rent, part.samples) == (12, 0.05, 0.01, 100)


def test_a_culled_seed_ends_its_life_when_its_embargo_ends():
    steps = [step(1, S.GERMINATED), step(2, S.TRAINING), step(6, S.CULLED), step(9, S.DORMANT)]
    (life,) = lives_of(steps, 20)
    assert (life.state, life.decided, life.spans[-1].end) == (S.CULLED, 6, 9)
    assert not life.grafted
    assert list(grown_from([life])) == []


def test_the_next_germination_ends_the_life_before():
    steps = [step(1, S.GERMINATED), step(4, S.CULLED), step(7, S.GERMINATED, cycle=1)]
    first, second = lives_of(steps, 10)
    assert (first.spans[-1].end, second.spans[-1].end) == (7, 10)
    assert second.decided is None


def test_slots_live_side_by_side_and_are_numbered_as_they_germinate():
    steps = [
        step(1, S.GERMINATED, slot=0),
        step(2, S.GERMINATED, slot=1),
        step(2, S.GERMINATED, layer="c"),
        step(3, S.TRAINING, slot=1),
    ]
    lives = list(lives_of(steps, 5))
    assert [(life.number, life.layer, life.slot) for life in lives] == [
        (1, "a", 0),
        (2, "a", 1),
        (3, "c", 0),
    ]
    assert [len(life.spans) for life in lives] == [1, 2, 1]


def test_a_log_that_starts_in_the_middle_of_a_life():
    (life,) = lives_of([step(5, S.DORMANT), step(6, S.TRAINING)], 9)
    assert life.spans[0].state is S.TRAINING


def test_a_fossil_without_a_measurement_has_no_contribution():
    (part,) = grown_from(lives_of([step(5, S.FOSSILIZED)], 9))
    assert part.contribution is None
    assert part.rent is None


@given(
    st.lists(
        st.tuples(st.integers(0, 30), st.sampled_from(S), st.sampled_from("abc"), st.integers(0, 1))
    )
)
def test_lives_are_whole_whatever_the_order_of_states(drawn):
    steps = [step(*each) for each in sorted(drawn, key=lambda each: each[0])]
    lives = list(lives_of(steps, 31))
    assert [life.number for life in lives] == list(range(1, len(lives) + 1))
    for life in lives:
        assert life.spans
        assert all(span.start <= span.end <= 31 for span in life.spans)
        assert all(a.end == b.start for a, b in zip(life.spans, life.spans[1:], strict=False))
        assert S.DORMANT not in {span.state for span in life.spans}
    spans = sum(len(life.spans) for life in lives)
    assert spans == sum(each.current is not S.DORMANT for each in steps)


def test_a_result_keeps_the_counts_among_its_seeds():
    result = ResultRecord.model_validate({"seeds": {"fossilized": 2, "note": "x"}, "later": 1})
    assert result.seeds == {"fossilized": 2}
    assert ResultRecord.model_validate({"seeds": None}).seeds == {}
