"""The control arms: none, periodic, random, and the room they share with the heuristic."""

from __future__ import annotations

from collections import Counter

import pytest

from esper.contracts.enums import ControllerPolicy, DecisionAction, SeedState
from esper.contracts.operational import LayerDescription
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import POLICIES, decide
from esper.services.tamiyo.policies import room

WAIT, GERMINATE, GRAFT = DecisionAction.WAIT, DecisionAction.GERMINATE, DecisionAction.GRAFT


def decided(packet):
    return decide(packet, ModelGraphAnalyzer().analyze(packet))


def told(decision):
    return (decision.action, decision.layer, decision.slot, decision.blueprint)


def two_slots(names=("fc1", "fc2", "fc3")):
    return tuple(
        LayerDescription(name=name, kind="Linear", parameters=9, slots=2) for name in names
    )


def test_every_policy_a_session_can_name_is_there():
    assert set(POLICIES) == set(ControllerPolicy)


def test_none_waits_even_for_a_ready_seed(build):
    packet = build.packet({"policy": "none"}, seeds=(build.ready("fc1", "bottleneck-mlp", 0.5),))
    decision = decided(packet)
    assert told(decision) == (WAIT, None, None, None)
    assert decision.reason == "The policy is none, so nothing grows in this session."


@pytest.mark.parametrize(
    ("states", "slot"),
    [
        ({}, 0),
        ({0: SeedState.DORMANT}, 0),
        ({0: SeedState.FOSSILIZED}, 1),
        ({0: SeedState.CULLED}, 1),
        ({1: SeedState.TRAINING}, 0),
        ({0: SeedState.GERMINATED, 1: SeedState.DORMANT}, 1),
        ({0: SeedState.GRAFTING, 1: SeedState.CULLED}, None),
    ],
)
def test_a_slot_is_free_when_nothing_has_left_dormancy_there(build, states, slot):
    seeds = tuple(build.seed("fc1", slot=at, state=state) for at, state in states.items())
    elsewhere = build.seed("fc2", slot=0)
    packet = build.packet(layers=two_slots(), seeds=(elsewhere, *seeds))
    assert room.free_slot(packet, "fc1") == slot


def test_an_unknown_layer_has_no_free_slot(build):
    assert room.free_slot(build.packet(), "fc9") is None


@pytest.mark.parametrize(
    ("settings", "trial", "graft", "growth"),
    [
        ({}, 5, 6, 16),
        ({"dwell_epochs": 0}, 2, 6, 10),
        ({"interval_epochs": 4}, 8, 9, 25),
        ({"ramp_epochs": 0, "hold_epochs": 0}, 5, 1, 11),
    ],
)
def test_the_clock_of_a_trial_and_a_graft(build, settings, trial, graft, growth):
    made = build.settings(**settings)
    assert room.trial_epochs(made) == trial
    assert room.graft_epochs(made) == graft
    assert room.growth_epochs(made) == growth


CANDIDATES = (("fc1", "bottleneck-mlp"), ("fc2", "widen"), ("fc3", "noop"))


def listed(build):
    return tuple(build.candidate(layer, blueprint) for layer, blueprint in CANDIDATES)


@pytest.mark.parametrize(
    ("trials", "expected"),
    [(0, CANDIDATES[0]), (1, CANDIDATES[1]), (2, CANDIDATES[2]), (3, CANDIDATES[0])],
)
def test_periodic_goes_round_robin_with_the_number_of_trials_as_cursor(build, trials, expected):
    packet = build.packet(
        {"policy": "periodic"},
        epoch=40,
        candidates=listed(build),
        trials=(build.trial(),) * trials,
    )
    assert told(decided(packet)) == (GERMINATE, expected[0], 0, expected[1])


def test_periodic_passes_over_what_does_not_fit(build):
    packet = build.packet(
        {"policy": "periodic", "active_seeds": 2},
        epoch=40,
        candidates=listed(build),
        remaining_parameters=500,
        seeds=(build.seed("fc1"),),
        trials=(build.trial(),) * 3,
    )
    decision = decided(packet)
    assert told(decision) == (GERMINATE, "fc3", 0, "noop")
    assert decision.reason == (
        "Turn 4: noop at fc3 is next in round robin over 3 candidates, one every 5 epochs."
    )


@pytest.mark.parametrize(
    ("dwell", "epoch", "started", "action"),
    [
        (5, 4, None, WAIT),
        (5, 5, None, GERMINATE),
        (5, 14, 10, WAIT),
        (5, 15, 10, GERMINATE),
        (0, 10, 10, WAIT),
        (0, 11, 10, GERMINATE),
    ],
)
def test_periodic_keeps_its_period_since_the_last_start(build, dwell, epoch, started, action):
    trials = (
        ()
        if started is None
        else (build.trial(started_epoch=2), build.trial(started_epoch=started))
    )
    packet = build.packet({"policy": "periodic", "dwell_epochs": dwell}, epoch=epoch, trials=trials)
    decision = decided(packet)
    assert decision.action is action
    if action is WAIT:
        due = (started or 0) + max(dwell, 1)
        assert f"due at epoch {due}, one every {max(dwell, 1)}." in decision.reason


@pytest.mark.parametrize("policy", ["periodic", "random"])
@pytest.mark.parametrize(
    ("settings", "fields", "reason"),
    [
        (
            {},
            {"states": (SeedState.GRAFTING,)},
            "All seats are taken: 1 active seeds of 1 allowed.",
        ),
        (
            {"active_seeds": 2},
            {"states": (SeedState.TRAINING, SeedState.GERMINATED)},
            "All seats are taken: 2 active seeds of 2 allowed.",
        ),
        (
            {},
            {"epoch": 85},
            "A trial with its graft and payback takes 16 epochs and 15 are left.",
        ),
        (
            {},
            {"states": (SeedState.FOSSILIZED, SeedState.CULLED, SeedState.FOSSILIZED)},
            "None of 9 candidates has a free slot and fits the 5000 parameters left.",
        ),
        (
            {},
            {"candidates": ()},
            "None of 0 candidates has a free slot and fits the 5000 parameters left.",
        ),
    ],
)
def test_controls_wait_for_room_and_say_for_which(build, policy, settings, fields, reason):
    states = fields.pop("states", ()) if "states" in (fields := dict(fields)) else ()
    seeds = tuple(
        build.seed(layer, state=state)
        for layer, state in zip(("fc1", "fc2", "fc3"), states, strict=False)
    )
    packet = build.packet({"policy": policy, **settings}, seeds=seeds, **fields)
    assert (decided(packet).action, decided(packet).reason) == (WAIT, reason)


@pytest.mark.parametrize("policy", ["periodic", "random"])
def test_controls_graft_the_first_ready_seed_without_comparing(build, policy):
    seeds = (
        build.seed("fc1"),
        build.ready("fc2", "bottleneck-mlp", 0.1),
        build.ready("fc3", "bottleneck-mlp", 0.9),
    )
    decision = decided(build.packet({"policy": policy}, seeds=seeds))
    assert told(decision) == (GRAFT, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 has passed its gate at 0.100 nats;"
        " this policy grafts whatever is ready."
    )


@pytest.mark.parametrize("policy", ["periodic", "random"])
def test_controls_graft_a_ready_seed_whose_numbers_are_gone(build, policy):
    seed = build.seed("fc1", blueprint=None, ready=True, parameters=5)
    decision = decided(build.packet({"policy": policy}, seeds=(seed,)))
    assert decision.action is GRAFT
    assert decision.reason.startswith("an unnamed blueprint at fc1 has passed its gate; this")


@pytest.mark.parametrize("policy", ["periodic", "random"])
@pytest.mark.parametrize(("epoch", "action"), [(94, GRAFT), (95, WAIT)])
def test_controls_begin_no_graft_whose_verdict_would_come_too_late(build, policy, epoch, action):
    seeds = (build.ready("fc2", "bottleneck-mlp", 0.1),)
    assert decided(build.packet({"policy": policy}, epoch=epoch, seeds=seeds)).action is action


def test_random_draws_every_candidate_that_fits_about_equally_often(build):
    seeds = (build.seed("fc1", state=SeedState.FOSSILIZED),)
    drawn = Counter()
    for epoch in range(600):
        packet = build.packet(
            {"policy": "random"},
            epoch=epoch,
            remaining_epochs=600,
            epochs=1200,
            remaining_parameters=400,
            seeds=seeds,
        )
        decision = decided(packet)
        assert decision.action is GERMINATE
        drawn[decision.layer, decision.blueprint] += 1
    fitting = {(layer, name) for layer in ("fc2", "fc3") for name in ("low-rank", "noop")}
    assert set(drawn) == fitting
    # 600 draws of 1/4: five standard deviations are 53.
    assert all(97 < count < 203 for count in drawn.values())


def test_random_depends_on_the_seed_the_epoch_and_the_number_of_trials_alone(build):
    def draws(seed, trials=(), **fields):
        found = []
        for epoch in range(10, 40):
            packet = build.packet(
                {"policy": "random", "seed": seed}, epoch=epoch, trials=trials, **fields
            )
            found.append(told(decided(packet)))
        return found

    assert draws(1) == draws(1, session="other", train_loss=9.0, sequence=3)
    assert draws(1) != draws(2)
    trials = (build.trial("fc1"), build.trial("fc2", "noop"))
    assert draws(1, trials[:1]) == draws(1, trials[1:])
    assert len({tuple(draws(1, trials[:count])) for count in range(3)}) == 3


def test_random_draws_anew_for_each_seat_that_it_fills_at_one_epoch(build):
    candidates = tuple(
        build.candidate("fc1", name, parameters=9) for name in ("a", "b", "c", "d", "e")
    )
    drawn = []
    for number in range(40):
        packet = build.packet(
            {"policy": "random", "active_seeds": 64},
            candidates=candidates,
            sequence=number,
            trials=(build.trial(),) * number,
        )
        drawn.append(decided(packet).blueprint)
    # 40 draws of 1/5: five standard deviations are 13.
    assert set(Counter(drawn)) == {"a", "b", "c", "d", "e"}
    assert max(Counter(drawn).values()) < 21


def test_random_says_what_it_drew_from(build):
    packet = build.packet({"policy": "random"}, remaining_parameters=10, epoch=3)
    decision = decided(packet)
    assert decision.reason == (
        f"Drawn by lot: noop at {decision.layer}, one of 3 candidates that fit the"
        " 10 parameters left."
    )


@pytest.mark.parametrize("policy", ["periodic", "random", "heuristic"])
def test_a_ready_seed_the_budget_has_no_room_for_any_more_is_culled(build, policy):
    seeds = (build.ready("fc2", "bottleneck-mlp", 0.1), build.ready("fc3", "widen", 0.1))
    decision = decided(build.surveying({"policy": policy}, seeds=seeds, remaining_parameters=900))
    assert told(decision) == (DecisionAction.CULL, "fc2", 0, "bottleneck-mlp")
    assert decision.reason == (
        "bottleneck-mlp at fc2 takes 2000 parameters, and growth elsewhere has left 900."
    )
