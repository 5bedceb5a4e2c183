"""The operations of a graph that hold no weights, each as the fewest calls of torch.

A seed's forward competes with its host's: on a small layer one call of a module costs as much as
the arithmetic, so what needs no module is a function or a method of a tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.nn import functional as F

from esper.contracts.ir import (
    ActivationKind,
    ActivationNode,
    AddNode,
    AttentionNode,
    GateNode,
    GraphSource,
    KernelTarget,
    MeanNode,
    MultiplyNode,
    Node,
    SequenceNode,
    SpreadNode,
    ZerosNode,
)
from esper.contracts.values import Value


@dataclass(frozen=True)
class Tracing:
    """An fx graph in the making: what its nodes give, and the fx nodes that give it, by id."""

    graph: fx.Graph
    target: KernelTarget
    dtype: torch.dtype
    source: GraphSource
    values: Mapping[str, Value]
    made: dict[str, fx.Node] = field(default_factory=dict)

    def call(self, function: Callable[..., Any], *arguments: Any, **keywords: Any) -> fx.Node:
        """A call of a function of torch or `operator`."""
        return self.graph.call_function(function, arguments, keywords)

    def method(self, name: str, *arguments: Any, **keywords: Any) -> fx.Node:
        """A call of the method `name` of the first argument."""
        return self.graph.call_method(name, arguments, keywords)


def operation(node: Node, tracing: Tracing) -> fx.Node:
    """The fx node that computes a weightless `node`."""
    return _OPERATIONS[node.op](node, tracing)


def _activation(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, ActivationNode)
    assert node.kind != "traced"
    return _ACTIVATIONS[node.kind](node, tracing, tracing.made[node.input])


_ACTIVATIONS: Mapping[ActivationKind, Callable[[ActivationNode, Tracing, fx.Node], fx.Node]] = {
    "relu": lambda _, tracing, x: tracing.call(torch.relu, x),
    "gelu": lambda node, tracing, x: tracing.call(
        F.gelu, x, **({} if node.approximate is None else {"approximate": node.approximate})
    ),
    "silu": lambda _, tracing, x: tracing.call(F.silu, x),
    "tanh": lambda _, tracing, x: tracing.call(torch.tanh, x),
    "sigmoid": lambda _, tracing, x: tracing.call(torch.sigmoid, x),
    "leaky_relu": lambda node, tracing, x: tracing.call(
        F.leaky_relu, x, 0.01 if node.negative_slope is None else node.negative_slope
    ),
    "elu": lambda node, tracing, x: tracing.call(
        F.elu, x, 1.0 if node.alpha is None else node.alpha
    ),
    "identity": lambda _, __, x: x,
}


def _combination(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, AddNode | MultiplyNode)
    combine = operator.add if isinstance(node, AddNode) else operator.mul
    result = tracing.made[node.inputs[0]]
    for name in node.inputs[1:]:
        result = tracing.call(combine, result, tracing.made[name])
    return result


def _mean(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, MeanNode)
    value = tracing.values[node.input]
    axes = len(value.shape)
    positions = tuple(axis for axis in range(-axes, 0) if axis != value.axis)
    return tracing.method("mean", tracing.made[node.input], positions)


def _gate(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, GateNode)
    value, gate = tracing.values[node.value], tracing.made[node.gate]
    new = (None,) * (len(value.shape) - 1)
    if new and value.axis == -1:
        gate = tracing.call(operator.getitem, gate, (..., *new, slice(None)))
    elif new:
        gate = tracing.call(operator.getitem, gate, (..., *new))
    return tracing.call(operator.mul, tracing.made[node.value], gate)


def _sequence(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, SequenceNode)
    value, row = tracing.values[node.input], tracing.made[node.input]
    axes = len(value.shape) - 1
    if value.axis == -1:
        return tracing.method("flatten", row, -1 - axes, -2) if axes > 1 else row
    if axes > 1:
        row = tracing.method("flatten", row, -axes)
    return tracing.method("transpose", row, -1, -2)


def _spread(node: Node, tracing: Tracing) -> fx.Node:
    assert isinstance(node, SpreadNode)
    like, out = tracing.values[node.positions], tracing.made[node.input]
    axes = len(like.shape) - 1
    where, positions = (-2, slice(-1 - axes, -1)) if like.axis == -1 else (-1, slice(-axes, None))
    if like.axis != -1:
        out = tracing.method("transpose", out, -1, -2)
    if axes == 1:
        return out
    # As many as arrive: a convolutional model may see other image sizes than the probe's.
    size = tracing.method("size", tracing.made[node.positions])
    return tracing.call(
        torch.unflatten, out, where, tracing.call(operator.getitem, size, positions)
    )


def _attention(node: Node, tracing: Tracing) -> fx.Node:
    """(…, P, 3·h·d) to (…, P, h·d); torch chooses among its fused kernels."""
    assert isinstance(node, AttentionNode)
    width = tracing.values[node.id].channels // node.heads
    split = tracing.call(torch.unflatten, tracing.made[node.input], -1, (3, node.heads, width))
    parts = tracing.method("unbind", tracing.method("transpose", split, -4, -2), -3)
    query, key, value = (tracing.call(operator.getitem, parts, index) for index in range(3))
    mixed = tracing.call(F.scaled_dot_product_attention, query, key, value)
    return tracing.method("flatten", tracing.method("transpose", mixed, -3, -2), -2)


def _zeros(node: Node, tracing: Tracing) -> fx.Node:
    """Zeros of the shape that the host gives for whatever input arrives.

    The shape is computed as the graph runs: a convolutional model may see other image sizes than
    the probe's. Multiplying the input by zero would do, were it not for infinities.
    """
    assert isinstance(node, ZerosNode)
    layer, source = tracing.target.layer, tracing.made[node.input]
    given = tracing.values[node.input].shape
    if layer.kind in ("LayerNorm", "BatchNorm2d") or (
        tracing.source == "output" or given != tracing.target.input_shape
    ):
        return tracing.call(torch.zeros_like, source)
    size = tracing.method("size", source)
    if layer.kind == "Embedding":
        shape = tracing.call(operator.add, size, (layer.outputs,))
        return tracing.method("new_zeros", source, shape, dtype=tracing.dtype)
    window = layer.kernel_size or ()
    extents: list[fx.Node] = []
    for axis, kernel in enumerate(window):
        reach = layer.dilation[axis] * (kernel - 1)
        pad = reach if layer.padding == "same" else 2 * layer.padding[axis]
        extent = tracing.call(operator.getitem, size, axis - len(window))
        extent = tracing.call(operator.add, extent, pad - reach - 1)
        extent = tracing.call(operator.floordiv, extent, layer.stride[axis])
        extents.append(tracing.call(operator.add, extent, 1))
    batch = tracing.call(operator.getitem, size, slice(None, -1 - len(window)))
    shape = tracing.call(operator.add, batch, (layer.outputs, *extents))
    return tracing.method("new_zeros", source, shape)


_OPERATIONS: Mapping[str, Callable[[Node, Tracing], fx.Node]] = {
    "activation": _activation,
    "add": _combination,
    "multiply": _combination,
    "mean": _mean,
    "gate": _gate,
    "sequence": _sequence,
    "attention": _attention,
    "spread": _spread,
    "zeros": _zeros,
}
