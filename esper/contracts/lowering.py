"""Fitting a blueprint to one layer, and its price: pure arithmetic, no torch.

`bind` turns symbolic sizes into numbers, `infer` counts what the result costs and enforces the
caps before anything is allocated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from esper.contracts.base import Contract, digest_of
from esper.contracts.ir import (
    MAX_ACTIVATION_ELEMENTS,
    MAX_FLOPS,
    MAX_PARAMETERS,
    ActivationNode,
    AffineNode,
    AttentionNode,
    AvgPool2dNode,
    BlueprintDocument,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    EmbeddingNode,
    Graph,
    InputNode,
    KernelTarget,
    LayerGeometry,
    LayerNode,
    LayerRole,
    LinearNode,
    MaxPool2dNode,
    Node,
    inputs_of,
    source_of,
)
from esper.contracts.shapes import POSITION_AXES, Sizes, host_shape
from esper.contracts.values import Value, producer_of, refuse_other_kind, value_of, values_of
from esper.errors import BlueprintError


class GraphCost(Contract):
    """What a bound graph costs.

    `flops` counts 2 per multiply-add of layers with weights, per sample: the forward product, the
    weight gradient, and the input gradient where a parameter lies upstream of the node, which is
    what autograd computes when the graph's own input needs no gradient. An attention's two
    products count likewise, with two gradients each; what a fused kernel computes again does not
    count, nor does a table that is looked up. `activation_elements` sums the sizes of all nodes'
    outputs per sample, and of attention's scores; `shapes` has each output without the batch.
    """

    parameters: int
    flops: int
    activation_elements: int
    shapes: dict[str, tuple[int, ...]]


def lower(document: BlueprintDocument, target: KernelTarget) -> Graph:
    """The document's graph bound to `target`.

    Raises:
        BlueprintError: the host is of a kind that the document doesn't name, or `bind` refuses.
    """
    if target.layer.kind not in document.hosts:
        raise BlueprintError("spec.hosts", target.layer.kind, f"{', '.join(document.hosts)} hosts")
    return bind(document.graph, target)


def bind(graph: Graph, target: KernelTarget) -> Graph:
    """`graph` with symbolic sizes replaced by numbers and the traced chain put in its place.

    Binding a bound graph again changes nothing.

    Raises:
        BlueprintError: a size, a shape or the producer doesn't fit the target; the field is a path
            such as `spec.graph.nodes[3].features`.
    """
    if host_shape(target.layer, target.input_shape) != target.output_shape:
        raise BlueprintError(
            "target.outputShape",
            target.output_shape,
            f"what the layer makes of {target.input_shape}, "
            f"{host_shape(target.layer, target.input_shape)}",
        )
    taken = {node.id for node in graph.nodes}
    nodes: list[Node] = []
    values: dict[str, Value] = {}
    for index, node in enumerate(graph.nodes):
        path = f"spec.graph.nodes[{index}]"
        for concrete in _concrete(node, values, target, taken, path):
            values[concrete.id] = value_of(concrete, values, target, path)
            nodes.append(concrete)
    found = values[graph.output]
    if (found.shape, found.layout) != (target.output_shape, "host"):
        raise BlueprintError(
            "spec.graph.output",
            f"{graph.output!r} of shape {found.shape}",
            f"the host's output shape, {target.output_shape}",
        )
    return Graph(nodes=tuple(nodes), output=graph.output)


def input_shape(graph: Graph, target: KernelTarget) -> Sizes:
    """The shape of what the graph reads, without batch.

    Raises:
        BlueprintError: the graph reads a producer that the target lacks.
    """
    match source_of(graph):
        case "host":
            return target.input_shape
        case "output":
            return target.output_shape
        case "producer":
            return producer_of(target, "target.producer").input_shape


def infer(bound: Graph, target: KernelTarget) -> GraphCost:
    """The parameters, FLOPs, activation elements and shapes of a bound graph.

    Raises:
        BlueprintError: the graph is not bound, doesn't fit the target, or is over a cap.
    """
    values = values_of(bound, target)
    parameters = flops = elements = 0
    learns: dict[str, bool] = {}
    for node in bound.nodes:
        value = values[node.id]
        upstream = any(learns[name] for name in inputs_of(node))
        weights, bias = _weights(node, values)
        parameters += weights + bias
        elements += math.prod(value.shape)
        learns[node.id] = upstream or weights > 0
        if isinstance(node, AttentionNode):
            positions = value.num_positions
            elements += node.heads * positions**2
            flops += 2 * 2 * positions**2 * value.channels * (3 if upstream else 1)
        elif not isinstance(node, EmbeddingNode):
            # Every weight is used once at each position, forward and in either gradient.
            flops += 2 * weights * value.num_positions * (3 if upstream else 2)
    for name, came, cap in (
        ("parameters", parameters, MAX_PARAMETERS),
        ("FLOPs per sample", flops, MAX_FLOPS),
        ("activation elements per sample", elements, MAX_ACTIVATION_ELEMENTS),
    ):
        if came > cap:
            raise BlueprintError("spec.graph", f"{came} {name}", f"at most {cap}")
    return GraphCost(
        parameters=parameters,
        flops=flops,
        activation_elements=elements,
        shapes={name: value.shape for name, value in values.items()},
    )


def kernel_id(document_digest: str, target: KernelTarget) -> str:
    """The identity of a blueprint compiled for a target, 40 hex characters.

    The digest and the target determine the bound graph. The producer's name stays out, so that
    equal places in a model, and in other models, share one kernel.
    """
    wire = target.model_dump(mode="json", by_alias=True, exclude={"producer": {"name"}})
    return digest_of([document_digest, wire])[:40]


def _concrete(
    node: Node, values: Mapping[str, Value], target: KernelTarget, taken: set[str], path: str
) -> Sequence[Node]:
    """The nodes that stand for `node` once the target is known; the last one keeps its id."""
    match node:
        case InputNode(source="producer"):
            _refuse_unfit_producer(target, path)
            return (node,)
        case LinearNode():
            return (node.model_copy(update={"features": _size(node.features, target.layer)}),)
        case EmbeddingNode():
            sizes = {
                name: _size(getattr(node, name), target.layer) for name in ("rows", "features")
            }
            return (node.model_copy(update=sizes),)
        case Conv1dNode() | Conv2dNode():
            update: dict[str, object] = {"channels": _size(node.channels, target.layer)}
            if node.kernel_size == "host":
                refuse_other_kind(node, target.layer.kind, path)
                update |= _window(target.layer)
            return (node.model_copy(update=update),)
        case LayerNode():
            return (_layer(node, values[node.input], target, path),)
        case ActivationNode(kind="traced"):
            return _traced(node, target, taken, path)
        case _:
            return (node,)


def _size(size: int | str, layer: LayerGeometry) -> int:
    if isinstance(size, int):
        return size
    return layer.inputs if size == "in" else layer.outputs


def _window(layer: LayerGeometry) -> dict[str, object]:
    if layer.kernel_size is None:  # BatchNorm2d
        return _POINTWISE[POSITION_AXES[layer.kind]]
    return {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }


_POINTWISE: Mapping[int, dict[str, object]] = {
    axes: {"kernel_size": (1,) * axes, "padding": (0,) * axes} for axes in (1, 2)
}


def _layer(
    node: LayerNode, before: Value, target: KernelTarget, path: str
) -> LinearNode | Conv1dNode | Conv2dNode | EmbeddingNode:
    layer = _role(node.like, target, f"{path}.like")
    outputs = _size(node.outputs, layer)
    axes = POSITION_AXES[layer.kind]
    if node.depthwise and not axes:
        raise BlueprintError(f"{path}.depthwise", f"true for {layer.kind}", "convolutions only")
    fields = {
        "id": node.id,
        "input": node.input,
        "bias": layer.bias if node.bias is None else node.bias,
        "init": node.init,
    }
    if layer.kind == "Embedding" and not node.pointwise:
        if node.init == "gradient":
            raise BlueprintError(f"{path}.init", node.init, "default or zero for an Embedding")
        return EmbeddingNode(
            id=node.id, input=node.input, rows=layer.inputs, features=outputs, init=node.init
        )
    if not axes:
        return LinearNode.model_validate({**fields, "features": outputs})
    window = _POINTWISE[axes] if node.pointwise else _window(layer)
    groups = before.channels if node.depthwise else 1
    fields |= {"channels": outputs, "groups": groups, **window}
    return (Conv1dNode if axes == 1 else Conv2dNode).model_validate(fields)


def _role(role: LayerRole, target: KernelTarget, path: str) -> LayerGeometry:
    return target.layer if role == "host" else producer_of(target, path).layer


def _refuse_unfit_producer(target: KernelTarget, path: str) -> None:
    producer, host = producer_of(target, f"{path}.source").layer, target.layer
    if producer.kind != host.kind:
        raise BlueprintError(
            f"{path}.source", f"producer {producer.kind} of host {host.kind}", "one kind of layer"
        )
    if producer.groups != 1 or host.groups != 1:
        raise BlueprintError(
            f"{path}.source",
            f"groups {producer.groups} in the producer and {host.groups} in the host",
            "groups 1 in both: new units can't join grouped channels",
        )


def _traced(
    node: ActivationNode, target: KernelTarget, taken: set[str], path: str
) -> Sequence[Node]:
    chain = producer_of(target, f"{path}.kind").chain
    if not chain:
        return (ActivationNode(id=node.id, input=node.input, kind="identity"),)
    nodes: list[Node] = []
    before = node.input
    for position, op in enumerate(chain, start=1):
        name = node.id if position == len(chain) else _fresh(position, taken)
        fields = {**op.model_dump(), "id": name, "input": before}
        nodes.append(_CHAIN_NODES[op.op].model_validate(fields))
        before = name
    return nodes


_CHAIN_NODES: Mapping[
    str, type[ActivationNode] | type[DropoutNode] | type[MaxPool2dNode] | type[AvgPool2dNode]
] = {
    "activation": ActivationNode,
    "dropout": DropoutNode,
    "max_pool2d": MaxPool2dNode,
    "avg_pool2d": AvgPool2dNode,
}


def _fresh(position: int, taken: set[str]) -> str:
    name = next(
        name
        for suffix in range(len(taken) + 1)
        if (name := f"traced{position}" + (f"_{suffix}" if suffix else "")) not in taken
    )
    taken.add(name)
    return name


def _weights(node: Node, values: Mapping[str, Value]) -> tuple[int, int]:
    """The sizes of a concrete node's weight and bias."""
    value = values[node.id]
    match node:
        case LinearNode():
            return values[node.input].channels * value.channels, value.channels * node.bias
        case Conv1dNode(kernel_size=tuple(window)) | Conv2dNode(kernel_size=tuple(window)):
            inputs = values[node.input].channels // node.groups
            return inputs * value.channels * math.prod(window), value.channels * node.bias
        case EmbeddingNode(rows=int(rows)):
            return rows * value.channels, 0
        case AffineNode():
            return value.channels, value.channels
        case _:
            return 0, 0
