"""No seed mixes samples, and none shows a model what it is to predict."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from esper.core import LayerSelection, MorphableModel, wrap
from esper.core.positions import CAUSAL, NOT_FIRST, RANKS, UNKNOWN, batch_axes, other_batches
from esper.core.probing import NO_KERNELS
from esper.errors import BlueprintError
from esper.execution.kasmina_layer import KASMINA_CLASSES
from tests.unit.esper.core.growing import graph_of, grow

EVERY = LayerSelection(types=[kind.__name__ for kind in KASMINA_CLASSES])
MIXERS = ("squeeze-excitation", "attention")


def encoder(width: int = 8, **options: object) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 16, dropout=0.0, **options)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)


class SequenceFirst(nn.Module):
    """Batches of sequences, which torch's default layers read time first."""

    def __init__(self, recurrent: bool, picky: int | None = None) -> None:
        super().__init__()
        self.mixed = nn.GRU(8, 8) if recurrent else encoder()
        self.layer, self.head, self.picky = nn.Linear(8, 8), nn.Linear(8, 3), picky

    def forward(self, x: Tensor) -> Tensor:
        if self.picky is not None and len(x) != self.picky:
            raise ValueError("another batch")
        rows = self.mixed(x.transpose(0, 1))
        rows = self.layer(rows[0] if isinstance(rows, tuple) else rows)
        return self.head(torch.tanh(rows).mean(0))


class Ranks(nn.Module):
    """One layer for positions and for their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.layer(x).mean(1) + self.layer(x.mean(1))))


def refuses_mixers(model: MorphableModel, layer: str, reason: str) -> None:
    assert model.morphology.unmixed[layer] == reason
    for blueprint in MIXERS:
        with pytest.raises(BlueprintError) as caught:
            grow(model, layer, blueprint)
        assert reason in str(caught.value)
    assert not model.morphology.layers[layer].site.branches


@pytest.mark.parametrize("recurrent", [True, False])
@pytest.mark.parametrize("batch", [1, 4, 5])
def test_a_sequence_first_layer_mixes_no_samples(recurrent: bool, batch: int) -> None:
    model = wrap(SequenceFirst(recurrent), torch.randn(batch, 5, 8)).eval()
    refuses_mixers(model, "layer", NOT_FIRST)
    # The batch is no part of what kernels are made for.
    assert model.morphology.target("layer").input_shape == (5, 8)
    assert model.morphology.target("layer").output_shape == (5, 8)
    grow(model, "layer", "bottleneck-mlp")
    x = torch.randn(3, 5, 8)
    assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-6)


def test_a_layer_that_is_called_with_rows_and_with_their_mean_mixes_no_samples() -> None:
    model = wrap(Ranks(), torch.randn(4, 5, 8))
    refuses_mixers(model, "layer", RANKS)
    assert model.morphology.target("layer").input_shape == (5, 8)


class Picky(nn.Module):
    """A model for one size of batch, its layer fed batch first."""

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.layer, self.head, self.batch = nn.Linear(8, 8), nn.Linear(8, 3), batch

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != self.batch:
            raise ValueError("another batch")
        return self.head(torch.tanh(self.layer(x)).mean(1))


@pytest.mark.parametrize("batch", [4, 5])
def test_where_the_model_takes_one_batch_only_sizes_tell(batch: int) -> None:
    x = torch.randn(batch, 5, 8)
    model = wrap(SequenceFirst(recurrent=True, picky=batch), x)
    refuses_mixers(model, "layer", UNKNOWN)
    # As many positions as samples leave it open which is which.
    model = wrap(Picky(batch), x)
    assert model.morphology.unmixed == ({} if batch == 4 else {"layer": UNKNOWN})


@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(encoder(batch_first=True), nn.Linear(8, 8)), torch.randn(2, 5, 8)),
        (nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 8)), torch.randn(2, 5, 8)),
        (nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)), torch.randn(2, 3, 6, 6)),
        (nn.Sequential(nn.Unflatten(0, (-1, 1)), nn.Linear(8, 8)), torch.randn(3, 8)),
        (nn.Sequential(nn.Flatten(0, 1), nn.Linear(8, 4)), torch.randn(2, 6, 5, 8)),
        (nn.Sequential(nn.LayerNorm(8)), torch.randn(2, 5, 8)),
    ],
)
def test_batch_first_models_that_see_both_ways_are_free(model: nn.Module, x: Tensor) -> None:
    wrap(model, x, layers=EVERY)
    assert model.morphology.unmixed == {}


class Speaks(nn.Module):
    """A model of what comes next; `kind` says how it looks back."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.words, self.head = kind, nn.Embedding(9, 8), nn.Linear(8, 9)
        self.encoder = encoder(batch_first=True)
        self.conv, self.lstm = nn.Conv1d(8, 8, 3), nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.words(x)
        if self.kind == "conv":
            rows = self.conv(F.pad(rows.transpose(1, 2), (2, 0))).transpose(1, 2)
        elif self.kind == "lstm":
            rows = self.lstm(rows)[0]
        else:
            mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
            rows = self.encoder(rows, mask=mask if self.kind != "both ways" else None)
        out = self.head(torch.tanh(rows))
        if self.kind == "pooled":
            return out.mean(1)
        return out.transpose(1, 2) if self.kind == "channels" else out


LAYER = {"conv": "conv", "lstm": "head"}


@pytest.mark.parametrize("kind", ["conv", "lstm", "masked", "channels"])
@pytest.mark.parametrize("tokens", [torch.randint(9, (2, 7)), torch.zeros(2, 7).long()])
def test_in_a_causal_model_no_position_sees_later_ones(kind: str, tokens: Tensor) -> None:
    model = wrap(Speaks(kind), tokens, layers=EVERY).eval()
    layer = LAYER.get(kind, "encoder.layers.0.linear1")
    refuses_mixers(model, layer, CAUSAL)
    grow(model, layer, "affine")
    x = torch.randint(1, 9, (2, 7))
    y = x.clone()
    y[:, -1] -= 1
    earlier = (slice(None), slice(-1)) if kind != "channels" else (..., slice(-1))
    assert torch.allclose(model(x)[earlier], model(y)[earlier], atol=1e-6)


@pytest.mark.parametrize("kind", ["both ways", "pooled"])
def test_a_model_that_looks_both_ways_or_tells_of_the_whole_is_free(kind: str) -> None:
    model = wrap(Speaks(kind), torch.randint(9, (2, 7)), layers=EVERY)
    assert model.morphology.unmixed == {}
    grow(model, "encoder.layers.0.linear1", "attention")


def test_a_causal_decoder_leaves_the_encoder_free() -> None:
    class Translates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Transformer(8, 2, 1, 1, 16, batch_first=True)

        def forward(self, source: Tensor, target: Tensor) -> Tensor:
            mask = nn.Transformer.generate_square_subsequent_mask(target.shape[1])
            return self.inner(source, target, tgt_mask=mask)

    model = wrap(Translates(), (torch.randn(2, 5, 8), torch.randn(2, 4, 8)))
    assert set(model.morphology.unmixed.values()) == {CAUSAL}
    assert {name.split(".")[1] for name in model.morphology.unmixed} == {"decoder"}


def test_windows_and_pools_of_a_graphs_own_look_at_other_positions() -> None:
    model = wrap(Speaks("conv"), torch.randint(9, (2, 7)), layers=EVERY)
    x = {"op": "input", "id": "x", "source": "output"}
    seen = {
        1: {"op": "conv1d", "id": "y", "input": "x", "channels": "out", "kernelSize": 1},
        3: {"op": "conv1d", "id": "y", "input": "x", "channels": "out", "kernelSize": 3},
    }
    with pytest.raises(BlueprintError, match="conv1d, which reads other positions"):
        grow(model, "conv", graph_of(x, seen[3]))
    grow(model, "conv", graph_of(x, seen[1]))


def test_shapes_that_no_kernel_is_made_for_are_refused_with_the_reason() -> None:
    x = torch.zeros(1, 1, 1_000_001)
    model = wrap(
        nn.Sequential(nn.Conv1d(1, 1, 2), nn.AdaptiveAvgPool1d(2), nn.Linear(2, 2)), x, layers=EVERY
    )
    assert list(model.morphology.layers) == ["2"]
    assert model.morphology.refused["0"].startswith(NO_KERNELS)


def test_batches_are_doubled_and_halved_where_tensors_have_them() -> None:
    x, mask = torch.arange(6).reshape(3, 2), torch.ones(2, 2)
    twice, half = other_batches(((x, mask, 3), {"flag": True}))
    assert (twice[0][0].shape, half[0][0].shape) == ((6, 2), (2, 2))
    assert twice[0][1] is half[0][1] is mask
    assert twice[0][2] == 3
    assert twice[1] == {"flag": True}
    assert len(other_batches(((x[:1],), {}))) == 1
    assert other_batches(((torch.zeros(()),), {})) == []
    # Of a large batch first the half, which takes less memory.
    half, twice = other_batches(((torch.zeros(64, 2),), {}))
    assert (half[0][0].shape, twice[0][0].shape) == ((32, 2), (128, 2))


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_inputs_that_are_no_plain_tensors_are_passed_as_they_are() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.layer(y.to_dense() if y.is_sparse else y.to_padded_tensor(0.0)) + x

    for strange in (
        torch.ones(2, 4).to_sparse(),
        torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(1, 4)]),
    ):
        model = wrap(Reads(), (torch.zeros(()), strange))
        assert list(model.morphology.layers) == ["layer"]


def test_dimensions_are_compared_call_by_call() -> None:
    assert batch_axes([(2, 3), (5, 2, 3)], [(4, 3), (5, 4, 3)]) == [{0}, {1}]
    assert batch_axes([(2, 3)], [(4, 3), (4, 3)]) is None
    assert batch_axes([(2, 3)], [(4, 3, 1)]) is None
