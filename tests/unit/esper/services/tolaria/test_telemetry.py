from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.services.tolaria.telemetry import (
    PROBE_SAMPLES,
    PROBE_UNITS,
    captured_outputs,
    effective_rank_share,
    health_signals,
    layer_gradients,
    unit_rows,
)

GRADIENTS = {"a": (1.0, 0.1, 0.5)}


def signal(output: Tensor, kind: str = "Linear") -> tuple[float, float, float]:
    """(activation rank, dead fraction, health score) of a layer with this output."""
    (found,) = health_signals("s", 3, {"a": kind}, GRADIENTS, {"a": output})
    return found.activation_rank, found.dead_fraction, found.health_score()


def with_values(values: list[float], rows: int = 64) -> Tensor:
    """Centred rows whose singular values are `values`."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(rows, len(values), generator=generator, dtype=torch.float64)
    left, _, _ = torch.linalg.svd(raw - raw.mean(dim=0), full_matrices=False)
    right, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    return left @ torch.diag(torch.tensor(values, dtype=torch.float64)) @ right


# -- rank ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "rank"),
    [
        ([1.0, 1.0, 1.0, 1.0], 4.0),
        ([5.0, 5.0, 0.0, 0.0], 2.0),
        ([3.0, 0.0, 0.0, 0.0], 1.0),
        ([2.0, 1.0, 1.0], math.exp(-(0.5 * math.log(0.5) + 2 * 0.25 * math.log(0.25)))),
    ],
)
def test_the_rank_of_known_matrices(values: list[float], rank: float) -> None:
    rows = with_values(values)
    assert effective_rank_share(rows) == pytest.approx(rank / len(values), rel=1e-4)
    assert effective_rank_share(rows * 1000) == pytest.approx(rank / len(values), rel=1e-4)
    assert effective_rank_share(rows + 7.0) == pytest.approx(rank / len(values), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e6])
@pytest.mark.parametrize("units", [1, 3])
def test_units_that_never_change_have_no_rank(value: float, units: int) -> None:
    rows = torch.full((7, units), value, dtype=torch.float64)
    assert effective_rank_share(rows) == 0.0
    assert effective_rank_share(rows * torch.arange(1.0, units + 1)) == 0.0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 20), st.integers(0, 1000))
def test_the_share_lies_between_zero_and_one(rows: int, units: int, seed: int) -> None:
    drawn = torch.randn(rows, units, generator=torch.Generator().manual_seed(seed))
    share = effective_rank_share(drawn.double())
    assert 0 <= share <= 1 + 1e-9
    # Centring takes one dimension; what is left is at most the number of rows.
    assert share * units <= max(rows - 1, 0) + 1e-3


# -- rows ---------------------------------------------------------------------------------------


def test_units_are_the_features_of_a_linear_and_the_channels_of_a_convolution() -> None:
    dense = torch.randn(4, 6, 5)
    assert torch.equal(unit_rows(dense, "Linear"), dense.reshape(24, 5).double())
    image = torch.randn(3, 5, 2, 2)
    rows = unit_rows(image, "Conv2d")
    assert rows.shape == (12, 5)
    assert torch.equal(rows[:4], image[0].reshape(5, 4).t().double())


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 2000), st.integers(1, 600))
def test_rows_and_units_have_a_bound_and_are_taken_evenly(samples: int, units: int) -> None:
    output = torch.arange(samples)[:, None] * 1000.0 + torch.arange(units)
    rows = unit_rows(output, "Linear")
    assert rows.shape[0] == min(samples, rows.shape[0]) <= PROBE_SAMPLES
    assert rows.shape[1] <= PROBE_UNITS
    if samples <= PROBE_SAMPLES:
        assert rows.shape[0] == samples
    if units <= PROBE_UNITS:
        assert rows.shape[1] == units
    for steps in (rows[:, 0].diff(), rows[0].diff()):
        assert len(set(steps.tolist())) <= 1


# -- signals ------------------------------------------------------------------------------------


def test_dead_units_are_those_that_never_rise_above_zero() -> None:
    output = torch.randn(50, 4).abs()
    output[:, 1] = -1.0
    output[:, 3] = 0.0
    assert signal(output)[1] == 0.5
    image = torch.randn(5, 4, 3, 3).abs()
    image[:, 2] = 0
    assert signal(image, "Conv2d")[1] == 0.25


def test_a_dead_layer_has_no_rank_and_a_low_score() -> None:
    rank, dead, score = signal(torch.zeros(20, 4))
    assert (rank, dead) == (0.0, 1.0)
    assert score < 0.4


def test_a_lively_layer_scores_high() -> None:
    rank, dead, score = signal(torch.randn(256, 6, generator=torch.Generator().manual_seed(0)))
    assert rank > 0.9
    assert dead == 0.0
    assert score > 0.9


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_outputs_that_are_not_finite_score_zero(bad: float) -> None:
    output = torch.randn(20, 4)
    output[3, 2] = bad
    rank, dead, score = signal(output)
    assert math.isnan(rank)
    assert math.isnan(dead)
    assert score == 0.0


def test_a_layer_that_was_not_called_counts_as_dead() -> None:
    found = health_signals("s", 4, {"a": "Linear", "b": "Conv2d"}, GRADIENTS, {})
    assert [one.layer for one in found] == ["a", "b"]
    assert [(one.activation_rank, one.dead_fraction) for one in found] == [(0.0, 1.0)] * 2
    assert (found[0].gradient_norm, found[1].gradient_norm) == (1.0, 0.0)
    assert {(one.session, one.epoch) for one in found} == {("s", 4)}


# -- gradients ----------------------------------------------------------------------------------


def test_gradients_are_told_by_norm_variance_and_ratio() -> None:
    layer = nn.Linear(2, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        layer.bias.zero_()
    layer.weight.grad = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    layer.bias.grad = torch.tensor([-1.0, -1.0])
    norm, variance, ratio = layer_gradients({"a": layer})["a"]
    assert norm == pytest.approx(math.sqrt(6))
    assert variance == pytest.approx(1 - (2 / 6) ** 2)
    assert ratio == pytest.approx(math.sqrt(6) / 5)


def test_a_layer_without_gradients_gives_zeros_and_zero_weights_do_not_divide() -> None:
    frozen, zero = nn.Linear(2, 2), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        zero.weight.zero_()
    zero.weight.grad = torch.ones(2, 2)
    found = layer_gradients({"frozen": frozen, "zero": zero})
    assert found["frozen"] == (0.0, 0.0, 0.0)
    assert math.isfinite(found["zero"][2])


def test_grown_parts_are_not_their_hosts_gradients() -> None:
    layer = nn.Linear(2, 2)
    layer.add_module("grown", nn.ModuleDict({"0": nn.Linear(2, 2)}))
    for parameter in layer.get_submodule("grown").parameters():
        parameter.grad = torch.full_like(parameter, 100.0)
    assert layer_gradients({"a": layer})["a"] == (0.0, 0.0, 0.0)


# -- capturing ----------------------------------------------------------------------------------


def test_outputs_are_captured_inside_and_hooks_leave_with_the_context() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 1))
    x = torch.randn(4, 2)
    with captured_outputs({"first": model[0], "last": model[2]}) as outputs:
        expected = model(x)
    assert torch.equal(outputs["last"], expected)
    assert outputs["first"].shape == (4, 3)
    assert not outputs["last"].requires_grad
    model(x + 1)
    assert torch.equal(outputs["last"], expected)
    assert not any(module._forward_hooks for module in model)


def test_hooks_leave_after_an_error_too() -> None:
    layer = nn.Linear(2, 3)
    with pytest.raises(RuntimeError), captured_outputs({"a": layer}):
        layer(torch.zeros(1, 5))
    assert not layer._forward_hooks
