"""A seed without nonlinearity, as the one affine map that it computes.

Legend: o = outputs, i = inputs, m = between, k and l = window height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from esper.contracts.ir import (
    ActivationNode,
    AddNode,
    Conv2dNode,
    DropoutNode,
    Graph,
    InputNode,
    LayerGeometry,
    LinearNode,
    Node,
    ZerosNode,
)
from esper.execution.builders import submodule_name


@dataclass(frozen=True)
class Affine:
    """x to `matrix · x + shift`, in float64; None stands for zero.

    `matrix` is (o, i), or (o, i, k, l) once the map has looked through the host's window;
    `shift` is (o).
    """

    matrix: Tensor | None
    shift: Tensor | None


def affine_map(graph: Graph, module: nn.Module, host: LayerGeometry) -> Affine | None:
    """What `module`, built from the bound `graph`, adds to the host's own weight and bias.

    None where that is not exactly one map of the host's own shape: a nonlinearity, dropout, a
    second window, a window that is not the host's, a shift before zero padding.
    """
    if isinstance(graph.nodes[-1], ZerosNode):
        return Affine(None, None)
    values: dict[str, Affine] = {}
    for node in graph.nodes:
        value = _value(node, values, module, host)
        if value is None:
            return None
        values[node.id] = value
    out = values[graph.output]
    if out.matrix is None or host.kind == "Linear":
        return out
    if out.matrix.dim() == 2:
        if not _is_pointwise(host):
            return None
        return Affine(out.matrix[:, :, None, None], out.shift)
    return out


def _value(
    node: Node, values: dict[str, Affine], module: nn.Module, host: LayerGeometry
) -> Affine | None:
    if isinstance(node, InputNode):
        if node.source != "host" or host.groups != 1:
            return None
        return Affine(torch.eye(host.inputs, dtype=torch.float64, device=_device(module)), None)
    if isinstance(node, ZerosNode):
        return Affine(None, None)
    if isinstance(node, AddNode):
        return _sum([values[name] for name in node.inputs])
    if isinstance(node, ActivationNode):
        return values[node.input] if node.kind == "identity" else None
    if isinstance(node, DropoutNode):
        return values[node.input] if node.p == 0.0 else None
    if isinstance(node, LinearNode | Conv2dNode):
        return _layer(node, values[node.input], module, host)
    return None


def _sum(parts: list[Affine]) -> Affine | None:
    matrices = [part.matrix for part in parts if part.matrix is not None]
    if len({matrix.dim() for matrix in matrices}) > 1:
        return None
    shifts = [part.shift for part in parts if part.shift is not None]
    total = torch.stack(matrices).sum(0) if matrices else None
    return Affine(total, torch.stack(shifts).sum(0) if shifts else None)


def _layer(
    node: LinearNode | Conv2dNode, before: Affine, module: nn.Module, host: LayerGeometry
) -> Affine | None:
    layer = module.get_submodule(submodule_name(node.id))
    assert isinstance(layer, nn.Linear | nn.Conv2d)
    weight = layer.weight.detach().double()
    bias = None if layer.bias is None else layer.bias.detach().double()
    if isinstance(node, Conv2dNode):
        if node.groups != 1:
            return None
        if not _is_pointwise(node):
            return _through_window(node, weight, bias, before, host)
        weight = weight[:, :, 0, 0]
    matrix = None
    if before.matrix is not None:
        matrix = torch.einsum("om,mi...->oi...", weight, before.matrix)
    shift = None if before.shift is None else weight @ before.shift
    return Affine(matrix, _added(shift, bias))


def _through_window(
    node: Conv2dNode, weight: Tensor, bias: Tensor | None, before: Affine, host: LayerGeometry
) -> Affine | None:
    names = ("kernel_size", "stride", "padding", "dilation", "padding_mode")
    if any(getattr(node, name) != getattr(host, name) for name in names):
        return None
    if before.matrix is None or before.matrix.dim() != 2:
        return None
    padded_with_zeros = node.padding_mode == "zeros" and node.padding != (0, 0)
    if before.shift is not None and padded_with_zeros:
        return None
    matrix = torch.einsum("omkl,mi->oikl", weight, before.matrix)
    shift = None if before.shift is None else weight.sum((2, 3)) @ before.shift
    return Affine(matrix, _added(shift, bias))


def _added(shift: Tensor | None, bias: Tensor | None) -> Tensor | None:
    if shift is None or bias is None:
        return bias if shift is None else shift
    return shift + bias


def _is_pointwise(window: Conv2dNode | LayerGeometry) -> bool:
    return (
        window.kernel_size == (1, 1)
        and window.stride == (1, 1)
        and window.padding in ((0, 0), "same")
    )


def _device(module: nn.Module) -> torch.device | None:
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device
