"""Which layers feed which, and which pairs could share new units."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from esper.core import wrap


def shape_of(chain) -> list[str]:
    return [op.kind if op.op == "activation" else op.op for op in chain]


def pairs_of(model: nn.Module, *inputs: torch.Tensor) -> dict[tuple[str, str], list[str]]:
    morphology = wrap(model, inputs).morphology
    return {(p.producer, p.consumer): shape_of(p.chain) for p in morphology.pairs}


class Functional(nn.Module):
    """Two layers with `between` applied by a function in forward."""

    def __init__(self, between, width: int = 6) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, width), nn.Linear(width, 3)
        self.between = between

    def forward(self, x):
        return self.second(self.between(self.first(x)))


ACTIVATIONS = {
    "relu": [nn.ReLU(), nn.ReLU(inplace=True), F.relu, F.relu_, torch.relu, torch.Tensor.relu_],
    "gelu": [nn.GELU(), nn.GELU("tanh"), F.gelu],
    "silu": [nn.SiLU(), nn.SiLU(inplace=True), F.silu],
    "tanh": [nn.Tanh(), torch.tanh, F.tanh, torch.Tensor.tanh],
    "sigmoid": [nn.Sigmoid(), torch.sigmoid, F.sigmoid],
    "leaky_relu": [nn.LeakyReLU(0.2), F.leaky_relu, lambda x: F.leaky_relu(x, 0.3, True)],
    "elu": [nn.ELU(), nn.ELU(0.5, inplace=True), F.elu],
    "dropout": [nn.Dropout(0.2)],
}


@pytest.mark.parametrize(
    ("kind", "between"), [(kind, f) for kind, many in ACTIVATIONS.items() for f in many]
)
def test_activations_are_seen_as_modules_and_as_functions(kind, between) -> None:
    assert pairs_of(Functional(between), torch.randn(2, 4)) == {("first", "second"): [kind]}


def test_arguments_of_the_chain_are_kept() -> None:
    def chain(between):
        return wrap(Functional(between), torch.randn(2, 4)).morphology.pairs[0].chain[0]

    assert chain(nn.LeakyReLU(0.2)).negative_slope == 0.2
    assert chain(nn.ELU(0.5)).alpha == 0.5
    assert chain(nn.GELU("tanh")).approximate == "tanh"
    assert chain(nn.Dropout(0.3)).p == 0.3


@pytest.mark.parametrize(
    "between",
    [
        nn.Softmax(-1),
        nn.LayerNorm(6),
        nn.BatchNorm1d(6),
        nn.PReLU(),
        nn.Hardtanh(),
        torch.sin,
        lambda x: x + 1,
        lambda x: x.view(2, 6),
        lambda x: x * x.sigmoid(),
        lambda x: x + torch.relu(x),
        lambda x: torch.relu(x)[:, : x.shape[1]],
        lambda x: F.relu(x, inplace=True) + x,
        nn.Dropout1d(0.2),
        nn.AvgPool1d(1),
    ],
)
def test_what_is_not_elementwise_and_known_makes_no_pair_but_an_edge(between) -> None:
    morphology = wrap(Functional(between), torch.randn(2, 4)).morphology
    assert morphology.pairs == ()
    assert morphology.edges == (("first", "second"),)


def test_a_sequential_is_a_row_of_pairs() -> None:
    model = nn.Sequential(
        nn.Linear(4, 6), nn.ReLU(), nn.Dropout(0.1), nn.Linear(6, 5), nn.Identity(), nn.Linear(5, 2)
    )
    assert pairs_of(model, torch.randn(3, 4)) == {
        ("0", "3"): ["relu", "dropout"],
        ("3", "5"): [],
    }


def test_a_small_cnn_pairs_its_convolutions_over_pools() -> None:
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3),
        nn.GELU(),
        nn.AvgPool2d((2, 1), stride=1, padding=0),
        nn.Conv2d(6, 3, 1),
        nn.Flatten(),
        nn.LazyLinear(2),
    )
    x = torch.randn(2, 1, 12, 12)
    model(x)
    morphology = wrap(model, x).morphology
    assert {(p.producer, p.consumer): shape_of(p.chain) for p in morphology.pairs} == {
        ("0", "3"): ["relu", "max_pool2d"],
        ("3", "6"): ["gelu", "avg_pool2d"],
    }
    assert morphology.edges == (("0", "3"), ("3", "6"), ("6", "8"))
    pool = morphology.pairs[1].chain[1]
    assert (pool.kernel_size, pool.stride, pool.padding) == ((2, 1), (1, 1), (0, 0))
    assert morphology.target("6").producer.input_shape == (4, 6, 6)


def test_grouped_convolutions_and_pools_over_features_make_no_pair() -> None:
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.ReLU(), nn.Conv2d(4, 4, 1))
    assert pairs_of(grouped, torch.randn(2, 4, 6, 6)) == {}
    pooled = Functional(nn.MaxPool2d(1))
    assert pairs_of(pooled, torch.randn(1, 2, 3, 4)) == {}


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        hidden = torch.relu(self.inner(x))
        return self.head(x + self.outer(hidden)), hidden.mean()


def test_a_value_with_two_readers_makes_no_pair() -> None:
    morphology = wrap(Residual(), torch.randn(2, 4)).morphology
    assert morphology.pairs == ()
    assert morphology.edges == (("inner", "outer"), ("outer", "head"))


class Keeping(Functional):
    def forward(self, x):
        self.seen = torch.relu(self.first(x))
        return self.second(self.seen)


def test_a_value_that_the_model_keeps_makes_no_pair() -> None:
    assert pairs_of(Keeping(None), torch.randn(2, 4)) == {}


class HiddenInOutput(Functional):
    def forward(self, x):
        class Result:
            hidden = torch.relu(self.first(x))

        result = Result()
        result.out = self.second(result.hidden)
        return result


def test_a_value_inside_an_unknown_output_makes_no_pair() -> None:
    assert pairs_of(HiddenInOutput(None), torch.randn(2, 4)) == {}


class OutputToo(Functional):
    def forward(self, x):
        hidden = torch.relu(self.first(x))
        return {"hidden": hidden, "out": self.second(hidden)}


def test_an_output_of_the_model_makes_no_pair() -> None:
    assert pairs_of(OutputToo(None), torch.randn(2, 4)) == {}


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.head(torch.relu(self.shared(torch.relu(self.shared(x)))))


def test_a_layer_that_is_called_twice_makes_no_pair() -> None:
    assert pairs_of(Twice(), torch.randn(2, 4)) == {}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encode, self.decode = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x):
        return self.decode(torch.relu(self.encode(x))) + F.linear(x, self.encode.weight).sum()


def test_a_weight_that_is_read_elsewhere_makes_no_pair() -> None:
    assert pairs_of(Tied(), torch.randn(2, 4)) == {}


def test_layers_that_share_a_parameter_make_no_pair() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert pairs_of(model, torch.randn(2, 4)) == {}


def test_a_layer_with_the_users_hooks_makes_no_pair() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[0].register_forward_hook(lambda module, args, out: out * 2)
    assert pairs_of(model, torch.randn(2, 4)) == {}


class Untraceable(Functional):
    def forward(self, x):
        from torch.overrides import _get_current_function_mode

        if _get_current_function_mode() is not None:
            raise RuntimeError("not under a mode")
        return super().forward(x)


def test_a_model_that_cannot_be_traced_has_no_pairs_and_is_no_error() -> None:
    morphology = wrap(Untraceable(torch.relu), torch.randn(2, 4)).morphology
    assert morphology.pairs == morphology.edges == ()
    assert list(morphology.layers) == ["first", "second"]


def test_edges_follow_values_through_any_operation() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.join = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(6, 2)

        def forward(self, x):
            joined = torch.cat([self.left(x).sin(), self.right(x).exp().T.T], dim=-1)
            return self.join(joined.contiguous())

    morphology = wrap(Branching(), torch.randn(2, 4)).morphology
    assert morphology.edges == (("left", "join"), ("right", "join"))


class TwoModes(nn.Module):
    """Computes differently in training, as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.first, self.second, self.side = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        x = torch.relu(self.first(x))
        if self.kind == "always dropped" or (self.kind == "dropped aside" and self.training):
            x = F.dropout(x, 0.2)
        if self.kind == "never dropped":
            x = F.dropout(x, 0.2, False)
        if self.kind == "as the mode":
            x = F.dropout(x, 0.2, training=self.training)
        out = self.second(x)
        return out + self.side(x) if self.kind == "side head" and self.training else out


@pytest.mark.parametrize(
    ("kind", "pairs"),
    [
        ("as the mode", {("first", "second"): ["relu", "dropout"]}),
        ("side head", {}),
        ("always dropped", {}),
        ("never dropped", {}),
        ("dropped aside", {}),
    ],
)
def test_a_pair_is_one_in_both_modes(kind, pairs) -> None:
    assert pairs_of(TwoModes(kind), torch.randn(2, 4)) == pairs


def mean_of(x: torch.Tensor) -> torch.Tensor:
    return x.mean()


class Copied(torch.autograd.Function):
    """A function that autograd runs past torch's functions."""

    @staticmethod
    def forward(_context, x):
        return x * 2


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["script", "trace", "module", "function"])
@pytest.mark.parametrize("calls", [1, 4])
def test_scripted_readers_of_a_producer_are_readers(how: str, calls: int) -> None:
    class Scripted(nn.Module):
        def forward(self, x):
            return x.mean()

    readers = {
        "script": lambda: torch.jit.script(mean_of),
        "trace": lambda: torch.jit.trace(mean_of, torch.randn(3, 6)),
        "module": lambda: torch.jit.script(Scripted()),
        "function": lambda: Copied.apply,
    }
    reader = readers[how]()

    class Aside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            x = self.first(x)
            return self.second(torch.relu(x)) + reader(x).mean()

    model = Aside()
    # Scripted code is optimised after a few calls.
    for _ in range(calls - 1):
        model(torch.randn(3, 4))
    assert pairs_of(model, torch.randn(3, 4)) == {}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_edges_lead_through_scripted_code() -> None:
    double = torch.jit.script(doubled)
    model = Functional(double)
    assert wrap(model, torch.randn(2, 4)).morphology.edges == (("first", "second"),)
    assert model.morphology.pairs == ()


def doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x * 2)


@pytest.mark.parametrize("when", ["between", "after"])
def test_a_producers_input_that_is_written_to_before_the_consumer_reads_makes_no_pair(
    when: str,
) -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x):
            x = x.clone()
            hidden = self.first(x)
            if when == "between":
                x[:, 0].mul_(2)
            out = self.second(torch.relu(hidden))
            return out + x.mul_(3)

    found = pairs_of(Writes(), torch.randn(2, 4))
    assert found == ({} if when == "between" else {("first", "second"): ["relu"]})
