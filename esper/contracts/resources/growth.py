"""Where a session may grow, from what, who decides, and which evidence a seed needs."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, model_validator

from esper.contracts.enums import ControllerPolicy
from esper.contracts.ir import LayerKind
from esper.contracts.resources.common import LabelSelector, ResourceModel, refusal, rules

Glob = Annotated[str, Field(min_length=1, max_length=512)]
Globs = Annotated[
    tuple[Glob, ...],
    Field(strict=False, max_length=64, json_schema_extra={"x-kubernetes-list-type": "set"}),
]


class LayersSpec(ResourceModel):
    """Which layers may host seeds: of these types, included by a glob, excluded by none."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.include.all(name, !(name in self.exclude))",
                "include: nothing that exclude names too",
            )
        )
    )

    types: Annotated[
        tuple[LayerKind, ...],
        Field(
            strict=False,
            min_length=1,
            max_length=6,
            json_schema_extra={"x-kubernetes-list-type": "set"},
        ),
    ] = ("Linear", "Conv2d")
    """Types of layers that may host seeds."""
    include: Globs = ()
    """Globs over layer names such as `features.*`; empty: every layer."""
    exclude: Globs = ()
    """Globs over layer names that host nothing."""

    @model_validator(mode="after")
    def _lists_are_sets_and_disjoint(self) -> LayersSpec:
        lists = {"types": self.types, "include": self.include, "exclude": self.exclude}
        for field, names in lists.items():
            if len(set(names)) < len(names):
                raise refusal(field, list(names), "each entry once")
        both = [name for name in self.include if name in self.exclude]
        if both:
            raise refusal("include", both[0], "nothing that exclude names too")
        return self


class BudgetSpec(ResourceModel):
    """How much may grow."""

    parameters_percent: Annotated[int, Field(ge=0, le=100_000)] = 100
    """Parameters that growth may add, as a percentage of the model's own."""
    active_seeds: Annotated[int, Field(ge=1, le=64)] = 1
    """Seeds that may be in their shadow trial at one time; others wait, germinated."""


class ControllerSpec(ResourceModel):
    """Who decides, and how often."""

    policy: Annotated[ControllerPolicy, Field(strict=False)] = ControllerPolicy.HEURISTIC
    dedicated: bool = False
    """Whether the session has a controller of its own in a cluster."""
    minimum_confidence: Annotated[float, Field(ge=0, le=1)] = 0.8
    """Decisions below it are recorded and not applied."""
    interval_epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Epochs between two decisions."""
    probe_interval_steps: Annotated[int, Field(ge=1, le=1_000_000_000)] = 200
    """Optimiser steps between two probes of the layers while no seed is on trial; with one, every
    boundary is probed."""
    patience_seconds: Annotated[float, Field(gt=0, le=86_400)] | None = None
    """How long a boundary waits for its decision over the wire; in one process it always waits."""


class GatesSpec(ResourceModel):
    """What a seed must show to be grafted and kept, and how long it may take."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self.ageEpochs >= self.dwellEpochs", "ageEpochs: at least dwellEpochs"),
            ("self.passes <= self.ageEpochs", "passes: at most ageEpochs"),
        )
    )

    confidence_level: Annotated[float, Field(gt=0.5, le=0.9999)] = 0.95
    """One-sided level of the bounds that gates compare with the rent."""
    passes: Annotated[int, Field(ge=1, le=1000)] = 2
    """Shadow measurements in a row that must pass."""
    dwell_epochs: Annotated[int, Field(ge=0, le=100_000)] = 5
    """Epochs a seed trains before a gate may open."""
    age_epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Epochs of training after which a seed that has not passed is culled."""
    ramp_epochs: Annotated[int, Field(ge=0, le=100_000)] = 3
    """Epochs over which a grafting seed's share rises to 1."""
    hold_epochs: Annotated[int, Field(ge=0, le=100_000)] = 2
    """Epochs at full share before the recovery trial."""
    embargo_epochs: Annotated[int, Field(ge=0, le=100_000)] = 5
    """Epochs a slot rests after a cull."""
    rent_per_million_parameters: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """Price in nats a sample of a million parameters."""
    rent_per_gigaflop: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """Price in nats a sample of 1e9 floating-point operations a sample, forward and backward."""

    @model_validator(mode="after")
    def _times_fit(self) -> GatesSpec:
        if self.age_epochs < self.dwell_epochs:
            raise refusal(
                "ageEpochs", self.age_epochs, f"at least dwellEpochs, {self.dwell_epochs}"
            )
        if self.passes > self.age_epochs:
            raise refusal("passes", self.passes, f"at most ageEpochs, {self.age_epochs}")
        return self


class GrowthSpec(ResourceModel):
    """How the model grows while it trains."""

    layers: LayersSpec = Field(default_factory=LayersSpec)
    seeds_per_layer: Annotated[int, Field(ge=1, le=64)] = 1
    """Slots of each layer that hosts seeds."""
    blueprints: LabelSelector = Field(default_factory=LabelSelector)
    """Which blueprints may germinate; empty: all."""
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    controller: ControllerSpec = Field(default_factory=ControllerSpec)
    gates: GatesSpec = Field(default_factory=GatesSpec)
