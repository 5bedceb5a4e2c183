"""The whole state of a training run as data, and its checkpoints on disk.

One snapshot serves four ends: the two arms of a recovery trial, rolling back after a non-finite
loss, checkpoints, and stopping in the middle of an interval.

A checkpoint is a folder: `tensors.safetensors`, `structure.json` (the seeds to rebuild before any
tensor is loaded) and `state.json`. It is written under a temporary name and renamed, and gets
another name before it is deleted, so a folder with its final name is complete.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from esper.execution.isolation import RandomState

PREFIX = "epoch-"
PARTIAL = ".partial"
REPLACED = ".replaced"


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training run at an interval boundary. Tensors are copies; the rest is JSON-ready."""

    epoch: int
    tensors: dict[str, Tensor]
    structure: list[dict[str, Any]]
    state: dict[str, Any]
    randomness: RandomState


def write_checkpoint(folder: Path, snapshot: Snapshot, keep: int) -> Path:
    """Write `snapshot` below `folder` and drop all but the newest `keep` checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"{PREFIX}{snapshot.epoch:06d}"
    partial = _hidden(final, PARTIAL)
    _clean_up(folder)
    partial.mkdir()
    try:
        randomness = snapshot.randomness
        tensors = {f"state/{name}": tensor for name, tensor in snapshot.tensors.items()}
        tensors["random/torch"] = randomness.torch_cpu
        tensors["random/numpy"] = randomness.numpy_keys
        for index, tensor in enumerate(randomness.torch_cuda):
            tensors[f"random/cuda/{index}"] = tensor
        state = snapshot.state | {
            "epoch": snapshot.epoch,
            "numpy": list(randomness.numpy_rest),
            "python": randomness.python,
        }
        _write(partial / "tensors.safetensors", save_tensors(_packed(tensors)))
        _write(partial / "structure.json", json.dumps(snapshot.structure).encode())
        _write(partial / "state.json", json.dumps(state).encode())
        _sync_folder(partial)
        if final.exists():
            # Counts as the checkpoint until the new one has the name.
            final.rename(_hidden(final, REPLACED))
        partial.rename(final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(folder)
    for old in checkpoints(folder)[:-keep]:
        old.rename(_hidden(old, PARTIAL))
    _clean_up(folder)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    if not folder.is_dir():
        return []
    found = {_final_name(path): path for path in folder.glob(f".{PREFIX}*{REPLACED}")}
    found |= {path.name: path for path in folder.glob(f"{PREFIX}*") if path.is_dir()}
    return [found[name] for name in sorted(found)]


def read_checkpoint(path: Path) -> Snapshot:
    """The snapshot that a checkpoint folder holds."""
    tensors = load_tensors((path / "tensors.safetensors").read_bytes())
    state = json.loads((path / "state.json").read_bytes())
    version, numbers, gauss = state.pop("python")
    position, has_gauss, cached = state.pop("numpy")
    cuda = sorted(
        (name for name in tensors if name.startswith("random/cuda/")),
        key=lambda name: int(name.rpartition("/")[2]),
    )
    return Snapshot(
        epoch=state.pop("epoch"),
        tensors={
            name.removeprefix("state/"): tensor
            for name, tensor in tensors.items()
            if name.startswith("state/")
        },
        structure=json.loads((path / "structure.json").read_bytes()),
        state=state,
        randomness=RandomState(
            torch_cpu=tensors["random/torch"].to(torch.uint8),
            torch_cuda=tuple(tensors[name] for name in cuda),
            numpy_keys=tensors["random/numpy"],
            numpy_rest=(position, has_gauss, cached),
            python=(version, tuple(numbers), gauss),
        ),
    )


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as safetensors takes them: on the CPU, contiguous, none in another's storage."""
    packed: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        if plain.untyped_storage().data_ptr() in storages:
            plain = plain.clone()
        storages.add(plain.untyped_storage().data_ptr())
        packed[name] = plain
    return packed


def _hidden(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")


def _final_name(hidden: Path) -> str:
    return hidden.stem.removeprefix(".")


def _clean_up(folder: Path) -> None:
    """Delete what is no checkpoint, or no longer; finish what a dead process left half done."""
    for path in folder.glob(f".{PREFIX}*{REPLACED}"):
        final = folder / _final_name(path)
        if final.exists():
            path.rename(_hidden(final, PARTIAL))
        else:
            path.rename(final)
    for path in folder.glob(f".{PREFIX}*{PARTIAL}"):
        shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
