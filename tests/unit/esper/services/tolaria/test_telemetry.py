from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch

from esper.execution.isolation import RandomState
from esper.execution.probes import LayerReading, Reading
from esper.execution.state_layout import SeedLifecycleState as S
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.telemetry import health_signals
from tests.unit.esper.core.growing import grow
from tests.unit.esper.services.tolaria.sessions import config, engine


def test_a_signal_a_layer_in_their_order() -> None:
    reading = Reading(
        layers={
            "b": LayerReading(1.0, 0.1, 0.5, 0.9, 0.25),
            "a": LayerReading(0.0, 0.0, 0.0, 0.0, 1.0),
        },
        seeds={},
    )
    first, second = health_signals("s", 3, reading)
    assert (first.session, first.epoch, first.layer) == ("s", 3, "b")
    assert (first.gradient_norm, first.gradient_variance) == (1.0, 0.1)
    assert first.gradient_to_weight_ratio == 0.5
    assert (first.activation_rank, first.dead_fraction) == (0.9, 0.25)
    assert second.layer == "a"
    assert first.health_score() > second.health_score()


def test_outputs_that_are_not_finite_score_zero() -> None:
    reading = Reading(layers={"a": LayerReading(1.0, 0.1, 0.5, math.nan, math.nan)}, seeds={})
    (signal,) = health_signals("s", 3, reading)
    assert signal.health_score() == 0.0


def watched() -> Engine:
    """An engine with a seed on trial, so that every boundary is probed."""
    found = engine()
    grow(found.model, "head", "noop", ())
    return found


def test_the_validation_of_an_epoch_is_what_a_probe_looks_at() -> None:
    found = watched()
    found.train_epoch(1)
    found.evaluate(found.datasets.test, key="test")
    assert not found.telemetry.sampled
    found.evaluate(found.datasets.validation, key="validation")
    before = found.meter.total
    signals = found.probe(1)
    cheap = found.meter.total - before
    assert [signal.layer for signal in signals] == ["hidden.0", "hidden.1", "head"]
    assert all(signal.gradient_norm > 0 for signal in signals)
    assert all(signal.activation_rank > 0 for signal in signals)
    assert not found.telemetry.sampled

    # Without samples the same batch runs once more: same signals, and a forward to pay for.
    assert found.probe(1) == signals
    forward = 2 * 48 * (6 * 5 + 5 * 4 + 4 * 3)
    assert found.meter.total - before - 2 * cheap == forward


def test_samples_of_another_model_are_forgotten() -> None:
    found = watched()
    start = found.capture(0, {})
    found.train_epoch(1)
    found.evaluate(found.datasets.validation, key="validation")
    trained = found.capture(1, {})
    expected = found.probe(1)
    found.restore(start)
    found.evaluate(found.datasets.validation, key="validation")
    found.restore(trained)
    assert not found.telemetry.sampled
    assert found.probe(1) == expected


@pytest.mark.parametrize("sampled", [True, False])
def test_a_probe_tells_of_active_seeds_and_leaves_no_trace(sampled: bool) -> None:
    found = engine()
    grow(found.model, "hidden.1", "bottleneck-mlp", (), units=3)
    bad = grow(found.model, "hidden.1", "widen", (S.TRAINING,), slot=1, units=2)
    next(bad.parameters()).data.fill_(math.inf)
    found.train_epoch(1)
    if sampled:
        found.evaluate(found.datasets.validation, key="validation")
    before, randomness = found.capture(1, {}), RandomState.capture()
    found.probe(1)
    assert found.telemetry.reading.seeds == {("hidden.1", 0): True, ("hidden.1", 1): False}
    assert torch.equal(RandomState.capture().torch_cpu, randomness.torch_cpu)
    after = found.capture(1, {})
    assert before.tensors.keys() == after.tensors.keys()
    for name, tensor in before.tensors.items():
        assert torch.equal(tensor, after.tensors[name]), name
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in found.model.modules())


def epochs_probed(found: Engine, epochs: range) -> list[int]:
    """Train, validate and probe; the epochs whose signals were read anew."""
    probed: list[int] = []
    before_all = found.telemetry.epoch
    for epoch in epochs:
        before = found.telemetry.reading
        found.train_epoch(epoch)
        found.evaluate(found.datasets.validation, key="validation")
        signals = found.probe(epoch)
        probed += [epoch] if found.telemetry.reading is not before else []
        assert {signal.epoch for signal in signals} == {probed[-1] if probed else before_all}
        assert all(signal.gradient_norm > 0 for signal in signals)
        assert not found.telemetry.sampled
    return probed


def test_a_dormant_model_is_probed_once_in_so_many_steps() -> None:
    steps = 48 // 8
    settings = config({"batchSize": 8}, {"controller": {"probeIntervalSteps": 2 * steps + 1}})
    found = engine(settings)
    assert epochs_probed(found, range(1, 9)) == [1, 4, 7]
    seed = ("head", 0)
    grow(found.model, *seed[:1], "noop", ())
    assert epochs_probed(found, range(9, 12)) == [9, 10, 11], "a seed on trial is watched"
    found.model.morphology.transition(*seed, S.CULLED)
    assert epochs_probed(found, range(12, 16)) == [14]


def test_who_goes_on_with_a_run_probes_when_the_run_would_have() -> None:
    steps = 48 // 8
    settings = config({"batchSize": 8}, {"controller": {"probeIntervalSteps": 2 * steps + 1}})
    one, other = engine(settings), engine(settings)
    epochs_probed(one, range(1, 3))
    snapshot = one.capture(2, {})
    state = json.loads(json.dumps(snapshot.state))
    other.restore(replace(snapshot, state=state))
    assert other.telemetry.reading.layers == one.telemetry.reading.layers
    assert epochs_probed(other, range(3, 6)) == epochs_probed(one, range(3, 6)) == [4]
    assert other.telemetry.reading == one.telemetry.reading
