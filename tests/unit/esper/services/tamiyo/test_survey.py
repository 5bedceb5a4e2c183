"""The heuristic, rule by rule: its clock, what it culls, and what it grafts."""

from __future__ import annotations

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import Measurement
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.policies import survey
from esper.services.tamiyo.policies.room import growth_epochs

WAIT, GERMINATE = DecisionAction.WAIT, DecisionAction.GERMINATE
GRAFT, CULL = DecisionAction.GRAFT, DecisionAction.CULL


def decided(packet):
    return survey.decide(packet, ModelGraphAnalyzer().analyze(packet))


def told(decision):
    return (decision.action, decision.layer, decision.slot, decision.blueprint)


def all_tried(build):
    """One open trial for each candidate that a survey of the usual ones tries."""
    return tuple(
        build.open_trial(layer, blueprint)
        for blueprint in ("bottleneck-mlp", "noop")
        for layer in ("fc1", "fc2", "fc3")
    )


# The clock: the first survey begins at its share of the epochs, or while a graft still pays.


@pytest.mark.parametrize(
    ("epochs", "settings", "latest"),
    [
        # a trial, its graft and its payback take 16 epochs
        (100, {}, 84),
        (30, {}, 14),
        (32, {}, 16),
        (33, {}, 17),
        (10, {}, 1),
        (16, {}, 1),
        (17, {}, 1),
        (18, {}, 2),
        # 25 epochs at boundaries 4 apart: the last one in time is at 4, not at 5
        (30, {"interval_epochs": 4}, 4),
        (29, {"interval_epochs": 4}, 4),
        (28, {"interval_epochs": 4}, 1),
        (100, {"interval_epochs": 4}, 72),
        (100, {"dwell_epochs": 40}, 14),
        (1, {}, 1),
    ],
)
def test_the_first_survey_begins_at_its_share_of_the_epochs_or_while_a_graft_still_pays(
    build, epochs, settings, latest
):
    packet = build.packet(settings, epochs=epochs, epoch=1, remaining_epochs=epochs - 1)
    share = int(survey.FIRST_SURVEY * epochs)
    assert survey.first_survey_epoch(packet) == max(1, min(share, latest))


def test_the_first_survey_begins_at_three_fifths_of_a_long_session(build):
    found = [survey.first_survey_epoch(build.packet(epochs=epochs)) for epochs in (60, 101, 1000)]
    assert found == [36, 60, 600]


@pytest.mark.parametrize("epochs", [30, 100])
def test_nothing_happens_before_the_first_survey(build, epochs):
    def at(epoch):
        return decided(build.packet(epochs=epochs, epoch=epoch, remaining_epochs=epochs - epoch))

    start = survey.first_survey_epoch(build.packet(epochs=epochs))
    assert 1 < start <= epochs - growth_epochs(build.settings())
    early = [at(epoch) for epoch in range(1, start)]
    assert {decision.action for decision in early} == {WAIT}
    assert {d.reason for d in early} == {f"The first survey begins at epoch {start}."}
    assert told(at(start)) == (GERMINATE, "fc1", 0, "bottleneck-mlp")


def test_a_session_too_short_for_any_graft_says_so_from_its_first_epoch(build):
    decision = decided(build.packet(epochs=10, epoch=1, remaining_epochs=9))
    assert (decision.action, decision.reason) == (
        WAIT,
        "A trial with its graft and payback takes 16 epochs and 9 are left, so 6 candidates stay"
        " untried.",
    )


# While a seed is grafting, clear up what its survey left over.


def test_a_graft_in_progress_voids_what_was_measured_before(build):
    grafting = build.seed("fc1", state=SeedState.GRAFTING, alpha=0.33)
    left = (build.ready("fc2", "bottleneck-mlp", 0.1), build.ready("fc3", "bottleneck-mlp", 0.2))
    decision = decided(build.surveying(seeds=(grafting, *left)))
    assert told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 was planted in the host as it was before bottleneck-mlp at fc1 was"
        " grafted, so its trial, with 0.100 nats (at least 0.080), no longer counts."
    )


@pytest.mark.parametrize("state", [SeedState.TRAINING, SeedState.GERMINATED])
@pytest.mark.parametrize("age", [0, 5])
def test_a_graft_in_progress_ends_the_trials_that_it_did_not_wait_for(build, state, age):
    grafting = build.seed("fc2", state=SeedState.GRAFTING, alpha=0.33)
    late = build.seed("fc1", state=state, age_epochs=age)
    decision = decided(build.surveying(seeds=(late, grafting)))
    assert told(decision) == (CULL, "fc1", 0, "bottleneck-mlp")
    assert decision.reason.endswith("so its trial, with no measurement, no longer counts.")
    # Ready seeds go first, and one that is left over goes at a time.
    ready = build.ready("fc3", "bottleneck-mlp", 0.1)
    assert decided(build.surveying(seeds=(late, grafting, ready))).layer == "fc3"


def test_nothing_else_happens_while_a_seed_is_grafting(build):
    grafting = build.seed("fc2", state=SeedState.GRAFTING, alpha=0.33)
    others = (
        build.seed("fc1", state=SeedState.FOSSILIZED),
        build.seed("fc3", state=SeedState.CULLED),
        build.seed("fc3", slot=1, state=SeedState.DORMANT),
    )
    # The seats and fc3's second slot are free, and its candidate is untried.
    layers = tuple(layer.model_copy(update={"slots": 2}) for layer in build.surveying().layers)
    packet = build.surveying({"active_seeds": 5}, layers=layers, seeds=(grafting, *others))
    decision = decided(packet)
    assert told(decision) == (WAIT, None, None, None)
    assert decision.reason == (
        "bottleneck-mlp at fc2 is being blended in, now at 33%; its recovery trial decides."
    )


# Races.


@pytest.mark.parametrize(
    ("settings", "age"),
    [
        # a trial takes the dwell ...
        ({}, 3),
        ({"dwell_epochs": 8}, 4),
        ({"dwell_epochs": 9}, 5),
        # ... or the passes, one an interval
        ({"interval_epochs": 4}, 4),
        ({"interval_epochs": 4, "passes": 3}, 6),
        # the graft and the age limit have no part in it
        ({"ramp_epochs": 30, "hold_epochs": 20, "age_epochs": 40}, 3),
        # however short a trial, its first epoch decides nothing
        ({"dwell_epochs": 3}, 2),
        ({"dwell_epochs": 1, "passes": 1}, 2),
    ],
)
def test_a_race_is_decided_from_half_a_trial_on_and_never_before_two_epochs(build, settings, age):
    assert survey.racing_age(build.packet(settings)) == age


@pytest.mark.parametrize(
    ("laggard", "leader", "culled"),
    [
        # margins are 0.02 either way, so a race is lost from a gap of 0.04 on
        ({"measurement": (0.10,)}, {"measurement": (0.15,)}, True),
        ({"measurement": (0.12,)}, {"measurement": (0.15,)}, False),
        ({"measurement": (0.10, 0.04)}, {"measurement": (0.15, 0.02)}, False),
        # rent counts: the leader pays more
        ({"measurement": (0.10,)}, {"measurement": (0.15, 0.02, 0.05)}, False),
        ({"measurement": (0.14, 0.02, 0.05)}, {"measurement": (0.15, 0.02, 0.0)}, True),
        # only trials of one age race
        ({"measurement": (0.10,)}, {"measurement": (0.15,), "older": 1}, False),
        ({"measurement": (0.10,), "older": 2}, {"measurement": (0.95,), "older": 1}, False),
        # and only from the racing age on
        *(
            (
                {"measurement": (0.10,), "older": older},
                {"measurement": (0.15,), "older": older},
                older >= 0,
            )
            for older in (-2, -1, 0, 1)
        ),
        # a ready seed leads and loses like any other
        ({"measurement": (0.10,)}, {"measurement": (0.15,), "ready": True}, True),
        ({"measurement": (0.10,), "ready": True}, {"measurement": (0.15,), "ready": True}, True),
        # what is not measured neither wins nor loses
        ({}, {"measurement": (0.15,)}, False),
        ({"measurement": (-9.0,)}, {}, False),
        # seeds that are not in training are not in the race
        ({"measurement": (0.10,), "state": SeedState.GERMINATED}, {"measurement": (0.15,)}, False),
        ({"measurement": (0.10,)}, {"measurement": (0.15,), "state": SeedState.FOSSILIZED}, False),
    ],
)
def test_a_trial_that_can_not_win_any_more_is_ended(build, laggard, leader, culled):
    age = survey.racing_age(build.packet())

    def racing(layer, *, measurement=None, older=0, **fields):
        measured = build.measured(*measurement) if measurement else None
        return build.seed(layer, measurement=measured, age_epochs=age + older, **fields)

    seeds = (racing("fc1", **leader), racing("fc2", **laggard))
    decision = decided(build.surveying({"active_seeds": 2}, seeds=seeds))
    assert (told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")) is culled
    assert (decision.action is CULL) is culled


@pytest.mark.parametrize(
    ("leader", "culled"),
    [
        # exact gains, then a rent: a leader's lower bound lies above it
        ((-0.10, 0.0, 0.0), False),
        ((0.0, 0.0, 0.0), False),
        ((0.002, 0.0, 0.002), False),
        ((0.003, 0.0, 0.002), True),
        # the mean alone shows nothing
        ((0.10, 0.10, 0.002), False),
        ((0.10, 0.05, 0.002), True),
    ],
)
def test_only_a_seed_that_has_earned_its_rent_can_end_anothers_trial(build, leader, culled):
    age = survey.racing_age(build.packet())
    seeds = (
        build.seed("fc1", measurement=build.measured(*leader), age_epochs=age),
        build.seed("fc2", measurement=build.measured(-0.5), age_epochs=age),
        build.seed("fc3", measurement=build.measured(-0.9), age_epochs=age),
    )
    decision = decided(build.surveying({"active_seeds": 3}, seeds=seeds))
    if culled:
        assert told(decision) == (CULL, "fc3", 0, "bottleneck-mlp")
    else:
        assert decision.action is WAIT


def test_the_one_furthest_behind_goes_first_and_the_reason_names_both(build):
    seeds = (
        build.seed("fc1", measurement=build.measured(0.1)),
        build.seed("fc2", measurement=build.measured(0.0)),
        build.seed("fc3", measurement=build.measured(0.231)),
    )
    decision = decided(build.surveying({"active_seeds": 3}, seeds=seeds))
    assert told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 gains at most 0.018 nats after rent, and bottleneck-mlp at fc3 at"
        " least 0.209, so it can't win this survey."
    )


def test_an_older_leader_does_not_stop_the_race_among_the_younger(build):
    age = survey.racing_age(build.packet())
    seeds = (
        build.ready("fc1", "bottleneck-mlp", 0.9, age_epochs=age + 5),
        build.seed("fc2", measurement=build.measured(0.3), age_epochs=age),
        build.seed("fc3", measurement=build.measured(0.1), age_epochs=age),
    )
    decision = decided(build.surveying({"active_seeds": 2}, seeds=seeds))
    assert told(decision) == (CULL, "fc3", 0, "bottleneck-mlp")
    assert "bottleneck-mlp at fc2 at least 0.278" in decision.reason


def test_of_several_races_the_widest_gap_goes_first(build):
    age = survey.racing_age(build.packet())
    seeds = (
        build.seed("fc1", measurement=build.measured(0.9), age_epochs=age + 1),
        build.seed("fc1", slot=1, measurement=build.measured(0.2), age_epochs=age + 1),
        build.seed("fc2", measurement=build.measured(0.2), age_epochs=age),
        build.seed("fc3", measurement=build.measured(0.1), age_epochs=age),
    )
    decision = decided(build.surveying({"active_seeds": 4}, seeds=seeds))
    assert told(decision) == (CULL, "fc1", 1, "bottleneck-mlp")


def test_the_placebo_never_leads_a_race_but_can_lose_one(build):
    slow = build.seed("fc1", measurement=build.measured(-0.3))
    placebo = build.seed("fc2", "noop", measurement=build.measured(0.0, half=0.0, rent=0.0))
    strong = build.seed("fc3", measurement=build.measured(0.3))
    assert decided(build.surveying({"active_seeds": 2}, seeds=(slow, placebo))).action is WAIT
    decision = decided(build.surveying({"active_seeds": 2}, seeds=(placebo, strong)))
    assert told(decision) == (CULL, "fc2", 0, "noop")


def test_a_kernel_that_folds_leads_no_race_where_something_else_is_offered(build):
    folding = build.seed("fc1", "low-rank", measurement=build.measured(0.3))
    slow = build.seed("fc2", measurement=build.measured(0.1))
    assert decided(build.surveying({"active_seeds": 2}, seeds=(folding, slow))).action is WAIT


def test_bounds_the_wrong_way_round_do_not_make_a_seed_race_itself(build):
    crossed = Measurement(mean=0.1, lower=0.3, upper=0.0, rent=0.0, samples=9)
    packet = build.surveying(seeds=(build.seed("fc1", measurement=crossed),))
    assert decided(packet).action is WAIT


# Ready seeds that may not be grafted are culled: their trials are over.


@pytest.mark.parametrize("blueprint", ["noop", "low-rank"])
def test_a_ready_seed_that_never_counts_as_growth_is_culled(build, blueprint):
    decision = decided(build.surveying(seeds=(build.ready("fc1", blueprint, 0.4),)))
    assert told(decision) == (CULL, "fc1", 0, blueprint)
    assert decision.reason == (
        f"{blueprint} at fc1 passed its gate with 0.400 nats (at least 0.380), but it adds no"
        " function class and never counts as growth."
    )


@pytest.mark.parametrize(
    ("asked", "measurement", "reason"),
    [
        (
            0.999,
            (0.04, 0.03, 0.002),
            "bottleneck-mlp at fc1 ended its trial with 0.040 nats (at least 0.010) and earns its"
            " rent with a confidence of 0.981, below 0.999.",
        ),
        (
            0.0,
            (0.02, 0.03, 0.002),
            "bottleneck-mlp at fc1 ended its trial with 0.020 nats (at least -0.010), which does"
            " not show that it earns its rent.",
        ),
        (
            0.0,
            None,
            "bottleneck-mlp at fc1 ended its trial with no measurement, which does not show that"
            " it earns its rent.",
        ),
    ],
)
def test_a_ready_seed_whose_evidence_does_not_suffice_is_culled_and_told_why(
    build, asked, measurement, reason
):
    measured = build.measured(*measurement) if measurement else None
    seeds = (
        build.seed("fc1", ready=True, measurement=measured),
        build.ready("fc2", "bottleneck-mlp", 0.03, measurement=build.measured(0.03, 0.001)),
    )
    decision = decided(build.surveying({"minimum_confidence": asked}, seeds=seeds))
    assert (told(decision), decision.reason) == ((CULL, "fc1", 0, "bottleneck-mlp"), reason)
    after = decided(
        build.surveying({"minimum_confidence": asked}, seeds=seeds[1:], trials=all_tried(build))
    )
    assert told(after) == (GRAFT, "fc2", 0, "bottleneck-mlp")


def test_confidence_decides_at_the_threshold(build):
    seed = build.seed("fc1", ready=True, measurement=build.measured(0.04, 0.03, 0.002))
    for asked, action in ((0.98, GRAFT), (0.99, CULL)):
        packet = build.surveying(
            {"minimum_confidence": asked}, seeds=(seed,), trials=all_tried(build)
        )
        assert decided(packet).action is action


# Graft the best.


def test_the_best_ready_seed_is_grafted_with_its_evidence(build):
    wide = build.measured(0.25, half=0.2)
    best = Measurement(mean=0.231, lower=0.204, upper=0.258, rent=0.002, samples=500)
    seeds = (
        build.ready("fc1", "bottleneck-mlp", 0, measurement=wide),
        build.ready("fc2", "bottleneck-mlp", 0, measurement=best),
        build.ready("fc3", "bottleneck-mlp", 0.22),
    )
    decision = decided(build.surveying(seeds=seeds, trials=all_tried(build)))
    assert told(decision) == (GRAFT, "fc2", 0, "bottleneck-mlp")
    assert decision.confidence == pytest.approx(1.0)
    assert decision.reason == (
        "bottleneck-mlp at fc2 gains 0.231 nats (at least 0.204) for a rent of 0.002; best of 6"
        " tried."
    )


def test_among_equals_the_first_is_grafted(build):
    seeds = tuple(build.ready(name, "bottleneck-mlp", 0.2) for name in ("fc2", "fc1"))
    decision = decided(build.surveying(seeds=seeds, trials=all_tried(build)))
    assert told(decision) == (GRAFT, "fc2", 0, "bottleneck-mlp")


@pytest.mark.parametrize(
    ("settings", "state", "age", "action"),
    [
        # a trial takes the dwell ...
        ({}, SeedState.TRAINING, 4, WAIT),
        ({}, SeedState.TRAINING, 5, GRAFT),
        ({}, SeedState.TRAINING, 9, GRAFT),
        ({"dwell_epochs": 8}, SeedState.TRAINING, 7, WAIT),
        ({"dwell_epochs": 8}, SeedState.TRAINING, 8, GRAFT),
        # ... or the passes, one an interval
        ({"interval_epochs": 4}, SeedState.TRAINING, 7, WAIT),
        ({"interval_epochs": 4}, SeedState.TRAINING, 8, GRAFT),
        # and it begins with the training, however long the wait for a seat
        ({}, SeedState.GERMINATED, 9, WAIT),
    ],
)
def test_nothing_is_grafted_while_a_trial_has_not_lasted_as_long_as_one_must(
    build, settings, state, age, action
):
    seeds = (
        build.ready("fc1", "bottleneck-mlp", 0.2),
        build.seed("fc2", state=state, age_epochs=age),
        build.seed("fc3", "noop", age_epochs=20),
    )
    decision = decided(build.surveying(settings, seeds=seeds, trials=all_tried(build)))
    assert decision.action is action
    if action is WAIT:
        assert decision.reason == (
            "The survey goes on with 2 trials under way: bottleneck-mlp at fc2, noop at fc3."
        )
    else:
        assert told(decision) == (GRAFT, "fc1", 0, "bottleneck-mlp")


@pytest.mark.parametrize(
    ("interval", "left", "action"), [(1, 7, WAIT), (1, 6, GRAFT), (1, 5, WAIT), (3, 10, GRAFT)]
)
def test_a_trial_under_way_does_not_cost_a_ready_seed_its_last_boundary(
    build, interval, left, action
):
    seeds = (build.ready("fc1", "bottleneck-mlp", 0.2), build.seed("fc2", age_epochs=1))
    settings = {"interval_epochs": interval, "age_epochs": 40}
    decision = decided(build.surveying(settings, left=left, seeds=seeds))
    assert decision.action is action


@pytest.mark.parametrize(("left", "action"), [(6, GRAFT), (5, WAIT)])
def test_no_graft_begins_whose_verdict_would_come_too_late(build, left, action):
    seeds = (build.ready("fc1", "bottleneck-mlp", 0.3),)
    decision = decided(build.surveying(left=left, seeds=seeds, trials=all_tried(build)))
    assert decision.action is action
    if action is WAIT:
        assert decision.reason == (
            "bottleneck-mlp at fc1 leads with 0.300 nats (at least 0.280), but a graft takes"
            " 6 epochs and 5 are left."
        )


@pytest.mark.parametrize(
    ("culled", "tried", "left", "action"),
    [
        # fc2 was not tried yet and opens again: worth waiting for
        ("fc2", ("fc1", "fc3"), 50, WAIT),
        ("fc2", ("fc1", "fc3"), 16, WAIT),
        # once a trial would come too late there is nothing to wait for
        ("fc2", ("fc1", "fc3"), 15, GRAFT),
        # fc2 was tried: only its placebo is left, which could not win
        ("fc2", ("fc1", "fc2", "fc3"), 50, GRAFT),
        # fc3 is the closed one, and it was tried
        ("fc3", ("fc1", "fc3"), 50, GERMINATE),
    ],
)
def test_grafting_waits_for_untried_candidates_behind_an_embargo(
    build, culled, tried, left, action
):
    packet = build.surveying(
        left=left,
        candidates=tuple(
            build.candidate(layer, blueprint)
            for layer in ("fc1", "fc2", "fc3")
            for blueprint in ("bottleneck-mlp", "noop")
            if (layer, blueprint) != ("fc3", "noop")
        ),
        seeds=(
            build.ready("fc1", "bottleneck-mlp", 0.2),
            build.seed(culled, "noop", state=SeedState.CULLED),
        ),
        trials=tuple(build.open_trial(layer) for layer in tried),
    )
    decision = decided(packet)
    assert decision.action is action
    if action is WAIT:
        assert decision.reason.endswith("candidates has a free slot.")


def test_a_slot_that_another_ready_seed_holds_is_not_waited_for(build):
    packet = build.surveying(
        candidates=(build.candidate("fc1"), build.candidate("fc1", "widen")),
        seeds=(build.ready("fc1", "bottleneck-mlp", 0.2),),
        trials=(build.open_trial("fc1"),),
    )
    assert told(decided(packet)) == (GRAFT, "fc1", 0, "bottleneck-mlp")


def test_a_kernel_that_folds_is_grafted_where_the_session_offers_nothing_else(build):
    packet = build.surveying(
        candidates=(build.candidate("fc1", "low-rank"), build.candidate("fc1", "noop")),
        seeds=(build.ready("fc1", "low-rank", 0.3),),
    )
    assert told(decided(packet)) == (GRAFT, "fc1", 0, "low-rank")


def test_a_ready_seed_the_packet_no_longer_lists_is_grafted(build):
    packet = build.surveying(candidates=(), seeds=(build.ready("fc1", "bottleneck-mlp", 0.3),))
    assert told(decided(packet)) == (GRAFT, "fc1", 0, "bottleneck-mlp")
