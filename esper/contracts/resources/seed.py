"""Seed: one slot of a session that has left dormancy."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from esper.contracts.enums import SeedState
from esper.contracts.resources.common import (
    Conditions,
    Count,
    DecimalText,
    LabelledMeta,
    Percent,
    Resource,
    ResourceModel,
    SessionName,
    Text,
    Time,
    immutable,
)

State = Annotated[SeedState, Field(strict=False)]


class SeedSpec(ResourceModel):
    """Which slot this is; the operator writes it once."""

    model_config = ConfigDict(json_schema_extra=immutable("spec"))

    session: SessionName
    layer: Annotated[str, Field(min_length=1, max_length=512)]
    slot: Annotated[int, Field(ge=0, le=63)]


class SeedTransitionStatus(ResourceModel):
    """One step of the seed's life."""

    time: Time
    epoch: Count
    previous: State
    current: State
    reason: Text = ""


class SeedStatus(ResourceModel):
    """How the seed stands."""

    observed_generation: Count | None = None
    conditions: Conditions = ()
    state: State = SeedState.DORMANT
    blueprint: Annotated[str, Field(max_length=253)] | None = None
    kernel: Annotated[str, Field(max_length=253)] | None = None
    alpha_percent: Percent = 0
    health_percent: Percent | None = None
    contribution: DecimalText | None = None
    """Gain in nats a sample, as last measured."""
    cycle: Count = 0
    """How often the slot has been used."""
    transitions: Annotated[
        tuple[SeedTransitionStatus, ...], Field(strict=False, max_length=32)
    ] = ()
    """The newest, oldest first."""


class Seed(Resource):
    """One slot of a session that has left dormancy; made by the operator, owned by the session."""

    plural: ClassVar[str] = "seeds"
    singular: ClassVar[str] = "seed"
    short_names: ClassVar[tuple[str, ...]] = ("seed",)
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("Session", "string", ".spec.session"),
        ("Layer", "string", ".spec.layer"),
        ("State", "string", ".status.state"),
        ("Blueprint", "string", ".status.blueprint"),
        ("Alpha", "integer", ".status.alphaPercent"),
        ("Health", "integer", ".status.healthPercent"),
        ("Gain", "string", ".status.contribution"),
        ("Age", "date", ".metadata.creationTimestamp"),
    )
    selectable: ClassVar[tuple[str, ...]] = (".spec.session", ".status.state")

    kind: Literal["Seed"]
    metadata: LabelledMeta
    spec: SeedSpec
    status: SeedStatus | None = None
