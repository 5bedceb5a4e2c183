"""The heuristic, rule by rule."""

from __future__ import annotations

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import LayerDescription, Measurement
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.policies import survey

WAIT, GERMINATE = DecisionAction.WAIT, DecisionAction.GERMINATE
GRAFT, CULL = DecisionAction.GRAFT, DecisionAction.CULL


def decided(packet):
    return survey.decide(packet, ModelGraphAnalyzer().analyze(packet))


def told(decision):
    return (decision.action, decision.layer, decision.slot, decision.blueprint)


def layers(slots, names=("fc1", "fc2", "fc3")):
    return tuple(
        LayerDescription(name=name, kind="Linear", parameters=9, slots=slots) for name in names
    )


def all_tried(build, **fields):
    """Trials of all that a survey of the usual candidates tries."""
    return tuple(
        build.trial(layer, blueprint, **fields)
        for layer in ("fc1", "fc2", "fc3")
        for blueprint in ("noop", "bottleneck-mlp")
    )


# Rule 1: while a seed is grafting, clear up what its survey left over.


def test_a_graft_in_progress_voids_what_was_measured_before(build):
    grafting = build.seed("fc1", state=SeedState.GRAFTING, alpha=0.33)
    left = (build.ready("fc2", "bottleneck-mlp", 0.1), build.ready("fc3", "bottleneck-mlp", 0.2))
    decision = decided(build.packet(seeds=(grafting, *left)))
    assert told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 was measured against the host as it was before bottleneck-mlp at"
        " fc1 was grafted, so its 0.100 nats (at least 0.080) no longer count."
    )


def test_nothing_else_happens_while_a_seed_is_grafting(build):
    grafting = build.seed("fc2", state=SeedState.GRAFTING, alpha=0.33)
    training = build.seed("fc3", measurement=build.measured(-1.0))
    decision = decided(build.packet({"active_seeds": 5}, seeds=(grafting, training)))
    assert told(decision) == (WAIT, None, None, None)
    assert decision.reason == (
        "bottleneck-mlp at fc2 is being blended in, now at 33%; its recovery trial decides."
    )


# Rule 2: races.


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
        # neither may be younger than two epochs
        ({"measurement": (0.10,), "age_epochs": 1}, {"measurement": (0.15,)}, False),
        ({"measurement": (0.10,)}, {"measurement": (0.15,), "age_epochs": 1}, False),
        (
            {"measurement": (0.10,), "age_epochs": 2},
            {"measurement": (0.15,), "age_epochs": 2},
            True,
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
    def racing(layer, fields):
        measurement = fields.get("measurement")
        measured = build.measured(*measurement) if measurement else None
        return build.seed(layer, **{**fields, "measurement": measured})

    seeds = (racing("fc1", leader), racing("fc2", laggard))
    decision = decided(build.packet({"active_seeds": 2}, seeds=seeds))
    assert (told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")) is culled
    assert (decision.action is CULL) is culled


def test_the_one_furthest_behind_goes_first_and_the_reason_names_both(build):
    seeds = (
        build.seed("fc1", measurement=build.measured(0.1)),
        build.seed("fc2", measurement=build.measured(0.0)),
        build.seed("fc3", measurement=build.measured(0.231)),
    )
    decision = decided(build.packet({"active_seeds": 3}, seeds=seeds))
    assert told(decision) == (CULL, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 gains at most 0.018 nats after rent, and bottleneck-mlp at fc3 at"
        " least 0.209, so it can't win this survey."
    )


def test_the_placebo_never_leads_a_race_but_can_lose_one(build):
    slow = build.seed("fc1", measurement=build.measured(-0.3))
    placebo = build.seed("fc2", "noop", measurement=build.measured(0.0, half=0.0, rent=0.0))
    strong = build.seed("fc3", measurement=build.measured(0.3))
    assert decided(build.packet({"active_seeds": 2}, seeds=(slow, placebo))).action is WAIT
    decision = decided(build.packet({"active_seeds": 2}, seeds=(placebo, strong)))
    assert told(decision) == (CULL, "fc2", 0, "noop")


def test_bounds_the_wrong_way_round_do_not_make_a_seed_race_itself(build):
    crossed = Measurement(mean=0.1, lower=0.3, upper=0.0, rent=0.0, samples=9)
    packet = build.packet(seeds=(build.seed("fc1", measurement=crossed),))
    assert decided(packet).action is WAIT


@pytest.mark.parametrize("blueprint", ["noop", "low-rank"])
def test_a_ready_seed_that_never_counts_as_growth_is_culled(build, blueprint):
    decision = decided(build.packet(seeds=(build.ready("fc1", blueprint, 0.4),)))
    assert told(decision) == (CULL, "fc1", 0, blueprint)
    assert decision.reason == (
        f"{blueprint} at fc1 passed its gate with 0.400 nats (at least 0.380), but it adds no"
        " function class and never counts as growth."
    )


# Rule 3: try the next candidate.


def test_the_survey_goes_by_layer_and_then_by_size(build):
    found, trials = [], ()
    for _ in range(6):
        decision = decided(build.packet(trials=trials))
        assert decision.action is GERMINATE
        found.append((decision.layer, decision.blueprint))
        trials += (build.trial(decision.layer, decision.blueprint),)
    assert found == [
        (layer, blueprint)
        for layer in ("fc1", "fc2", "fc3")
        for blueprint in ("noop", "bottleneck-mlp")
    ]
    decision = decided(build.packet(trials=trials))
    assert decision.reason == (
        "The survey is over after 6 trials: nothing else fits the 5000 parameters left."
    )


def test_equal_sizes_are_ordered_by_name_and_not_by_the_packet(build):
    twins = tuple(build.candidate("fc1", name, parameters=9) for name in ("widen", "mlp"))
    for candidates in (twins, twins[::-1]):
        assert decided(build.packet(candidates=candidates)).blueprint == "mlp"


def test_a_trial_says_its_number_its_price_and_what_ails_the_layer(build):
    packet = build.packet(
        candidates=(build.candidate("fc1"),),
        signals=(build.signal("fc1", activation_rank=0.12),),
        trials=(build.trial("fc2"), build.trial("fc3")),
    )
    assert decided(packet).reason == (
        "Trial 3 of this survey: bottleneck-mlp at fc1 for 2000 of the 5000 parameters left"
        " (fc1 uses 12% of its rank)."
    )


@pytest.mark.parametrize(
    ("remaining", "candidates", "trials", "expected"),
    [
        # where something else can grow, what folds is not tried
        (5000, ("low-rank", "bottleneck-mlp"), (), "bottleneck-mlp"),
        (5000, ("low-rank", "bottleneck-mlp"), ("bottleneck-mlp",), None),
        # also when the trial itself has used the budget up
        (500, ("low-rank", "bottleneck-mlp"), ("bottleneck-mlp",), None),
        # where nothing else can, it is, after the placebo
        (500, ("low-rank", "bottleneck-mlp"), (), "low-rank"),
        (500, ("low-rank", "noop"), (), "noop"),
        (500, ("low-rank", "noop"), ("noop",), "low-rank"),
        # the placebo is always tried
        (0, ("bottleneck-mlp", "noop"), (), "noop"),
        (0, ("bottleneck-mlp", "low-rank"), (), None),
    ],
)
def test_kernels_that_fold_are_tried_only_where_nothing_else_could_grow(
    build, remaining, candidates, trials, expected
):
    packet = build.packet(
        remaining_parameters=remaining,
        candidates=tuple(build.candidate("fc1", name) for name in candidates),
        trials=tuple(build.trial("fc1", name) for name in trials),
    )
    decision = decided(packet)
    assert decision.blueprint == expected
    assert decision.action is (GERMINATE if expected else WAIT)


def test_kernels_that_fold_come_after_all_placebos(build):
    candidates = tuple(
        build.candidate(layer, name) for layer in ("fc1", "fc2") for name in ("low-rank", "noop")
    )
    found, trials = [], ()
    for _ in candidates:
        decision = decided(build.packet(candidates=candidates, trials=trials))
        found.append((decision.layer, decision.blueprint))
        trials += (build.trial(decision.layer, decision.blueprint),)
    assert found == [("fc1", "noop"), ("fc2", "noop"), ("fc1", "low-rank"), ("fc2", "low-rank")]


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
    decision = decided(build.packet({"active_seeds": active}, seeds=placed))
    assert decision.action is action
    if action is GERMINATE:
        assert decision.layer == ("fc2", "fc3")[len(seeds) - 1]


def test_a_ready_seed_keeps_its_slot_but_not_its_seat(build):
    packet = build.packet(
        seeds=(build.ready("fc1", "bottleneck-mlp", 0.2),), trials=(build.trial("fc1"),)
    )
    assert told(decided(packet)) == (GERMINATE, "fc2", 0, "noop")


def test_a_second_slot_of_a_layer_is_used(build):
    packet = build.packet(
        {"active_seeds": 2},
        layers=layers(2),
        seeds=(build.seed("fc1", "noop"),),
        trials=(build.trial("fc1", "noop"),),
    )
    assert told(decided(packet)) == (GERMINATE, "fc1", 1, "bottleneck-mlp")


def test_without_a_free_slot_the_survey_waits_for_one(build):
    seeds = tuple(build.seed(name, state=SeedState.CULLED) for name in ("fc1", "fc2", "fc3"))
    decision = decided(build.packet(seeds=seeds))
    assert decision.action is WAIT
    assert decision.reason == "No layer of 6 untried candidates has a free slot."


def test_a_candidate_in_a_layer_the_packet_does_not_describe_is_left_alone(build):
    packet = build.packet(candidates=(build.candidate("fc9"),))
    assert decided(packet).action is WAIT


@pytest.mark.parametrize(("epoch", "action"), [(84, GERMINATE), (85, WAIT)])
def test_no_trial_starts_that_could_not_pay_back(build, epoch, action):
    decision = decided(build.packet(epoch=epoch))
    assert decision.action is action
    if action is WAIT:
        assert decision.reason == (
            "A trial with its graft and payback takes 16 epochs and 15 are left, so 6 candidates"
            " stay untried."
        )


# Which trials belong to this survey.


def test_a_survey_starts_where_the_latest_fossil_ended(build):
    fossil = build.trial("fc1", state=SeedState.FOSSILIZED, started_epoch=20, ended_epoch=30)
    earlier = build.trial("fc1", state=SeedState.FOSSILIZED, started_epoch=1, ended_epoch=15)
    old = build.trial("fc2", started_epoch=21)
    same = build.trial("fc3", "noop", started_epoch=30)
    new = build.trial("fc3", started_epoch=33, ended_epoch=None, state=SeedState.TRAINING)
    packet = build.packet(epoch=35, trials=(earlier, fossil, old, same, new))
    assert survey.survey_trials(packet) == [same, new]


def test_without_a_fossil_every_trial_counts(build):
    trials = all_tried(build)
    assert survey.survey_trials(build.packet(trials=trials)) == list(trials)


def test_a_fossil_without_an_end_counts_from_its_start(build):
    fossil = build.trial(state=SeedState.FOSSILIZED, started_epoch=20, ended_epoch=None)
    old, new = build.trial("fc2", started_epoch=19), build.trial("fc2", started_epoch=20)
    packet = build.packet(epoch=35, trials=(fossil, old, new))
    assert survey.survey_trials(packet) == [new]


def test_after_a_fossil_everything_is_tried_anew(build):
    fossil = build.trial("fc1", state=SeedState.FOSSILIZED, started_epoch=6, ended_epoch=20)
    packet = build.packet(
        epoch=20,
        seeds=(build.seed("fc1", state=SeedState.FOSSILIZED),),
        trials=(*all_tried(build), fossil),
    )
    assert told(decided(packet)) == (GERMINATE, "fc2", 0, "noop")


# Rule 4: graft the best.


def test_the_best_ready_seed_is_grafted_with_its_evidence(build):
    wide = build.measured(0.25, half=0.2)
    best = Measurement(mean=0.231, lower=0.204, upper=0.258, rent=0.002, samples=500)
    seeds = (
        build.ready("fc1", "bottleneck-mlp", 0, measurement=wide),
        build.ready("fc2", "bottleneck-mlp", 0, measurement=best),
        build.ready("fc3", "bottleneck-mlp", 0.22),
    )
    decision = decided(build.packet(seeds=seeds, trials=all_tried(build)))
    assert told(decision) == (GRAFT, "fc2", 0, "bottleneck-mlp")
    assert decision.confidence == pytest.approx(1.0)
    assert decision.reason == (
        "bottleneck-mlp at fc2 gains 0.231 nats (at least 0.204) for a rent of 0.002; best of 6"
        " tried."
    )


def test_among_equals_the_first_is_grafted(build):
    seeds = tuple(build.ready(name, "bottleneck-mlp", 0.2) for name in ("fc2", "fc1"))
    decision = decided(build.packet(seeds=seeds, trials=all_tried(build)))
    assert told(decision) == (GRAFT, "fc2", 0, "bottleneck-mlp")


def test_nothing_is_grafted_while_a_trial_is_under_way(build):
    seeds = (
        build.ready("fc1", "bottleneck-mlp", 0.2),
        build.seed("fc2"),
        build.seed("fc3", "noop"),
    )
    decision = decided(build.packet(seeds=seeds, trials=all_tried(build)))
    assert decision.action is WAIT
    assert decision.reason == (
        "The survey goes on with 2 trials under way: bottleneck-mlp at fc2, noop at fc3."
    )


@pytest.mark.parametrize(
    ("settings", "fields", "reason"),
    [
        (
            {"minimum_confidence": 0.999},
            {"measurement": (0.04, 0.03, 0.002)},
            "bottleneck-mlp at fc1 leads with 0.040 nats (at least 0.010) and earns its rent with"
            " a confidence of 0.981, below 0.999.",
        ),
        (
            {"minimum_confidence": 0.0},
            {"measurement": (0.02, 0.03, 0.002)},
            "bottleneck-mlp at fc1 leads with 0.020 nats (at least -0.010), which does not show"
            " that it earns its rent.",
        ),
        (
            {"minimum_confidence": 0.0},
            {},
            "bottleneck-mlp at fc1 leads with no measurement, which does not show that it earns"
            " its rent.",
        ),
        (
            {},
            {"measurement": (0.3, 0.02, 0.002), "epoch": 95},
            "bottleneck-mlp at fc1 leads with 0.300 nats (at least 0.280), but a graft takes"
            " 6 epochs and 5 are left.",
        ),
    ],
)
def test_a_best_seed_that_does_not_suffice_waits_and_says_why(build, settings, fields, reason):
    measurement = fields.get("measurement")
    seed = build.seed(
        "fc1", ready=True, measurement=build.measured(*measurement) if measurement else None
    )
    packet = build.packet(
        settings, epoch=fields.get("epoch", 10), seeds=(seed,), trials=all_tried(build)
    )
    decision = decided(packet)
    assert (decision.action, decision.reason) == (WAIT, reason)


def test_confidence_decides_at_the_threshold(build):
    seed = build.seed("fc1", ready=True, measurement=build.measured(0.04, 0.03, 0.002))
    for asked, action in ((0.98, GRAFT), (0.99, WAIT)):
        packet = build.packet({"minimum_confidence": asked}, seeds=(seed,), trials=all_tried(build))
        assert decided(packet).action is action


def test_a_kernel_that_folds_is_grafted_where_nothing_else_could_grow(build):
    packet = build.packet(
        candidates=(build.candidate("fc1", "low-rank"),),
        seeds=(build.ready("fc1", "low-rank", 0.3),),
        trials=(build.trial("fc1", "low-rank"),),
    )
    assert told(decided(packet)) == (GRAFT, "fc1", 0, "low-rank")


def test_a_ready_seed_the_packet_no_longer_lists_is_grafted(build):
    packet = build.packet(candidates=(), seeds=(build.ready("fc1", "bottleneck-mlp", 0.3),))
    assert told(decided(packet)) == (GRAFT, "fc1", 0, "bottleneck-mlp")


def test_a_model_without_candidates_has_nothing_to_survey(build):
    decision = decided(build.packet(candidates=(), remaining_parameters=1))
    assert decision.reason == (
        "The survey is over after 0 trials: nothing else fits the 1 parameter left."
    )
