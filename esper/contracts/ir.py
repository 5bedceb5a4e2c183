"""The blueprint's intermediate representation: a small graph of named operations, as data.

A graph holds no code, no import path and no expression. Nodes name earlier nodes only, so it has no
cycle; every size is capped before anything is allocated. Sizes may be symbolic ("in", "out",
"host") until `esper.contracts.lowering.bind` fits the graph to one layer of one model.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from esper.contracts.base import Contract, canonical_json, digest_of

MAX_BYTES = 64 * 1024
MAX_NODES = 64
MAX_PARAMETERS = 50_000_000
MAX_FLOPS = 10_000_000_000
MAX_ACTIVATION_ELEMENTS = 100_000_000


def _doubled(value: object) -> object:
    """A plain integer as the pair that torch makes of it; anything else unchanged."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _zero_for_valid(value: object) -> object:
    """Padding "valid" as the zeros it means, so that equal geometries have equal digests."""
    return (0, 0) if value == "valid" else _doubled(value)


NodeId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Positive = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
NonNegative = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]
Pair = Annotated[tuple[Positive, Positive], BeforeValidator(_doubled)]
PaddingPair = Annotated[tuple[NonNegative, NonNegative], BeforeValidator(_doubled)]
Padding = Annotated[
    tuple[NonNegative, NonNegative] | Literal["same"], BeforeValidator(_zero_for_valid)
]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size = Positive | Literal["in", "out"]
Real = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Shape = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]
LayerKind = Literal["Linear", "Conv2d"]
LayerRole = Literal["host", "producer"]
Initialisation = Literal["default", "zero"]
ActivationKind = Literal["relu", "gelu", "silu", "tanh", "sigmoid", "leaky_relu", "elu", "identity"]
DataType = Literal["float32", "float64", "float16", "bfloat16"]


def _refuse_wide_padding(kernel: tuple[int, int], padding: tuple[int, int]) -> None:
    if any(2 * pad > size for pad, size in zip(padding, kernel, strict=True)):
        raise ValueError(f"padding: got {padding}; allowed: at most half of kernelSize {kernel}")


class ActivationOp(Contract):
    """An elementwise function.

    `negative_slope` belongs to leaky_relu (0.01), `alpha` to elu (1.0), `approximate` to gelu
    ("none"); torch's defaults, in brackets, hold where they are left out.
    """

    op: Literal["activation"] = "activation"
    kind: ActivationKind | Literal["traced"]
    negative_slope: Real | None = None
    alpha: Real | None = None
    approximate: Literal["none", "tanh"] | None = None

    @model_validator(mode="after")
    def _arguments_belong(self) -> Self:
        owners = {"negative_slope": "leaky_relu", "alpha": "elu", "approximate": "gelu"}
        for argument, owner in owners.items():
            if getattr(self, argument) is not None and self.kind != owner:
                raise ValueError(f"{argument}: got kind {self.kind!r}; allowed: kind {owner!r}")
        return self


class DropoutOp(Contract):
    """Dropout with probability `p`; the identity in eval mode."""

    op: Literal["dropout"] = "dropout"
    p: Annotated[float, Field(ge=0, lt=1)]


class MaxPool2dOp(Contract):
    """The maximum over windows; `stride` is the kernel size where left out."""

    op: Literal["max_pool2d"] = "max_pool2d"
    kernel_size: Pair
    stride: Pair | None = None
    padding: PaddingPair = (0, 0)
    dilation: Pair = (1, 1)
    ceil_mode: Flag = False

    @model_validator(mode="after")
    def _padding_fits(self) -> Self:
        _refuse_wide_padding(self.kernel_size, self.padding)
        return self


class AvgPool2dOp(Contract):
    """The mean over windows; `stride` is the kernel size where left out."""

    op: Literal["avg_pool2d"] = "avg_pool2d"
    kernel_size: Pair
    stride: Pair | None = None
    padding: PaddingPair = (0, 0)
    ceil_mode: Flag = False
    count_include_pad: Flag = True
    divisor_override: Positive | None = None

    @model_validator(mode="after")
    def _padding_fits(self) -> Self:
        _refuse_wide_padding(self.kernel_size, self.padding)
        return self


ChainOp = Annotated[ActivationOp | DropoutOp | MaxPool2dOp | AvgPool2dOp, Field(discriminator="op")]


class InputNode(Contract):
    """What enters the graph: the host layer's input, or the input of the layer that feeds it."""

    op: Literal["input"] = "input"
    id: NodeId
    source: LayerRole = "host"


class LinearNode(Contract):
    """A dense layer over the last dimension; `features` is its output width."""

    op: Literal["linear"] = "linear"
    id: NodeId
    input: NodeId
    features: Size
    bias: Flag = True
    init: Initialisation = "default"


class Conv2dNode(Contract):
    """A 2-d convolution to `channels`.

    `kernel_size` "host" takes kernel, stride, padding, dilation and padding mode from the host;
    a number means a window of that size with the other fields as given, by default stride 1 and
    an output as large as the input.
    """

    op: Literal["conv2d"] = "conv2d"
    id: NodeId
    input: NodeId
    channels: Size
    kernel_size: Pair | Literal["host"]
    stride: Pair = (1, 1)
    padding: Padding = "same"
    dilation: Pair = (1, 1)
    groups: Positive = 1
    padding_mode: PaddingMode = "zeros"
    bias: Flag = True
    init: Initialisation = "default"

    @model_validator(mode="after")
    def _window_is_whole(self) -> Self:
        window = (self.stride, self.padding, self.dilation, self.padding_mode)
        if self.kernel_size == "host":
            if window != ((1, 1), "same", (1, 1), "zeros"):
                raise ValueError(
                    "kernelSize: got 'host' together with stride, padding, dilation or "
                    "paddingMode; allowed: 'host' alone, which takes them all from the host"
                )
        elif self.padding == "same" and self.stride != (1, 1):
            raise ValueError(f"padding: got 'same' with stride {self.stride}; allowed: stride 1")
        return self


class LayerNode(Contract):
    """A layer of the same kind and geometry as the host or the producer, with `outputs` units.

    `bias` left out means as the model's layer has it; `pointwise` keeps the kind but looks at one
    position at a time (a 1 by 1 convolution). The inputs are as many as arrive.
    """

    op: Literal["layer"] = "layer"
    id: NodeId
    input: NodeId
    like: LayerRole
    outputs: Size
    pointwise: Flag = False
    bias: Flag | None = None
    init: Initialisation = "default"


class ActivationNode(ActivationOp):
    """An elementwise function of one node; "traced" is what lies between producer and host."""

    id: NodeId
    input: NodeId


class DropoutNode(DropoutOp):
    """Dropout of one node."""

    id: NodeId
    input: NodeId


class MaxPool2dNode(MaxPool2dOp):
    """Maximum pooling of one node."""

    id: NodeId
    input: NodeId


class AvgPool2dNode(AvgPool2dOp):
    """Mean pooling of one node."""

    id: NodeId
    input: NodeId


class AddNode(Contract):
    """The elementwise sum of nodes of one shape."""

    op: Literal["add"] = "add"
    id: NodeId
    inputs: Annotated[tuple[NodeId, ...], Field(min_length=2, max_length=16)]


class MultiplyNode(Contract):
    """The elementwise product of nodes of one shape."""

    op: Literal["multiply"] = "multiply"
    id: NodeId
    inputs: Annotated[tuple[NodeId, ...], Field(min_length=2, max_length=16)]


class ZerosNode(Contract):
    """Zeros of the host's output shape; `input` is a host input."""

    op: Literal["zeros"] = "zeros"
    id: NodeId
    input: NodeId


Node = Annotated[
    InputNode
    | LinearNode
    | Conv2dNode
    | LayerNode
    | ActivationNode
    | DropoutNode
    | MaxPool2dNode
    | AvgPool2dNode
    | AddNode
    | MultiplyNode
    | ZerosNode,
    Field(discriminator="op"),
]


def inputs_of(node: Node) -> tuple[str, ...]:
    """The ids that `node` reads, in order."""
    if isinstance(node, InputNode):
        return ()
    return node.inputs if isinstance(node, AddNode | MultiplyNode) else (node.input,)


class Graph(Contract):
    """Nodes in the order they are computed, and the id of the one that is the result."""

    schema_version: Literal[1] = 1
    nodes: Annotated[tuple[Node, ...], Field(min_length=1, max_length=MAX_NODES)]
    output: NodeId

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        where = {node.id: index for index, node in reversed(list(enumerate(self.nodes)))}
        for index, node in enumerate(self.nodes):
            if where[node.id] != index:
                raise ValueError(
                    f"nodes[{index}].id: got {node.id!r}, which nodes[{where[node.id]}] has; "
                    "allowed: an id of its own"
                )
            for name in inputs_of(node):
                if name not in where:
                    raise ValueError(f"nodes[{index}].input: got {name!r}; {_earlier(self, index)}")
                if where[name] >= index:
                    raise ValueError(
                        f"nodes[{index}].input: got {name!r}, which closes a cycle or comes "
                        f"later; {_earlier(self, index)}"
                    )
        if self.output not in where:
            raise ValueError(f"output: got {self.output!r}; {_earlier(self, len(self.nodes))}")
        self._refuse_unused()
        if len({node.source for node in self.nodes if isinstance(node, InputNode)}) > 1:
            raise ValueError(
                "nodes: got inputs from both host and producer; allowed: one source for a graph"
            )
        size = len(canonical_json(self.to_wire()))
        if size > MAX_BYTES:
            raise ValueError(f"graph: got {size} bytes; allowed: at most {MAX_BYTES}")
        return self

    def _refuse_unused(self) -> None:
        # A node beside the path to the output would hold parameters that never see a gradient.
        used = {self.output}
        for node in reversed(self.nodes):
            if node.id in used:
                used.update(inputs_of(node))
        for index, node in enumerate(self.nodes):
            if node.id not in used:
                raise ValueError(
                    f"nodes[{index}].id: got {node.id!r}, which the output does not depend on; "
                    "allowed: nodes on a path to the output"
                )


def _earlier(graph: Graph, index: int) -> str:
    names = ", ".join(node.id for node in graph.nodes[:index])
    return f"allowed: an earlier id ({names or 'none here; start with op input'})"


def reads_producer(graph: Graph) -> bool:
    """Whether the graph takes the producer's input instead of the host's."""
    return any(isinstance(node, InputNode) and node.source == "producer" for node in graph.nodes)


class LayerGeometry(Contract):
    """A layer's kind and sizes, as torch names them; the window fields are Conv2d's alone."""

    kind: LayerKind
    inputs: Positive
    outputs: Positive
    bias: Flag = True
    kernel_size: Pair | None = None
    stride: Pair = (1, 1)
    padding: Padding = (0, 0)
    dilation: Pair = (1, 1)
    groups: Positive = 1
    padding_mode: PaddingMode = "zeros"

    @model_validator(mode="after")
    def _kernel_matches_kind(self) -> Self:
        if (self.kernel_size is None) != (self.kind == "Linear"):
            raise ValueError(
                f"kernelSize: got {self.kernel_size} for {self.kind}; allowed: two numbers for "
                "Conv2d, none for Linear"
            )
        return self


class ProducerDescription(Contract):
    """The layer that feeds the host, and the operations traced between the two, in order.

    `input_shape` is the producer's input without the batch dimension. `name` serves people and
    does not enter a kernel's identity.
    """

    layer: LayerGeometry
    name: str
    input_shape: Shape
    chain: tuple[ChainOp, ...] = ()

    @model_validator(mode="after")
    def _chain_is_concrete(self) -> Self:
        if any(isinstance(op, ActivationOp) and op.kind == "traced" for op in self.chain):
            raise ValueError("chain: got kind 'traced'; allowed: the operations themselves")
        return self


class KernelTarget(Contract):
    """What a kernel is compiled for: one host layer, its shapes without batch, dtype and device.

    `dtype` is torch's name without the "torch." in front.
    """

    layer: LayerGeometry
    input_shape: Shape
    output_shape: Shape
    dtype: DataType = "float32"
    device: Annotated[str, Field(pattern=r"^[a-z]+(:[0-9]+)?$")] = "cpu"
    producer: ProducerDescription | None = None


class BlueprintDocument(Contract):
    """A blueprint: what kinds of layer may host it, and its graph."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
    description: Annotated[str, Field(max_length=1024)] = ""
    hosts: Annotated[tuple[LayerKind, ...], Field(min_length=1, max_length=2)]
    graph: Graph

    @property
    def digest(self) -> str:
        """SHA-256 of what the blueprint does; its name and description do not enter."""
        return digest_of({"hosts": sorted(set(self.hosts)), "graph": self.graph.to_wire()})
