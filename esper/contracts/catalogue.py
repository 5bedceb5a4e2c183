"""The blueprints that come with Esper. All are zero at birth: the host's function is preserved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

from esper.contracts.ir import (
    ActivationKind,
    ActivationNode,
    AffineNode,
    AttentionNode,
    BlueprintDocument,
    GateNode,
    Graph,
    InputNode,
    LayerKind,
    LayerNode,
    LinearNode,
    MeanNode,
    Node,
    SequenceNode,
    SpreadNode,
    ZerosNode,
)
from esper.errors import BlueprintError

BUILTIN_LABEL = "esper.dev/builtin"
MAX_UNITS = 65_536

Argument = int | float | str
_CHOICES: Mapping[str, tuple[str, ...]] = {
    "activation": get_args(ActivationKind),
    "initialisation": ("default", "gradient"),
}


@dataclass(frozen=True)
class BuiltinBlueprint:
    """A blueprint of the catalogue: which arguments it takes, and their defaults."""

    name: str
    description: str
    hosts: tuple[LayerKind, ...]
    arguments: Mapping[str, Argument]
    expand: Callable[[Mapping[str, Argument]], tuple[Node, ...]] = field(repr=False)

    @property
    def labels(self) -> dict[str, str]:
        """The labels of the resource that the chart installs."""
        return {BUILTIN_LABEL: "true"}

    @property
    def document(self) -> BlueprintDocument:
        """The blueprint with its default arguments."""
        return self.with_arguments({})

    def with_arguments(self, arguments: Mapping[str, Argument]) -> BlueprintDocument:
        """The blueprint with some arguments changed.

        Raises:
            BlueprintError: an argument is unknown, of a wrong type, or out of range.
        """
        for name in arguments:
            if name not in self.arguments:
                allowed = ", ".join(self.arguments) or "no argument"
                raise BlueprintError(f"spec.arguments.{name}", name, f"{allowed} for {self.name}")
        chosen = {**self.arguments, **arguments}
        for name, value in chosen.items():
            _refuse_wrong(name, value)
        nodes = self.expand(chosen)
        return BlueprintDocument(
            name=self.name,
            description=self.description,
            hosts=self.hosts,
            graph=Graph(nodes=nodes, output=nodes[-1].id),
        )


def builtin(name: str, arguments: Mapping[str, Argument]) -> BlueprintDocument:
    """The catalogue's blueprint `name` with `arguments`; the rest as by default.

    Raises:
        BlueprintError: on `spec.builtin` or `spec.arguments.NAME`.
    """
    for entry in CATALOGUE:
        if entry.name == name:
            return entry.with_arguments(arguments)
    raise BlueprintError("spec.builtin", name, ", ".join(entry.name for entry in CATALOGUE))


def _refuse_wrong(name: str, value: Argument) -> None:
    if name in _CHOICES:
        if value not in _CHOICES[name]:
            raise BlueprintError(f"spec.arguments.{name}", value, ", ".join(_CHOICES[name]))
    elif type(value) is not int or not 1 <= value <= MAX_UNITS:
        raise BlueprintError(
            f"spec.arguments.{name}", value, f"a whole number from 1 to {MAX_UNITS}"
        )


def _noop(_: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (InputNode(id="x"), ZerosNode(id="zeros", input="x"))


def _affine(_: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (InputNode(id="x", source="output"), AffineNode(id="affine", input="x", init="zero"))


def _low_rank(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    """Hu et al. 2021, "LoRA: low-rank adaptation of large language models"."""
    # No bias: the product of the two weights is then a change of the host's weight alone, also
    # at the border of a padded image.
    first = {"outputs": arguments["rank"], "init": arguments["initialisation"]}
    return (
        InputNode(id="x"),
        _layer_node("down", "x", bias=False, **first),
        _layer_node("up", "down", outputs="out", bias=False, pointwise=True, init="zero"),
    )


def _bottleneck_mlp(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    first = {"features": arguments["units"], "init": arguments["initialisation"]}
    return (
        InputNode(id="x"),
        LinearNode.model_validate({"id": "down", "input": "x", **first}),
        _activation(arguments),
        LinearNode(id="up", input="act", features="out", init="zero"),
    )


def _bottleneck_conv(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    first = {"outputs": arguments["channels"], "init": arguments["initialisation"]}
    return (
        InputNode(id="x"),
        _layer_node("down", "x", pointwise=True, bias=True, **first),
        _activation(arguments),
        _layer_node("up", "act", outputs="out", bias=True, init="zero"),
    )


def _depthwise_separable(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    """Howard et al. 2017, "MobileNets"; without the activation between it would be linear."""
    return (
        InputNode(id="x"),
        _layer_node("down", "x", outputs="in", depthwise=True, bias=True),
        _activation(arguments),
        _layer_node("up", "act", outputs="out", pointwise=True, bias=True, init="zero"),
    )


def _squeeze_excitation(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    """Hu et al. 2018, "Squeeze-and-excitation networks", as a gate that is closed at birth."""
    return (
        InputNode(id="x", source="output"),
        MeanNode(id="mean", input="x"),
        LinearNode.model_validate({"id": "down", "input": "mean", "features": arguments["units"]}),
        _activation(arguments),
        LinearNode(id="up", input="act", features="out", init="zero"),
        ActivationNode(id="tanh", input="up", kind="tanh"),
        GateNode(id="gate", value="x", gate="tanh"),
    )


def _attention(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    """Wang et al. 2018, "Non-local neural networks"; heads as Vaswani et al. 2017."""
    channels, heads = arguments["channels"], arguments["heads"]
    assert isinstance(channels, int)
    assert isinstance(heads, int)
    if channels % heads:
        raise BlueprintError("spec.arguments.heads", heads, f"a divisor of {channels} channels")
    return (
        InputNode(id="x", source="output"),
        SequenceNode(id="row", input="x"),
        LinearNode(id="qkv", input="row", features=3 * channels),
        AttentionNode(id="mixed", input="qkv", heads=heads),
        LinearNode(id="up", input="mixed", features="out", init="zero"),
        SpreadNode(id="spread", input="up", positions="x"),
    )


def _widen(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    first = {"outputs": arguments["units"], "init": arguments["initialisation"]}
    return (
        InputNode(id="x", source="producer"),
        _layer_node("units", "x", like="producer", **first),
        ActivationNode(id="act", input="units", kind="traced"),
        _layer_node("out", "act", outputs="out", bias=False, init="zero"),
    )


def _layer_node(name: str, source: str, **fields: object) -> LayerNode:
    return LayerNode.model_validate({"id": name, "input": source, "like": "host", **fields})


def _activation(arguments: Mapping[str, Argument]) -> ActivationNode:
    fields = {"id": "act", "input": "down", "kind": arguments["activation"]}
    return ActivationNode.model_validate(fields)


def _entry(
    name: str,
    description: str,
    hosts: tuple[LayerKind, ...],
    expand: Callable[[Mapping[str, Argument]], tuple[Node, ...]],
    **arguments: Argument,
) -> BuiltinBlueprint:
    return BuiltinBlueprint(name, description, hosts, MappingProxyType(arguments), expand)


CATALOGUE: tuple[BuiltinBlueprint, ...] = (
    _entry(
        "noop",
        "Adds zeros: the placebo that growth is compared with.",
        get_args(LayerKind),
        _noop,
    ),
    _entry(
        "affine",
        "A scale and a shift of each output channel; folds into its host and is never counted as "
        "growth.",
        get_args(LayerKind),
        _affine,
    ),
    _entry(
        "low-rank",
        "A linear bypass of a given rank; folds into its host and is never counted as growth.",
        ("Linear", "Conv1d", "Conv2d", "Embedding"),
        _low_rank,
        rank=8,
        initialisation="default",
    ),
    _entry(
        "bottleneck-mlp",
        "A hidden layer beside the host: down to a number of units, an activation, and back up.",
        ("Linear", "LayerNorm"),
        _bottleneck_mlp,
        units=36,
        activation="gelu",
        initialisation="default",
    ),
    _entry(
        "bottleneck-conv",
        "A hidden layer beside the host: 1 by 1 to a number of channels, an activation, and the "
        "host's own window back up.",
        ("Conv1d", "Conv2d", "BatchNorm2d"),
        _bottleneck_conv,
        channels=16,
        activation="gelu",
        initialisation="default",
    ),
    _entry(
        "depthwise-separable-conv",
        "The host's window on each channel by itself, an activation, and 1 by 1 to the output.",
        ("Conv1d", "Conv2d"),
        _depthwise_separable,
        activation="gelu",
    ),
    _entry(
        "squeeze-excitation",
        "A gate for each output channel, worked out from the mean over all positions.",
        ("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d"),
        _squeeze_excitation,
        units=16,
        activation="relu",
    ),
    _entry(
        "attention",
        "Scaled dot-product attention among the positions of the host's output.",
        ("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d"),
        _attention,
        channels=32,
        heads=4,
    ),
    _entry(
        "widen",
        "New units between the layer that feeds the host and the host itself.",
        ("Linear", "Conv1d", "Conv2d"),
        _widen,
        units=16,
        initialisation="default",
    ),
)
