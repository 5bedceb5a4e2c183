from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.errors import EntryPointError
from esper.services.tolaria.objective import (
    Classification,
    CustomObjective,
    Regression,
    fitted_temperature,
)

ALL = slice(None)


def drawn(seed: int, samples: int, classes: int, scale: float, skill: float) -> tuple[Tensor, ...]:
    """Logits that favour the right class by `skill`, then stretched by `scale`."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(classes, (samples,), generator=generator)
    logits = torch.randn(samples, classes, generator=generator, dtype=torch.float64)
    logits[torch.arange(samples), targets] += skill
    return logits * scale, targets


def grid_best(logits: Tensor, targets: Tensor) -> tuple[float, float]:
    """(temperature, loss) of the best of 401 temperatures in [1/100, 100]."""
    scales = torch.logspace(-2, 2, 401, dtype=torch.float64)
    losses = [float(F.cross_entropy(logits * scale, targets)) for scale in scales]
    best = min(range(len(losses)), key=losses.__getitem__)
    return 1.0 / float(scales[best]), losses[best]


# -- the temperature ----------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.integers(0, 10_000),
    st.integers(2, 40),
    st.integers(2, 6),
    st.floats(0.05, 30),
    st.floats(-1, 4),
)
def test_the_fit_is_no_worse_than_a_grid_of_temperatures(
    seed: int, samples: int, classes: int, scale: float, skill: float
) -> None:
    logits, targets = drawn(seed, samples, classes, scale, skill)
    found = fitted_temperature(logits, targets)
    assert 0.01 * 0.999 <= found <= 100 * 1.001
    loss = float(F.cross_entropy(logits / found, targets))
    assert loss <= grid_best(logits, targets)[1] + 1e-6


def test_overconfident_logits_are_cooled_to_the_scale_that_made_them() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(20_000, 4, generator=generator, dtype=torch.float64) * 2
    targets = torch.multinomial(logits.softmax(1), 1, generator=generator)[:, 0]
    for stretch in (0.2, 1.0, 5.0, 20.0):
        assert fitted_temperature(logits * stretch, targets) == pytest.approx(stretch, rel=0.05)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(0.2, 5))
def test_stretching_the_logits_stretches_the_temperature(seed: int, stretch: float) -> None:
    logits, targets = drawn(seed, 60, 3, 1.0, 0.8)
    once, twice = fitted_temperature(logits, targets), fitted_temperature(logits * stretch, targets)
    assume(0.05 < once < 20 and 0.05 < twice < 20)
    assert twice / once == pytest.approx(stretch, rel=1e-3)


def test_perfect_predictions_want_the_coldest_temperature_and_lose_nothing() -> None:
    logits = torch.eye(4, dtype=torch.float64) * 3
    targets = torch.arange(4)
    found = fitted_temperature(logits, targets)
    assert found < 0.2
    assert float(F.cross_entropy(logits / found, targets)) < 1e-6


def test_wrong_predictions_want_the_hottest_temperature() -> None:
    logits = torch.eye(3, dtype=torch.float64) * 4
    assert fitted_temperature(logits, torch.tensor([1, 2, 0])) == pytest.approx(100.0)


@pytest.mark.parametrize("value", [0.0, -3.0, 1e4])
def test_constant_logits_have_no_temperature_to_fit(value: float) -> None:
    logits = torch.full((8, 3), value, dtype=torch.float64)
    assert fitted_temperature(logits, torch.arange(8) % 3) == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_give_one(bad: float) -> None:
    logits = torch.zeros(4, 3, dtype=torch.float64)
    logits[1, 2] = bad
    assert fitted_temperature(logits, torch.zeros(4, dtype=torch.long)) == 1.0
    assert fitted_temperature(logits[:0], torch.zeros(0, dtype=torch.long)) == 1.0


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(-1e4, 1e4))
def test_a_shift_of_all_logits_changes_nothing(seed: int, shift: float) -> None:
    logits, targets = drawn(seed, 40, 3, 2.0, 0.5)
    assert fitted_temperature(logits + shift, targets) == pytest.approx(
        fitted_temperature(logits, targets), rel=1e-4
    )


def test_positions_beyond_the_batch_count_like_samples() -> None:
    logits, targets = drawn(1, 60, 3, 4.0, 1.0)
    stacked = logits.reshape(10, 6, 3).movedim(2, 1)
    assert fitted_temperature(stacked, targets.reshape(10, 6)) == pytest.approx(
        fitted_temperature(logits, targets)
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_targets_may_have_the_integer_types_that_cross_entropy_takes(dtype: torch.dtype) -> None:
    logits, targets = drawn(2, 30, 3, 4.0, 1.0)
    expected = fitted_temperature(logits, targets)
    assert fitted_temperature(logits, targets.to(dtype)) == expected


# -- classification -----------------------------------------------------------------------------


def test_classification_trains_on_cross_entropy_and_shows_accuracy() -> None:
    logits, targets = drawn(0, 50, 4, 1.0, 1.5)
    objective = Classification()
    assert torch.equal(objective.loss(logits, targets), F.cross_entropy(logits, targets))
    assert objective.metric_name == "accuracy"
    assert objective.metric_sum(logits, targets) == float((logits.argmax(1) == targets).sum())


def test_accuracy_of_dense_targets_is_a_mean_over_positions() -> None:
    logits = torch.zeros(2, 3, 4)
    logits[:, 1] = 1.0
    targets = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    assert Classification().metric_sum(logits, targets) == pytest.approx(1.25)


def test_nats_are_scored_on_one_half_at_the_temperature_of_the_other() -> None:
    logits, targets = drawn(4, 40, 3, 6.0, 1.0)
    fit, score = slice(0, 20), slice(20, None)
    temperature = fitted_temperature(logits[fit], targets[fit])
    nats = Classification().nats(logits.float(), targets, fit, score)
    expected = F.cross_entropy(logits[score] / temperature, targets[score], reduction="none")
    assert nats.dtype == torch.float64
    assert torch.allclose(nats, expected, rtol=1e-5)


def test_nats_of_dense_targets_are_one_a_sample() -> None:
    logits, targets = drawn(4, 60, 3, 6.0, 1.0)
    dense = logits.reshape(10, 6, 3).movedim(2, 1)
    nats = Classification().nats(dense, targets.reshape(10, 6), slice(0, 5), slice(5, None))
    assert nats.shape == (5,)


def test_with_a_temperature_the_better_model_wins_where_plain_cross_entropy_says_the_opposite() -> (
    None
):
    # The later model is right more often and far too sure of itself.
    early, targets = drawn(9, 2000, 5, 1.0, 1.5)
    later = early.clone()
    later[torch.arange(2000), targets] += 0.5
    later = later * 8
    assert (later.argmax(1) == targets).sum() > (early.argmax(1) == targets).sum()
    assert F.cross_entropy(later, targets) > F.cross_entropy(early, targets)
    halves = (slice(0, 1000), slice(1000, None))
    objective = Classification()
    gain = objective.nats(early, targets, *halves) - objective.nats(later, targets, *halves)
    assert float(gain.mean()) > 0.1


# -- regression ---------------------------------------------------------------------------------


def test_regression_trains_on_squared_error_and_shows_r2() -> None:
    targets = torch.tensor([0.0, 2.0, 4.0])
    outputs = torch.tensor([[0.0], [2.0], [1.0]])
    objective = Regression(float(targets.var(correction=0)))
    assert objective.metric_name == "r2"
    assert float(objective.loss(outputs, targets)) == pytest.approx(3.0)
    assert objective.metric_sum(outputs, targets) / 3 == pytest.approx(1 - 3.0 / (8 / 3))
    assert objective.metric_sum(targets, targets) == 3.0


def test_the_mean_of_the_targets_has_an_r2_of_zero() -> None:
    targets = torch.randn(200, 1)
    objective = Regression(float(targets.double().var(correction=0)))
    assert objective.metric_sum(targets.mean().expand(200, 1), targets) == pytest.approx(
        0, abs=1e-3
    )


def test_constant_targets_do_not_divide_by_zero() -> None:
    targets = torch.ones(4)
    objective = Regression(0.0)
    assert objective.metric_sum(targets, targets) == 4.0
    assert math.isfinite(objective.metric_sum(targets + 1, targets))
    assert bool(torch.isfinite(objective.nats(targets, targets, slice(0, 2), slice(2, None))).all())


def test_integer_targets_are_compared_in_the_outputs_type() -> None:
    outputs = torch.randn(6, requires_grad=True)
    loss = Regression(1.0).loss(outputs, torch.arange(6))
    assert loss.dtype == torch.float32
    loss.backward()
    assert outputs.grad is not None


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 100), st.integers(1, 3))
def test_regressions_nats_are_the_gaussian_log_likelihood(
    seed: int, deviation: float, width: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(40, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(40, width, generator=generator, dtype=torch.float64) * deviation
    fit, score = slice(0, 20), slice(20, None)
    nats = Regression(1.0).nats(targets + noise, targets, fit, score)
    variance = (noise[fit] ** 2).mean()
    normal = torch.distributions.Normal(targets[score] + noise[score], variance.sqrt())
    assert torch.allclose(nats, -normal.log_prob(targets[score]).mean(dim=1))


def test_less_error_is_fewer_nats() -> None:
    targets = torch.randn(100, 2)
    noise = torch.randn(100, 2)
    halves = (slice(0, 50), slice(50, None))
    objective = Regression(1.0)
    worse = objective.nats(targets + noise, targets, *halves).mean()
    better = objective.nats(targets + noise / 2, targets, *halves).mean()
    assert float(worse - better) == pytest.approx(math.log(2), abs=1e-4)


# -- the user's own -----------------------------------------------------------------------------


class Distance:
    """As little as a custom objective may be."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs().mean()


class FullObjective(Distance):
    metric_name = "closeness"

    def sample_losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).abs()

    def metric(self, outputs: Tensor, targets: Tensor) -> float:
        return float((outputs == targets).float().mean())


def test_a_custom_objective_needs_nothing_but_a_loss() -> None:
    outputs, targets = torch.randn(6), torch.randn(6)
    objective = CustomObjective(Distance(), "mine:Distance")
    assert objective.metric_name == "score"
    assert objective.loss(outputs, targets) == (outputs - targets).abs().mean()
    assert objective.metric_sum(outputs, targets) == pytest.approx(
        -float((outputs - targets).abs().sum()), rel=1e-6
    )
    nats = objective.nats(outputs, targets, slice(0, 3), slice(3, None))
    assert nats.dtype == torch.float64
    assert torch.allclose(nats.float(), (outputs - targets).abs()[3:])


def test_a_custom_objectives_own_methods_are_used() -> None:
    outputs, targets = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([1.0, 2.0, 0.0, 0.0])
    objective = CustomObjective(FullObjective(), "mine:FullObjective")
    assert objective.metric_name == "closeness"
    assert objective.metric_sum(outputs, targets) == 2.0
    nats = objective.nats(outputs, targets, slice(0, 2), slice(2, None))
    assert nats.dtype == torch.float64
    assert nats.tolist() == [3.0, 4.0]


def test_a_metric_without_a_name_is_called_metric() -> None:
    class Nameless(Distance):
        metric = staticmethod(lambda outputs, targets: 0.5)

    objective = CustomObjective(Nameless(), "mine:Nameless")
    assert objective.metric_name == "metric"
    assert objective.metric_sum(torch.zeros(4), torch.zeros(4)) == 2.0


@pytest.mark.parametrize("user", [object(), None, type("Bad", (), {"loss": 3})()])
def test_an_object_without_a_loss_is_refused(user: object) -> None:
    with pytest.raises(EntryPointError, match=r"spec\.training\.objective") as caught:
        CustomObjective(user, "mine:thing")
    assert type(user).__name__ in str(caught.value)
    assert "loss(outputs, targets)" in caught.value.allowed
