"""What each node of a graph gives: its shape, and where its channels are. No torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from esper.contracts.base import Contract
from esper.contracts.ir import (
    ActivationNode,
    AddNode,
    AffineNode,
    AttentionNode,
    AvgPool2dNode,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    EmbeddingNode,
    GateNode,
    Graph,
    InputNode,
    KernelTarget,
    LayerKind,
    LinearNode,
    MaxPool2dNode,
    MeanNode,
    MultiplyNode,
    Node,
    ProducerDescription,
    SequenceNode,
    SpreadNode,
    ZerosNode,
    inputs_of,
)
from esper.contracts.shapes import POSITION_AXES, Sizes, convolved_shape, pooled_shape
from esper.errors import BlueprintError

Layout = Literal["host", "indices", "vector", "sequence"]


class Value(NamedTuple):
    """One node's output without batch: its shape, its layout, and which axis counts channels.

    The layouts are those of `esper.contracts.nodes`, and "indices", the input of an Embedding.
    `axis` counts from the end: -1, or before the positions of a convolution.
    """

    shape: Sizes
    layout: Layout
    axis: int

    @property
    def channels(self) -> int:
        """How many channels there are; 1 for indices."""
        return 1 if self.layout == "indices" else self.shape[self.axis]

    @property
    def num_positions(self) -> int:
        """At how many places there are channels."""
        return math.prod(self.shape) // self.channels


def values_of(bound: Graph, target: KernelTarget) -> dict[str, Value]:
    """What each node of a bound graph gives, by id.

    Raises:
        BlueprintError: the graph is not bound, or doesn't fit the target.
    """
    values: dict[str, Value] = {}
    for index, node in enumerate(bound.nodes):
        values[node.id] = value_of(node, values, target, f"spec.graph.nodes[{index}]")
    return values


def value_of(node: Node, values: Mapping[str, Value], target: KernelTarget, path: str) -> Value:
    """What a concrete node gives, when earlier nodes give `values`.

    Raises:
        BlueprintError: the node has symbolic sizes, or does not fit what it reads.
    """
    if isinstance(node, InputNode):
        return _entering(node, target, path)
    refuse_other_kind(node, target.layer.kind, path)
    if isinstance(node, ZerosNode):
        return _zeros(node, values, target, path)
    _refuse_other_layout(node, values, target.layer.kind, path)
    before = values[inputs_of(node)[0]]
    match node:
        case LinearNode(features=int(features)):
            return before._replace(shape=(*before.shape[:-1], features))
        case EmbeddingNode(rows=int(), features=int(features)):
            return Value((*before.shape, features), "host", -1)
        case Conv1dNode(channels=int(channels), kernel_size=tuple()):
            return before._replace(shape=convolved_shape(node, channels, before.shape, path))
        case Conv2dNode(channels=int(channels), kernel_size=tuple()):
            return before._replace(shape=convolved_shape(node, channels, before.shape, path))
        case MaxPool2dNode() | AvgPool2dNode():
            return before._replace(shape=pooled_shape(node, before.shape, path))
        case AddNode() | MultiplyNode():
            _refuse_unequal([values[name] for name in node.inputs], path)
            return before
        case ActivationNode(kind="traced"):
            raise BlueprintError(path, f"symbolic sizes in {node.op}", "a bound graph")
        case ActivationNode() | DropoutNode() | AffineNode():
            return before
        case MeanNode():
            return Value((before.channels,), "vector", -1)
        case SequenceNode():
            return Value((before.num_positions, before.channels), "sequence", -1)
        case GateNode():
            if values[node.gate].shape != (before.channels,):
                came = f"shape {values[node.gate].shape}"
                raise BlueprintError(f"{path}.gate", came, f"a vector ({before.channels},)")
            return before
        case AttentionNode():
            if before.channels % (3 * node.heads):
                raise BlueprintError(
                    f"{path}.heads",
                    f"{node.heads} for {before.channels} channels",
                    "queries, keys and values of equal width for each head",
                )
            return before._replace(shape=(before.shape[0], before.channels // 3))
        case SpreadNode():
            return _spread(node, before, values[node.positions], path)
        case _:
            raise BlueprintError(path, f"symbolic sizes in {node.op}", "a bound graph")


def producer_of(target: KernelTarget, path: str) -> ProducerDescription:
    """The layer that feeds the target's.

    Raises:
        BlueprintError: none was traced.
    """
    if target.producer is None:
        raise BlueprintError(
            path, "producer", "host here: no single layer was traced that feeds this one"
        )
    return target.producer


def refuse_other_kind(node: Node, kind: LayerKind, path: str) -> None:
    """Refuse an operation that has no meaning beside a host of this kind.

    Raises:
        BlueprintError: on the node's `op`.
    """
    kinds = _KINDS.get(type(node))
    if kinds is not None and kind not in kinds:
        raise BlueprintError(
            f"{path}.op", f"{node.op} on a {kind} host", f"{', '.join(kinds)} hosts for this op"
        )


_IMAGES: tuple[LayerKind, ...] = ("Conv2d", "BatchNorm2d")
_KINDS: Mapping[type[Contract], tuple[LayerKind, ...]] = {
    Conv1dNode: ("Conv1d",),
    Conv2dNode: _IMAGES,
    MaxPool2dNode: _IMAGES,
    AvgPool2dNode: _IMAGES,
    EmbeddingNode: ("Embedding",),
}
_LAYOUTS: Mapping[type[Contract], tuple[Layout, ...]] = {
    LinearNode: ("host", "vector", "sequence"),
    Conv1dNode: ("host",),
    Conv2dNode: ("host",),
    MaxPool2dNode: ("host",),
    AvgPool2dNode: ("host",),
    MeanNode: ("host",),
    SequenceNode: ("host",),
    EmbeddingNode: ("indices",),
    AttentionNode: ("sequence",),
}


def _entering(node: InputNode, target: KernelTarget, path: str) -> Value:
    axis = -1 - POSITION_AXES[target.layer.kind]
    if node.source == "producer":
        return Value(producer_of(target, f"{path}.source").input_shape, "host", axis)
    if node.source == "output":
        return Value(target.output_shape, "host", axis)
    layout: Layout = "indices" if target.layer.kind == "Embedding" else "host"
    return Value(target.input_shape, layout, axis)


def _zeros(node: ZerosNode, values: Mapping[str, Value], target: KernelTarget, path: str) -> Value:
    came = values[node.input]
    outside = came.layout not in ("host", "indices")
    if outside or came.shape not in (target.input_shape, target.output_shape):
        raise BlueprintError(
            f"{path}.input", node.input, f"the host's input, {target.input_shape}, or its output"
        )
    return Value(target.output_shape, "host", -1 - POSITION_AXES[target.layer.kind])


def _refuse_other_layout(
    node: Node, values: Mapping[str, Value], kind: LayerKind, path: str
) -> None:
    found = values[inputs_of(node)[0]]
    allowed = _LAYOUTS.get(type(node), ("host", "vector", "sequence"))
    if found.layout not in allowed:
        came = f"the {found.layout} {inputs_of(node)[0]!r}"
        raise BlueprintError(f"{path}.input", came, f"a node in layout {' or '.join(allowed)}")
    if isinstance(node, LinearNode) and found.layout == "host" and found.axis != -1:
        raise BlueprintError(
            f"{path}.op",
            f"linear on a {kind} host",
            "a vector or a sequence before it, or hosts whose channels come last",
        )
    if isinstance(node, MeanNode | SequenceNode) and len(found.shape) < 2:
        raise BlueprintError(
            f"{path}.input", f"shape {found.shape}", "positions beside the channels"
        )


def _refuse_unequal(found: Sequence[Value], path: str) -> None:
    if len(set(found)) > 1:
        shapes = [value.shape for value in found]
        raise BlueprintError(f"{path}.inputs", f"shapes {shapes}", "one shape and layout for all")


def _spread(node: SpreadNode, before: Value, like: Value, path: str) -> Value:
    if before.layout != "sequence":
        raise BlueprintError(f"{path}.input", f"the {before.layout} {node.input!r}", "a sequence")
    if like.layout != "host" or like.num_positions != before.num_positions:
        raise BlueprintError(
            f"{path}.positions", node.positions, f"a node with {before.num_positions} positions"
        )
    if like.axis == -1:
        return like._replace(shape=(*like.shape[:-1], before.channels))
    return like._replace(shape=(before.channels, *like.shape[1:]))
