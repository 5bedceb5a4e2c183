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
    AddNode,
    AvgPool2dNode,
    BlueprintDocument,
    Conv2dNode,
    DropoutNode,
    Graph,
    InputNode,
    KernelTarget,
    LayerGeometry,
    LayerKind,
    LayerNode,
    LayerRole,
    LinearNode,
    MaxPool2dNode,
    MultiplyNode,
    Node,
    ProducerDescription,
    ZerosNode,
    inputs_of,
)
from esper.contracts.shapes import (
    Sizes,
    convolved_shape,
    host_shape,
    pooled_shape,
)
from esper.errors import BlueprintError

_KINDS: dict[type[Contract], LayerKind] = {
    LinearNode: "Linear",
    Conv2dNode: "Conv2d",
    MaxPool2dNode: "Conv2d",
    AvgPool2dNode: "Conv2d",
}


class GraphCost(Contract):
    """What a bound graph costs.

    `flops` counts 2 per multiply-add of linear and conv2d nodes, per sample: the forward product,
    the weight gradient, and the input gradient where a parameter lies upstream of the node, which
    is what autograd computes when the graph's own input needs no gradient. `activation_elements`
    sums the sizes of all nodes' outputs per sample, `shapes` has each without the batch.
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
    shapes: dict[str, Sizes] = {}
    for index, node in enumerate(graph.nodes):
        path = f"spec.graph.nodes[{index}]"
        for concrete in _concrete(node, target, taken, path):
            shapes[concrete.id] = _shape(concrete, shapes, target, path)
            nodes.append(concrete)
    if shapes[graph.output] != target.output_shape:
        raise BlueprintError(
            "spec.graph.output",
            f"{graph.output!r} of shape {shapes[graph.output]}",
            f"the host's output shape, {target.output_shape}",
        )
    return Graph(nodes=tuple(nodes), output=graph.output)


def infer(bound: Graph, target: KernelTarget) -> GraphCost:
    """The parameters, FLOPs, activation elements and shapes of a bound graph.

    Raises:
        BlueprintError: the graph is not bound, doesn't fit the target, or is over a cap.
    """
    shapes: dict[str, Sizes] = {}
    parameters = flops = 0
    learns: dict[str, bool] = {}
    for index, node in enumerate(bound.nodes):
        path = f"spec.graph.nodes[{index}]"
        shapes[node.id] = _shape(node, shapes, target, path)
        upstream = any(learns[name] for name in inputs_of(node))
        weights, bias = _weights(node, shapes)
        parameters += weights + bias
        # Every weight is used once at each output position, forward and in either gradient.
        positions = _positions(node, shapes[node.id])
        flops += 2 * weights * positions * (3 if upstream else 2)
        learns[node.id] = upstream or weights > 0
    elements = sum(math.prod(shape) for shape in shapes.values())
    for name, came, cap in (
        ("parameters", parameters, MAX_PARAMETERS),
        ("FLOPs per sample", flops, MAX_FLOPS),
        ("activation elements per sample", elements, MAX_ACTIVATION_ELEMENTS),
    ):
        if came > cap:
            raise BlueprintError("spec.graph", f"{came} {name}", f"at most {cap}")
    return GraphCost(
        parameters=parameters, flops=flops, activation_elements=elements, shapes=shapes
    )


def kernel_id(document_digest: str, target: KernelTarget) -> str:
    """The identity of a blueprint compiled for a target, 40 hex characters.

    The digest and the target determine the bound graph. The producer's name stays out, so that
    equal places in a model, and in other models, share one kernel.
    """
    wire = target.model_dump(mode="json", by_alias=True, exclude={"producer": {"name"}})
    return digest_of([document_digest, wire])[:40]


def _concrete(node: Node, target: KernelTarget, taken: set[str], path: str) -> Sequence[Node]:
    """The nodes that stand for `node` once the target is known; the last one keeps its id."""
    match node:
        case InputNode(source="producer"):
            _refuse_unfit_producer(target, path)
            return (node,)
        case LinearNode():
            return (node.model_copy(update={"features": _size(node.features, target.layer)}),)
        case Conv2dNode():
            update: dict[str, object] = {"channels": _size(node.channels, target.layer)}
            if node.kernel_size == "host":
                _refuse_other_kind(node, target, path)
                update |= _window(target.layer)
            return (node.model_copy(update=update),)
        case LayerNode():
            return (_layer(node, target, path),)
        case ActivationNode(kind="traced"):
            return _traced(node, target, taken, path)
        case _:
            return (node,)


def _size(size: int | str, layer: LayerGeometry) -> int:
    if isinstance(size, int):
        return size
    return layer.inputs if size == "in" else layer.outputs


def _window(layer: LayerGeometry) -> dict[str, object]:
    return {
        "kernel_size": layer.kernel_size,
        "stride": layer.stride,
        "padding": layer.padding,
        "dilation": layer.dilation,
        "padding_mode": layer.padding_mode,
    }


def _layer(node: LayerNode, target: KernelTarget, path: str) -> LinearNode | Conv2dNode:
    layer = _role(node.like, target, f"{path}.like")
    outputs = _size(node.outputs, layer)
    bias = layer.bias if node.bias is None else node.bias
    if layer.kind == "Linear":
        return LinearNode(id=node.id, input=node.input, features=outputs, bias=bias, init=node.init)
    window = {"kernel_size": (1, 1), "padding": (0, 0)} if node.pointwise else _window(layer)
    return Conv2dNode.model_validate(
        {
            "id": node.id,
            "input": node.input,
            "channels": outputs,
            "bias": bias,
            "init": node.init,
            **window,
        }
    )


def _role(role: LayerRole, target: KernelTarget, path: str) -> LayerGeometry:
    return target.layer if role == "host" else _producer(target, path).layer


def _producer(target: KernelTarget, path: str) -> ProducerDescription:
    if target.producer is None:
        raise BlueprintError(
            path, "producer", "host here: no single layer was traced that feeds this one"
        )
    return target.producer


def _refuse_unfit_producer(target: KernelTarget, path: str) -> None:
    producer, host = _producer(target, f"{path}.source").layer, target.layer
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
    chain = _producer(target, f"{path}.kind").chain
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


def _refuse_other_kind(node: Node, target: KernelTarget, path: str) -> None:
    kind = _KINDS.get(type(node))
    if kind is not None and kind != target.layer.kind:
        raise BlueprintError(
            f"{path}.op", f"{node.op} on a {target.layer.kind} host", f"{kind} hosts for this op"
        )


def _shape(node: Node, shapes: Mapping[str, Sizes], target: KernelTarget, path: str) -> Sizes:
    """The shape of a concrete node's output, without batch, given those of earlier nodes."""
    _refuse_other_kind(node, target, path)
    match node:
        case InputNode():
            if node.source == "producer":
                return _producer(target, f"{path}.source").input_shape
            return target.input_shape
        case LinearNode(features=int(features)):
            return (*shapes[node.input][:-1], features)
        case Conv2dNode(channels=int(channels), kernel_size=tuple()):
            return convolved_shape(node, channels, shapes[node.input], path)
        case LinearNode() | Conv2dNode() | LayerNode() | ActivationNode(kind="traced"):
            raise BlueprintError(path, f"symbolic sizes in {node.op}", "a bound graph")
        case MaxPool2dNode() | AvgPool2dNode():
            return pooled_shape(node, shapes[node.input], path)
        case AddNode() | MultiplyNode():
            found = [shapes[name] for name in node.inputs]
            if len(set(found)) > 1:
                raise BlueprintError(f"{path}.inputs", f"shapes {found}", "one shape for all")
            return found[0]
        case ZerosNode():
            if node.input not in shapes or shapes[node.input] != target.input_shape:
                raise BlueprintError(
                    f"{path}.input", node.input, f"the host's input, {target.input_shape}"
                )
            return target.output_shape
        case ActivationNode() | DropoutNode():
            return shapes[node.input]


def _weights(node: Node, shapes: Mapping[str, Sizes]) -> tuple[int, int]:
    """The sizes of a concrete node's weight and bias."""
    match node:
        case LinearNode(features=int(features)):
            return shapes[node.input][-1] * features, features * node.bias
        case Conv2dNode(channels=int(channels), kernel_size=(int(height), int(width))):
            inputs = shapes[node.input][-3] // node.groups
            return inputs * channels * height * width, channels * node.bias
        case _:
            return 0, 0


def _positions(node: Node, shape: Sizes) -> int:
    """How many places of the output a concrete layer computes with the same weight."""
    return math.prod(shape[-2:] if isinstance(node, Conv2dNode) else shape[:-1])
