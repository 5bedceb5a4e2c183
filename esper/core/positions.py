"""Whether the positions of a host's input may look at each other.

A blueprint that reads other positions takes the first dimension for the batch, and lets each
position see all others. Where the first dimension is another one it would mix samples, and in a
model that predicts what comes next, positions would see what they predict.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from esper.contracts.ir import (
    AttentionNode,
    AvgPool2dNode,
    Conv1dNode,
    Conv2dNode,
    Graph,
    LayerGeometry,
    MaxPool2dNode,
    MeanNode,
    Node,
    SequenceNode,
)
from esper.errors import BlueprintError

RANKS = "it is called with inputs of different ranks: positions of one are samples of the other"
NOT_FIRST = "its input has another dimension than the batch in front"
UNKNOWN = "which dimension of its input is the batch is unknown: the model takes no other batch"
CAUSAL = "the model's outputs do not depend on later positions, and would through it"

MAX_CAUSAL_LOOKS = 8
"""How many forwards may be spent on finding out whether a model is causal."""
NO_DEPENDENCE = 1e-5
"""Up to this part of the largest change, a change is one of rounding."""

Shape = tuple[int, ...]
Inputs = tuple[tuple[Any, ...], Mapping[str, Any]]


def batch_of(inputs: Inputs) -> int | None:
    """The size of the first tensor's first dimension, which is the batch."""
    sizes = [leaf.shape[0] for leaf in _tensors(inputs) if leaf.dim()]
    return sizes[0] if sizes else None


def other_batches(inputs: Inputs) -> list[Inputs]:
    """The inputs with twice their samples, and with half of them where there are enough.

    The one to try first comes first: of a large batch, the half, for its memory's sake.
    """
    batch = batch_of(inputs)
    if not batch:
        return []

    def doubled(leaf: Any) -> Any:
        return torch.cat([leaf, leaf]) if _batched(leaf, batch) else leaf

    def halved(leaf: Any) -> Any:
        return leaf[: (batch + 1) // 2] if _batched(leaf, batch) else leaf

    changes = [doubled] if batch == 1 else [doubled, halved]
    return [tree_map(change, inputs) for change in (changes[::-1] if batch > 32 else changes)]


def batch_axes(calls: Sequence[Shape], others: Sequence[Shape]) -> list[set[int]] | None:
    """For each call the dimensions of its input that differ with the batch; None if unclear."""
    if [len(shape) for shape in calls] != [len(shape) for shape in others]:
        return None
    return [
        {axis for axis, sizes in enumerate(zip(one, other, strict=True)) if len(set(sizes)) > 1}
        for one, other in zip(calls, others, strict=True)
    ]


def refusal_to_mix(
    calls: Sequence[Shape], axes: list[set[int]] | None, batch: int | None, *, windowed: bool
) -> str | None:
    """Why positions of a host called with these shapes may not look at each other, if so.

    A `windowed` host (a convolution, a norm of images) has its batch in front by its own rule.
    """
    if len({len(shape) for shape in calls}) > 1:
        return RANKS
    if axes is None:
        alone = all(shape[:1] == (batch,) and batch not in shape[1:-1] for shape in calls)
        return None if windowed or alone else UNKNOWN
    return NOT_FIRST if any(found - {0} for found in axes) else None


def without_batch(shape: Shape, axes: set[int], unbatched: int) -> list[int]:
    """The dimensions of a host's input that are a sample's: `unbatched` are there at least."""
    gone = axes or ({0} if len(shape) > unbatched else set())
    return [axis for axis in range(len(shape)) if axis not in gone]


def causal_layers(inputs: Inputs, run: Callable[[Inputs], tuple[Any, dict[str, Any]]]) -> set[str]:
    """The layers through which outputs depend on earlier positions of an input, never on later.

    `run` gives the model's output and a fingerprint of each layer's outputs, and keeps no state.
    Models whose output has no position of its own for each of the input have none of these.
    """
    found: set[str] = set()
    looks, before = 0, None
    for index, leaf in enumerate(_tensors(inputs)):
        for axis in range(1, leaf.dim()):
            before = before or run(inputs)
            size = leaf.shape[axis]
            places = _places(before[0], size)
            if leaf.dtype == torch.bool or size < 2 or not places or looks >= MAX_CAUSAL_LOOKS:
                continue
            looks += 2
            last = run(_changed(inputs, index, axis, size - 1))
            first = run(_changed(inputs, index, axis, 0))
            if any(_looks_back(before[0], last[0], first[0], *place) for place in places):
                found |= {name for name, mark in before[1].items() if last[1].get(name) != mark}
    return found


def refuse_mixing(
    unmixed: Mapping[str, str], layer: str, bound: Graph, geometry: LayerGeometry
) -> None:
    """Refuse a bound graph that reads other positions at a layer that `unmixed` names.

    Raises:
        BlueprintError: it does; with the reason.
    """
    if layer not in unmixed:
        return
    for index, node in enumerate(bound.nodes):
        if _reads_positions(node, geometry):
            raise BlueprintError(
                f"spec.graph.nodes[{index}].op",
                f"{node.op}, which reads other positions",
                f"nodes that look at one position at a time at layer {layer} ({unmixed[layer]})",
            )


def _reads_positions(node: Node, layer: LayerGeometry) -> bool:
    if isinstance(node, Conv1dNode | Conv2dNode):
        if node.kernel_size == "host" or set(node.kernel_size) == {1}:
            return False
        window = ("kernel_size", "stride", "padding", "dilation")
        return any(getattr(node, name) != getattr(layer, name) for name in window)
    mixing = MeanNode | SequenceNode | AttentionNode | MaxPool2dNode | AvgPool2dNode
    return isinstance(node, mixing)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if _plain(leaf)]


def _plain(leaf: Any) -> bool:
    """Whether it is a tensor with one size in each dimension, and an entry at each place."""
    return isinstance(leaf, Tensor) and not leaf.is_nested and leaf.layout is torch.strided


def _batched(leaf: Any, batch: int) -> bool:
    return _plain(leaf) and leaf.dim() > 0 and leaf.shape[0] == batch


def _places(output: Any, size: int) -> list[tuple[int, int]]:
    """The tensors of an output, and dimensions of theirs, that have `size` positions."""
    return [
        (index, axis)
        for index, leaf in enumerate(_tensors(output))
        for axis in range(1, leaf.dim())
        if leaf.shape[axis] == size
    ]


def _changed(inputs: Inputs, index: int, axis: int, place: int) -> Inputs:
    """The inputs, another value at one place along `axis` of the tensor of this index."""
    leaf = _tensors(inputs)[index].detach().clone()
    part = leaf.select(axis, place)
    if leaf.is_floating_point() or leaf.is_complex():
        # No constant: a norm would take that away again.
        steps = torch.arange(part.numel(), device=part.device).reshape(part.shape)
        part.add_((1 + steps % 7).to(part.dtype) * (-1) ** (steps % 2))
    else:
        # An index that is there is followed by no larger one, which a table might not have.
        part.copy_(torch.where(part > 1, part - 1, 1 - part))
    seen = iter(range(len(tree_leaves(inputs))))

    def swapped(one: Any) -> Any:
        return leaf if _plain(one) and next(seen) == index else one

    changed: Inputs = tree_map(swapped, inputs)
    return changed


def _looks_back(before: Any, last: Any, first: Any, index: int, axis: int) -> bool:
    """Whether the last input moves the last output alone, and the first input later ones, too."""
    outputs = [_tensors(output) for output in (before, last, first)]
    if any(len(output) <= index for output in outputs):
        return False
    was, by_last, by_first = (output[index] for output in outputs)
    if not was.shape == by_last.shape == by_first.shape:
        return False
    end = was.shape[axis] - 1
    moved = _distance(by_last, was)
    moves = _distance(by_first, was)
    own, ahead = moved.select(axis, end).max(), moved.narrow(axis, 0, end).max()
    later = moves.narrow(axis, 1, end).max()
    alone = bool(own > 0) and bool(ahead <= NO_DEPENDENCE * own)
    return alone and bool(later > NO_DEPENDENCE * moves.max())


def _distance(one: Tensor, other: Tensor) -> Tensor:
    wide = torch.complex128 if one.is_complex() else torch.float64
    return (one.to(wide) - other.to(wide)).abs()
