"""Seeds that are tried and never grafted leave the training as it would have been, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from esper.contracts.enums import SeedState
from tests.integration.sessions import state, trained

CNN = {
    "model": {
        "entrypoint": "esper.zoo.models:CNN",
        "arguments": {"channels": 1, "widths": [3, 4], "outputs": 10},
    },
    "data": {"arguments": {"image": True}},
}
MODULE = '''
import torch
from torch import nn


class Noisy(nn.Module):
    """Dropout, GroupNorm, BatchNorm, and numpy noise in training."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1, padding_mode="circular", bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.3)
        self.middle = nn.Linear(64, 12)
        self.out = nn.Linear(12, 10)

    def forward(self, x):
        x = self.drop(self.norm(self.conv(x)).relu())
        x = nn.functional.dropout(self.middle(x.flatten(1)).relu(), 0.2, self.training)
        return self.out(x)
'''
SESSIONS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "cnn": CNN,
    "dropout": {
        "model": {"entrypoint": "noisy:Noisy", "arguments": {}},
        "data": {"arguments": {"image": True}},
    },
    "accumulation": {"training": {"optimizer": {"accumulationSteps": 3}, "batchSize": 40}},
    "clipping": {"training": {"optimizer": {"maxGradientNorm": 0.5}}},
    "bfloat16": {"training": {"precision": "bfloat16"}},
    "bfloat16-cnn": CNN | {"training": {"precision": "bfloat16"}},
    "sgd-cosine": {
        "training": {
            "optimizer": {"name": "sgd", "learningRate": 0.05, "momentum": 0.9},
            "schedule": {"name": "cosine", "warmupEpochs": 2},
        }
    },
    "long-interval": {"training": {"epochs": 16}, "growth": {"controller": {"intervalEpochs": 2}}},
}


def spec(session: dict[str, Any], policy: str) -> dict[str, Any]:
    growth = {
        **session.get("growth", {}),
        # A rent that no seed can earn: every trial ends with a cull before grafting.
        "gates": {"rentPerMillionParameters": 1e6, "confidenceLevel": 0.999},
    }
    growth["controller"] = {**growth.get("controller", {}), "policy": policy}
    return {"spec": session | {"growth": growth}}


@pytest.mark.parametrize("name", SESSIONS)
def test_trials_leave_no_trace_in_the_host(name: str, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(MODULE)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    session = SESSIONS[name]
    quiet, alone, bare = trained(spec(session, "none"), _beside(tmp_path, "a"))
    tried, watching, wrapped = trained(spec(session, "random"), _beside(tmp_path, "b"))

    culled = [t for t in watching.transitions if t.current is SeedState.CULLED]
    assert len(culled) >= 3
    assert {t.previous for t in culled} <= {SeedState.TRAINING, SeedState.GERMINATED}
    for row, other in zip(alone.rows, watching.rows, strict=True):
        for key in ("trainLoss", "validationLoss", "validationMetric", "learningRate"):
            assert row[key] == other[key], (name, row["epoch"], key)
    before, after = state(bare), state(wrapped)
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert torch.equal(value, after[key]), key
    assert quiet.test == tried.test
    assert tried.flops > quiet.flops
    assert tried.flops_trials > quiet.flops_trials


def test_a_grafted_seed_does_change_the_training(tmp_path: Path) -> None:
    # The test above could pass with seeds that do nothing: here they must do something.
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    growth = {"gates": {"rentPerMillionParameters": 0.1}, "controller": {"policy": "periodic"}}
    plain = {"controller": {"policy": "none"}}
    longer = {"training": {"epochs": 14}}
    result, watching, _ = trained({"spec": longer | {"growth": growth}}, tmp_path / "a")
    alone, rows, _ = trained({"spec": longer | {"growth": plain}}, tmp_path / "b")
    assert any(t.current is SeedState.GRAFTING for t in watching.transitions)
    assert watching.rows[-1]["trainLoss"] != rows.rows[-1]["trainLoss"]
    assert result.flops > alone.flops


def _beside(folder: Path, name: str) -> Path:
    """A folder of its own for a run, with the module in reach."""
    (folder / name / "noisy.py").write_text((folder / "noisy.py").read_text())
    return folder / name
