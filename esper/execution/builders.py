"""From a bound graph to a trainable module: an fx graph over plain torch modules.

Each operation has its builder in a constant table; nothing is looked up by name in torch, and
nothing in a graph is evaluated. The result depends on torch alone: it deep-copies, pickles, and
its `code` can be written out as it stands.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from copy import copy

import torch
from torch import fx, nn

from esper.contracts.blueprints import Graph, KernelTarget, Node, infer, reads_producer
from esper.contracts.ir import (
    ActivationKind,
    ActivationNode,
    AddNode,
    AvgPool2dNode,
    Conv2dNode,
    DropoutNode,
    InputNode,
    LinearNode,
    MaxPool2dNode,
    MultiplyNode,
    ZerosNode,
)

__all__ = [
    "DTYPES",
    "build",
    "cloned",
    "draw_weights",
    "parameter_shapes",
    "reads_producer",
    "skeleton",
    "submodule_name",
]

DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

Shapes = Mapping[str, tuple[int, ...]]


def build(bound: Graph, target: KernelTarget, *, generator_seed: int) -> fx.GraphModule:
    """The module of a bound graph, with `target`'s dtype and device, in train mode.

    Its forward takes the host layer's input, or the producer's where `reads_producer(bound)`, with
    any batch dimensions in front, and gives a tensor of the host's output shape. How its weights
    are drawn, `draw_weights` says.

    Raises:
        BlueprintError: the graph is not bound, doesn't fit the target, or is over a cap.
    """
    module = cloned(skeleton(bound, target), target.device)
    draw_weights(module, bound, generator_seed)
    return module


def skeleton(bound: Graph, target: KernelTarget) -> fx.GraphModule:
    """The module of a bound graph without its weights, which lie on the meta device.

    Raises:
        BlueprintError: as `build`.
    """
    shapes = infer(bound, target).shapes
    root = nn.Module()
    graph = fx.Graph()
    source = graph.placeholder("x", type_expr=torch.Tensor)
    values: dict[str, fx.Node] = {}
    for node in bound.nodes:
        if isinstance(node, InputNode):
            values[node.id] = source
        elif isinstance(node, AddNode | MultiplyNode):
            values[node.id] = _combine(graph, node, values)
        elif isinstance(node, ZerosNode):
            values[node.id] = _zeros(graph, values[node.input], target)
        else:
            module = _MODULES[node.op](node, shapes).to(DTYPES[target.dtype])
            root.add_module(submodule_name(node.id), module)
            values[node.id] = graph.call_module(submodule_name(node.id), (values[node.input],))
    graph.output(values[bound.output])
    graph.lint()
    module = fx.GraphModule(root, graph, class_name="Kernel")
    # fx's own call adds two frames to every forward, to print generated code in a traceback.
    type(module).__call__ = nn.Module.__call__  # type: ignore[method-assign]
    return module


def cloned(template: fx.GraphModule, device: str) -> fx.GraphModule:
    """A module like `template` with parameters of its own, uninitialised, on `device`.

    Some hundred times faster than a deep copy: generated code and class are shared.
    """
    clone = _cloned(template, device)
    assert isinstance(clone, fx.GraphModule)
    return clone


def _cloned(module: nn.Module, device: str) -> nn.Module:
    clone = object.__new__(type(module))
    # Hooks and the like are the clone's own; what they hold, generated code too, is shared.
    clone.__dict__.update(
        {
            name: copy(value) if isinstance(value, dict | set) else value
            for name, value in module.__dict__.items()
        }
    )
    clone.__dict__["_parameters"] = {
        name: None
        if parameter is None
        else nn.Parameter(torch.empty_like(parameter, device=device))
        for name, parameter in module._parameters.items()
    }
    clone.__dict__["_modules"] = {
        name: None if part is None else _cloned(part, device)
        for name, part in module._modules.items()
    }
    return clone


def parameter_shapes(bound: Graph, target: KernelTarget) -> dict[str, tuple[int, ...]]:
    """The names and shapes of the parameters that `build` makes, without allocating them.

    Raises:
        BlueprintError: as `build`.
    """
    shapes = infer(bound, target).shapes
    return {
        f"{submodule_name(node.id)}.{name}": tuple(parameter.shape)
        for node in bound.nodes
        if isinstance(node, LinearNode | Conv2dNode)
        for name, parameter in _MODULES[node.op](node, shapes).named_parameters()
    }


def submodule_name(node_id: str) -> str:
    """The name of a node's module in what `build` makes; no nn.Module attribute begins so."""
    return f"op_{node_id}"


def _linear(node: Node, shapes: Shapes) -> nn.Module:
    assert isinstance(node, LinearNode)
    inputs, outputs = shapes[node.input][-1], shapes[node.id][-1]
    return nn.Linear(inputs, outputs, bias=node.bias, device="meta")


def _conv2d(node: Node, shapes: Shapes) -> nn.Module:
    assert isinstance(node, Conv2dNode)
    assert not isinstance(node.kernel_size, str)
    return nn.Conv2d(
        shapes[node.input][-3],
        shapes[node.id][-3],
        node.kernel_size,
        stride=node.stride,
        padding=node.padding,
        dilation=node.dilation,
        groups=node.groups,
        bias=node.bias,
        padding_mode=node.padding_mode,
        device="meta",
    )


def _activation(node: Node, _: Shapes) -> nn.Module:
    assert isinstance(node, ActivationNode)
    assert node.kind != "traced"
    return _ACTIVATIONS[node.kind](node)


def _dropout(node: Node, _: Shapes) -> nn.Module:
    assert isinstance(node, DropoutNode)
    return nn.Dropout(node.p)


def _max_pool2d(node: Node, _: Shapes) -> nn.Module:
    assert isinstance(node, MaxPool2dNode)
    return nn.MaxPool2d(
        node.kernel_size,
        stride=node.stride,
        padding=node.padding,
        dilation=node.dilation,
        ceil_mode=node.ceil_mode,
    )


def _avg_pool2d(node: Node, _: Shapes) -> nn.Module:
    assert isinstance(node, AvgPool2dNode)
    return nn.AvgPool2d(
        node.kernel_size,
        stride=node.stride,
        padding=node.padding,
        ceil_mode=node.ceil_mode,
        count_include_pad=node.count_include_pad,
        divisor_override=node.divisor_override,
    )


_ACTIVATIONS: Mapping[ActivationKind, Callable[[ActivationNode], nn.Module]] = {
    "relu": lambda _: nn.ReLU(),
    "gelu": lambda node: nn.GELU(approximate=node.approximate or "none"),
    "silu": lambda _: nn.SiLU(),
    "tanh": lambda _: nn.Tanh(),
    "sigmoid": lambda _: nn.Sigmoid(),
    "leaky_relu": lambda node: nn.LeakyReLU(_given(node.negative_slope, 0.01)),
    "elu": lambda node: nn.ELU(_given(node.alpha, 1.0)),
    "identity": lambda _: nn.Identity(),
}

_MODULES: Mapping[str, Callable[[Node, Shapes], nn.Module]] = {
    "linear": _linear,
    "conv2d": _conv2d,
    "activation": _activation,
    "dropout": _dropout,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
}

_COMBINATIONS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "add": operator.add,
    "multiply": operator.mul,
}


def _given(value: float | None, default: float) -> float:
    return default if value is None else value


def _combine(
    graph: fx.Graph, node: AddNode | MultiplyNode, values: Mapping[str, fx.Node]
) -> fx.Node:
    result = values[node.inputs[0]]
    for name in node.inputs[1:]:
        result = graph.call_function(_COMBINATIONS[node.op], (result, values[name]))
    return result


def _zeros(graph: fx.Graph, source: fx.Node, target: KernelTarget) -> fx.Node:
    """Zeros of the shape that the host gives for whatever input arrives.

    The shape is computed as the graph runs: a convolutional model may see other image sizes than
    the probe's. Multiplying the input by zero would do, were it not for infinities.
    """
    layer = target.layer
    size = graph.call_method("size", (source,))
    if layer.kind == "Linear":
        batch = graph.call_function(operator.getitem, (size, slice(None, -1)))
        return _new_zeros(graph, source, batch, (layer.outputs,))
    assert layer.kernel_size is not None
    extents: list[fx.Node] = []
    for axis in (0, 1):
        reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1)
        pad = reach if layer.padding == "same" else 2 * layer.padding[axis]
        extent = graph.call_function(operator.getitem, (size, axis - 2))
        extent = graph.call_function(operator.add, (extent, pad - reach - 1))
        extent = graph.call_function(operator.floordiv, (extent, layer.stride[axis]))
        extents.append(graph.call_function(operator.add, (extent, 1)))
    batch = graph.call_function(operator.getitem, (size, slice(None, -3)))
    return _new_zeros(graph, source, batch, (layer.outputs, *extents))


def _new_zeros(
    graph: fx.Graph, source: fx.Node, batch: fx.Node, sizes: tuple[fx.Node | int, ...]
) -> fx.Node:
    shape = graph.call_function(operator.add, (batch, sizes))
    return graph.call_method("new_zeros", (source, shape))


@torch.no_grad()
def draw_weights(module: nn.Module, bound: Graph, generator_seed: int) -> None:
    """Give every parameter of a built module its initial value, in the order of the nodes.

    Weights follow torch's own law for linear and convolutional layers, Kaiming-uniform with
    a = sqrt(5), drawn on the CPU from a generator of their own, so that a seed gives equal weights
    on every device and the global generator stays untouched; `init: zero` gives zeros.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    for node in bound.nodes:
        if isinstance(node, LinearNode | Conv2dNode):
            _draw(module._modules[submodule_name(node.id)], node, generator)


def _draw(
    part: nn.Module | None, node: LinearNode | Conv2dNode, generator: torch.Generator
) -> None:
    assert isinstance(part, nn.Linear | nn.Conv2d)
    bound = 1 / math.sqrt(math.prod(part.weight.shape[1:]))
    for parameter in part.parameters():
        if node.init == "zero":
            parameter.zero_()
        else:
            # sqrt(6 / (1 + 5) / fan_in): the weight's Kaiming bound and torch's bias bound agree.
            wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
            drawn = torch.empty(parameter.shape, dtype=wide)
            parameter.copy_(drawn.uniform_(-bound, bound, generator=generator))
