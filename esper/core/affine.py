"""A seed without nonlinearity, as the one change of its layer's parameters that it computes.

Legend: o = outputs, i = inputs, m = between, … = a convolution's window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.contracts.ir import (
    ActivationNode,
    AddNode,
    AffineNode,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    EmbeddingNode,
    Graph,
    InputNode,
    LayerGeometry,
    LinearNode,
    Node,
    ZerosNode,
)
from esper.contracts.shapes import POSITION_AXES
from esper.execution.builders import affine_names, submodule_name

_NORMS = ("LayerNorm", "BatchNorm2d")


@dataclass(frozen=True)
class Affine:
    """x to `matrix · x + shift`, in float64; None stands for zero.

    `matrix` is (o, i), or (o, i, …) once the map has looked through the host's window; beside a
    norm it is (o), the scale of what has been normalised. `shift` is (o).
    """

    matrix: Tensor | None
    shift: Tensor | None


def affine_map(
    graph: Graph, module: nn.Module, layer: nn.Module, host: LayerGeometry
) -> Affine | None:
    """What `module`, built from the bound `graph`, adds to the weight and bias of `layer`.

    `layer` has the parameters it had when the module was built; `host` is its geometry. For an
    Embedding the matrix is the change of its table, (i, o), and holds the shift.

    None where that is not exactly one map of the host's own shape: a nonlinearity, dropout, a
    second window, a window that is not the host's, a shift before zero padding.
    """
    if isinstance(graph.nodes[-1], ZerosNode):
        return Affine(None, None)
    values: dict[str, Affine] = {}
    for node in graph.nodes:
        value = _value(node, values, module, layer, host)
        if value is None:
            return None
        values[node.id] = value
    return _fitted(values[graph.output], host)


def _fitted(out: Affine, host: LayerGeometry) -> Affine | None:
    if host.kind == "Embedding":
        parts = [] if out.matrix is None else [out.matrix.T]
        parts += [] if out.shift is None else [out.shift.expand(host.inputs, -1)]
        return Affine(torch.stack(parts).sum(0) if parts else None, None)
    axes = POSITION_AXES[host.kind]
    if out.matrix is None or not axes or out.matrix.dim() != 2:
        return out
    if not _is_pointwise(host):
        return None
    return Affine(out.matrix[(..., *(None,) * axes)], out.shift)


def _value(
    node: Node,
    values: dict[str, Affine],
    module: nn.Module,
    layer: nn.Module,
    host: LayerGeometry,
) -> Affine | None:
    match node:
        case InputNode():
            return _entering(node, module, layer, host)
        case ZerosNode():
            return Affine(None, None)
        case AddNode():
            return _sum([values[name] for name in node.inputs])
        case ActivationNode():
            return values[node.input] if node.kind == "identity" else None
        case DropoutNode():
            return values[node.input] if node.p == 0.0 else None
        case AffineNode():
            scale, shift = map(module.get_parameter, affine_names(node.id))
            return _scaled(values[node.input], scale.detach().double(), shift.detach().double())
        case EmbeddingNode():
            table, _ = _parameters(module.get_submodule(submodule_name(node.id)))
            return Affine(table.T, None)
        case LinearNode() | Conv1dNode() | Conv2dNode() if host.kind not in _NORMS:
            return _layer(node, values[node.input], module, host)
        case _:
            return None


def _entering(
    node: InputNode, module: nn.Module, layer: nn.Module, host: LayerGeometry
) -> Affine | None:
    if node.source == "output":
        weight, bias = _parameters(layer)
        return Affine(weight.T if host.kind == "Embedding" else weight, bias)
    if node.source == "producer" or host.groups != 1 or host.kind in _NORMS:
        return None
    if host.kind == "Embedding":
        return Affine(None, None)  # indices, which only a table reads
    device = next((parameter.device for parameter in module.parameters()), None)
    return Affine(torch.eye(host.inputs, dtype=torch.float64, device=device), None)


def _sum(parts: list[Affine]) -> Affine | None:
    matrices = [part.matrix for part in parts if part.matrix is not None]
    if len({matrix.dim() for matrix in matrices}) > 1:
        return None
    shifts = [part.shift for part in parts if part.shift is not None]
    total = torch.stack(matrices).sum(0) if matrices else None
    return Affine(total, torch.stack(shifts).sum(0) if shifts else None)


def _scaled(before: Affine, scale: Tensor, added: Tensor) -> Affine:
    scale, added = scale.flatten(), added.flatten()
    matrix = None
    if before.matrix is not None:
        matrix = scale[(..., *(None,) * (before.matrix.dim() - 1))] * before.matrix
    return Affine(matrix, added if before.shift is None else scale * before.shift + added)


def _layer(
    node: LinearNode | Conv1dNode | Conv2dNode,
    before: Affine,
    module: nn.Module,
    host: LayerGeometry,
) -> Affine | None:
    weight, bias = _parameters(module.get_submodule(submodule_name(node.id)))
    if host.groups != 1:
        return None
    if isinstance(node, Conv1dNode | Conv2dNode):
        if node.groups != 1:
            return None
        if not _is_pointwise(node):
            return _through_window(node, weight, bias, before, host)
        weight = weight.flatten(1)
    matrix = None
    if before.matrix is not None:
        matrix = torch.einsum("om,mi...->oi...", weight, before.matrix)
    shift = None if before.shift is None else weight @ before.shift
    return Affine(matrix, _added(shift, bias))


def _through_window(
    node: Conv1dNode | Conv2dNode,
    weight: Tensor,
    bias: Tensor | None,
    before: Affine,
    host: LayerGeometry,
) -> Affine | None:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    if any(getattr(node, name) != getattr(host, name) for name in names):
        return None
    if before.matrix is None or before.matrix.dim() != 2:
        return None
    unpadded = node.padding != "same" and not any(node.padding)
    if before.shift is not None and node.padding_mode == "zeros" and not unpadded:
        return None
    matrix = torch.einsum("om...,mi->oi...", weight, before.matrix)
    shift = None if before.shift is None else weight.flatten(2).sum(2) @ before.shift
    return Affine(matrix, _added(shift, bias))


def _parameters(part: nn.Module) -> tuple[Tensor, Tensor | None]:
    """The weight and bias of a layer, in double precision."""
    weight, bias = part.get_parameter("weight"), part._parameters.get("bias")
    return weight.detach().double(), None if bias is None else bias.detach().double()


def _added(shift: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if shift is None or bias is None:
        return bias if shift is None else shift
    return shift + bias


def _is_pointwise(window: Conv1dNode | Conv2dNode | LayerGeometry) -> bool:
    if window.kernel_size is None or isinstance(window.kernel_size, str):
        return False
    unpadded = window.padding == "same" or not any(window.padding)
    return {*window.kernel_size, *window.stride} == {1} and unpadded
