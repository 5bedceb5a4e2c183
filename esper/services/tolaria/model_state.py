"""A model's parameters, buffers and seeds as a snapshot has them, and their return to the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts.ir import Graph
from esper.core.model_wrapper import MorphableModel
from esper.execution.builders import build
from esper.execution.isolation import writable
from esper.services.tolaria.snapshots import Snapshot


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers, as they are."""
    return dict(model.named_parameters()) | dict(model.named_buffers())


def empty_buffers(model: nn.Module) -> list[str]:
    """The places for buffers that hold none yet."""
    return [name for name, buffer in buffer_places(model).items() if buffer is None]


@torch.no_grad()
def restore_model(
    model: nn.Module, tensors: Mapping[str, Tensor], empty: Sequence[str], device: torch.device
) -> None:
    """Give the model these tensors; a forward may have made, replaced or resized a buffer."""
    for name, parameter in model.named_parameters():
        parameter.copy_(placed_like(parameter, tensors[name]))
    found = buffer_places(model)
    buffers = {name for name, _ in model.named_buffers()}
    parameters = {name for name, _ in model.named_parameters()}
    for name in (buffers | set(tensors)) - parameters:
        path, _, key = name.rpartition(".")
        table, buffer = model.get_submodule(path)._buffers, found.get(name)
        if name in tensors:
            value = tensors[name]
            if buffer is not None and buffer.shape == value.shape and writable(buffer):
                buffer.copy_(value)
            else:
                table[key] = value.to(device, copy=True)
        elif name in empty:
            table[key] = None
        else:
            del table[key]


def rebuild_seeds(model: MorphableModel, structure: Sequence[Mapping[str, Any]]) -> None:
    """Rebuild the seeds of a snapshot in a dormant model; their weights are loaded afterwards."""

    def seed_of(entry: Mapping[str, Any]) -> nn.Module:
        target = model.morphology.target(entry["layer"])
        return build(Graph.model_validate(entry["graph"]), target, generator_seed=0)

    model.morphology.restore(structure, seed_of)


def whole(snapshot: Snapshot) -> Snapshot:
    """`snapshot` with every tensor whole; all ranks must ask for it together.

    In the order of their names: a rank that went on from bytes holds them in another one than a
    rank that did not, and parts of two tensors of one shape would be put together unseen.
    """
    tensors = {
        name: tensor.full_tensor() if is_shared_out(tensor) else tensor  # type: ignore[attr-defined]
        for name, tensor in sorted(snapshot.tensors.items())
    }
    return replace(snapshot, tensors=tensors)


def is_shared_out(tensor: Tensor) -> bool:
    """Whether the tensor is a DTensor, of which each rank has a part."""
    # By its mark: importing its class takes longer than a small session needs to begin.
    return hasattr(tensor, "device_mesh")


def placed_like(like: Tensor, value: Tensor) -> Tensor:
    """`value`, whole on every rank, shared out as `like` is, if it is."""
    if not is_shared_out(like) or is_shared_out(value):
        return value
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    # Every rank has all of it: nothing needs to be sent.
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)


def buffer_places(model: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name, with the places that hold none yet."""
    return {
        f"{path}.{key}" if path else key: buffer
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
    }
