"""A session for ranks that fail: short, and with what makes ranks disagree.

Its model has normalisation over the batch and dropout, batches do not divide, gradients are
accumulated and clipped. Seeds are tried, grafted, kept and culled all the time.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

MODULE = '''\
"""A small classifier of digits."""

from torch import nn

from esper.zoo.data import digits


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
    return digits(train=490, validation=600, test=100, image=False)
'''

SESSION: dict[str, Any] = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "ranks"},
    "spec": {
        "model": {"entrypoint": "of_ranks:Net"},
        "data": {"entrypoint": "of_ranks:data"},
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
    (folder / "of_ranks.py").write_text(MODULE)
    path = folder / "session.yaml"
    path.write_text(yaml.safe_dump(made))
    return path
