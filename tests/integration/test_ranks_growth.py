"""What a sharded model grows, and goes on from: as one process does it.

In float64 and without normalisation over the batch, so that only the order of sums differs.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from esper.cli.preparing import prepare
from esper.cli.trainers import Attention, Progress, embedded_trainer, following_trainer
from esper.configs import EsperConfig
from esper.contracts.blueprints import CATALOGUE
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.manifests import parse_manifest
from esper.contracts.operational import AdaptationDecision
from esper.execution.isolation import RandomState
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.model_state import whole
from esper.services.tolaria.snapshots import Snapshot, parts_of, snapshot_of
from esper.services.tolaria.trainer import TolariaTrainer
from tests.integration.rank_sessions import differences, of_type, session, train
from tests.integration.sessions import Watching
from tests.ranks import run_ranks

MODULE = """
import torch
from torch import nn
from torch.utils.data import TensorDataset

from esper.zoo.data import digits


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Linear(16, 8)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10)
        self.double()

    def forward(self, x):
        x = self.second(self.first(x).relu()).relu()
        x = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        return self.head(self.norm(self.third(x).relu()))


def data():
    return {
        name: TensorDataset(part.tensors[0].double(), part.tensors[1])
        for name, part in digits(train=64, validation=64, test=64).items()
    }
"""
BORN = ("low-rank", "bottleneck-mlp", "bottleneck-conv", "widen")


def every_blueprint(sharding: str) -> str:
    """A session that may grow all of the catalogue, and what is born on data."""
    made = session(epochs=9, logicalShards=2, sharding=sharding)
    spec = made["spec"]
    spec["model"] = {"entrypoint": "of_growth:Net"}
    spec["data"] = {"entrypoint": "of_growth:data"}
    spec["training"]["optimizer"] = {"name": "sgd", "learningRate": 0.01}
    spec["growth"] |= {
        "layers": {"types": ["Linear", "Conv2d", "LayerNorm"]},
        "seedsPerLayer": 16,
        "budget": {"parametersPercent": 10000, "activeSeeds": 64},
    }
    spec["growth"]["gates"] |= {"rampEpochs": 2}
    spec["workers"] = {"processesPerWorker": 2}
    own = [
        {
            "apiVersion": made["apiVersion"],
            "kind": "Blueprint",
            "metadata": {"name": f"born-{name}"},
        }
        | {"spec": {"builtin": name, "arguments": {"initialisation": "gradient"}}}
        for name in BORN
    ]
    return yaml.safe_dump_all([made, *own])


def lived(ranks: Ranks, manifest: str) -> dict[str, Any]:
    """A seed of each blueprint on each kind of host, from its birth till it is a fossil."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "of_growth.py").write_text(MODULE)
        prepared = prepare(parse_manifest(manifest, "test"), Path(folder), processes=ranks.size)
        config = EsperConfig().inside(Path(folder))

        async def live() -> dict[str, Any]:
            if ranks.rank:
                async with following_trainer(
                    prepared, config, progress=Progress(), ranks=ranks
                ) as trainer:
                    return await life(trainer)
            attention = Attention(ranks=ranks)
            async with embedded_trainer(prepared, config, attention=attention) as trainer:
                return await life(trainer)

        return asyncio.run(live())


async def life(trainer: TolariaTrainer) -> dict[str, Any]:
    engine, growth = trainer.engine, trainer.growth
    kinds = {layer.name: layer.kind for layer in growth.layer_descriptions()}
    chosen = {(one.blueprint, kinds[one.layer]): one.layer for one in reversed(growth.candidates)}
    taken = dict.fromkeys(kinds, 0)
    losses = []

    async def decide(action: DecisionAction, layer: str, slot: int, blueprint: str = "") -> None:
        decision = AdaptationDecision(
            id="0" * 32, session="ranks", epoch=0, action=action, layer=layer, slot=slot,
            blueprint=blueprint or None, confidence=1.0, reason="the test",
        )  # fmt: skip
        applied, outcome = await growth.apply(decision, 0)
        assert applied, (blueprint, layer, outcome)

    def epoch(number: int) -> None:
        trained = engine.train_epoch(number)
        losses.append((trained, engine.evaluate(engine.datasets.validation, key="validation").loss))
        growth.grow_older(1)

    for (blueprint, _), layer in chosen.items():
        await decide(DecisionAction.GERMINATE, layer, taken[layer], blueprint)
        taken[layer] += 1
    growth.begin_trials(0)
    seeds = growth.book.learning()
    assert len(seeds) == len(chosen)
    epoch(1)
    nats = [engine.sample_nats(trying=record.site) for record in seeds]
    for record in seeds:
        record.ready = True
        await decide(DecisionAction.GRAFT, *record.site)
    growth.grow_older(1)
    growth.blend()
    assert all(0 < record.alpha < 1 for record in seeds)
    epoch(2)
    for record in seeds:
        growth.fossilize(record, 2, "the test")
    assert {record.state for record in seeds} == {SeedState.FOSSILIZED}
    epoch(3)
    epoch(4)
    model = engine.whole_model()
    return {
        "blueprints": sorted({blueprint for blueprint, _ in chosen}),
        "kinds": sorted({kind for _, kind in chosen}),
        "losses": losses,
        "nats": nats,
        "weights": {name: weight.tolist() for name, weight in model.state_dict().items()},
    }


def test_every_blueprint_grows_in_a_sharded_model_as_in_a_whole_one() -> None:
    alone = lived(Alone(), every_blueprint("none"))
    names = {document.name for document in CATALOGUE}
    assert set(alone["blueprints"]) == names | {f"born-{name}" for name in BORN}
    assert alone["kinds"] == ["Conv2d", "LayerNorm", "Linear"]
    sharded, other = run_ranks(2, lived, every_blueprint("full"))
    assert sharded == other
    assert list(differences(sharded, alone)) == []


# -- on from another way's checkpoint -------------------------------------------------------------


def part(ranks: Ranks, way: str, parts: dict[str, bytes] | None) -> dict[str, Any]:
    """The rest of a session, computed in one way, on from the checkpoint of these `parts`."""
    made = of_type(session(logicalShards=4, sharding=way), "float64", norm=False)
    made["spec"]["workers"] = {"processesPerWorker": 2}
    made["spec"]["training"]["checkpoint"] = {"everyEpochs": 4}
    snapshot = snapshot_of(parts) if parts is not None and ranks.rank == 0 else None
    watching = Watching()
    found = train(ranks, made, snapshot=snapshot, watching=watching)
    kept = {one.epoch: parts_of(one) for one in watching.checkpoints}
    return {"rows": found["rows"], "test": found["test"], "kept": kept}


def test_a_session_goes_on_in_another_way() -> None:
    """From a whole model's checkpoint with a sharded one, and back; by other numbers of ranks."""
    (alone,) = run_ranks(1, part, "data", None)
    assert {"grafting", "fossilized"} <= {seed["state"] for seed in structure(alone, 4, 8)}
    sharded = run_ranks(2, part, "full", alone["kept"][4])[0]
    again = run_ranks(2, part, "none", sharded["kept"][8])[0]
    for found, first in ((sharded, 5), (again, 9)):
        assert [row["epoch"] for row in found["rows"]] == list(range(first, 13))
        assert list(differences(found["rows"], alone["rows"][first - 1 :])) == []
        assert list(differences(found["test"], alone["test"])) == []


def structure(found: dict[str, Any], *epochs: int) -> list[dict[str, Any]]:
    return [seed for epoch in epochs for seed in json.loads(found["kept"][epoch]["structure.json"])]


def made_whole(ranks: Ranks) -> dict[str, list[float]]:
    """Two tensors shared out over the ranks, which hold them in an order of their own."""
    mesh = init_device_mesh("cpu", (ranks.size,))
    tensors = {
        name: distribute_tensor(first + torch.arange(4.0), mesh, [Shard(0)])
        for name, first in (("mean", 0.0), ("square", 10.0))
    }
    snapshot = Snapshot(
        epoch=1,
        tensors=dict(sorted(tensors.items(), reverse=ranks.rank > 0)),
        structure=[],
        state={},
        randomness=RandomState.capture(),
    )
    return {name: tensor.tolist() for name, tensor in whole(snapshot).tensors.items()}


def test_parts_of_one_tensor_are_put_together_whatever_their_order() -> None:
    expected = {"mean": [0.0, 1.0, 2.0, 3.0], "square": [10.0, 11.0, 12.0, 13.0]}
    assert run_ranks(2, made_whole) == [expected, expected]
