"""Unwrapping a grown model: plain layers where that is exact, torch-only modules elsewhere."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.core import unwrap, wrap
from esper.errors import WrapError
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import GRAFTING, graph_of, grow

X = {"op": "input", "id": "x"}


def mlp(**arguments) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)]
    return wrap(nn.Sequential(*layers), torch.randn(3, 4), **arguments).eval()


def cnn(padding=1, mode="zeros", stride=1, **arguments) -> nn.Module:
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, stride=stride, bias=False),
        nn.Flatten(2),
        nn.Dropout(0.5),
    ]
    return wrap(nn.Sequential(*layers), torch.randn(3, 1, 12, 12), **arguments).eval()


def unwrapped_same(model: nn.Module, x: torch.Tensor) -> nn.Module:
    expected = model(x)
    back = unwrap(model)
    assert torch.allclose(back(x), expected, atol=1e-5)
    for layer in back.modules():
        assert not type(layer).__module__.startswith("esper")
    x = torch.cat([x, x[:1] * 3])
    assert torch.isfinite(back(x)).all()
    return back


def keeps(layer: nn.Module) -> bool:
    """Whether a layer of torch's own class has seeds beside it."""
    assert type(layer).__module__.startswith("torch.nn.")
    return "grown" in dict(layer.named_children())


def linear(name: str, source: str, features: object, **fields: object) -> dict[str, object]:
    return {"op": "linear", "id": name, "input": source, "features": features, **fields}


def conv(name: str, source: str, channels: object, kernel: object, **fields: object) -> dict:
    return {
        "op": "conv2d",
        "id": name,
        "input": source,
        "channels": channels,
        "kernel_size": kernel,
        **fields,
    }


LINEAR_FOLDS = {
    "one layer": (X, linear("y", "x", "out")),
    "two layers": (X, linear("d", "x", 3), linear("y", "d", "out", bias=False)),
    "a sum": (
        X,
        linear("a", "x", "out"),
        linear("b", "x", "out", bias=False),
        {"op": "add", "id": "y", "inputs": ["a", "b"]},
    ),
    "an identity": (
        X,
        {"op": "activation", "id": "i", "kind": "identity", "input": "x"},
        linear("y", "i", "out"),
    ),
    "zeros in a sum": (
        X,
        linear("a", "x", "out"),
        {"op": "zeros", "id": "z", "input": "x"},
        {"op": "add", "id": "y", "inputs": ["a", "z"]},
    ),
}


@pytest.mark.parametrize("nodes", LINEAR_FOLDS.values(), ids=LINEAR_FOLDS)
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_seed_folds_into_its_layer(nodes, bias) -> None:
    torch.manual_seed(0)
    model = wrap(nn.Sequential(nn.Linear(4, 5, bias=bias)), torch.randn(2, 4)).eval()
    weight = model[0].weight
    grow(model, "0", graph_of(*nodes))
    back = unwrapped_same(model, torch.randn(2, 4))
    assert type(back[0]) is nn.Linear
    assert back[0].weight is weight
    assert set(back.state_dict()) <= {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("name", "layer"), [("noop", "0"), ("noop", "3"), ("low-rank", "0"), ("low-rank", "3")]
)
@pytest.mark.parametrize("options", [{}, {"padding": "same", "mode": "reflect"}, {"stride": 2}])
def test_catalogue_seeds_that_add_no_function_class_fold(name, layer, options) -> None:
    model = cnn(**options)
    grow(model, layer, name)
    back = unwrapped_same(model, torch.randn(2, 1, 12, 12))
    assert type(back.get_submodule(layer)) is nn.Conv2d
    assert list(back.state_dict()) == ["0.weight", "0.bias", "3.weight"]


def test_a_chain_through_the_hosts_window_folds_where_borders_allow() -> None:
    nodes = (X, conv("d", "x", 3, 1), conv("w", "d", 2, "host"), conv("y", "w", "out", 1))
    for options, folds in (
        ({"padding": 0}, True),
        ({"padding": 1, "mode": "circular"}, True),
        ({"padding": 1, "mode": "zeros"}, False),
    ):
        model = cnn(**options)
        grow(model, "3", graph_of(*nodes))
        back = unwrapped_same(model, torch.randn(2, 1, 12, 12))
        assert keeps(back[3]) is not folds


def test_a_pointwise_seed_of_a_pointwise_host_folds() -> None:
    model = wrap(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 5, 5)).eval()
    grow(model, "0", graph_of(X, conv("d", "x", 2, 1), conv("y", "d", "out", 1)))
    assert type(unwrapped_same(model, torch.randn(2, 3, 5, 5))[0]) is nn.Conv2d


NOT_FOLDING = {
    "an activation": ("bottleneck-mlp", "2"),
    "dropout": (
        graph_of(X, {"op": "dropout", "id": "d", "p": 0.5, "input": "x"}, linear("y", "d", "out")),
        "2",
    ),
    "a product": (
        graph_of(
            X,
            linear("a", "x", "out"),
            linear("b", "x", "out"),
            {"op": "multiply", "id": "y", "inputs": ["a", "b"]},
        ),
        "2",
    ),
}


@pytest.mark.parametrize(("graph", "layer"), NOT_FOLDING.values(), ids=NOT_FOLDING)
def test_what_does_not_fold_becomes_a_torch_only_module_with_the_same_keys(graph, layer) -> None:
    model = mlp()
    grow(model, layer, graph)
    keys = list(model.state_dict())
    back = unwrapped_same(model, torch.randn(3, 4))
    assert keeps(back[2])
    assert list(back.state_dict()) == keys
    assert not back[2].training
    x = torch.randn(3, 4)
    for copied in (copy.deepcopy(back), pickle.loads(pickle.dumps(back))):
        assert torch.equal(copied(x), back(x))
    back.train()(x).sum().backward()
    assert all(parameter.grad is not None for parameter in back.parameters())


@pytest.mark.parametrize("padding", [0, 1, "same"])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_a_kept_convolution_seed_keeps_its_hosts_window(padding, mode) -> None:
    model = cnn(padding=padding, mode=mode)
    grow(model, "3", "bottleneck-conv", channels=3)
    assert keeps(unwrapped_same(model, torch.randn(2, 1, 12, 12))[3])


@settings(max_examples=15, deadline=None)
@given(first=st.integers(1, 5), second=st.integers(1, 5), third=st.integers(1, 5))
def test_widenings_concatenate_over_a_whole_row_of_layers(first, second, third) -> None:
    model = mlp(seeds_per_layer=2)
    grow(model, "2", "widen", units=first)
    grow(model, "2", "widen", slot=1, units=second)
    grow(model, "4", "widen", units=third)
    back = unwrapped_same(model, torch.randn(3, 4))
    assert [type(layer) for layer in back] == [nn.Linear, nn.ReLU, nn.Linear, nn.Tanh, nn.Linear]
    sizes = [(back[n].in_features, back[n].out_features) for n in (0, 2, 4)]
    assert sizes == [(4, 6 + first + second), (6 + first + second, 5 + third), (5 + third, 2)]
    assert list(back.state_dict()) == [f"{n}.{p}" for n in (0, 2, 4) for p in ("weight", "bias")]


def test_a_widened_convolution_is_a_larger_convolution() -> None:
    model = cnn()
    grow(model, "3", "widen", units=3)
    back = unwrapped_same(model, torch.randn(2, 1, 12, 12))
    assert type(back[0]) is nn.Conv2d
    assert (back[0].out_channels, back[3].in_channels, back[3].out_channels) == (7, 7, 6)


@pytest.mark.parametrize("seeded", ["0", "2", "both"])
def test_widening_goes_together_with_seeds_that_stay(seeded) -> None:
    model = mlp(seeds_per_layer=3)
    grow(model, "2", "widen", units=3)
    grow(model, "0", "low-rank", slot=2, rank=1)
    for layer in ("0", "2") if seeded == "both" else (seeded,):
        grow(model, layer, "bottleneck-mlp", slot=1, units=2)
    back = unwrapped_same(model, torch.randn(3, 4))
    assert back[0].weight.shape == (9, 4)
    assert back[2].weight.shape == (5, 9)


def test_widening_a_convolution_goes_together_with_seeds_that_stay() -> None:
    model = cnn(seeds_per_layer=2)
    grow(model, "3", "widen", units=2)
    for layer in ("0", "3"):
        grow(model, layer, "bottleneck-conv", slot=1, channels=2)
    unwrapped_same(model, torch.randn(2, 1, 12, 12))


def test_a_producer_without_bias_stays_without() -> None:
    layers = [nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 2, bias=False)]
    model = wrap(nn.Sequential(*layers), torch.randn(3, 4)).eval()
    grow(model, "2", "widen", units=3)
    back = unwrapped_same(model, torch.randn(3, 4))
    assert back[0].bias is None
    assert back[2].bias is None


PRODUCER = {"op": "input", "id": "x", "source": "producer"}


def test_a_reader_of_the_producer_that_is_no_widening_is_named() -> None:
    model = mlp()
    graph = graph_of(
        PRODUCER,
        linear("a", "x", 3),
        {"op": "activation", "id": "b", "kind": "gelu", "input": "a"},
        linear("y", "b", "out"),
    )
    grow(model, "2", graph)
    with pytest.raises(WrapError, match=r"2\[0\].*export writes"):
        unwrap(model)


def test_open_trials_go_and_fossils_stay() -> None:
    model = mlp(seeds_per_layer=2)
    grow(model, "0", "bottleneck-mlp", GRAFTING, units=2)
    model.morphology.set_alpha("0", 0, 0.5)
    grow(model, "2", "low-rank", rank=2)
    with model.morphology.without("0", 0):
        expected = model(x := torch.randn(3, 4))
    back = unwrap(model)
    assert torch.allclose(back(x), expected, atol=1e-6)
    assert type(back[0]) is nn.Linear


def test_a_model_that_is_itself_a_layer_is_replaced_where_it_does_not_fold() -> None:
    model = wrap(nn.Linear(4, 3), torch.randn(2, 4)).eval()
    grow(model, "model", "bottleneck-mlp", units=2)
    x = torch.randn(2, 4)
    expected = model(x)
    back = unwrap(model)
    assert type(back) is nn.Linear
    assert keeps(back)
    assert torch.equal(back(x), expected)


def test_folding_parts_a_layer_from_the_one_it_shared_a_weight_with() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.head = nn.Embedding(7, 4), nn.Linear(4, 7)
            self.head.weight = self.words.weight

        def forward(self, x):
            return self.head(self.words(x))

    x = torch.arange(7)
    model = wrap(Tied(), x).eval()
    words = model.words.weight.clone()
    grow(model, "head", "low-rank", rank=2)
    expected = model(x)
    back = unwrap(model)
    assert torch.equal(back.words.weight, words)
    assert torch.allclose(back(x), expected, atol=1e-6)


def test_a_shared_layer_is_replaced_wherever_it_stands() -> None:
    shared = nn.Linear(4, 4)
    model = wrap(nn.Sequential(shared, nn.Tanh(), shared), torch.randn(2, 4)).eval()
    grow(model, "0", "bottleneck-mlp", units=2)
    back = unwrapped_same(model, torch.randn(2, 4))
    assert back[0] is back[2]


def test_a_module_without_ir_stays_as_it_is() -> None:
    model = mlp()
    model.morphology.germinate("2", 0, nn.Linear(6, 5), kernel="k")
    for state in (S.TRAINING, S.GRAFTING, S.FOSSILIZED):
        model.morphology.transition("2", 0, state)
    assert keeps(unwrapped_same(model, torch.randn(3, 4))[2])


def test_a_fused_encoder_layer_does_not_pass_over_what_grew() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    x = torch.randn(2, 5, 8)
    model = wrap(nn.TransformerEncoder(layer, 1), x).eval()
    grow(model, "layers.0.linear1", "bottleneck-mlp", units=4)
    with torch.no_grad():
        expected = model(x)
        back = unwrap(model)
        assert torch.allclose(back(x), expected, atol=1e-6)
        padding = torch.zeros(2, 5, dtype=torch.bool)
        padding[0, 4] = True
        assert torch.isfinite(back(x, src_key_padding_mask=padding)).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_folding_keeps_the_dtype(dtype) -> None:
    model = wrap(nn.Sequential(nn.Linear(4, 5, dtype=dtype)), torch.randn(2, 4, dtype=dtype)).eval()
    grow(model, "0", "low-rank", rank=2)
    x = torch.randn(2, 4, dtype=dtype)
    expected = model(x)
    back = unwrap(model)
    assert back[0].weight.dtype == dtype
    assert torch.allclose(back(x), expected, atol=1e-12 if dtype == torch.float64 else 0.1)


class Listed(nn.Module):
    """Refers to its layers through a list too, reads a size, and hooks a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.order = [self.first, self.second]
        self.second.label = "last"
        self.first.register_forward_hook(doubled)

    def forward(self, x):
        for layer in self.order:
            x = torch.tanh(layer(x))
        return x.view(-1, self.second.out_features)


def doubled(module, inputs, output):
    return output * 2


def test_what_refers_to_a_layer_refers_to_what_it_has_become() -> None:
    x = torch.randn(5, 4)
    model = wrap(Listed(), x)
    grow(model, "first", "bottleneck-mlp", units=2)
    grow(model, "second", "bottleneck-mlp", units=3)
    layers = model.first, model.second
    back = unwrapped_same(model, x)
    assert (back.first, back.second) == layers == tuple(back.order)
    assert (back.second.in_features, back.second.label) == (6, "last")
    again = copy.deepcopy(back)
    assert torch.equal(again(x), back(x))
    assert (again.second.out_features, again.second.label) == (3, "last")
