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
    AffineNode,
    AvgPool2dNode,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    EmbeddingNode,
    InputNode,
    LinearNode,
    MaxPool2dNode,
    inputs_of,
    source_of,
)
from esper.contracts.values import Value, values_of
from esper.execution.operations import Tracing, operation

__all__ = [
    "DTYPES",
    "WeightedNode",
    "affine_names",
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

Values = Mapping[str, Value]
WeightedNode = LinearNode | Conv1dNode | Conv2dNode | EmbeddingNode | AffineNode


def build(bound: Graph, target: KernelTarget, *, generator_seed: int) -> fx.GraphModule:
    """The module of a bound graph, with `target`'s dtype and device, in train mode.

    Its forward takes what `source_of(bound)` says, the host layer's input or output or its
    producer's input, with any batch dimensions in front, and gives a tensor of the host's output
    shape. How its weights are drawn, `draw_weights` says.

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
    infer(bound, target)  # refuses what is over a cap
    values = values_of(bound, target)
    root, graph = nn.Module(), fx.Graph()
    source = graph.placeholder("x", type_expr=torch.Tensor)
    tracing = Tracing(graph, target, DTYPES[target.dtype], source_of(bound), values)
    for node in bound.nodes:
        name = submodule_name(node.id)
        if isinstance(node, InputNode):
            tracing.made[node.id] = source
        elif node.op in _MODULES:
            root.add_module(name, _MODULES[node.op](node, values).to(tracing.dtype))
            before = tracing.made[inputs_of(node)[0]]
            tracing.made[node.id] = graph.call_module(name, (before,))
        elif isinstance(node, AffineNode):
            parts = []
            for name, shape in zip(
                affine_names(node.id), _affine_shapes(node, values), strict=True
            ):
                empty = torch.empty(shape, dtype=tracing.dtype, device="meta")
                root.register_parameter(name, nn.Parameter(empty))
                parts.append(graph.get_attr(name))
            scaled = tracing.call(operator.mul, tracing.made[node.input], parts[0])
            tracing.made[node.id] = tracing.call(operator.add, scaled, parts[1])
        else:
            tracing.made[node.id] = operation(node, tracing)
    graph.output(tracing.made[bound.output])
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
    infer(bound, target)  # refuses what is over a cap
    values = values_of(bound, target)
    shapes: dict[str, tuple[int, ...]] = {}
    for node in bound.nodes:
        if isinstance(node, AffineNode):
            own = _affine_shapes(node, values)
            shapes |= dict(zip(affine_names(node.id), own, strict=True))
        elif isinstance(node, WeightedNode):
            for name, parameter in _MODULES[node.op](node, values).named_parameters():
                shapes[f"{submodule_name(node.id)}.{name}"] = tuple(parameter.shape)
    return shapes


def submodule_name(node_id: str) -> str:
    """The name of a node's module in what `build` makes; no nn.Module attribute begins so."""
    return f"op_{node_id}"


def affine_names(node_id: str) -> tuple[str, str]:
    """The names of an affine node's scale and shift in what `build` makes.

    They are parameters of the module itself: each step to a submodule costs as much time as
    scaling a small output.
    """
    return f"scale_{node_id}", f"shift_{node_id}"


def _linear(node: Node, values: Values) -> nn.Module:
    assert isinstance(node, LinearNode)
    inputs, outputs = values[node.input].channels, values[node.id].channels
    return nn.Linear(inputs, outputs, bias=node.bias, device="meta")


def _convolution(node: Node, values: Values) -> nn.Module:
    assert isinstance(node, Conv1dNode | Conv2dNode)
    assert not isinstance(node.kernel_size, str)
    return (nn.Conv1d if isinstance(node, Conv1dNode) else nn.Conv2d)(
        values[node.input].channels,
        values[node.id].channels,
        node.kernel_size,  # type: ignore[arg-type]
        stride=node.stride,  # type: ignore[arg-type]
        padding=node.padding,  # type: ignore[arg-type]
        dilation=node.dilation,  # type: ignore[arg-type]
        groups=node.groups,
        bias=node.bias,
        padding_mode=node.padding_mode,
        device="meta",
    )


def _embedding(node: Node, values: Values) -> nn.Module:
    assert isinstance(node, EmbeddingNode)
    assert isinstance(node.rows, int)
    return nn.Embedding(node.rows, values[node.id].channels, device="meta")


def _affine_shapes(node: AffineNode, values: Values) -> tuple[tuple[int, ...], tuple[int, ...]]:
    value = values[node.id]
    shape = (value.channels, *(1,) * (-1 - value.axis))
    return shape, shape


def _dropout(node: Node, _: Values) -> nn.Module:
    assert isinstance(node, DropoutNode)
    return nn.Dropout(node.p)


def _max_pool2d(node: Node, _: Values) -> nn.Module:
    assert isinstance(node, MaxPool2dNode)
    return nn.MaxPool2d(
        node.kernel_size,
        stride=node.stride,
        padding=node.padding,
        dilation=node.dilation,
        ceil_mode=node.ceil_mode,
    )


def _avg_pool2d(node: Node, _: Values) -> nn.Module:
    assert isinstance(node, AvgPool2dNode)
    return nn.AvgPool2d(
        node.kernel_size,
        stride=node.stride,
        padding=node.padding,
        ceil_mode=node.ceil_mode,
        count_include_pad=node.count_include_pad,
        divisor_override=node.divisor_override,
    )


_MODULES: Mapping[str, Callable[[Node, Values], nn.Module]] = {
    "linear": _linear,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "embedding": _embedding,
    "dropout": _dropout,
    "max_pool2d": _max_pool2d,
    "avg_pool2d": _avg_pool2d,
}


@torch.no_grad()
def draw_weights(module: nn.Module, bound: Graph, generator_seed: int) -> None:
    """Give every parameter of a built module its initial value, in the order of the nodes.

    Weights follow torch's own laws: for linear and convolutional layers Kaiming-uniform with
    a = sqrt(5), for a table the standard normal, for an affine node ones and zeros; `init: zero`
    gives zeros, and `gradient` begins as the default does. They are drawn on the CPU from a
    generator of their own, so that a seed gives equal weights on every device and the global
    generator stays untouched.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    for node in bound.nodes:
        if isinstance(node, AffineNode):
            scale, shift = map(module.get_parameter, affine_names(node.id))
            scale.fill_(node.init != "zero")
            shift.zero_()
        elif isinstance(node, WeightedNode):
            part = module._modules[submodule_name(node.id)]
            assert part is not None
            for parameter in part.parameters():
                if node.init == "zero":
                    parameter.zero_()
                else:
                    parameter.copy_(_drawn(node, part, parameter, generator))


def _drawn(
    node: Node, part: nn.Module, parameter: nn.Parameter, generator: torch.Generator
) -> torch.Tensor:
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    drawn = torch.empty(parameter.shape, dtype=wide)
    if isinstance(node, EmbeddingNode):
        return drawn.normal_(generator=generator)
    weight = part._parameters["weight"]
    assert weight is not None
    # sqrt(6 / (1 + 5) / fan_in): the weight's Kaiming bound and torch's bias bound agree.
    bound = 1 / math.sqrt(math.prod(weight.shape[1:]))
    return drawn.uniform_(-bound, bound, generator=generator)
