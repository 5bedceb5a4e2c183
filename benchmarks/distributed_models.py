"""The sessions that are measured: models and data as entry points, manifests, training loops."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import TensorDataset

from benchmarks.distributed_turns import Held, Loop
from benchmarks.execution_models import CASES, CLASSES, Case
from esper.cli.preparing import Prepared, prepare
from esper.contracts.manifests import parse_manifest
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.seeds import SeedBook

BATCH = 64
"""Over all ranks."""
EPOCH_STEPS = 64
LEARNING_RATE = 1e-5
"""So small that no weight runs away, however often a step is repeated."""


def wide_mlp() -> nn.Module:
    """Eight Linear layers, 1,024 wide, with ReLU between them; (B, 1024) to (B, 1024)."""
    layers: list[nn.Module] = []
    for _ in range(8):
        layers += [nn.Linear(1024, 1024), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


MODELS = {case.name: case for case in CASES} | {
    "mlp-1024": Case("mlp-1024", wide_mlp, lambda batch: torch.randn(batch, 1024))
}


def build(name: str) -> nn.Module:
    """The model of that name."""
    return MODELS[name].build()


def data(name: str, train: int) -> dict[str, TensorDataset]:
    """Random inputs for the model of that name, of random classes."""
    sizes = {"train": train, "validation": 256, "test": 64}
    return {
        split: TensorDataset(MODELS[name].inputs(size, seed), torch.randint(0, CLASSES, (size,)))
        for seed, (split, size) in enumerate(sizes.items())
    }


def manifest(
    name: str, *, train: int = BATCH * EPOCH_STEPS, optimizer: str = "sgd", **training: Any
) -> dict[str, Any]:
    """A session that trains the model of that name and grows nothing."""
    return {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": f"bench-{name}"},
        "spec": {
            "model": {
                "entrypoint": "benchmarks.distributed_models:build",
                "arguments": {"name": name},
            },
            "data": {
                "entrypoint": "benchmarks.distributed_models:data",
                "arguments": {"name": name, "train": train},
            },
            "training": {
                "epochs": 100_000,
                "batchSize": BATCH,
                "optimizer": {"name": optimizer, "learningRate": LEARNING_RATE},
            }
            | training,
            "growth": {"controller": {"policy": "none"}},
        },
    }


def prepared(made: dict[str, Any]) -> Prepared:
    """The session as a run prepares it: its model wrapped and probed, its data read."""
    return prepare(parse_manifest(yaml.safe_dump(made), "benchmark"), Path.cwd())


def engine(ranks: Ranks, made: Prepared) -> Engine:
    """The engine of a session."""
    return Engine(made.config, made.model, made.datasets, made.objective, SeedBook(), ranks)


def trained(
    ranks: Ranks, made: dict[str, Any], prepare_engine: Callable[[Engine], None] = lambda _: None
) -> Loop:
    """Tolaria's own loop over epochs of that session; `prepare_engine` may graft seeds first."""

    def loop(gate: Callable[[], None]) -> None:
        held: Any = Held(ranks, gate)
        own = engine(held, prepared(made))
        prepare_engine(own)
        for epoch in count(1):
            own.train_epoch(epoch)

    return loop


def plain(ranks: Ranks, name: str, *, views: bool = False) -> Loop:
    """The same training as a person writes it: bare DDP, each rank its own half of the samples.

    `views` has DDP keep gradients where it averages them, as Tolaria's does; it is no default.
    """

    def loop(gate: Callable[[], None]) -> None:
        torch.manual_seed(0)
        dataset = data(name, BATCH * EPOCH_STEPS)["train"]
        torch.manual_seed(0)
        model = build(name).train()
        replica = DistributedDataParallel(model, gradient_as_bucket_view=views)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE, fused=True)
        inputs, targets = dataset.tensors
        for epoch in count(1):
            total: Tensor = torch.zeros(())
            order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(epoch))
            for indices in order[ranks.rank :: ranks.size].split(BATCH // ranks.size):
                gate()
                loss = F.cross_entropy(replica(inputs[indices]), targets[indices])
                loss.backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                total += loss.detach()

    return loop
