"""Built modules do what their graph says, and cost what `infer` says."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from esper.contracts.blueprints import (
    Graph,
    bind,
    builtin,
    folds,
)
from esper.contracts.ir import ActivationOp, DropoutOp, MaxPool2dOp
from esper.errors import BlueprintError
from esper.execution.builders import build
from tests.unit.esper.execution.building import built, input_of, wake
from tests.unit.esper.kernel_targets import (
    Place,
    conv_pair,
    conv_places,
    linear_pair,
    linear_place,
    place,
)


def graph_of(*nodes: dict[str, object]) -> Graph:
    start = {"op": "input", "id": "x"}
    return Graph.model_validate({"nodes": [start, *nodes], "output": nodes[-1]["id"]})


@pytest.mark.parametrize(
    "spot",
    [
        linear_pair(ActivationOp(kind="tanh"), DropoutOp(p=0.5)),
        conv_pair(ActivationOp(kind="relu"), MaxPool2dOp(kernel_size=2, stride=1)),
    ],
    ids=["Linear", "Conv2d"],
)
def test_widen_is_what_concatenated_layers_compute(spot: Place) -> None:
    bound, module = built("widen", spot.target, units=5)
    wake(module.eval())
    producer, host = copy.deepcopy(spot.producer), copy.deepcopy(spot.host)
    with torch.no_grad():
        producer.weight = nn.Parameter(torch.cat([producer.weight, module.op_units.weight]))
        producer.bias = nn.Parameter(torch.cat([producer.bias, module.op_units.bias]))
        host.weight = nn.Parameter(torch.cat([host.weight, module.op_out.weight], dim=1))
    batch = input_of(bound, spot.target, 3)
    plain = nn.Sequential(spot.producer, *spot.chain, spot.host).eval()
    wide = nn.Sequential(producer, *spot.chain, host).eval()
    if isinstance(host, nn.Conv2d):
        producer.out_channels += 5
        host.in_channels += 5
    torch.testing.assert_close(plain(batch) + module(batch), wide(batch), rtol=1e-4, atol=1e-4)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.filter_too_much])
@given(conv_places())
def test_low_rank_is_a_change_of_the_hosts_weight(spot: Place) -> None:
    host = spot.host
    if host.groups > 1:
        assert not folds(builtin("low-rank", {}).graph, spot.target.layer)
        return
    bound, module = built("low-rank", spot.target, rank=2)
    wake(module)
    grown = copy.deepcopy(host)
    with torch.no_grad():
        up, down = module.op_up.weight[:, :, 0, 0], module.op_down.weight
        grown.weight += torch.einsum("or,rihw->oihw", up, down)
    batch = input_of(bound, spot.target, 2)
    torch.testing.assert_close(host(batch) + module(batch), grown(batch), rtol=1e-4, atol=1e-4)


def test_any_batch_dimensions_in_front() -> None:
    spot = linear_place(5, 4)
    for name in ("noop", "low-rank", "bottleneck-mlp"):
        _, module = built(name, spot.target)
        for batch in ((), (3,), (2, 3), (2, 0, 3)):
            assert module(torch.zeros(*batch, 5)).shape == (*batch, 4)


def test_an_image_without_batch_and_one_of_another_size() -> None:
    spot = place(nn.Conv2d(3, 4, 3, stride=2, dilation=2, padding=(1, 2)), (3, 9, 9))
    for name in ("noop", "low-rank", "bottleneck-conv"):
        _, module = built(name, spot.target)
        for shape in ((3, 9, 9), (2, 3, 9, 9), (2, 3, 12, 7)):
            x = torch.randn(shape)
            assert module(x).shape == spot.host(x).shape


def test_zeros_stay_zeros_where_the_input_is_infinite() -> None:
    spot = linear_place(5, 4)
    _, module = built("noop", spot.target)
    assert not module(torch.full((2, 5), float("inf"))).count_nonzero()


def test_every_operation_computes_what_torch_does() -> None:
    spot = place(nn.Conv2d(4, 6, 1), (4, 6, 6))
    bound = bind(
        graph_of(
            {"op": "conv2d", "id": "a", "input": "x", "channels": 6, "kernelSize": 3, "groups": 2},
            {"op": "activation", "id": "b", "input": "a", "kind": "elu", "alpha": 0.5},
            {"op": "dropout", "id": "c", "input": "b", "p": 0.5},
            {
                "op": "max_pool2d",
                "id": "d",
                "input": "c",
                "kernelSize": 3,
                "stride": 1,
                "padding": 1,
            },
            {
                "op": "avg_pool2d",
                "id": "e",
                "input": "c",
                "kernelSize": 3,
                "stride": 1,
                "padding": 1,
            },
            {"op": "multiply", "id": "f", "inputs": ["d", "e", "b"]},
            {"op": "add", "id": "y", "inputs": ["f", "a", "d"]},
        ),
        spot.target,
    )
    module = build(bound, spot.target, generator_seed=1).eval()
    x = torch.randn(2, 4, 6, 6)
    a = nn.functional.conv2d(x, module.op_a.weight, module.op_a.bias, padding=1, groups=2)
    b = nn.functional.elu(a, alpha=0.5)
    d = nn.functional.max_pool2d(b, 3, 1, 1)
    e = nn.functional.avg_pool2d(b, 3, 1, 1)
    torch.testing.assert_close(module(x), d * e * b + a + d)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"kind": "relu"}, nn.ReLU()),
        ({"kind": "gelu"}, nn.GELU()),
        ({"kind": "gelu", "approximate": "tanh"}, nn.GELU(approximate="tanh")),
        ({"kind": "silu"}, nn.SiLU()),
        ({"kind": "tanh"}, nn.Tanh()),
        ({"kind": "sigmoid"}, nn.Sigmoid()),
        ({"kind": "leaky_relu"}, nn.LeakyReLU()),
        ({"kind": "leaky_relu", "negativeSlope": 0.0}, nn.LeakyReLU(0.0)),
        ({"kind": "elu"}, nn.ELU()),
        ({"kind": "elu", "alpha": 2.0}, nn.ELU(2.0)),
        ({"kind": "identity"}, nn.Identity()),
    ],
)
def test_activations_are_torchs(fields: dict[str, object], expected: nn.Module) -> None:
    spot = linear_place(6, 6)
    bound = bind(graph_of({"op": "activation", "id": "y", "input": "x", **fields}), spot.target)
    x = torch.linspace(-3, 3, 6)
    assert torch.equal(build(bound, spot.target, generator_seed=0)(x), expected(x))


def test_dropout_draws_in_training_only() -> None:
    spot = linear_place(64, 64)
    bound = bind(graph_of({"op": "dropout", "id": "y", "input": "x", "p": 0.5}), spot.target)
    module = build(bound, spot.target, generator_seed=0)
    x = torch.ones(64)
    assert module.training
    assert 0 < module(x).count_nonzero() < 64
    assert torch.equal(module.eval()(x), x)


def test_weights_follow_the_seed_and_nothing_else() -> None:
    target = linear_place().target
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built("bottleneck-mlp", target, seed=3)[1].state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again = built("bottleneck-mlp", target, seed=3)[1].state_dict()
    other = built("bottleneck-mlp", target, seed=4)[1].state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["op_down.weight"], other["op_down.weight"])


@pytest.mark.parametrize("layer", [nn.Linear(300, 200), nn.Conv2d(12, 64, (3, 5), groups=2)])
def test_weights_follow_torchs_law(layer: nn.Linear | nn.Conv2d) -> None:
    if isinstance(layer, nn.Linear):
        spot = place(layer, (300,))
        node = {"op": "linear", "id": "y", "input": "x", "features": 200}
    else:
        spot = place(layer, (12, 8, 8))
        node = {
            "op": "conv2d",
            "id": "y",
            "input": "x",
            "channels": 64,
            "kernelSize": "host",
            "groups": 2,
        }
    module = build(bind(graph_of(node), spot.target), spot.target, generator_seed=0).op_y
    layer.reset_parameters()
    for ours, torchs in ((module.weight, layer.weight), (module.bias, layer.bias)):
        assert ours.shape == torchs.shape
        bound = layer.weight[0].numel() ** -0.5
        assert ours.abs().max() <= bound
        assert ours.abs().max() > 0.9 * bound
        torch.testing.assert_close(ours.std(), torchs.std(), rtol=0.25, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "bfloat16"])
def test_the_targets_dtype(dtype: str) -> None:
    spot = place(nn.Linear(5, 4), (5,), dtype=dtype)
    bound, module = built("bottleneck-mlp", spot.target)
    assert {p.dtype for p in module.parameters()} == {getattr(torch, dtype)}
    assert module(input_of(bound, spot.target, 2)).dtype == getattr(torch, dtype)
    wide = built("bottleneck-mlp", linear_place(5, 4).target)[1]
    if dtype != "float64":
        rounded = wide.op_down.weight.to(getattr(torch, dtype))
        assert torch.equal(module.op_down.weight, rounded)


def test_the_targets_device() -> None:
    target = linear_place().target.model_copy(update={"device": "meta"})
    assert {p.device.type for p in built("low-rank", target)[1].parameters()} == {"meta"}


def test_copies_and_pickles_compute_the_same() -> None:
    spot = conv_pair(ActivationOp(kind="relu"))
    bound, module = built("widen", spot.target)
    wake(module)
    x = input_of(bound, spot.target, 2)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        with torch.no_grad():
            twin.op_units.weight.zero_()
        assert module.op_units.weight.count_nonzero()


def test_nodes_may_be_called_what_modules_call_their_own() -> None:
    names = ["forward", "training", "parameters", "add_module", "lambda", "op_x", "self"]
    nodes = [
        {"op": "linear", "id": name, "input": before, "features": 3 if name != "self" else 4}
        for name, before in zip(names, ["x", *names[:-1]], strict=True)
    ]
    target = linear_place(5, 4).target
    module = build(bind(graph_of(*nodes), target), target, generator_seed=0)
    assert module(torch.zeros(2, 5)).shape == (2, 4)


def test_modules_depend_on_torch_alone() -> None:
    _, module = built("widen", linear_pair(ActivationOp(kind="relu")).target)
    for child in module.children():
        assert type(child).__module__.startswith("torch.")
    assert "esper" not in module.code


def test_a_symbolic_graph_is_not_built() -> None:
    target = linear_place().target
    with pytest.raises(BlueprintError, match="allowed: a bound graph"):
        build(builtin("bottleneck-mlp", {}).graph, target, generator_seed=0)


@given(seed=st.integers(0, 2**63 - 1))
@settings(deadline=None, max_examples=20)
def test_any_seed_will_do(seed: int) -> None:
    _, module = built("bottleneck-mlp", linear_place(3, 2).target, seed=seed)
    assert module.op_down.weight.isfinite().all()
