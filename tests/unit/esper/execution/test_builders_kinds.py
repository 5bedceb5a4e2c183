"""The whole catalogue beside every kind of host: zero at birth, priced, and what it says it is."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from esper.contracts.blueprints import CATALOGUE, Graph, bind, builtin, infer, lower
from esper.errors import BlueprintError
from esper.execution.builders import build
from tests.unit.esper.execution.building import built, check_everything, input_of, wake
from tests.unit.esper.kernel_targets import (
    Place,
    a_place_of_each_kind,
    conv_places,
    linear_places,
    norm_places,
    place,
    sequence_places,
)

PLACES = a_place_of_each_kind()
NO_MEANING = {("squeeze-excitation", "vector"), ("attention", "vector")}
FITTING = [
    (entry.name, kind)
    for entry in CATALOGUE
    for kind, spot in PLACES.items()
    if spot.target.layer.kind in entry.hosts and entry.name != "widen"
    if (entry.name, kind) not in NO_MEANING
]


def fitting_on(*kinds: str) -> list[str]:
    return [entry.name for entry in CATALOGUE if {*kinds} & {*entry.hosts}]


@pytest.mark.parametrize("name", [entry.name for entry in CATALOGUE])
@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
@given(
    spot=linear_places()
    | sequence_places()
    | conv_places()
    | norm_places()
    | linear_places(fed=True)
    | sequence_places(fed=True)
    | conv_places(fed=True)
)
def test_every_blueprint_on_every_host(name: str, spot: Place) -> None:
    document, target = builtin(name, {}), spot.target
    fits = target.layer.kind in document.hosts
    fits &= name != "widen" or target.producer is not None
    fits &= name not in ("squeeze-excitation", "attention") or len(target.output_shape) > 1
    if fits:
        check_everything(name, target)
    else:
        with pytest.raises(BlueprintError):
            lower(document, target)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_in_every_precision(name: str, kind: str, dtype: str) -> None:
    check_everything(name, a_place_of_each_kind(dtype)[kind].target)


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_copies_and_pickles_compute_the_same_and_learn(name: str, kind: str) -> None:
    bound, module = built(name, PLACES[kind].target)
    x = input_of(bound, PLACES[kind].target, 3)
    expected = wake(module)(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), expected)
        assert list(twin.state_dict()) == list(module.state_dict())
        assert {id(p) for p in twin.parameters()}.isdisjoint(map(id, module.parameters()))
        if expected.requires_grad:
            twin(x).square().sum().backward()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in twin.parameters())


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_under_autocast_it_is_zero_at_birth_and_then_near(name: str, kind: str) -> None:
    bound, module = built(name, PLACES[kind].target)
    x = input_of(bound, PLACES[kind].target, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not module(x).count_nonzero()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        near = wake(module)(x).float()
    expected = module(x)
    assert (near - expected).norm() <= 0.05 * expected.norm()


BATCHES = {"Conv1d": [(), (3,)], "Conv2d": [(), (3,)], "BatchNorm2d": [(), (3,)]}


@pytest.mark.parametrize(("name", "kind"), FITTING)
def test_batch_dimensions_are_in_front_and_each_sample_stands_alone(name: str, kind: str) -> None:
    target = PLACES[kind].target
    bound, module = built(name, target)
    wake(module)
    module.double()  # in float32 another batch size rounds otherwise
    for batch in BATCHES.get(kind, [(), (3,), (2, 3)]):
        x = input_of(bound, target, *batch)
        x = x.double() if x.is_floating_point() else x
        out = module(x)
        assert out.shape == (*batch, *target.output_shape)
        if batch:
            torch.testing.assert_close(out[-1], module(x[-1:])[0])


@pytest.mark.parametrize("kind", ["Conv1d", "Conv2d", "BatchNorm2d", "Linear", "LayerNorm"])
def test_other_sizes_than_the_probes(kind: str) -> None:
    host = PLACES[kind].host.eval()
    larger = {"Conv1d": (2, 6, 14), "Linear": (2, 7, 6), "LayerNorm": (2, 4, 5, 6)}
    x = torch.randn(larger.get(kind, (2, 6, 8, 7)))
    for name in fitting_on(kind):
        if name == "widen":
            continue
        bound, module = built(name, PLACES[kind].target)
        own = host(x)
        read = own if bound.nodes[0].source == "output" else x
        assert wake(module)(read).shape == own.shape


@pytest.mark.parametrize("kind", ["Conv2d", "BatchNorm2d"])
def test_channels_last_computes_the_same(kind: str) -> None:
    for name in fitting_on(kind):
        if name == "widen":
            continue
        bound, module = built(name, PLACES[kind].target)
        x = input_of(bound, PLACES[kind].target, 3)
        expected = wake(module)(x)
        torch.testing.assert_close(module(x.to(memory_format=torch.channels_last)), expected)


def test_affine_scales_and_shifts_each_channel() -> None:
    _, module = built("affine", PLACES["Conv2d"].target)
    wake(module)
    x = torch.randn(2, 5, 5, 4)
    weight, bias = module.scale_affine, module.shift_affine
    expected = x * weight.view(5, 1, 1) + bias.view(5, 1, 1)
    torch.testing.assert_close(module(x), expected)
    _, module = built("affine", PLACES["Embedding"].target)
    wake(module)
    x = torch.randn(2, 4, 5)
    torch.testing.assert_close(module(x), x * module.scale_affine + module.shift_affine)


def test_low_rank_beside_a_table_is_a_change_of_the_table() -> None:
    spot = PLACES["Embedding"]
    _, module = built("low-rank", spot.target, rank=2)
    wake(module)
    table = module.op_down.weight @ module.op_up.weight.T
    x = torch.randint(7, (3, 4))
    torch.testing.assert_close(module(x), F.embedding(x, table))


def test_a_bottleneck_beside_a_1d_convolution_has_its_window() -> None:
    _, module = built("bottleneck-conv", PLACES["Conv1d"].target, channels=3)
    wake(module)
    x = torch.randn(2, 6, 9)
    down, up = module.op_down, module.op_up
    hidden = F.gelu(F.conv1d(x, down.weight, down.bias))
    expected = F.conv1d(hidden, up.weight, up.bias, stride=2, padding=1)
    torch.testing.assert_close(module(x), expected)


def test_depthwise_separable_filters_each_channel_by_itself() -> None:
    _, module = built("depthwise-separable-conv", PLACES["Conv2d"].target)
    wake(module)
    down, up = module.op_down, module.op_up
    assert down.weight.shape == (6, 1, 3, 3)
    x = torch.randn(2, 6, 5, 4)
    parts = [F.conv2d(x[:, [c]], down.weight[[c]], down.bias[[c]], padding=1) for c in range(6)]
    expected = F.conv2d(F.gelu(torch.cat(parts, 1)), up.weight, up.bias)
    torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "LayerNorm"])
def test_squeeze_excitation_gates_channels_by_their_means(kind: str) -> None:
    target = PLACES[kind].target
    bound, module = built("squeeze-excitation", target, units=3)
    wake(module)
    out = input_of(bound, target, 2)
    last = kind in ("Linear", "LayerNorm")
    rows = out.flatten(1, -2) if last else out.flatten(2).transpose(1, 2)
    hidden = torch.relu(rows.mean(1) @ module.op_down.weight.T + module.op_down.bias)
    gate = torch.tanh(hidden @ module.op_up.weight.T + module.op_up.bias)
    found = module(out)
    found = found.flatten(1, -2) if last else found.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, rows * gate[:, None])


@pytest.mark.parametrize("kind", ["Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d"])
@pytest.mark.parametrize("heads", [1, 3])
def test_attention_is_torchs_multi_head_attention(kind: str, heads: int) -> None:
    target = PLACES[kind].target
    bound, module = built("attention", target, channels=6, heads=heads)
    wake(module)
    out = input_of(bound, target, 2)
    last = kind in ("Linear", "LayerNorm")
    rows = out.flatten(1, -2) if last else out.flatten(2).transpose(1, 2)
    qkv = F.linear(rows, module.op_qkv.weight, module.op_qkv.bias)
    query, key, value = qkv.chunk(3, -1)
    other = nn.MultiheadAttention(6, heads, bias=False, batch_first=True)
    other.in_proj_weight = nn.Parameter(torch.eye(6).repeat(3, 1))
    other.out_proj.weight = nn.Parameter(torch.eye(6))
    mixed, _ = other(query, key, value)
    expected = F.linear(mixed, module.op_up.weight, module.op_up.bias)
    found = module(out)
    found = found.flatten(1, -2) if last else found.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_counts_what_grows_with_the_square_of_the_positions() -> None:
    costs = []
    for side in (4, 8):
        target = place(nn.Conv2d(2, 2, 1), (2, side, side)).target
        bound, _ = built("attention", target, channels=4, heads=2)
        costs.append((side**2, infer(bound, target)))
    for positions, cost in costs:
        projections = 2 * positions * (2 * 2 * 12 + 3 * 4 * 2)
        assert cost.flops == projections + 3 * 2 * 2 * positions**2 * 4
        widths = 2 + 2 + 12 + 4 + 2 + 2
        assert cost.activation_elements == widths * positions + 2 * positions**2


@given(spot=linear_places(fed=True) | sequence_places(fed=True) | conv_places(fed=True))
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.filter_too_much])
def test_measured_births_begin_as_the_default_ones(spot: Place) -> None:
    for name in ("low-rank", "bottleneck-mlp", "bottleneck-conv", "widen"):
        if spot.target.layer.kind not in builtin(name, {}).hosts:
            continue
        _, module = built(name, spot.target, seed=5)
        _, measured = built(name, spot.target, seed=5, initialisation="gradient")
        for one, other in zip(module.parameters(), measured.parameters(), strict=True):
            assert torch.equal(one, other)


def chain(*nodes: dict[str, object], source: str = "host") -> Graph:
    start = {"op": "input", "id": "x", "source": source}
    return Graph.model_validate({"nodes": [start, *nodes], "output": nodes[-1]["id"]})


def test_zeros_of_the_hosts_output() -> None:
    for kind, spot in PLACES.items():
        bound = bind(chain({"op": "zeros", "id": "y", "input": "x"}, source="output"), spot.target)
        module = build(bound, spot.target, generator_seed=0)
        x = torch.full((2, *spot.target.output_shape), float("inf"))
        assert torch.equal(module(x), torch.zeros_like(x)), kind


@given(side=st.integers(1, 4), heads=st.integers(1, 3), width=st.integers(1, 3))
@settings(deadline=None, max_examples=15)
def test_positions_in_several_axes_are_one_row(side: int, heads: int, width: int) -> None:
    square = place(nn.Linear(3, 4), (side, 2, 3)).target
    flat = place(nn.Linear(3, 4), (2 * side, 3)).target
    arguments = {"channels": heads * width, "heads": heads}
    _, one = built("attention", square, **arguments)
    _, other = built("attention", flat, **arguments)
    other.load_state_dict(wake(one).state_dict())
    x = torch.randn(5, side, 2, 4)
    torch.testing.assert_close(one(x).flatten(1, 2), other(x.flatten(1, 2)))


@given(norm_places())
@settings(deadline=None, max_examples=20)
def test_an_unused_kind_of_layer_is_refused_where_it_has_no_meaning(spot: Place) -> None:
    assume(spot.target.layer.kind == "Embedding")
    with pytest.raises(BlueprintError, match="indices"):
        bind(chain({"op": "activation", "id": "y", "input": "x", "kind": "relu"}), spot.target)
    with pytest.raises(BlueprintError, match="indices"):
        bind(chain({"op": "linear", "id": "y", "input": "x", "features": "out"}), spot.target)
