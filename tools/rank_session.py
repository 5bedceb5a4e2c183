"""A session for ranks that fail: short, and with what makes ranks disagree.

Its model has normalisation over the batch and dropout, batches do not divide, gradients are
accumulated and clipped. Seeds are tried, grafted, kept and culled all the time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from esper.zoo.data import digits

MODULE = '''\
"""A small classifier of digits."""

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.1),
            nn.Linear(12, 12), nn.ReLU(),
        )
        self.head = nn.Linear(12, 10)

    def forward(self, x):
        return self.head(self.body(x))


def data():
    found = np.load(Path(__file__).with_name("digits.npz"))
    return {
        name: TensorDataset(*(torch.from_numpy(found[f"{name}-{part}"]) for part in ("x", "y")))
        for name in ("train", "validation", "test")
    }
'''

SESSION: dict[str, Any] = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "ranks"},
    "spec": {
        "model": {"entrypoint": "of_worker:Net"},
        "data": {"entrypoint": "of_worker:data"},
        "training": {
            "epochs": 60,
            "batchSize": 32,
            "seed": 5,
            "optimizer": {
                "name": "adamw", "learningRate": 0.01, "accumulationSteps": 2,
                "maxGradientNorm": 1.0,
            },
            "checkpoint": {"everyEpochs": 3},
        },
        "growth": {
            "seedsPerLayer": 3,
            "budget": {"parametersPercent": 2000, "activeSeeds": 2},
            "controller": {"policy": "periodic", "probeIntervalSteps": 3},
            "gates": {
                "passes": 1, "dwellEpochs": 1, "ageEpochs": 2, "rampEpochs": 1, "holdEpochs": 1,
                "embargoEpochs": 1, "confidenceLevel": 0.51, "rentPerMillionParameters": 0,
            },
        },
    },
}  # fmt: skip


def write_session(folder: Path, **training: Any) -> Path:
    """The manifest, with changes to its training, in `folder`, and its module beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    made = copy.deepcopy(SESSION)
    made["spec"]["training"] |= training
    (folder / "of_worker.py").write_text(MODULE)
    _write_digits(folder / "digits.npz")
    path = folder / "session.yaml"
    path.write_text(yaml.safe_dump(made))
    return path


def _write_digits(path: Path) -> None:
    """Once for all ranks: where the digits come from takes a second to import."""
    found = digits(train=490, validation=600, test=100, image=False)
    arrays = {
        f"{name}-{part}": tensor.numpy()
        for name, split in found.items()
        for part, tensor in zip("xy", split.tensors, strict=True)
    }
    np.savez(path, **arrays)
