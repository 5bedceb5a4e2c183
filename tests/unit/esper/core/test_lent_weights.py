"""A weight that the model reads outside of its layer, too, stays what that reader found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

from esper.core import LayerSelection, unwrap, wrap
from esper.core.folding import FOLDED, KEPT, plan
from tests.unit.esper.core.growing import grow

ALL = LayerSelection(types=("Linear", "Embedding"))


class Lends(nn.Module):
    """An autoencoder whose decoder is the encoder's weight, read by the functional `reading`."""

    def __init__(self, reading) -> None:
        super().__init__()
        self.encoder, self.side, self.reading = nn.Linear(8, 4), nn.Linear(8, 4), reading

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.relu(self.encoder(x) + self.side(x))
        return self.reading(hidden, self.encoder.weight)


class Speaks(nn.Module):
    """A language model whose head is its table, read by a product."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.layer = nn.Embedding(11, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.words(x))) @ self.words.weight.T


def read(hidden: Tensor, weight: Tensor) -> Tensor:
    return hidden @ weight


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize(
    ("layer", "how", "blueprint"),
    [
        ("encoder", "functional", "low-rank"),
        ("encoder", "scripted", "low-rank"),
        ("encoder", "in training", "affine"),
        ("words", "product", "low-rank"),
        ("words", "product", "affine"),
    ],
)
def test_a_seed_at_a_layer_that_lends_its_weight_stays_beside_it(
    layer: str, how: str, blueprint: str
) -> None:
    readings = {
        "functional": lambda hidden, weight: F.linear(hidden, weight.t()),
        "scripted": torch.jit.script(read),
    }
    if how == "product":
        model, x = Speaks(), torch.randint(11, (3, 5))
    else:
        model, x = Lends(readings.get(how, read)), torch.randn(5, 8)
    if how == "in training":
        model.reading = lambda hidden, weight: hidden @ weight if model.training else hidden
    wrap(model, x, layers=ALL)
    assert model.morphology.lent == {layer}
    grow(model, layer, blueprint)
    expected = model(x)
    assert plan(model.morphology)[layer].notes == {0: KEPT}
    assert torch.equal(unwrap(model)(x), expected)


def test_sizes_may_be_asked_for_and_other_layers_fold() -> None:
    def sizes(hidden: Tensor, weight: Tensor) -> Tensor:
        hidden = hidden.to(weight.dtype) * weight.numel() * len(weight)
        return hidden.reshape(-1, weight.shape[0], weight.size(0) // 4)

    model = wrap(Lends(sizes), torch.randn(5, 8))
    assert model.morphology.lent == set()
    grow(model, "encoder", "low-rank")
    assert plan(model.morphology)["encoder"].notes == {0: FOLDED}


def test_a_layer_that_holds_the_weight_under_a_name_of_its_own_is_no_borrower() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    wrap(model, torch.arange(7))
    assert model.morphology.lent == set()


def test_where_no_trace_tells_every_layer_may_be_lent() -> None:
    class Shy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if _get_current_function_mode_stack():
                raise RuntimeError("watched")
            return self.layer(x)

    x = torch.randn(2, 4)
    model = wrap(Shy(), x)
    assert model.morphology.lent == {"layer"}
    grow(model, "layer", "low-rank")
    expected = model(x)
    assert torch.equal(unwrap(model)(x), expected)
