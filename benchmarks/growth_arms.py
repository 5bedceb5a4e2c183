"""The arms of the growth benchmark: one function trains one arm on one paired seed."""

from __future__ import annotations

import asyncio
import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn

from esper.cli.preparing import prepare
from esper.cli.trainers import Attention, embedded_trainer
from esper.configs import EsperConfig
from esper.contracts.enums import SeedState
from esper.contracts.manifests import parse_manifest
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.execution.isolation import evaluating
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import Datasets, epoch_order, gathered, ordered_batches
from esper.services.tolaria.entrypoints import build_datasets, build_model, build_objective
from esper.services.tolaria.flops import FlopMeter
from esper.services.tolaria.optimization import (
    learning_rate_share,
    make_optimizer,
    set_learning_rate,
    step,
)
from esper.services.tolaria.snapshots import Snapshot

Document = dict[str, Any]
SHAPES = ("both", "first", "last")


@dataclass(kw_only=True)
class Outcome:
    """What one arm came to on one seed. `tried` and `fossilised` list (layer, blueprint).

    `flops` are those of training, with probes, trials and culled work; the validation metric of
    every epoch is left out, as it is in the static arms.
    """

    accuracy: float
    parameters: int
    flops: int
    flops_trials: int = 0
    worst_drop: float = 0.0
    tried: list[tuple[str, str]] = field(default_factory=list)
    fossilised: list[tuple[str, str]] = field(default_factory=list)

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return asdict(self)


class _Watch:
    """Remembers what happened to the seeds, and the worst validation drop at a graft."""

    def __init__(self) -> None:
        self.tried: list[tuple[str, str]] = []
        self.fossilised: list[tuple[str, str]] = []
        self.worst_drop = 0.0
        self._metric: float | None = None
        self._grafted_at: int | None = None

    def epoch(self, row: Mapping[str, Any]) -> None:
        metric = float(row["validationMetric"])
        if self._grafted_at == row["epoch"] - 1 and self._metric is not None:
            self.worst_drop = max(self.worst_drop, self._metric - metric)
        self._metric = metric

    def transition(self, transition: SeedTransition) -> None:
        site = (transition.layer, str(transition.blueprint))
        if transition.current is SeedState.GERMINATED:
            self.tried.append(site)
        elif transition.current is SeedState.FOSSILIZED:
            self.fossilised.append(site)
        elif transition.current is SeedState.GRAFTING:
            self._grafted_at = transition.epoch

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None: ...

    def event(self, epoch: int, reason: str, message: str) -> None: ...

    def checkpoint(self, snapshot: Snapshot) -> None: ...


def merged(document: Document, changes: Mapping[str, Any]) -> Document:
    """`document` with `changes` laid over it, mapping by mapping."""
    made = copy.deepcopy(document)
    for key, value in changes.items():
        old = made.get(key)
        made[key] = (
            merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return made


def seeded(document: Document, seed: int) -> Document:
    """The session of one pair: its own draw of the data, of the weights and of the batches."""
    return merged(
        document,
        {"spec": {"training": {"seed": seed}, "data": {"arguments": {"seed": seed}}}},
    )


def read_case(path: Path) -> tuple[Document, list[Document]]:
    """The session of a manifest, and its blueprints."""
    documents = list(yaml.safe_load_all(path.read_text()))
    sessions = [found for found in documents if found["kind"] == "TrainingSession"]
    return sessions[0], [found for found in documents if found["kind"] == "Blueprint"]


def grown(document: Document, blueprints: Sequence[Document]) -> Outcome:
    """Train a session with Esper, every service in this process."""
    manifest = parse_manifest(yaml.safe_dump_all([document, *blueprints]), "benchmark")
    prepared = prepare(manifest, Path.cwd())
    watch = _Watch()

    async def train() -> Outcome:
        with tempfile.TemporaryDirectory() as folder:
            config = EsperConfig().inside(Path(folder))
            attention = Attention(observers=[watch])
            async with embedded_trainer(prepared, config, attention=attention) as trainer:
                result = await trainer.run()
        return Outcome(
            accuracy=result.test.metric,
            parameters=result.parameters,
            flops=result.flops - result.flops_monitoring,
            flops_trials=result.flops_trials,
            worst_drop=watch.worst_drop,
            tried=watch.tried,
            fossilised=watch.fossilised,
        )

    return asyncio.run(train())


def static(document: Document, *, flops: int | None = None) -> Outcome:
    """Train the session's model in a plain loop, without Esper in it.

    `flops` trains for as many epochs as that budget pays for, at least the session's own.
    """
    manifest = parse_manifest(yaml.safe_dump(document), "benchmark")
    config = TolariaConfig.from_resource(manifest.session)
    torch.set_num_threads(config.training.threads)
    datasets = build_datasets(config)
    model = build_model(config)
    meter = FlopMeter()
    epochs = config.training.epochs
    _train_epochs(model, config, datasets, meter, 1, epochs, epochs)
    if flops is not None:
        whole = max(epochs, round(flops / (meter.total / epochs)))
        # Again from the start: a schedule that runs over the longer course is another training.
        model = build_model(config)
        meter = FlopMeter()
        _train_epochs(model, config, datasets, meter, 1, whole, whole)
    return Outcome(
        accuracy=_accuracy(model, datasets),
        parameters=sum(p.numel() for p in model.parameters()),
        flops=meter.total,
    )


def _train_epochs(
    model: nn.Module,
    config: TolariaConfig,
    datasets: Datasets,
    meter: FlopMeter,
    first: int,
    last: int,
    epochs: int,
) -> None:
    training = config.training
    objective = build_objective(config, datasets)
    parameters = list(model.parameters())
    rate = training.optimizer.learning_rate
    optimizer = make_optimizer(training.optimizer, parameters, rate)
    model.train()
    for epoch in range(first, last + 1):
        share = learning_rate_share(training.schedule, epoch, epochs)
        set_learning_rate(optimizer, rate * share)
        order = epoch_order(len(datasets.train), training.batch_size, training.seed, epoch)
        for indices in order:
            inputs, targets = gathered(datasets.train, indices)
            with meter.counting("train", tuple(inputs.shape)):
                objective.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            step(optimizer, parameters, training.optimizer.max_gradient_norm)


def _accuracy(model: nn.Module, datasets: Datasets) -> float:
    right = 0
    with evaluating(model), torch.no_grad():
        for inputs, targets in ordered_batches(datasets.test, 512):
            right += int((model(inputs).argmax(dim=1) == targets).sum())
    return right / len(datasets.test)


def widths_for(
    build: Callable[[list[int]], nn.Module], base: list[int], shape: str, parameters: int
) -> list[int]:
    """The layer widths of a static model of `parameters` parameters, in one of SHAPES.

    "both" scales every hidden width alike, "first" and "last" widen one and keep the others. The
    count is met as nearly as whole widths can.
    """

    def widths(scale: float) -> list[int]:
        grown_to = [max(1, round(width * scale)) for width in base]
        if shape == "first":
            return [grown_to[0], *base[1:]]
        return [*base[:-1], grown_to[-1]] if shape == "last" else grown_to

    def count(scale: float) -> int:
        return sum(p.numel() for p in build(widths(scale)).parameters())

    low, high = 0.05, 2.0
    while count(high) < parameters and high < 1e4:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if count(middle) < parameters else (low, middle)
    return min((widths(low), widths(high)), key=lambda w: abs(_size(build, w) - parameters))


def _size(build: Callable[[list[int]], nn.Module], widths: list[int]) -> int:
    return sum(p.numel() for p in build(widths).parameters())
