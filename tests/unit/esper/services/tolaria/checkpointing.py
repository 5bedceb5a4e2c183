"""Checkpoints of a small session, in a folder, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from esper.configs import StorageConfig
from esper.execution.isolation import RandomState
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints
from esper.services.tolaria.snapshots import Snapshot

OWNER = Owner(session="small", uid="uid-1")


def snapshot(epoch: int = 3, tensors: dict[str, Tensor] | None = None, **state: Any) -> Snapshot:
    """A snapshot whose tensors tell its epoch."""
    return Snapshot(
        epoch=epoch,
        tensors={"model/w": torch.full((3,), float(epoch))} if tensors is None else tensors,
        structure=[{"layer": "head", "slot": 0, "alpha": 0.25, "graph": {"nodes": []}}],
        state=state,
        randomness=RandomState.capture(),
    )


def in_run(run: Path, keep: int = 2, owner: Owner = OWNER, uri: str | None = None) -> Checkpoints:
    """The checkpoints of a run in that directory."""
    return open_checkpoints(run, owner, keep, uri=uri, storage=StorageConfig())


def newest(checkpoints: Checkpoints) -> Snapshot:
    """The snapshot of the newest one, which must be there."""
    found = checkpoints.newest()
    assert found is not None
    return found.snapshot
