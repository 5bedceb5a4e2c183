from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from esper.contracts.catalogue import builtin
from esper.contracts.ir import Graph, source_of
from esper.contracts.lowering import bind
from esper.core import MorphableModel, wrap
from esper.errors import BlueprintError
from esper.execution.births import (
    EXACT_SIZE,
    ROW_NORM,
    apply_births,
    births,
    leading_directions,
    moments,
)
from esper.execution.builders import build
from esper.execution.isolation import RandomState
from tests.unit.esper.core.growing import graph_of, grow

GRADIENT = {"initialisation": "gradient"}


class Dense(nn.Module):
    """Linear(6, 5) -> ReLU in place -> Linear(5, 4), with dropout and normalisation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.drop, self.head = nn.Dropout(0.4), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu_(self.first(self.drop(x))))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def wrapped(model: nn.Module, *inputs: Tensor) -> MorphableModel:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.4)
    hosts = [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d)
    ]
    return wrap(model, *inputs, layers=hosts)


def bound_at(model: MorphableModel, layer: str, graph: Graph | str, **arguments: object) -> Graph:
    document = builtin(graph, GRADIENT | arguments).graph if isinstance(graph, str) else graph
    return bind(document, model.morphology.target(layer))


def measured(
    model: MorphableModel, layer: str, bound: Graph, *losses: Callable[[], Tensor]
) -> dict[str, Tensor]:
    return moments(model, model.morphology.layers[layer], bound, losses, random_seed=3)


def loss_on(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    return lambda: (model(x) * torch.linspace(-1, 1, model(x).numel()).view_as(model(x))).sum()


def last_gradient(
    model: MorphableModel, layer: str, bound: Graph, loss: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """The first layer's rows [U, F], and what a seed's last layer [O, U, K] first gets."""
    (birth,) = births(bound)
    module = build(bound, model.morphology.target(layer), generator_seed=7)
    first = module.get_submodule(f"op_{birth.first.id}")
    if first.bias is not None:
        nn.init.zeros_(first.bias)
    last = module.get_submodule(f"op_{birth.last.id}")
    model.morphology.germinate(layer, 0, module, kernel="k", source=source_of(bound), graph=bound)
    with model.morphology.trialling(layer, 0):
        (gradient,) = torch.autograd.grad(loss(), [last.weight])
    return first.weight.detach().flatten(1), gradient.reshape(*gradient.shape[:2], -1)


# -- what is measured ---------------------------------------------------------------------------


def test_beside_a_layer_the_moments_are_the_gradient_of_its_weight() -> None:
    model = wrapped(
        nn.Sequential(nn.Linear(6, 5), nn.ReLU(inplace=True), nn.Linear(5, 4)), drawn(2, 6)
    )
    x = drawn(9, 6)
    found = measured(model, "0", bound_at(model, "0", "bottleneck-mlp", units=3), loss_on(model, x))
    (expected,) = torch.autograd.grad(loss_on(model, x)(), [model[0].weight])
    assert found["down"].dtype == torch.float64
    torch.testing.assert_close(found["down"].float(), expected)


def test_batches_add_up() -> None:
    model = wrapped(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), drawn(2, 6))
    bound = bound_at(model, "1", "low-rank", rank=2)
    x = drawn(8, 6)

    def summed(part: Tensor) -> Callable[[], Tensor]:
        return lambda: model(part).square().sum()

    whole = measured(model, "1", bound, summed(x))["down"]
    parts = measured(model, "1", bound, summed(x[:3]), summed(x[3:]))["down"]
    torch.testing.assert_close(whole, parts, rtol=1e-5, atol=1e-6)


def test_every_call_of_a_shared_layer_counts() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(torch.tanh(self.layer(x)))

    model = wrapped(Twice(), drawn(2, 4))
    x = drawn(5, 4)
    found = measured(
        model, "layer", bound_at(model, "layer", "low-rank", rank=2), loss_on(model, x)
    )
    (expected,) = torch.autograd.grad(loss_on(model, x)(), [model.layer.weight])
    torch.testing.assert_close(found["down"].float(), expected)


WINDOWS = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 2),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "padding_mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
    }
)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from([nn.Conv1d, nn.Conv2d]),
    WINDOWS,
    st.sampled_from(["low-rank", "bottleneck-conv"]),
)
def test_the_moments_give_the_last_layers_gradient_for_any_window(
    kind: type[nn.Conv1d] | type[nn.Conv2d], window: dict[str, object], blueprint: str
) -> None:
    shape = (3, 9) if kind is nn.Conv1d else (3, 9, 8)
    model = wrapped(nn.Sequential(kind(3, 4, **window)), drawn(2, *shape))
    arguments = (
        {"rank": 2} if blueprint == "low-rank" else {"channels": 2, "activation": "identity"}
    )
    bound = bound_at(model, "0", blueprint, **arguments)
    loss = loss_on(model, drawn(5, *shape))
    found = measured(model, "0", bound, loss)["down"].float()
    rows, gradient = last_gradient(model, "0", bound, loss)
    torch.testing.assert_close(
        (found @ rows.T).view(4, -1, 2).transpose(1, 2), gradient, rtol=1e-3, atol=1e-4
    )


@pytest.mark.parametrize(
    "between",
    [
        (),
        (nn.AvgPool2d(2, ceil_mode=True),),
        (nn.AvgPool2d(3, 2, padding=1, count_include_pad=False), nn.Identity()),
    ],
)
@pytest.mark.parametrize("padding", [0, 1, "same"])
def test_widening_a_pair_of_convolutions(
    between: tuple[nn.Module, ...], padding: int | str
) -> None:
    pair = (nn.Conv2d(2, 3, 3, padding=1), *between, nn.Conv2d(3, 4, (2, 3), padding=padding))
    model = wrapped(nn.Sequential(*pair), drawn(2, 2, 9, 9))
    host = str(len(pair) - 1)
    bound = bound_at(model, host, "widen", units=2)
    loss = loss_on(model, drawn(5, 2, 9, 9))
    found = measured(model, host, bound, loss)["units"].float()
    rows, gradient = last_gradient(model, host, bound, loss)
    torch.testing.assert_close(
        (found @ rows.T).view(4, -1, 2).transpose(1, 2), gradient, rtol=1e-3, atol=1e-4
    )


def test_widening_a_pair_of_dense_layers_with_a_position_dimension() -> None:
    model = wrapped(nn.Sequential(nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 4)), drawn(2, 3, 6))
    bound = bound_at(model, "2", "widen", units=3)
    loss = loss_on(model, drawn(5, 3, 6))
    found = measured(model, "2", bound, loss)["units"].float()
    rows, gradient = last_gradient(model, "2", bound, loss)
    torch.testing.assert_close(found @ rows.T, gradient[..., 0])


def test_large_images_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(2, 3, 3, padding=1)), drawn(2, 2, 8, 8))
    bound = bound_at(model, "0", "low-rank", rank=2)
    loss = loss_on(model, drawn(7, 2, 8, 8))
    whole = measured(model, "0", bound, loss)["down"]
    monkeypatch.setattr("esper.execution.births.MAX_PATCH_ELEMENTS", 2 * 18 * 64)
    parts = measured(model, "0", bound, loss)["down"]
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)


def test_half_precision_is_summed_wider() -> None:
    model = wrapped(nn.Sequential(nn.Linear(6, 5)).bfloat16(), drawn(2, 6).bfloat16())
    x = drawn(200, 6).bfloat16()
    found = measured(model, "0", bound_at(model, "0", "low-rank", rank=2), lambda: model(x).sum())
    torch.testing.assert_close(found["down"][0], x.double().sum(dim=0))


# -- what stays as it was -----------------------------------------------------------------------


def test_the_model_is_left_as_it_was() -> None:
    model = wrapped(Dense(), drawn(4, 6)).train()
    bound = bound_at(model, "head", "bottleneck-mlp", units=3)
    grow(model, "first", "low-rank", rank=2)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: parameter.clone() for name, parameter in model.named_parameters()}
    before = RandomState.capture()

    def loss() -> Tensor:
        model.norm(drawn(4, 5))
        return model(drawn(8, 6)).square().sum()

    first = measured(model, "head", bound, loss)
    assert torch.equal(RandomState.capture().torch_cpu, before.torch_cpu)
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in model.named_buffers())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, weights[name])
        assert torch.equal(parameter.grad, torch.ones_like(parameter))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    torch.manual_seed(99)
    assert torch.equal(measured(model, "head", bound, loss)["down"], first["down"])


def test_frozen_layers_and_untouched_outputs() -> None:
    model = wrapped(nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)), drawn(2, 6)).requires_grad_(
        False
    )
    bound = bound_at(model, "0", "low-rank", rank=2)
    assert measured(model, "0", bound, loss_on(model, drawn(5, 6)))["down"].norm() > 0
    assert measured(model, "0", bound, lambda: drawn(1).requires_grad_().sum()) == {}


# -- what is made of it -------------------------------------------------------------------------


def test_rows_are_the_leading_directions_at_torchs_own_norm() -> None:
    model = wrapped(nn.Sequential(nn.Linear(8, 6)), drawn(2, 8))
    bound = bound_at(model, "0", "bottleneck-mlp", units=3)
    module = build(bound, model.morphology.target("0"), generator_seed=1)
    bias = module.op_down.bias.clone()
    matrix = drawn(6, 8).double()
    apply_births(module, bound, {"down": matrix})
    rows = module.op_down.weight.detach().double()
    torch.testing.assert_close(
        rows @ rows.T, torch.eye(3, dtype=torch.float64) * ROW_NORM**2, rtol=1e-5, atol=1e-6
    )
    values = torch.linalg.svdvals(matrix)
    torch.testing.assert_close((matrix @ rows.T).norm(dim=0), values[:3] * ROW_NORM)
    assert torch.equal(module.op_down.bias, bias)
    assert not module.op_up.weight.any()


def test_torchs_own_rows_have_that_norm_in_expectation() -> None:
    layer = nn.Conv2d(7, 4000, 3)
    assert float(layer.weight.detach().flatten(1).square().sum(1).mean().sqrt()) == pytest.approx(
        ROW_NORM, rel=0.01
    )


def test_no_rows_of_that_norm_give_the_last_layer_a_larger_gradient() -> None:
    matrix = drawn(6, 8).double()
    best = float((matrix @ leading_directions(matrix, 3).T).norm())
    for seed in range(50):
        rows = torch.linalg.qr(drawn(8, 3, seed=seed).double()).Q.T
        assert float((matrix @ rows.T).norm()) <= best


def test_what_the_moments_leave_open_keeps_its_draw() -> None:
    model = wrapped(nn.Sequential(nn.Linear(8, 2)), drawn(2, 8))
    bound = bound_at(model, "0", "low-rank", rank=5)
    made = [build(bound, model.morphology.target("0"), generator_seed=1) for _ in range(4)]
    before = made[0].op_down.weight.clone()
    apply_births(made[1], bound, {"down": drawn(2, 8).double()})
    assert not torch.equal(made[1].op_down.weight[:2], before[:2])
    assert torch.equal(made[1].op_down.weight[2:], before[2:])
    apply_births(made[2], bound, {})
    apply_births(made[3], bound, {"down": torch.full((2, 8), math.nan, dtype=torch.float64)})
    for module in made[2:]:
        assert torch.equal(module.op_down.weight, before)
    assert len(leading_directions(torch.zeros(2, 8, dtype=torch.float64), 2)) == 0


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 8), st.integers(0, 99))
def test_signs_are_fixed_and_a_scale_changes_nothing(
    height: int, width: int, count: int, seed: int
) -> None:
    matrix = drawn(height, width, seed=seed).double()
    rows = leading_directions(matrix, count)
    assert len(rows) <= min(height, width, count)
    assert bool((rows.gather(1, rows.abs().argmax(dim=1, keepdim=True)) > 0).all())
    torch.testing.assert_close(leading_directions(-1e6 * matrix, count), rows, rtol=1e-4, atol=1e-5)


def test_large_matrices_give_the_same_directions() -> None:
    size = EXACT_SIZE + 40
    left = torch.linalg.qr(drawn(size, size).double()).Q
    right = torch.linalg.qr(drawn(size, size, seed=1).double()).Q
    values = 0.9 ** torch.arange(size, dtype=torch.float64)
    state = torch.get_rng_state()
    rows = leading_directions((left * values) @ right.T, 4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(
        (rows @ right[:, :4]).abs(), torch.eye(4).double(), rtol=0, atol=1e-5
    )


def test_a_birth_lowers_the_loss_faster_than_a_draw() -> None:
    x = drawn(256, 8)
    y = torch.tanh(x @ drawn(8, 3, seed=5))
    model = wrapped(nn.Sequential(nn.Linear(8, 3)), drawn(2, 8))
    falls = []
    for initialisation in ("default", "gradient"):
        bound = bound_at(model, "0", "bottleneck-mlp", units=2, initialisation=initialisation)
        module = build(bound, model.morphology.target("0"), generator_seed=0)
        found = measured(model, "0", bound, lambda: F.mse_loss(model(x), y, reduction="sum"))
        assert (found == {}) is (initialisation == "default")
        apply_births(module, bound, found)
        start = F.mse_loss(model(x), y)
        (up,) = torch.autograd.grad(F.mse_loss(model(x) + module(x), y), [module.op_up.weight])
        falls.append(float(up.norm()))
        assert torch.equal(model(x) + module(x), model(x))
        assert start > 0
    assert falls[1] > 1.3 * falls[0]


# -- what is refused ----------------------------------------------------------------------------

X = {"op": "input", "id": "x"}


def down(**fields: object) -> dict[str, object]:
    return {"op": "linear", "id": "down", "input": "x", "features": 3, "init": "gradient", **fields}


@pytest.mark.parametrize(
    "nodes",
    [
        (X, down(features="out")),
        (
            X,
            down(),
            {"op": "linear", "id": "one", "input": "down", "features": "out"},
            {"op": "linear", "id": "two", "input": "down", "features": "out"},
            {"op": "add", "id": "y", "inputs": ("one", "two")},
        ),
        (
            X,
            down(),
            {"op": "linear", "id": "deep", "input": "down", "features": 3},
            {"op": "linear", "id": "up", "input": "deep", "features": "out"},
        ),
    ],
)
def test_graphs_without_one_last_layer_are_refused(nodes: tuple[dict[str, object], ...]) -> None:
    model = wrapped(nn.Sequential(nn.Linear(6, 5)), drawn(2, 6))
    bound = bound_at(model, "0", graph_of(*nodes))
    with pytest.raises(BlueprintError, match=r"spec\.graph\.nodes\[1\]\.init.*gradient"):
        births(bound)


def test_groups_are_refused() -> None:
    model = wrapped(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), drawn(2, 4, 5, 5))
    first = {"op": "conv2d", "id": "down", "input": "x", "channels": 4, "kernel_size": 3}
    last = {"op": "conv2d", "id": "up", "input": "down", "channels": "out", "kernel_size": 1}
    bound = bound_at(model, "0", graph_of(X, first | {"groups": 2, "init": "gradient"}, last))
    with pytest.raises(BlueprintError, match="groups 2"):
        births(bound)


def test_a_layer_called_by_keyword_is_read_as_one_called_by_position() -> None:
    class Called(nn.Module):
        def __init__(self, keyword: bool) -> None:
            super().__init__()
            self.first, self.head, self.keyword = nn.Linear(5, 4), nn.Linear(4, 3), keyword

        def forward(self, x: Tensor) -> Tensor:
            if self.keyword:
                return self.head(input=torch.relu(self.first(input=x)))
            return self.head(torch.relu(self.first(x)))

    x = drawn(7, 5)
    for layer, blueprint in (("first", "bottleneck-mlp"), ("head", "widen"), ("head", OUTPUT)):
        found = []
        for keyword in (True, False):
            model = wrapped(Called(keyword), x)
            arguments = GRADIENT if isinstance(blueprint, str) else {}
            bound = bound_at(model, layer, blueprint, **arguments)
            found.append(measured(model, layer, bound, loss_on(model, x)))
        assert found[0].keys() == found[1].keys() != set()
        assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


OUTPUT = graph_of(
    {"op": "input", "id": "x", "source": "output"},
    {"op": "linear", "id": "down", "input": "x", "features": 2, "init": "gradient"},
    {"op": "linear", "id": "up", "input": "down", "features": "out", "init": "zero"},
)


def test_weights_that_a_forward_writes_to_are_as_before_the_birth() -> None:
    model = nn.Sequential(nn.Embedding(9, 6, max_norm=0.1), Dense())
    x = torch.arange(9)
    wrap(model, x)
    with torch.no_grad():
        model[0].weight.mul_(10)
    before = model[0].weight.detach().clone()
    bound = bound_at(model, "1.first", "bottleneck-mlp", **GRADIENT)
    measured(model, "1.first", bound, loss_on(model, x))
    assert torch.equal(model[0].weight, before)
