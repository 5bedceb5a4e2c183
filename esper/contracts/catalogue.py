"""The blueprints that come with Esper. All are zero at birth: the host's function is preserved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import get_args

from esper.contracts.ir import (
    ActivationKind,
    ActivationNode,
    BlueprintDocument,
    Conv2dNode,
    Graph,
    InputNode,
    LayerKind,
    LayerNode,
    LinearNode,
    Node,
    ZerosNode,
)
from esper.errors import BlueprintError

BUILTIN_LABEL = "esper.dev/builtin"
MAX_UNITS = 65_536

Argument = int | float | str
_ACTIVATIONS: tuple[ActivationKind, ...] = get_args(ActivationKind)


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
    if name == "activation":
        if value not in _ACTIVATIONS:
            raise BlueprintError(f"spec.arguments.{name}", value, ", ".join(_ACTIVATIONS))
    elif type(value) is not int or not 1 <= value <= MAX_UNITS:
        raise BlueprintError(
            f"spec.arguments.{name}", value, f"a whole number from 1 to {MAX_UNITS}"
        )


def _noop(_: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (InputNode(id="x"), ZerosNode(id="zeros", input="x"))


def _low_rank(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    # No bias: the product of the two weights is then a change of the host's weight alone, also
    # at the border of a padded image.
    return (
        InputNode(id="x"),
        _layer_node("down", "x", outputs=arguments["rank"], bias=False),
        _layer_node("up", "down", outputs="out", bias=False, pointwise=True, init="zero"),
    )


def _bottleneck_mlp(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (
        InputNode(id="x"),
        LinearNode.model_validate({"id": "down", "input": "x", "features": arguments["units"]}),
        _activation(arguments),
        LinearNode(id="up", input="act", features="out", init="zero"),
    )


def _bottleneck_conv(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (
        InputNode(id="x"),
        Conv2dNode.model_validate(
            {"id": "down", "input": "x", "channels": arguments["channels"], "kernel_size": 1}
        ),
        _activation(arguments),
        Conv2dNode(id="up", input="act", channels="out", kernel_size="host", init="zero"),
    )


def _widen(arguments: Mapping[str, Argument]) -> tuple[Node, ...]:
    return (
        InputNode(id="x", source="producer"),
        _layer_node("units", "x", like="producer", outputs=arguments["units"]),
        ActivationNode(id="act", input="units", kind="traced"),
        _layer_node("out", "act", outputs="out", bias=False, init="zero"),
    )


def _layer_node(name: str, source: str, like: str = "host", **fields: object) -> LayerNode:
    return LayerNode.model_validate({"id": name, "input": source, "like": like, **fields})


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
        ("Linear", "Conv2d"),
        _noop,
    ),
    _entry(
        "low-rank",
        "A linear bypass of a given rank; folds into its host and is never counted as growth.",
        ("Linear", "Conv2d"),
        _low_rank,
        rank=8,
    ),
    _entry(
        "bottleneck-mlp",
        "A hidden layer beside the host: down to a number of units, an activation, and back up.",
        ("Linear",),
        _bottleneck_mlp,
        units=36,
        activation="gelu",
    ),
    _entry(
        "bottleneck-conv",
        "A hidden layer beside the host: 1 by 1 to a number of channels, an activation, and the "
        "host's own window back up.",
        ("Conv2d",),
        _bottleneck_conv,
        channels=16,
        activation="gelu",
    ),
    _entry(
        "widen",
        "New units between the layer that feeds the host and the host itself.",
        ("Linear", "Conv2d"),
        _widen,
        units=16,
    ),
)
