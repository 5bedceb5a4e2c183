"""Sessions that really train, in the pods of a node of processes."""

from __future__ import annotations

from typing import Any

GRID = {
    "model": {
        "entrypoint": "esper.zoo.models:MLP",
        "arguments": {"inputs": 64, "hidden": [12], "outputs": 10},
    },
    "data": {
        "entrypoint": "esper.zoo.data:digits",
        "arguments": {"train": 200, "validation": 200, "test": 100, "image": False},
    },
}
SECONDS = 300.0
"""For what takes a few on a machine that has nothing else to do."""


def spec(epochs: int, **growth: Any) -> dict[str, Any]:
    """Two workers that train a small model for so long, with a checkpoint after each epoch."""
    return {
        **GRID,
        "training": {
            "epochs": epochs,
            "batchSize": 32,
            "optimizer": {"name": "adamw", "learningRate": 0.01},
            "checkpoint": {"everyEpochs": 1},
        },
        "growth": growth or {"controller": {"policy": "none"}},
        "workers": {"replicas": 2},
    }


GROWING = {
    "blueprints": {
        "matchExpressions": [
            {"key": "esper.dev/blueprint", "operator": "In", "values": ["bottleneck-mlp"]}
        ]
    },
    "layers": {"include": ["hidden.0"]},
    "budget": {"parametersPercent": 2000},
    "controller": {"policy": "periodic"},
    "gates": {
        "passes": 1,
        "dwellEpochs": 1,
        "ageEpochs": 2,
        "rampEpochs": 1,
        "holdEpochs": 1,
        "confidenceLevel": 0.51,
        "rentPerMillionParameters": 0,
    },
}
"""As little patience as growth can have, so that a few epochs show all of it."""
