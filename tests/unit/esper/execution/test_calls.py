"""Layers are seen when they are called, and read alike however they are called."""

from __future__ import annotations

import asyncio

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.contracts.enums import DecisionAction
from esper.contracts.operational import AdaptationDecision
from esper.core import wrap
from esper.execution import probes
from esper.execution.calls import host_input, unfused
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.trainer import TolariaTrainer
from tests.unit.esper.services.tolaria.sessions import BuiltHere, config, documents


class Padded(nn.Module):
    """A classifier of sequences, which tells its encoder what is padding."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.words = nn.Embedding(20, 8, padding_idx=0)
        self.encoder, self.head = nn.TransformerEncoder(layer, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.words(x), src_key_padding_mask=x == 0)[:, 0])


def sentences(seed: int = 0, count: int = 48) -> TensorDataset:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(1, 20, (count, 6), generator=generator)
    x[::2, 4:] = 0
    return TensorDataset(x, torch.arange(count) % 3)


def test_a_host_is_read_by_position_and_by_name() -> None:
    x = torch.zeros(1)
    assert host_input((x,), {}) is host_input((), {"input": x}) is x


def test_an_error_inside_fuses_again() -> None:
    seen = []

    def fails() -> None:
        with unfused():
            seen.append(torch.backends.mha.get_fastpath_enabled())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert seen == [False]
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_every_layer_of_an_encoder_with_a_padding_mask_is_sampled() -> None:
    x = sentences().tensors[0]
    model = wrap(Padded(), x).eval()
    layers = model.morphology.layers
    with torch.no_grad():
        with probes.sampling(layers) as samples:
            model(x)
        assert set(probes.read(layers, samples).layers) == set(samples.layers) == set(layers)
        # Nothing of that stays: torch fuses the layers again.
        calls: list[str] = []
        forward = nn.functional.linear
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(nn.functional, "linear", lambda *a: (calls.append(""), forward(*a))[1])
            model(x)
    assert len(calls) == 1  # the head


class Waits:
    """A controller that lets everything be."""

    async def decide(self, packet):
        return AdaptationDecision.make(packet, DecisionAction.WAIT, "because")

    async def tell(self, news):
        pass

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


@pytest.mark.filterwarnings("ignore:.*nested tensors")
def test_a_session_trains_an_encoder_with_a_padding_mask() -> None:
    model = wrap(Padded(), sentences().tensors[0][:4])
    waits = Waits()
    trainer = TolariaTrainer(
        config({"epochs": 2}),
        model,
        Datasets(*(sentences(seed) for seed in range(3))),
        Classification(),
        documents("bottleneck-mlp"),
        controller=waits,
        kernels=BuiltHere(),
        observers=[waits],
    )
    result = asyncio.run(trainer.run())
    assert result.test.loss > 0
