"""A small real session that lives a whole life in seconds, and what a run of it left."""

import copy
import json

import yaml

API = "esper.dev/v1alpha1"

SPIRALS = '''\
"""Two spirals in the plane, and a network with too few units for them."""

import math

import torch
from torch import nn
from torch.utils.data import TensorDataset


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.first = nn.Linear(2, width)
        self.drop = nn.Dropout(0.05)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, width)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        x = self.norm(self.drop(self.first(x).relu()))
        return self.head(self.second(x).relu())


def spirals(train=600, validation=600, test=200):
    generator = torch.Generator().manual_seed(0)
    total = train + validation + test
    turn = 2 * math.pi * torch.rand(total, generator=generator)
    label = torch.arange(total) % 2
    angle = turn + math.pi * label
    x = torch.stack([turn * angle.cos(), turn * angle.sin()], 1) / 3
    x = x + 0.05 * torch.randn(total, 2, generator=generator)
    names, sizes = ("train", "validation", "test"), (train, validation, test)
    return {
        name: TensorDataset(*part)
        for name, part in zip(names, zip(x.split(sizes), label.split(sizes)))
    }
'''

SESSION = {
    "apiVersion": API,
    "kind": "TrainingSession",
    "metadata": {"name": "spirals"},
    "spec": {
        "model": {"entrypoint": "spirals:Net"},
        "data": {"entrypoint": "spirals:spirals"},
        "training": {"epochs": 8, "batchSize": 30, "optimizer": {"learningRate": 0.01}},
        "growth": {
            "blueprints": {
                "matchExpressions": [
                    {
                        "key": "esper.dev/blueprint",
                        "operator": "In",
                        "values": ["bottleneck-mlp", "widen"],
                    }
                ]
            },
            "budget": {"parametersPercent": 2000, "activeSeeds": 4},
            "controller": {"policy": "periodic"},
            "gates": {
                "passes": 1,
                "dwellEpochs": 1,
                "ageEpochs": 3,
                "rampEpochs": 1,
                "holdEpochs": 1,
                "embargoEpochs": 1,
            },
        },
    },
}
"""Short gates: shadow trials, grafts and recovery trials of both outcomes within eight epochs."""


def changed(base, **changes):
    """`base` with values at dotted paths (dots written __) replaced; None takes a field away."""
    document = copy.deepcopy(base)
    for path, value in changes.items():
        *parents, last = path.split("__")
        place = document
        for name in parents:
            place = place.setdefault(name, {})
        if value is None:
            place.pop(last, None)
        else:
            place[last] = value
    return document


def write_session(folder, *documents, modules=None):
    """The manifest of `documents` in `folder`, and modules beside it; returns its path."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, source in (modules or {"spirals": SPIRALS}).items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    path = folder / "session.yaml"
    path.write_text(yaml.safe_dump_all(documents or (SESSION,)), encoding="utf-8")
    return path


def lines(path, *without):
    """A file's JSON lines as text, each without the named fields."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        found.append(json.dumps({k: v for k, v in fields.items() if k not in without}))
    return found


def left(directory):
    """What a finished run left that must not depend on when it ran, or how often it died."""
    result = json.loads((directory / "result.json").read_bytes())
    return {
        "metrics": lines(directory / "metrics.jsonl", "time", "seconds"),
        "events": lines(directory / "events.jsonl", "time"),
        "decisions": lines(directory / "decisions.jsonl", "time"),
        "result": {name: value for name, value in result.items() if name != "seconds"},
        "model": tensors(directory / "model.safetensors"),
        "files": files(directory),
    }


def tensors(path):
    """What a safetensors file holds: its header, whose order is arbitrary, and its bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def files(directory):
    """The names of all files below `directory`, but for the database's own."""
    return sorted(
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and path.parent.name != "__pycache__" and "sqlite" not in path.name
    )


def status(directory):
    """The status of a run's resource, and its summary condition."""
    found = yaml.safe_load((directory / "status.yaml").read_text(encoding="utf-8"))["status"]
    (summary,) = [c for c in found["conditions"] if c["type"] == "Succeeded"]
    return found, summary
