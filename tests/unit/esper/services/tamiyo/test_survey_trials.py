"""The heuristic, rule by rule: which trials make a survey, and which comes next."""

from __future__ import annotations

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import LayerDescription
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.policies import survey

WAIT, GERMINATE, GRAFT = DecisionAction.WAIT, DecisionAction.GERMINATE, DecisionAction.GRAFT
NAMES = ("fc1", "fc2", "fc3")


def decided(packet):
    return survey.decide(packet, ModelGraphAnalyzer().analyze(packet))


def told(decision):
    return (decision.action, decision.layer, decision.slot, decision.blueprint)


def layers(slots, names=NAMES):
    return tuple(
        LayerDescription(name=name, kind="Linear", parameters=9, slots=slots) for name in names
    )


def tried(build, *sites, **fields):
    """Trials of this survey, over by now unless a field says otherwise."""
    past = {"started_epoch": build.start() - 5, "ended_epoch": build.start()}
    return tuple(build.trial(layer, blueprint, **{**past, **fields}) for layer, blueprint in sites)


def mlps(*names):
    return tuple((name, "bottleneck-mlp") for name in names)


# What comes next.


def test_the_survey_goes_by_layer_and_comes_to_the_placebos_last(build):
    found, trials = [], ()
    for _ in range(6):
        decision = decided(build.surveying(trials=trials))
        assert decision.action is GERMINATE
        found.append((decision.layer, decision.blueprint))
        trials += tried(build, found[-1])
    assert found == [(name, kind) for kind in ("bottleneck-mlp", "noop") for name in NAMES]
    decision = decided(build.surveying(trials=trials))
    assert (decision.action, decision.reason) == (
        WAIT,
        "The survey is over after 6 trials: nothing else fits the 5000 parameters left.",
    )


def test_within_a_layer_the_smaller_comes_first_and_equals_go_by_name(build):
    candidates = (
        build.candidate("fc2", "aaa", parameters=1),
        build.candidate("fc1", "widen", parameters=9),
        build.candidate("fc1", "mlp", parameters=9),
        build.candidate("fc1", "big", parameters=99),
        build.candidate("fc1", "noop"),
    )
    for listed in (candidates, candidates[::-1]):
        found, trials = [], ()
        for _ in candidates:
            decision = decided(build.surveying(candidates=listed, trials=trials))
            found.append((decision.layer, decision.blueprint))
            trials += tried(build, found[-1])
        assert [name for _, name in found] == ["mlp", "widen", "big", "aaa", "noop"]


def test_a_trial_says_its_number_its_price_and_what_ails_the_layer(build):
    packet = build.surveying(
        candidates=(build.candidate("fc1"),),
        signals=(build.signal("fc1", activation_rank=0.06),),
        trials=tried(build, *mlps("fc2", "fc3")),
    )
    assert decided(packet).reason == (
        "Trial 3 of this survey: bottleneck-mlp at fc1 for 2000 of the 5000 parameters left"
        " (fc1 uses 6% of its rank)."
    )


@pytest.mark.parametrize(
    ("remaining", "offered", "past", "expected"),
    [
        # where the session offers something else, what folds is not tried
        (5000, ("low-rank", "bottleneck-mlp"), (), "bottleneck-mlp"),
        (5000, ("low-rank", "bottleneck-mlp"), ("bottleneck-mlp",), None),
        # also when that is too big for what is left
        (500, ("low-rank", "bottleneck-mlp"), (), None),
        (500, ("low-rank", "bottleneck-mlp"), ("bottleneck-mlp",), None),
        # where it offers nothing else, it is, before the placebo
        (500, ("low-rank",), (), "low-rank"),
        (500, ("low-rank", "noop"), (), "low-rank"),
        (500, ("low-rank", "noop"), ("low-rank",), "noop"),
        (200, ("low-rank", "noop"), (), None),
        # the placebo is tried only in a search that has something to find
        (2000, ("bottleneck-mlp", "noop"), ("bottleneck-mlp",), "noop"),
        (1999, ("bottleneck-mlp", "noop"), (), None),
        (5000, ("noop",), (), None),
        (0, ("bottleneck-mlp", "low-rank", "noop"), (), None),
    ],
)
def test_kernels_that_fold_and_placebos_are_tried_only_where_they_have_a_meaning(
    build, remaining, offered, past, expected
):
    packet = build.surveying(
        remaining_parameters=remaining,
        candidates=tuple(build.candidate("fc1", name) for name in offered),
        trials=tried(build, *(("fc1", name) for name in past)),
    )
    decision = decided(packet)
    assert decision.blueprint == expected
    assert decision.action is (GERMINATE if expected else WAIT)


def test_placebos_come_after_all_that_fold(build):
    candidates = tuple(
        build.candidate(layer, name) for layer in ("fc1", "fc2") for name in ("noop", "low-rank")
    )
    found, trials = [], ()
    for _ in candidates:
        decision = decided(build.surveying(candidates=candidates, trials=trials))
        found.append((decision.layer, decision.blueprint))
        trials += tried(build, found[-1])
    assert found == [("fc1", "low-rank"), ("fc2", "low-rank"), ("fc1", "noop"), ("fc2", "noop")]


@pytest.mark.parametrize("active", [1, 2])
def test_a_placebo_delays_nothing_that_is_ready_to_grow(build, active):
    def decide(*seeds, sites=NAMES):
        trials = tried(build, *mlps(*sites))
        settings = {"active_seeds": active}
        packet = build.surveying(settings, layers=layers(2), seeds=seeds, trials=trials)
        return told(decided(packet))

    ready = build.ready("fc1", "bottleneck-mlp", 0.2)
    assert decide() == (GERMINATE, "fc1", 0, "noop")
    assert decide(ready) == (GRAFT, "fc1", 0, "bottleneck-mlp")
    # A candidate that could grow still goes first,
    assert decide(ready, sites=("fc1", "fc2")) == (GERMINATE, "fc3", 0, "bottleneck-mlp")
    # and no placebo takes the seat that is left beside a trial under way.
    assert decide(ready, build.seed("fc3", age_epochs=4))[0] is WAIT
    # Nor is one planted once that trial has lasted its time.
    assert decide(ready, build.seed("fc3", age_epochs=5)) == (GRAFT, "fc1", 0, "bottleneck-mlp")


@pytest.mark.parametrize(
    ("active", "seeds", "action"),
    [
        (1, (SeedState.TRAINING,), WAIT),
        (1, (SeedState.GERMINATED,), WAIT),
        (2, (SeedState.TRAINING,), GERMINATE),
        (2, (SeedState.TRAINING, SeedState.GERMINATED), WAIT),
        (1, (SeedState.FOSSILIZED, SeedState.CULLED), GERMINATE),
    ],
)
def test_only_trials_under_way_take_the_seats(build, active, seeds, action):
    placed = tuple(
        build.seed(layer, state=state) for layer, state in zip(("fc1", "fc2"), seeds, strict=False)
    )
    decision = decided(build.surveying({"active_seeds": active}, seeds=placed))
    assert decision.action is action
    if action is GERMINATE:
        assert decision.layer == ("fc2", "fc3")[len(seeds) - 1]


def test_a_ready_seed_keeps_its_slot_but_not_its_seat(build):
    packet = build.surveying(
        seeds=(build.ready("fc1", "bottleneck-mlp", 0.2),),
        trials=tried(build, *mlps("fc1"), ended_epoch=None),
    )
    assert told(decided(packet)) == (GERMINATE, "fc2", 0, "bottleneck-mlp")


def test_a_second_slot_of_a_layer_is_used(build):
    packet = build.surveying(
        {"active_seeds": 2},
        layers=layers(2),
        candidates=(build.candidate("fc1"), build.candidate("fc1", "widen")),
        seeds=(build.seed("fc1", "widen"),),
        trials=tried(build, ("fc1", "widen"), ended_epoch=None),
    )
    assert told(decided(packet)) == (GERMINATE, "fc1", 1, "bottleneck-mlp")


def test_without_a_free_slot_the_survey_waits_for_one(build):
    seeds = tuple(build.seed(name, state=SeedState.CULLED) for name in NAMES)
    decision = decided(build.surveying(seeds=seeds))
    assert decision.action is WAIT
    assert decision.reason == "No layer of 6 untried candidates has a free slot."


def test_an_embargo_on_the_next_site_does_not_hold_up_the_others(build):
    seeds = (build.seed("fc1", state=SeedState.CULLED),)
    assert told(decided(build.surveying(seeds=seeds))) == (GERMINATE, "fc2", 0, "bottleneck-mlp")


@pytest.mark.parametrize("full", [layers(0), layers(1, names=("fc8", "fc9"))])
def test_a_candidate_whose_layer_can_hold_no_seed_is_left_alone(build, full):
    decision = decided(build.surveying(layers=full, signals=()))
    assert decision.reason == (
        "The survey is over after 0 trials: nothing else fits the 5000 parameters left."
    )


@pytest.mark.parametrize(("left", "action"), [(16, GERMINATE), (15, WAIT)])
def test_no_trial_starts_that_could_not_pay_back(build, left, action):
    decision = decided(build.surveying(left=left))
    assert decision.action is action
    if action is WAIT:
        assert decision.reason == (
            "A trial with its graft and payback takes 16 epochs and 15 are left, so 6 candidates"
            " stay untried."
        )


def test_a_model_without_candidates_has_nothing_to_survey(build):
    decision = decided(build.surveying(candidates=(), remaining_parameters=1))
    assert decision.reason == (
        "The survey is over after 0 trials: nothing else fits the 1 parameter left."
    )


@pytest.mark.parametrize(("left", "action"), [(50, WAIT), (16, WAIT), (15, GRAFT)])
@pytest.mark.parametrize("untried", [("fc1", "widen"), ("fc3", "bottleneck-mlp")])
def test_grafting_waits_for_candidates_whose_slot_or_seat_a_late_trial_holds(
    build, untried, left, action
):
    packet = build.surveying(
        {"age_epochs": 40},
        left=left,
        candidates=tuple(
            build.candidate(*site)
            for site in (("fc1", "bottleneck-mlp"), ("fc2", "bottleneck-mlp"), untried)
        ),
        seeds=(build.seed("fc1", age_epochs=9), build.ready("fc2", "bottleneck-mlp", 0.2)),
        trials=tuple(build.open_trial(layer) for layer in ("fc1", "fc2")),
    )
    assert decided(packet).action is action


# Which trials belong to this survey.


def test_a_survey_starts_where_the_latest_fossil_ended(build):
    fossil = build.trial("fc1", state=SeedState.FOSSILIZED, started_epoch=50, ended_epoch=60)
    earlier = build.trial("fc1", state=SeedState.FOSSILIZED, started_epoch=41, ended_epoch=45)
    old = build.trial("fc2", started_epoch=51, ended_epoch=58)
    same = build.trial("fc3", "noop", started_epoch=60, ended_epoch=63)
    new = build.trial("fc3", started_epoch=63, ended_epoch=None, state=SeedState.TRAINING)
    packet = build.packet(epoch=65, trials=(earlier, fossil, old, same, new))
    assert survey.survey_trials(packet) == [same, new]


def test_a_fossil_without_an_end_counts_from_its_start(build):
    fossil = build.trial(state=SeedState.FOSSILIZED, started_epoch=50, ended_epoch=None)
    old, new = build.trial("fc2", started_epoch=49), build.trial("fc2", started_epoch=50)
    packet = build.packet(epoch=55, trials=(fossil, old, new))
    assert survey.survey_trials(packet) == [new]


def test_after_a_fossil_everything_is_tried_anew(build):
    start = build.start()
    fossil = build.trial(
        "fc1", state=SeedState.FOSSILIZED, started_epoch=start, ended_epoch=start + 11
    )
    others = tried(build, *mlps("fc2", "fc3"), started_epoch=start, ended_epoch=start + 5)
    packet = build.surveying(
        left=39,
        seeds=(build.seed("fc1", state=SeedState.FOSSILIZED),),
        trials=(fossil, *others),
    )
    assert told(decided(packet)) == (GERMINATE, "fc2", 0, "bottleneck-mlp")


@pytest.mark.parametrize(
    ("ended", "state", "count"),
    [
        # the last trial ended before this epoch: the next survey begins
        ((50, 55, 59), SeedState.CULLED, 0),
        # it ended at this very epoch, or goes on
        ((50, 55, 60), SeedState.CULLED, 3),
        ((50, 55, None), SeedState.TRAINING, 3),
        # one candidate was not tried yet
        ((50, 55), SeedState.CULLED, 2),
    ],
)
def test_a_survey_ends_once_every_eligible_candidate_was_tried(build, ended, state, count):
    trials = tuple(
        build.trial(name, started_epoch=45, ended_epoch=end, state=state)
        for name, end in zip(NAMES, ended, strict=False)
    )
    assert len(survey.survey_trials(build.packet(epoch=60, trials=trials))) == count


def test_neither_placebos_nor_what_folds_nor_the_unaffordable_keep_a_survey_open(build):
    trials = tried(build, *mlps("fc1"))
    packet = build.surveying(
        left=49,
        candidates=(
            build.candidate("fc1"),
            build.candidate("fc1", "noop"),
            build.candidate("fc2", "low-rank"),
            build.candidate("fc2", "huge", parameters=9999),
        ),
        trials=trials,
    )
    assert survey.survey_trials(packet) == []


def test_a_layer_full_of_fossils_does_not_keep_a_survey_open(build):
    past = {"started_epoch": build.start() - 10, "ended_epoch": build.start() - 5}
    fossil = build.trial("fc1", state=SeedState.FOSSILIZED, **past)
    packet = build.surveying(
        left=49,
        seeds=(build.seed("fc1", state=SeedState.FOSSILIZED),),
        trials=(fossil, *tried(build, *mlps("fc2", "fc3"))),
    )
    assert told(decided(packet)) == (GERMINATE, "fc2", 0, "bottleneck-mlp")
    roomy = packet.model_copy(update={"layers": layers(2)})
    assert told(decided(roomy)) == (GERMINATE, "fc1", 1, "bottleneck-mlp")


def test_earlier_surveys_are_told_apart_by_their_trials_alone(build):
    first = tried(build, *mlps(*NAMES), started_epoch=50, ended_epoch=55)
    placebo = tried(build, ("fc1", "noop"), started_epoch=55, ended_epoch=60)
    second = tried(build, *mlps(*NAMES), started_epoch=61, ended_epoch=66)
    third = tried(build, *mlps("fc1"), started_epoch=67, ended_epoch=None)

    def of(epoch, *trials):
        return survey.survey_trials(build.packet(epoch=epoch, trials=sum(trials, ())))

    assert of(55, first) == list(first)
    assert of(56, first) == []
    assert of(60, first, placebo) == list(first + placebo)
    assert of(61, first, placebo) == []
    assert of(66, first, placebo, second) == list(second)
    assert of(70, first, placebo, second, third) == list(third)


def test_the_numbers_in_the_reasons_are_those_of_this_survey(build):
    trials = tried(build, *mlps(*NAMES))
    assert decided(build.surveying(left=49, trials=trials)).reason.startswith("Trial 1 of this")
    assert decided(build.surveying(left=50, trials=trials)).reason.startswith("Trial 4 of this")
