"""The whole state of a training run as data, and as the parts of a checkpoint.

One snapshot serves four ends: the two arms of a recovery trial, rolling back after a non-finite
loss, checkpoints, and stopping in the middle of an interval. Nothing in it depends on how many
processes train.

A checkpoint's parts are `tensors.safetensors`, `structure.json` (the seeds to rebuild before any
tensor is loaded) and `state.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from esper.execution.isolation import RandomState

TENSORS, STRUCTURE, STATE = "tensors.safetensors", "structure.json", "state.json"
PARTS = (TENSORS, STRUCTURE, STATE)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """A training run at an interval boundary. Tensors are copies; the rest is JSON-ready."""

    epoch: int
    tensors: dict[str, Tensor]
    structure: list[dict[str, Any]]
    state: dict[str, Any]
    randomness: RandomState


def parts_of(snapshot: Snapshot) -> dict[str, bytes]:
    """The snapshot as the bytes of a checkpoint's parts, by their names.

    Raises:
        TypeError: its state or structure is no JSON.
    """
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
    return {
        TENSORS: save_tensors(_packed(tensors)),
        STRUCTURE: json.dumps(snapshot.structure).encode(),
        STATE: json.dumps(state).encode(),
    }


def snapshot_of(parts: Mapping[str, bytes]) -> Snapshot:
    """The snapshot that `parts_of` made these bytes of."""
    tensors = load_tensors(parts[TENSORS])
    state = json.loads(parts[STATE])
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
        structure=json.loads(parts[STRUCTURE]),
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
