from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts import operational
from esper.contracts.enums import SeedState, SystemHealth
from esper.services.tamiyo import analyzer
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer


def problems(state):
    return {problem.layer: problem.reason for problem in state.problems}


def test_the_graph_types_are_the_contracts():
    assert analyzer.LayerNode is operational.LayerNode
    assert analyzer.GraphTopology is operational.GraphTopology


@pytest.mark.parametrize("decay", [-0.1, 1.0, math.nan])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match="decay: got"):
        ModelGraphAnalyzer(decay=decay)


def test_nodes_keep_the_layer_order_and_count_their_active_seeds(build):
    seeds = (
        build.seed("fc2", state=SeedState.GERMINATED),
        build.seed("fc2", slot=1, state=SeedState.TRAINING),
        build.seed("fc2", slot=2, state=SeedState.GRAFTING),
        build.seed("fc3", state=SeedState.FOSSILIZED),
        build.seed("fc3", slot=1, state=SeedState.CULLED),
    )
    nodes = ModelGraphAnalyzer().analyze(build.packet(seeds=seeds)).topology.nodes
    assert [node.name for node in nodes] == ["fc1", "fc2", "fc3"]
    assert [node.active_seeds for node in nodes] == [0, 3, 0]
    assert {(node.kind, node.parameters) for node in nodes} == {("Linear", 366)}


def test_edges_become_indices_and_unknown_layers_are_left_out(build):
    edges = (("fc1", "fc3"), ("fc1", "norm"), ("norm", "fc2"), ("fc2", "fc3"))
    state = ModelGraphAnalyzer().analyze(build.packet(edges=edges))
    assert state.topology.edges == ((0, 2), (1, 2))


def test_health_is_an_ema_that_starts_at_the_first_score(build):
    engine = ModelGraphAnalyzer(decay=0.7)
    good, bad = build.signal("fc1"), build.signal("fc1", activation_rank=0.3, dead_fraction=0.6)
    first = engine.analyze(build.packet(epoch=10, signals=(good,))).topology.nodes[0]
    second = engine.analyze(build.packet(epoch=14, signals=(bad,))).topology.nodes[0]
    expected = 0.7 * good.health_score() + 0.3 * bad.health_score()
    assert (first.health, first.trend) == (good.health_score(), 0.0)
    assert second.health == pytest.approx(expected)
    assert second.trend == pytest.approx((expected - good.health_score()) / 4)


def test_the_loss_trend_is_the_change_of_its_ema_an_epoch(build):
    engine = ModelGraphAnalyzer(decay=0.5)
    losses = [(10, 2.0), (12, 1.0), (13, math.nan), (14, 1.5)]
    trends = [
        engine.analyze(build.packet(epoch=epoch, validation_loss=loss)).loss_trend
        for epoch, loss in losses
    ]
    assert trends == [0.0, -0.25, math.inf, 0.0]


def test_a_layer_without_a_signal_keeps_its_health_and_says_so(build):
    engine = ModelGraphAnalyzer()
    engine.analyze(build.packet(epoch=1, signals=(build.signal("fc1"),)))
    state = engine.analyze(build.packet(epoch=2, signals=()))
    assert state.topology.nodes[0].health == build.signal("fc1").health_score()
    assert state.topology.nodes[0].trend == 0.0
    assert [node.health for node in state.topology.nodes[1:]] == [0.0, 0.0]
    assert problems(state) == dict.fromkeys(("fc1", "fc2", "fc3"), "sent no health signal")


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        ({"gradient_to_weight_ratio": 1e-7}, "has a vanishing gradient (1.0e-07 of its weights)"),
        ({"gradient_to_weight_ratio": 12.5}, "has an exploding gradient (12.5 times its weights)"),
        ({"activation_rank": 0.06}, "uses 6% of its rank"),
        ({"dead_fraction": 0.62}, "has 62% of its units dead"),
        (
            {"activation_rank": math.nan},
            "sent measurements that are not finite; has a health of 0.00",
        ),
        (
            {"gradient_to_weight_ratio": math.inf},
            "sent measurements that are not finite; has a health of 0.00",
        ),
        (
            {"activation_rank": 0.09, "dead_fraction": 0.9},
            "uses 9% of its rank; has 90% of its units dead; has a health of 0.39",
        ),
    ],
)
def test_problem_layers_say_what_is_wrong(build, fields, reason):
    packet = build.packet(signals=(build.signal("fc1", **fields), build.signal("fc2")))
    found = problems(ModelGraphAnalyzer().analyze(packet))
    assert found.get("fc1") == reason
    assert "fc2" not in found


def test_falling_health_is_a_problem_before_it_is_low(build):
    engine = ModelGraphAnalyzer()
    engine.analyze(build.packet(epoch=1))
    state = engine.analyze(build.packet(epoch=2, signals=(build.signal(dead_fraction=0.5),)))
    assert problems(state)["fc1"] == "loses 0.04 of its health an epoch"


@pytest.mark.parametrize(
    ("rank", "health"),
    [
        (0.9, SystemHealth.HEALTHY),
        (0.1, SystemHealth.DEGRADED),
        (math.nan, SystemHealth.CRITICAL),
    ],
)
def test_system_health_is_the_mean_of_the_layers(build, rank, health):
    signals = tuple(build.signal(name, activation_rank=rank) for name in ("fc1", "fc2", "fc3"))
    assert ModelGraphAnalyzer().analyze(build.packet(signals=signals)).health is health


def test_without_any_signal_the_system_is_offline(build):
    assert ModelGraphAnalyzer().analyze(build.packet(signals=())).health is SystemHealth.OFFLINE


def packets_of(build, ranks, session="small"):
    return [
        build.packet(
            session=session,
            epoch=epoch,
            validation_loss=2.0 - rank,
            signals=(build.signal("fc1", activation_rank=rank),),
        )
        for epoch, rank in enumerate(ranks, start=1)
    ]


def test_the_averages_move_once_an_epoch(build):
    first, second = packets_of(build, [0.8, 0.2])
    engine, plain = ModelGraphAnalyzer(), ModelGraphAnalyzer()
    assert engine.analyze(first) == plain.analyze(first)
    moved = plain.analyze(second)
    assert engine.analyze(second) == moved
    for sequence in (3, 4, 5):
        again = second.model_copy(update={"sequence": sequence})
        assert engine.analyze(again) == moved
    following = packets_of(build, [0.0, 0.0, 0.5])[2].model_copy(update={"sequence": 6})
    assert engine.analyze(following) == plain.analyze(following)


def test_a_second_packet_of_an_epoch_moves_no_average_whatever_it_says(build):
    engine = ModelGraphAnalyzer()
    first = build.packet(epoch=1, sequence=1, signals=(build.signal(),), validation_loss=2.0)
    second = first.model_copy(
        update={
            "sequence": 2,
            "signals": (build.signal(activation_rank=0.09), build.signal("fc2")),
            "validation_loss": 1.0,
        }
    )
    before, after = engine.analyze(first), engine.analyze(second)
    assert after.topology == before.topology
    assert (after.loss_trend, after.health) == (before.loss_trend, before.health)
    assert problems(after)["fc1"] == "uses 9% of its rank"


def test_a_first_packet_without_a_finite_loss_leaves_no_trend_for_its_epoch(build):
    engine = ModelGraphAnalyzer()
    losses = [(1, 1, math.nan), (2, 1, 2.0), (3, 2, 2.0), (4, 2, math.nan), (5, 3, 1.0)]
    trends = [
        engine.analyze(
            build.packet(sequence=sequence, epoch=epoch, validation_loss=loss)
        ).loss_trend
        for sequence, epoch, loss in losses
    ]
    assert trends == [math.inf, 0.0, 0.0, math.inf, pytest.approx(-0.3)]


def test_seeds_are_counted_anew_with_every_packet_of_an_epoch(build):
    engine = ModelGraphAnalyzer()
    engine.analyze(build.packet(epoch=1, sequence=1))
    state = engine.analyze(build.packet(epoch=1, sequence=2, seeds=(build.seed("fc1"),)))
    assert [node.active_seeds for node in state.topology.nodes] == [1, 0, 0]


def several_an_epoch(packets, repeats):
    """Each packet as often as `repeats` says, numbered through."""
    spread = [packet for packet, count in zip(packets, repeats, strict=False) for _ in range(count)]
    return [
        packet.model_copy(update={"sequence": number}) for number, packet in enumerate(spread, 1)
    ]


ranks = st.lists(st.floats(0, 1), min_size=1, max_size=6)
repeats = st.lists(st.integers(1, 3), min_size=6, max_size=6)


@settings(deadline=None, max_examples=40)
@given(ranks, repeats, st.data())
def test_a_redelivered_packet_or_a_step_back_changes_nothing(build, values, counts, data):
    packets = several_an_epoch(packets_of(build, values), counts)
    straight = ModelGraphAnalyzer()
    expected = [straight.analyze(packet) for packet in packets]
    back = data.draw(st.integers(0, len(packets) - 1))
    assert [straight.analyze(packet) for packet in packets[back:]] == expected[back:]


@settings(deadline=None, max_examples=40)
@given(ranks, repeats)
def test_more_packets_an_epoch_change_no_state(build, values, counts):
    packets = packets_of(build, values)
    plain, asked = ModelGraphAnalyzer(), ModelGraphAnalyzer()
    expected = {packet.epoch: plain.analyze(packet) for packet in packets}
    for packet in several_an_epoch(packets, counts):
        assert asked.analyze(packet) == expected[packet.epoch]


@settings(deadline=None, max_examples=40)
@given(ranks, ranks)
def test_sessions_do_not_touch_one_another(build, first, second):
    alone = ModelGraphAnalyzer()
    expected = [alone.analyze(packet) for packet in packets_of(build, first)]
    shared = ModelGraphAnalyzer()
    for packet in packets_of(build, second, session="other"):
        shared.analyze(packet)
    assert [shared.analyze(packet) for packet in packets_of(build, first)] == expected


@settings(deadline=None, max_examples=60)
@given(st.lists(st.floats(), min_size=1, max_size=5))
def test_whatever_was_measured_health_stays_a_share(build, values):
    engine = ModelGraphAnalyzer()
    for packet in packets_of(build, values):
        state = engine.analyze(packet)
        assert all(0 <= node.health <= 1 for node in state.topology.nodes)


def test_memory_is_bounded_and_forgets_the_longest_unseen_session(build):
    engine = ModelGraphAnalyzer()
    engine.analyze(build.packet(session="seen"))
    for number in range(analyzer.KEPT_SESSIONS - 1):
        engine.analyze(build.packet(session=f"session-{number}"))
    engine.analyze(build.packet(session="seen", epoch=11))
    engine.analyze(build.packet(session="one-more"))
    low = (build.signal(activation_rank=0.0),)
    kept = engine.analyze(build.packet(session="seen", epoch=12, signals=low))
    forgotten = engine.analyze(build.packet(session="session-0", epoch=12, signals=low))
    assert kept.topology.nodes[0].trend < 0
    assert forgotten.topology.nodes[0].trend == 0
