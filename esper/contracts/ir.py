"""The blueprint's intermediate representation: a small graph of named operations, as data.

A graph holds no code, no import path and no expression. Nodes name earlier nodes only, so it has no
cycle; every size is capped before anything is allocated. Sizes may be symbolic ("in", "out",
"host") until `esper.contracts.lowering.bind` fits the graph to one layer of one model. The nodes
themselves are in `esper.contracts.nodes`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic.config import JsonDict

from esper.contracts.base import Contract, canonical_json, digest_of
from esper.contracts.nodes import (
    ActivationKind,
    ActivationNode,
    ActivationOp,
    AddNode,
    AffineNode,
    AttentionNode,
    AvgPool2dNode,
    AvgPool2dOp,
    ChainOp,
    Conv1dNode,
    Conv2dNode,
    DataType,
    DropoutNode,
    DropoutOp,
    EmbeddingNode,
    Flag,
    GateNode,
    GraphSource,
    Initialisation,
    InputNode,
    LayerKind,
    LayerNode,
    LayerRole,
    LinearNode,
    MaxPool2dNode,
    MaxPool2dOp,
    MeanNode,
    MultiplyNode,
    Node,
    NodeId,
    NonNegative,
    PaddingMode,
    Positive,
    SequenceNode,
    Shape,
    SpreadNode,
    ZerosNode,
    inputs_of,
)

__all__ = [
    "MAX_ACTIVATION_ELEMENTS",
    "MAX_BYTES",
    "MAX_FLOPS",
    "MAX_NODES",
    "MAX_PARAMETERS",
    "ActivationKind",
    "ActivationNode",
    "ActivationOp",
    "AddNode",
    "AffineNode",
    "AttentionNode",
    "AvgPool2dNode",
    "AvgPool2dOp",
    "BlueprintDocument",
    "ChainOp",
    "Conv1dNode",
    "Conv2dNode",
    "DropoutNode",
    "DropoutOp",
    "EmbeddingNode",
    "GateNode",
    "Graph",
    "GraphSource",
    "Initialisation",
    "InputNode",
    "KernelTarget",
    "LayerGeometry",
    "LayerKind",
    "LayerNode",
    "LayerRole",
    "LinearNode",
    "MaxPool2dNode",
    "MaxPool2dOp",
    "MeanNode",
    "MultiplyNode",
    "Node",
    "ProducerDescription",
    "SequenceNode",
    "SpreadNode",
    "ZerosNode",
    "inputs_of",
    "reads_producer",
    "source_of",
]

MAX_BYTES = 64 * 1024
MAX_NODES = 64
MAX_PARAMETERS = 50_000_000
MAX_FLOPS = 10_000_000_000
MAX_ACTIVATION_ELEMENTS = 100_000_000


def _whole(value: object) -> object:
    """Refuse true and 1.0, which Python takes for 1, as any reader of JSON would."""
    if type(value) is not int:
        raise ValueError("not a whole number")
    return value


class Graph(Contract):
    """Nodes in the order they are computed, and the id of the one that is the result."""

    schema_version: Annotated[Literal[1], BeforeValidator(_whole)] = 1
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
        sources = dict.fromkeys(node.source for node in self.nodes if isinstance(node, InputNode))
        if len(sources) > 1:
            raise ValueError(
                f"nodes: got inputs from both {' and '.join(sources)}; allowed: one source for a "
                "graph"
            )
        self._refuse_deep_gradients()
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

    def _refuse_deep_gradients(self) -> None:
        # The cross-covariance is measured at the graph's input; further in there is nothing yet.
        entries = {node.id for node in self.nodes if isinstance(node, InputNode)}
        for index, node in enumerate(self.nodes):
            if getattr(node, "init", None) == "gradient" and not entries.issuperset(
                inputs_of(node)
            ):
                raise ValueError(
                    f"nodes[{index}].init: got 'gradient' on {node.id!r}, which reads "
                    f"{', '.join(inputs_of(node))}; allowed: on a node that reads the input"
                )


def _earlier(graph: Graph, index: int) -> str:
    names = ", ".join(node.id for node in graph.nodes[:index])
    return f"allowed: an earlier id ({names or 'none here; start with op input'})"


def reads_producer(graph: Graph) -> bool:
    """Whether the graph takes the producer's input instead of the host's."""
    return source_of(graph) == "producer"


def source_of(graph: Graph) -> GraphSource:
    """What the graph reads: the host's input, the producer's, or the host's own output."""
    return next(node.source for node in graph.nodes if isinstance(node, InputNode))


Window = tuple[Positive] | tuple[Positive, Positive]


def _without_default(schema: JsonDict) -> None:
    schema.pop("default", None)


_BY_KIND = Field(json_schema_extra=_without_default)
"""Another default for each kind of layer: whoever writes out a schema's defaults writes none."""


class LayerGeometry(Contract):
    """A layer's kind and sizes, as torch names them.

    The window fields are a convolution's alone, one number for Conv1d and two for Conv2d. A norm
    has as many outputs as inputs, the size that it normalises (LayerNorm over the last dimension)
    or its channels; an Embedding's inputs are its rows.
    """

    kind: LayerKind
    inputs: Positive
    outputs: Positive
    bias: Flag = True
    kernel_size: Window | None = None
    stride: Annotated[Window, _BY_KIND] = (1, 1)
    padding: Annotated[
        tuple[NonNegative] | tuple[NonNegative, NonNegative] | Literal["same"], _BY_KIND
    ] = (0, 0)
    dilation: Annotated[Window, _BY_KIND] = (1, 1)
    groups: Positive = 1
    padding_mode: PaddingMode = "zeros"

    @model_validator(mode="before")
    @classmethod
    def _written_out(cls, data: object) -> object:
        """Plain numbers as the tuples that torch makes of them, padding "valid" as zeros."""
        if not isinstance(data, Mapping):
            return data
        axes = 1 if data.get("kind") == "Conv1d" else 2
        given: dict[str, object] = {"padding": 0, **data}
        if axes == 1:
            given = {"stride": 1, "dilation": 1, **given}
        for name in {"kernel_size", "kernelSize", "stride", "padding", "dilation"} & given.keys():
            value = 0 if (name, given[name]) == ("padding", "valid") else given[name]
            whole = isinstance(value, int) and not isinstance(value, bool)
            given[name] = (value,) * axes if whole else value
        return given

    @model_validator(mode="after")
    def _sizes_match_kind(self) -> Self:
        if self.kind in ("LayerNorm", "BatchNorm2d") and self.inputs != self.outputs:
            raise ValueError(
                f"outputs: got {self.outputs} of {self.inputs} inputs for {self.kind}; allowed: "
                "as many as inputs"
            )
        axes = {"Conv1d": 1, "Conv2d": 2}.get(self.kind)
        if (None if self.kernel_size is None else len(self.kernel_size)) != axes:
            raise ValueError(
                f"kernelSize: got {self.kernel_size} for {self.kind}; allowed: one number for "
                "Conv1d, two for Conv2d, none for others"
            )
        for name in ("stride", "padding", "dilation"):
            value = getattr(self, name)
            if axes is not None and value != "same" and len(value) != axes:
                raise ValueError(
                    f"{name}: got {value} for {self.kind}; allowed: as many numbers as kernelSize"
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

    `dtype` is torch's name without the "torch." in front. An Embedding's input, one index a
    sample, may have the shape ().
    """

    layer: LayerGeometry
    input_shape: Annotated[tuple[Positive, ...], Field(max_length=8)]
    output_shape: Shape
    dtype: DataType = "float32"
    device: Annotated[str, Field(pattern=r"^[a-z]+(:[0-9]+)?$")] = "cpu"
    producer: ProducerDescription | None = None

    @model_validator(mode="after")
    def _input_has_channels(self) -> Self:
        if not self.input_shape and self.layer.kind != "Embedding":
            raise ValueError(
                f"inputShape: got () for {self.layer.kind}; allowed: at least one number"
            )
        return self


class BlueprintDocument(Contract):
    """A blueprint: what kinds of layer may host it, and its graph."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")]
    description: Annotated[str, Field(max_length=1024)] = ""
    hosts: Annotated[tuple[LayerKind, ...], Field(min_length=1, max_length=6)]
    graph: Graph

    @property
    def digest(self) -> str:
        """SHA-256 of what the blueprint does; its name and description do not enter."""
        return digest_of({"hosts": sorted(set(self.hosts)), "graph": self.graph.to_wire()})
