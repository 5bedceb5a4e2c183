"""Sessions trained in this process, for tests that look at what the trainer tells."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from esper.cli.preparing import Prepared, prepare
from esper.cli.trainers import (
    Attention,
    Progress,
    embedded_trainer,
    following_trainer,
    share_progress,
)
from esper.configs import EsperConfig
from esper.contracts.manifests import parse_manifest
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.trainer import TrainingResult

BASE: dict[str, Any] = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "small"},
    "spec": {
        "model": {
            "entrypoint": "esper.zoo.models:MLP",
            "arguments": {"inputs": 64, "hidden": [8, 8], "outputs": 10},
        },
        "data": {
            "entrypoint": "esper.zoo.data:digits",
            "arguments": {"train": 300, "validation": 400, "test": 200, "image": False},
        },
        "training": {
            "epochs": 10,
            "batchSize": 64,
            "optimizer": {"name": "adamw", "learningRate": 0.01},
        },
        "growth": {
            "seedsPerLayer": 3,
            "budget": {"parametersPercent": 500, "activeSeeds": 8},
            "controller": {"policy": "periodic"},
            "gates": {
                "dwellEpochs": 2, "ageEpochs": 3, "rampEpochs": 1, "holdEpochs": 1,
                "embargoEpochs": 1,
            },
        },
    },
}  # fmt: skip


class Watching:
    """An observer that keeps everything it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.transitions: list[SeedTransition] = []
        self.decisions: list[tuple[AdaptationDecision, bool, str]] = []
        self.events: list[tuple[int, str, str]] = []
        self.checkpoints: list[Snapshot] = []

    def epoch(self, row: Mapping[str, Any]) -> None:
        self.rows.append(dict(row))

    def transition(self, transition: SeedTransition) -> None:
        self.transitions.append(transition)

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        self.decisions.append((decision, applied, outcome))

    def event(self, epoch: int, reason: str, message: str) -> None:
        self.events.append((epoch, reason, message))

    def checkpoint(self, snapshot: Snapshot) -> None:
        self.checkpoints.append(snapshot)


def document(changes: Mapping[str, Any]) -> dict[str, Any]:
    """The base session with `changes` laid over it."""

    def lay(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
        for key, value in new.items():
            # Another model takes other arguments, so that part is replaced as a whole.
            both = isinstance(old.get(key), dict) and isinstance(value, Mapping) and key != "model"
            old[key] = lay(old[key], value) if both else value
        return old

    return lay(copy.deepcopy(BASE), changes)


def trained(changes: Mapping[str, Any], folder: Path) -> tuple[TrainingResult, Watching, Prepared]:
    """Train the changed base session with every service in this process."""
    return trained_rank(Alone(), document(changes), folder)


def trained_rank(
    ranks: Ranks,
    session: Mapping[str, Any],
    folder: Path,
    *,
    source: Path | None = None,
    watching: Watching | None = None,
    snapshot: Snapshot | None = None,
) -> tuple[TrainingResult, Watching, Prepared]:
    """Train a session as one of `ranks`, the services in the first one's process.

    `source` is the folder of the session's own modules; rank 0 may have a `snapshot` to go on from.
    """
    manifest = parse_manifest(yaml.safe_dump(dict(session)), "test")
    prepared = prepare(manifest, source or folder, processes=ranks.size)
    watching = watching or Watching()
    progress = share_progress(ranks, None if ranks.rank else Progress(snapshot=snapshot))

    async def train() -> TrainingResult:
        config = EsperConfig().inside(folder)
        if ranks.rank:
            async with following_trainer(
                prepared, config, progress=progress, ranks=ranks
            ) as trainer:
                return await trainer.run()
        attention = Attention(observers=[watching], ranks=ranks)
        async with embedded_trainer(
            prepared, config, progress=progress, attention=attention
        ) as trainer:
            return await trainer.run()

    return asyncio.run(train()), watching, prepared


def state(prepared: Prepared) -> dict[str, torch.Tensor]:
    """The trained model's state."""
    return dict(prepared.model.state_dict())
