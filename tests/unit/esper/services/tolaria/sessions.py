"""Small sessions of real parts: a configuration, a wrapped MLP, data it can learn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from esper.contracts.blueprints import (
    BlueprintDocument,
    KernelTarget,
    builtin,
    kernel_id,
    lower,
)
from esper.contracts.ir import source_of
from esper.contracts.manifests import validate_resource
from esper.contracts.resources import TrainingSession
from esper.core import MorphableModel, wrap
from esper.errors import EsperError
from esper.execution.builders import build
from esper.services.tolaria.config import GatesConfig, TolariaConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.growth import BuiltSeed
from esper.services.tolaria.objective import Classification
from esper.services.tolaria.seeds import SeedBook
from esper.zoo.models import MLP

INPUTS, CLASSES = 6, 3


def resource(
    training: Mapping[str, Any] | None = None, growth: Mapping[str, Any] | None = None
) -> TrainingSession:
    """A TrainingSession of the zoo's MLP, with these parts of its spec."""
    data = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": "small"},
        "spec": {
            "model": {
                "entrypoint": "esper.zoo.models:MLP",
                "arguments": {"inputs": INPUTS, "hidden": [5, 4], "outputs": CLASSES},
            },
            "data": {"entrypoint": "esper.zoo.data:mnist1d"},
            "training": {"epochs": 40, "batchSize": 16, **(training or {})},
            "growth": {"seedsPerLayer": 2, **(growth or {})},
        },
    }
    return validate_resource(data, TrainingSession)


def config(
    training: Mapping[str, Any] | None = None, growth: Mapping[str, Any] | None = None
) -> TolariaConfig:
    """The configuration of `resource`."""
    return TolariaConfig.from_resource(resource(training, growth))


def gates(**thresholds: Any) -> GatesConfig:
    """The default gates with some thresholds changed."""
    return replace(config().growth.gates, **thresholds)


def datasets(samples: int = 48, seed: int = 0) -> Datasets:
    """Points [INPUTS] in CLASSES overlapping clouds."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(samples * 3) % CLASSES
    points = torch.randn(samples * 3, INPUTS, generator=generator)
    points[:, 0] += labels.float()
    order = torch.randperm(samples * 3, generator=generator).reshape(3, samples)
    return Datasets(*(TensorDataset(points[part], labels[part]) for part in order))


def wrapped_mlp(seeds_per_layer: int = 2) -> MorphableModel:
    """The session's MLP, drawn from a fixed seed, probed; its hosts: hidden.0, hidden.1, head."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model: nn.Module = MLP(INPUTS, [5, 4], CLASSES)
    return wrap(model, torch.zeros(2, INPUTS), seeds_per_layer=seeds_per_layer)


def engine(settings: TolariaConfig | None = None) -> Engine:
    """An engine over the MLP and its data."""
    settings = settings or config()
    model = wrapped_mlp(settings.growth.seeds_per_layer)
    return Engine(settings, model, datasets(), Classification(), SeedBook())


def documents(*names: str) -> Sequence[BlueprintDocument]:
    """Blueprints of the catalogue, small enough for the MLP."""
    arguments: dict[str, dict[str, int | float | str]] = {
        "low-rank": {"rank": 2},
        "bottleneck-mlp": {"units": 3},
        "widen": {"units": 2},
    }
    return [builtin(name, arguments.get(name, {})) for name in names]


class BuiltHere:
    """Kernels built on the spot from their IR; `refusal` is raised instead where it is set."""

    def __init__(self, refusal: EsperError | None = None) -> None:
        self.refusal = refusal

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        if self.refusal is not None:
            raise self.refusal
        graph = lower(document, target)
        return BuiltSeed(
            module=build(graph, target, generator_seed=slot),
            kernel=kernel_id(document.digest, target),
            graph=graph,
            source=source_of(graph),
        )
