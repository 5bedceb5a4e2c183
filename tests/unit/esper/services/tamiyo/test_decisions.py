"""What holds for every decision of every policy, over packets of any content."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.enums import ControllerPolicy, DecisionAction, SeedState, SystemHealth
from esper.contracts.operational import (
    Candidate,
    ControllerSettings,
    HealthSignal,
    LayerDescription,
    Measurement,
    SeedObservation,
    SystemStatePacket,
    TrialRecord,
)
from esper.services.tamiyo.analyzer import ModelGraphAnalyzer
from esper.services.tamiyo.heuristics import decide
from esper.services.tamiyo.policies.evidence import confidence
from esper.services.tamiyo.policies.survey import FIRST_SURVEY, first_survey_epoch


def made(contract, **fields):
    """Instances of `contract`; `st.builds` would want the names that travel, not these."""
    return st.fixed_dictionaries(fields).map(lambda values: contract(**values))


LAYERS = ("fc1", "fc2", "conv.3")
BLUEPRINTS = ("noop", "low-rank", "bottleneck-mlp", "widen")
EPOCHS = 120
epochs = st.integers(0, EPOCHS)
layer_names, blueprint_names = st.sampled_from(LAYERS), st.sampled_from(BLUEPRINTS)
sensible = st.tuples(st.floats(-0.1, 0.9), st.floats(0, 0.1), st.floats(0, 0.01)).map(
    lambda drawn: Measurement(
        mean=drawn[0],
        lower=drawn[0] - drawn[1],
        upper=drawn[0] + drawn[1],
        rent=drawn[2],
        samples=500,
    )
)
wild = made(
    Measurement,
    mean=st.floats(),
    lower=st.floats(),
    upper=st.floats(),
    rent=st.floats(0, 1),
    samples=st.integers(0, 1024),
)
measurements = st.none() | wild | sensible
sites = st.tuples(layer_names, st.integers(0, 2))


@st.composite
def packets(draw):
    """Any packet that the contract allows, also ones that no trainer would send."""
    placed = draw(st.lists(sites, unique=True, max_size=6))
    seeds = [
        draw(
            made(
                SeedObservation,
                layer=st.just(layer),
                slot=st.just(slot),
                state=st.sampled_from(SeedState),
                blueprint=st.none() | blueprint_names,
                age_epochs=st.integers(0, 12),
                parameters=st.integers(0, 3000),
                ready=st.booleans(),
                measurement=measurements,
            )
        )
        for layer, slot in placed
    ]
    return draw(
        made(
            SystemStatePacket,
            session=st.just("any"),
            sequence=epochs,
            # half of them where the heuristic has begun, as a rule
            epoch=epochs | st.integers(int(FIRST_SURVEY * EPOCHS), EPOCHS),
            epochs=st.just(EPOCHS),
            train_loss=st.floats(),
            validation_loss=st.floats(),
            parameters_base=st.just(1000),
            parameters=st.just(1000),
            remaining_parameters=st.integers(0, 4000),
            remaining_epochs=epochs,
            settings=made(
                ControllerSettings,
                policy=st.sampled_from((ControllerPolicy.HEURISTIC, *ControllerPolicy)),
                seed=st.integers(),
                interval_epochs=st.integers(1, 3),
                minimum_confidence=st.floats(0, 1),
                active_seeds=st.integers(1, 4),
                passes=st.integers(1, 3),
                dwell_epochs=st.integers(0, 5),
                age_epochs=st.integers(5, 10),
                ramp_epochs=st.integers(0, 3),
                hold_epochs=st.integers(0, 3),
            ),
            layers=st.lists(
                made(
                    LayerDescription,
                    name=layer_names,
                    kind=st.sampled_from(("Linear", "Conv2d")),
                    parameters=st.integers(0, 999),
                    slots=st.integers(0, 3),
                ),
                unique_by=lambda layer: layer.name,
                min_size=1,
            ).map(tuple),
            edges=st.lists(st.tuples(layer_names, layer_names), max_size=3).map(tuple),
            signals=st.lists(
                made(
                    HealthSignal,
                    session=st.just("any"),
                    epoch=epochs,
                    layer=layer_names,
                    gradient_norm=st.floats(),
                    gradient_variance=st.floats(),
                    gradient_to_weight_ratio=st.floats(),
                    activation_rank=st.floats(),
                    dead_fraction=st.floats(),
                ),
                max_size=4,
            ).map(tuple),
            seeds=st.just(tuple(seeds)),
            candidates=st.lists(
                made(
                    Candidate,
                    layer=layer_names,
                    blueprint=blueprint_names,
                    parameters=st.just(0) | st.integers(0, 5000),
                    flops=st.integers(0, 9999),
                    folds=st.booleans(),
                ),
                unique_by=lambda candidate: (candidate.layer, candidate.blueprint),
                max_size=8,
            ).map(tuple),
            trials=st.lists(
                made(
                    TrialRecord,
                    layer=layer_names,
                    slot=st.integers(0, 2),
                    blueprint=blueprint_names,
                    cycle=st.integers(0, 3),
                    started_epoch=epochs,
                    ended_epoch=st.none() | epochs,
                    state=st.sampled_from(SeedState),
                    measurement=measurements,
                ),
                max_size=6,
            ).map(tuple),
            health=st.sampled_from(SystemHealth),
        )
    )


def decided(packet):
    return decide(packet, ModelGraphAnalyzer().analyze(packet))


@settings(max_examples=80, deadline=None)
@given(packets())
def test_a_decision_can_be_carried_out_within_the_budget(packet):
    decision = decided(packet)
    site = (decision.layer, decision.slot)
    seeds = {(seed.layer, seed.slot): seed for seed in packet.seeds}
    match decision.action:
        case DecisionAction.WAIT:
            assert (*site, decision.blueprint) == (None, None, None)
        case DecisionAction.GERMINATE:
            (layer,) = (layer for layer in packet.layers if layer.name == decision.layer)
            assert decision.slot in range(layer.slots)
            assert site not in seeds or seeds[site].state is SeedState.DORMANT
            (candidate,) = (
                candidate
                for candidate in packet.candidates
                if (candidate.layer, candidate.blueprint) == (decision.layer, decision.blueprint)
            )
            assert candidate.parameters <= packet.remaining_parameters
        case DecisionAction.GRAFT:
            assert seeds[site].state is SeedState.TRAINING
            assert seeds[site].ready
            assert seeds[site].parameters <= packet.remaining_parameters
            assert decision.blueprint == seeds[site].blueprint
        case DecisionAction.CULL:
            assert seeds[site].state in (SeedState.GERMINATED, SeedState.TRAINING)
            assert decision.blueprint == seeds[site].blueprint


@settings(max_examples=25, deadline=None)
@given(packets())
def test_equal_packets_give_equal_decisions_also_across_the_wire(packet):
    copy = SystemStatePacket.model_validate_json(packet.model_dump_json(by_alias=True))
    assert decided(packet) == decided(packet)
    assert decided(copy) == decided(packet)


@settings(max_examples=50, deadline=None)
@given(packets())
def test_every_reason_is_one_sentence(packet):
    reason = decided(packet).reason
    assert reason.endswith(".")
    assert "\n" not in reason
    assert reason.count(". ") == 0


def sufficient(seed, packet):
    """Whether a seed could be grafted, was it the only one."""
    return (
        0 < seed.parameters <= packet.remaining_parameters
        and seed.measurement is not None
        and seed.measurement.passes()
        and confidence(seed) >= packet.settings.minimum_confidence
    )


@settings(max_examples=60, deadline=None)
@given(
    packets(),
    st.lists(st.tuples(sensible | measurements, st.integers(0, 1500)), min_size=1, max_size=3),
)
def test_the_heuristic_grafts_on_evidence_alone(packet, ended):
    # Ready seeds with the survey behind them: one by one they are culled, until one is grafted.
    seeds = tuple(
        SeedObservation(
            layer=layer,
            slot=0,
            state=SeedState.TRAINING,
            ready=True,
            parameters=parameters,
            measurement=measurement,
        )
        for layer, (measurement, parameters) in zip(LAYERS, ended, strict=False)
    )
    packet = packet.model_copy(
        update={
            "settings": packet.settings.model_copy(update={"policy": ControllerPolicy.HEURISTIC}),
            "epoch": first_survey_epoch(packet),
            "remaining_epochs": 20,
            "remaining_parameters": 1200,
            "candidates": (),
        }
    )
    left = {seed.layer: seed for seed in seeds}
    action = DecisionAction.CULL
    while left and action is DecisionAction.CULL:
        decision = decided(packet.model_copy(update={"seeds": tuple(left.values())}))
        action, seed = decision.action, left.pop(decision.layer)
        if action is DecisionAction.GRAFT:
            assert sufficient(seed, packet)
            assert decision.confidence >= packet.settings.minimum_confidence
    assert (action is DecisionAction.GRAFT) is any(sufficient(seed, packet) for seed in seeds)
