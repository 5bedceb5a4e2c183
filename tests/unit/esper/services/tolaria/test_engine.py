"""A snapshot in the middle of trials is the whole state: what follows is the same to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from esper.contracts.enums import SeedState
from esper.contracts.ir import Graph
from esper.core import wrap
from esper.execution.builders import build
from esper.execution.isolation import seed_everything
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.services.tolaria.snapshots import Snapshot, parts_of, snapshot_of
from tests.unit.esper.core.growing import GRAFTING, S, grow
from tests.unit.esper.services.tolaria.sessions import config

LEARNS, FULL, GRAFTS = ("first", 0), ("head", 1), ("second", 0)


class Cnn(nn.Module):
    """Batch norm, dropout, a buffer made in the first forward and one that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second, self.drop = nn.Conv2d(4, 4, 3), nn.Dropout(0.3)
        self.head = nn.Linear(4, 3)
        self.register_buffer("scale", None)
        self.register_buffer("seen", torch.zeros(1), persistent=False)
        self.register_buffer("wide", torch.ones(1).expand(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = torch.full((4,), 1.5)
        if len(self.seen) < len(x):
            self.seen = torch.zeros(len(x))
        if not hasattr(self, "made"):
            self.register_buffer("made", torch.ones(4))
        x = torch.relu(self.norm(self.first(x)))
        x = torch.relu(self.second(self.drop(x))).mean((-2, -1))
        return self.head(self.drop(x * self.scale * self.wide * self.made))


class Attention(nn.Module):
    """An encoder, whose two ways of computing differ in their last bits, over a recurrent layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.memory = nn.GRU(8, 8, 2, batch_first=True, dropout=0.2)
        self.second = nn.Linear(8, 8)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 8, batch_first=True), 1
        )
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, _ = self.memory(self.first(x.flatten(1, 2)))
        return self.head(self.encoder(self.second(x)).mean(1))


def datasets() -> Datasets:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20) % 3
    images = torch.randn(3, 20, 1, 6, 6, generator=generator)
    return Datasets(*(TensorDataset(part, labels) for part in images))


def engine(kind: type[nn.Module], training: dict[str, Any], book: SeedBook | None = None) -> Engine:
    settings = config({"epochs": 9, "batchSize": 8, **training})
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = wrap(kind(), torch.zeros(2, 1, 6, 6), seeds_per_layer=2)
    return Engine(settings, model, datasets(), Classification(), book or SeedBook())


def grown_engine(kind: type[nn.Module], training: dict[str, Any]) -> Engine:
    """One seed on trial, one grafting at 0.5, one fossil adopted, after an epoch of it all."""
    one = engine(kind, training)
    for site, states, state, alpha in (
        (LEARNS, (S.TRAINING,), SeedState.TRAINING, 0.0),
        (GRAFTS, GRAFTING, SeedState.GRAFTING, 0.5),
        (FULL, (*GRAFTING, S.FOSSILIZED), SeedState.FOSSILIZED, 1.0),
    ):
        layer, slot = site
        conv = isinstance(one.model.get_submodule(layer), nn.Conv2d)
        grow(one.model, layer, "bottleneck-conv" if conv else "low-rank", states, slot=slot)
        one.book.records[site] = SeedRecord(
            layer=layer, slot=slot, state=state, cycle=0, kernel=f"kernel-{slot}", alpha=alpha
        )
        one.start_learning(site)
    one.model.morphology.set_alpha(*GRAFTS, 0.5)
    seed_everything(5)
    one.train_epoch(1)
    one.adopt(FULL)
    return one


def continued(one: Engine) -> tuple[list[Any], dict[str, Tensor]]:
    """What two more epochs measure, and all that they leave."""
    numbers: list[Any] = []
    for epoch in (2, 3):
        numbers.append(one.train_epoch(epoch))
        numbers += [one.sample_nats(), one.sample_nats(trying=LEARNS)]
        with one.without(GRAFTS):
            numbers.append(one.evaluate(one.datasets.validation, key="validation"))
    left = one.capture(3, {})
    random = {"random": left.randomness.torch_cpu, "numpy": left.randomness.numpy_keys}
    return [*numbers, left.state, left.structure], left.tensors | random


def same(ours: tuple[list[Any], dict[str, Tensor]], theirs: tuple[Any, dict[str, Tensor]]) -> None:
    assert ours[0] == theirs[0]
    assert set(ours[1]) == set(theirs[1])
    assert [n for n, tensor in ours[1].items() if not torch.equal(tensor, theirs[1][n])] == []


def elsewhere(kind: type[nn.Module], training: dict[str, Any], snapshot: Snapshot) -> Engine:
    """A new engine that takes up what the snapshot holds, as resuming does."""
    two = engine(kind, training, SeedBook.from_state(snapshot.state["book"]))
    morphology = two.model.morphology

    def built(entry: Any) -> nn.Module:
        graph = Graph.model_validate(entry["graph"])
        return build(graph, morphology.target(entry["layer"]), generator_seed=0)

    morphology.restore(snapshot.structure, built)
    two.restore(snapshot)
    return two


@pytest.mark.parametrize(
    ("kind", "training"),
    [
        (Cnn, {"optimizer": {"name": "adamw", "accumulationSteps": 2, "maxGradientNorm": 0.5}}),
        (Cnn, {"precision": "bfloat16"}),
        (Attention, {"optimizer": {"name": "sgd", "momentum": 0.9}}),
    ],
)
def test_a_restored_snapshot_continues_to_the_bit(
    kind: type[nn.Module], training: dict[str, Any]
) -> None:
    one = grown_engine(kind, training)
    parts = parts_of(one.capture(1, {"book": one.book.to_state()}))
    before = one.capture(1, {"book": one.book.to_state()})
    first = continued(one)
    one.restore(before)
    same(continued(one), first)
    same(continued(elsewhere(kind, training, snapshot_of(parts))), first)


def test_a_snapshot_does_not_change_with_the_engine_that_gave_it() -> None:
    """It is written by another thread while training goes on."""
    one = grown_engine(Cnn, {"optimizer": {"name": "adamw"}})
    taken = one.capture(1, {})
    before = {name: data for name, data in parts_of(taken).items() if name.endswith(".json")}
    tensors = {name: tensor.clone() for name, tensor in taken.tensors.items()}
    continued(one)
    one.learning._groups.append(["as if something had fossilised"])
    after = {name: data for name, data in parts_of(taken).items() if name.endswith(".json")}
    assert after == before
    assert all(torch.equal(taken.tensors[name], tensor) for name, tensor in tensors.items())


def test_buffers_come_back_that_a_forward_made_replaced_or_grew() -> None:
    one = engine(Cnn, {})
    before = one.capture(0, {})
    one.train_epoch(1)
    after = one.capture(1, {})
    one.restore(before)
    assert one.model.scale is None
    assert one.model.seen.shape == (1,)
    assert not hasattr(one.model, "made")
    one.restore(after)
    assert torch.equal(one.model.scale, torch.full((4,), 1.5))
    assert one.model.seen.shape == (8,)
    assert torch.equal(one.model.made, torch.ones(4))
