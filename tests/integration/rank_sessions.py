"""Small sessions trained by several ranks, each a process of its own over gloo.

Their model has what makes ranks disagree: normalisation over the batch, dropout, batches that do
not divide, accumulated and clipped gradients, seeds that are tried, grafted, kept and culled.
"""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.flat import module_digest
from esper.services.tolaria.snapshots import Snapshot
from tests.integration.sessions import Watching, trained_rank

MODULE = """
import random

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from esper.zoo.data import digits


class Net(nn.Module):
    def __init__(self, norm, dtype):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 12), nn.BatchNorm1d(12) if norm else nn.Identity(), nn.ReLU(),
            nn.Dropout(0.1), nn.Linear(12, 12), nn.ReLU(),
        )
        self.head = nn.Linear(12, 10)
        self.spare = nn.Linear(3, 2)  # which nothing calls: it never has a gradient
        self.to(getattr(torch, dtype))

    def forward(self, x):
        return self.head(self.body(x))


def build(norm=True, dtype="float32"):
    return Net(norm, dtype)


class Remembering(Net):
    # Buffers of every kind: made by a forward, of the batch's size, empty, changed in eval.
    def __init__(self):
        super().__init__(True, "float32")
        self.register_buffer("seen", torch.zeros(1, 12))
        self.register_buffer("made", None)
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("mean", torch.zeros(64))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        self.calls += 1
        hidden = self.body(x - self.mean)
        self.made = hidden.detach().mean(0)
        self.seen = hidden.detach()
        return self.head(hidden)


class Noisy(Dataset):
    # Draws noise for each sample, from every stream.
    def __init__(self, kept):
        self.kept = kept

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, index):
        x, y = self.kept[index]
        noise = torch.randn(64) + random.random() + float(np.random.rand())
        return x + 0.1 * noise, y.to(torch.int16)


class Objective:
    # Over targets of a type that gloo does not know.
    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets.long())


def noisy():
    return {name: Noisy(part) for name, part in data().items()}


def data(dtype="float32"):
    kept = digits(train=150, validation=600, test=100, image=False)
    wanted = getattr(torch, dtype)
    return {
        name: TensorDataset(part.tensors[0].to(wanted), part.tensors[1])
        for name, part in kept.items()
    }
"""

SESSION: dict[str, Any] = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "ranks"},
    "spec": {
        "model": {"entrypoint": "of_ranks:build", "arguments": {}},
        "data": {"entrypoint": "of_ranks:data", "arguments": {}},
        "training": {
            "epochs": 12,
            "batchSize": 32,
            "seed": 5,
            "optimizer": {
                "name": "adamw", "learningRate": 0.01, "accumulationSteps": 2,
                "maxGradientNorm": 1.0,
            },
        },
        "growth": {
            "seedsPerLayer": 2,
            "budget": {"parametersPercent": 500, "activeSeeds": 3},
            "controller": {"policy": "periodic", "probeIntervalSteps": 3},
            "gates": {
                "passes": 1, "dwellEpochs": 1, "ageEpochs": 2, "rampEpochs": 1, "holdEpochs": 1,
                "embargoEpochs": 1, "confidenceLevel": 0.51, "rentPerMillionParameters": 0,
            },
        },
    },
}  # fmt: skip


def session(**training: Any) -> dict[str, Any]:
    """The session with changes to its training."""
    made = copy.deepcopy(SESSION)
    made["spec"]["training"] |= training
    return made


def awkward(**training: Any) -> dict[str, Any]:
    """A shorter session whose model, data and targets are none that ranks find easy."""
    made = session(epochs=7, objective="of_ranks:Objective", **training)
    made["spec"]["model"] = {"entrypoint": "of_ranks:Remembering"}
    made["spec"]["data"] = {"entrypoint": "of_ranks:noisy"}
    return made


def of_type(made: Mapping[str, Any], dtype: str, *, norm: bool) -> dict[str, Any]:
    """The session in `dtype`, with or without its normalisation layer."""
    changed = copy.deepcopy(dict(made))
    changed["spec"]["model"]["arguments"] = {"norm": norm, "dtype": dtype}
    changed["spec"]["data"]["arguments"] = {"dtype": dtype}
    return changed


def train(
    ranks: Ranks,
    made: Mapping[str, Any],
    prepare: Callable[[Ranks], Any] | None = None,
    *,
    snapshot: Snapshot | None = None,
    watching: Watching | None = None,
) -> dict[str, Any]:
    """Train as one of `ranks`; `prepare` is called first, to break something, say.

    Rank 0 may have a `snapshot` to go on from; its observer is `watching`.
    """
    if prepare is not None:
        prepare(ranks)
    watching = watching or Watching()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        source = folder / "source"
        source.mkdir()
        (source / "of_ranks.py").write_text(MODULE)
        result, _, _ = trained_rank(
            ranks, made, folder, source=source, watching=watching, snapshot=snapshot
        )
    return {
        "digest": module_digest(result.model),
        "rows": [
            {name: value for name, value in row.items() if name not in ("time", "seconds")}
            for row in watching.rows
        ],
        "transitions": [transition.to_wire() for transition in watching.transitions],
        "events": watching.events,
        "decisions": [
            (decision.to_wire(), applied, outcome)
            for decision, applied, outcome in watching.decisions
        ],
        "test": (result.test.loss, result.test.metric),
        "flops": (result.flops, result.flops_trials, result.flops_monitoring),
    }


def lives(found: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    """The transitions without what was measured."""
    names = ("epoch", "layer", "slot", "previous", "current", "blueprint")
    return [tuple(one.get(name) for name in names) for one in found["transitions"]]


def differences(one: Any, other: Any, at: str = "") -> Iterator[str]:
    """Where two rows are further apart than 1e-9, relative to their size."""
    if isinstance(one, dict) and isinstance(other, dict):
        for name in one.keys() | other.keys():
            yield from differences(one.get(name), other.get(name), f"{at}.{name}")
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            yield at
        for place, (mine, theirs) in enumerate(zip(one, other, strict=False)):
            yield from differences(mine, theirs, f"{at}[{place}]")
    elif isinstance(one, float) and isinstance(other, float):
        if not math.isclose(one, other, rel_tol=1e-9, abs_tol=1e-9):
            yield f"{at}: {one} and {other}"
    elif one != other:
        yield f"{at}: {one} and {other}"
