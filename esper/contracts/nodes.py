"""The nodes of a blueprint's graph: named operations with their sizes, as data.

A *host layout* has the positions where the host layer has them: in front of the channels for
Linear, LayerNorm and Embedding, behind them for convolutions and BatchNorm2d. A *vector* has
channels and no positions; a *sequence* is (positions, channels) whatever the host.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from esper.contracts.base import Contract


def _doubled(value: object) -> object:
    """A plain integer as the pair that torch makes of it; anything else unchanged."""
    return (value, value) if isinstance(value, int) and not isinstance(value, bool) else value


def _single(value: object) -> object:
    """A plain integer as the 1-tuple that torch makes of it; anything else unchanged."""
    return (value,) if isinstance(value, int) and not isinstance(value, bool) else value


def _zeros_for_valid(value: object) -> object:
    """Padding "valid" as the zeros it means, so that equal geometries have equal digests."""
    return (0, 0) if value == "valid" else _doubled(value)


def _zero_for_valid(value: object) -> object:
    return (0,) if value == "valid" else _single(value)


NodeId = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
Positive = Annotated[int, Field(strict=True, ge=1, le=1_000_000)]
NonNegative = Annotated[int, Field(strict=True, ge=0, le=1_000_000)]
Pair = Annotated[tuple[Positive, Positive], BeforeValidator(_doubled)]
PaddingPair = Annotated[tuple[NonNegative, NonNegative], BeforeValidator(_doubled)]
Padding = Annotated[
    tuple[NonNegative, NonNegative] | Literal["same"], BeforeValidator(_zeros_for_valid)
]
Single = Annotated[tuple[Positive], BeforeValidator(_single)]
PaddingSingle = Annotated[tuple[NonNegative] | Literal["same"], BeforeValidator(_zero_for_valid)]
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]
Size = Positive | Literal["in", "out"]
Real = Annotated[float, Field(allow_inf_nan=False)]
Flag = Annotated[bool, Field(strict=True)]
Shape = Annotated[tuple[Positive, ...], Field(min_length=1, max_length=8)]
LayerKind = Literal["Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d", "Embedding"]
LayerRole = Literal["host", "producer"]
GraphSource = Literal["host", "producer", "output"]
Initialisation = Literal["default", "zero", "gradient"]
"""How a layer's weights begin: by torch's own law, as zeros, or as the directions in which the
loss falls fastest, the leading right singular vectors of the cross-covariance between the loss
gradient at the host's output and the layer's input (GradMax, Evci et al. 2022), where those were
measured, and by torch's own law where they were not."""
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
    """What enters the graph.

    `source` "host" is the host layer's input, "producer" the input of the layer that feeds it,
    "output" the host layer's own output, before any seed is added.
    """

    op: Literal["input"] = "input"
    id: NodeId
    source: GraphSource = "host"


class LinearNode(Contract):
    """A dense layer over the last dimension; `features` is its output width.

    Beside convolutions and BatchNorm2d, whose channels are not last, only on a vector or sequence.
    """

    op: Literal["linear"] = "linear"
    id: NodeId
    input: NodeId
    features: Size
    bias: Flag = True
    init: Initialisation = "default"


class Conv1dNode(Contract):
    """A 1-d convolution to `channels`; all as for conv2d, along one axis."""

    op: Literal["conv1d"] = "conv1d"
    id: NodeId
    input: NodeId
    channels: Size
    kernel_size: Single | Literal["host"]
    stride: Single = (1,)
    padding: PaddingSingle = "same"
    dilation: Single = (1,)
    groups: Positive = 1
    padding_mode: PaddingMode = "zeros"
    bias: Flag = True
    init: Initialisation = "default"

    @model_validator(mode="after")
    def _window_is_whole(self) -> Self:
        _refuse_torn_window(self)
        return self


class Conv2dNode(Contract):
    """A 2-d convolution to `channels`.

    `kernel_size` "host" takes kernel, stride, padding, dilation and padding mode from the host,
    which for BatchNorm2d are those of a pointwise window; a number means a window of that size
    with the other fields as given, by default stride 1 and an output as large as the input.
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
        _refuse_torn_window(self)
        return self


def _refuse_torn_window(node: Conv1dNode | Conv2dNode) -> None:
    if node.kernel_size == "host":
        fields = type(node).model_fields
        window = ("stride", "padding", "dilation", "padding_mode")
        if any(getattr(node, name) != fields[name].default for name in window):
            raise ValueError(
                "kernelSize: got 'host' together with stride, padding, dilation or "
                "paddingMode; allowed: 'host' alone, which takes them all from the host"
            )
    elif node.padding == "same" and set(node.stride) != {1}:
        raise ValueError(f"padding: got 'same' with stride {node.stride}; allowed: stride 1")


class EmbeddingNode(Contract):
    """A table with a row of `features` for each index of an Embedding host's input."""

    op: Literal["embedding"] = "embedding"
    id: NodeId
    input: NodeId
    rows: Size = "in"
    features: Size
    init: Literal["default", "zero"] = "default"


class LayerNode(Contract):
    """A layer of the same kind and geometry as the host or the producer, with `outputs` units.

    `bias` left out means as the model's layer has it; `pointwise` keeps the kind but looks at one
    position at a time (a 1 by 1 convolution; a dense layer on what an embedding gives), as beside
    LayerNorm and BatchNorm2d it always does; `depthwise` filters each channel by itself. The
    inputs are as many as arrive.
    """

    op: Literal["layer"] = "layer"
    id: NodeId
    input: NodeId
    like: LayerRole
    outputs: Size
    pointwise: Flag = False
    depthwise: Flag | None = None
    bias: Flag | None = None
    init: Initialisation = "default"

    @model_validator(mode="after")
    def _one_window(self) -> Self:
        if self.pointwise and self.depthwise:
            raise ValueError("depthwise: got true together with pointwise; allowed: one of them")
        return self


class AffineNode(Contract):
    """A scale and a shift of its own for each channel; at birth 1 and 0, or both 0."""

    op: Literal["affine"] = "affine"
    id: NodeId
    input: NodeId
    init: Literal["default", "zero"] = "default"


class MeanNode(Contract):
    """The mean over all positions, a vector; the host layout must have a position."""

    op: Literal["mean"] = "mean"
    id: NodeId
    input: NodeId


class GateNode(Contract):
    """`value` times `gate`, a vector with one factor for each channel of `value`."""

    op: Literal["gate"] = "gate"
    id: NodeId
    value: NodeId
    gate: NodeId


class SequenceNode(Contract):
    """The positions of a host layout in one row, in front of the channels."""

    op: Literal["sequence"] = "sequence"
    id: NodeId
    input: NodeId


class AttentionNode(Contract):
    """Scaled dot-product attention of `heads` heads among the positions of a sequence.

    The input holds queries, keys and values in this order, a third of its channels each. Vaswani
    et al. 2017, "Attention is all you need"; as a layer over the positions of an image, Wang et
    al. 2018, "Non-local neural networks".
    """

    op: Literal["attention"] = "attention"
    id: NodeId
    input: NodeId
    heads: Positive = 1


class SpreadNode(Contract):
    """A sequence laid out in the host layout again, with the positions of node `positions`."""

    op: Literal["spread"] = "spread"
    id: NodeId
    input: NodeId
    positions: NodeId


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
    | Conv1dNode
    | Conv2dNode
    | EmbeddingNode
    | LayerNode
    | AffineNode
    | ActivationNode
    | DropoutNode
    | MaxPool2dNode
    | AvgPool2dNode
    | AddNode
    | MultiplyNode
    | ZerosNode
    | MeanNode
    | GateNode
    | SequenceNode
    | AttentionNode
    | SpreadNode,
    Field(discriminator="op"),
]


def inputs_of(node: Node) -> tuple[str, ...]:
    """The ids that `node` reads, in order."""
    match node:
        case InputNode():
            return ()
        case AddNode() | MultiplyNode():
            return node.inputs
        case GateNode():
            return (node.value, node.gate)
        case SpreadNode():
            return (node.input, node.positions)
        case _:
            return (node.input,)
