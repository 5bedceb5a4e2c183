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
    """The session's name."""
    layer: Annotated[str, Field(min_length=1, max_length=512)]
    """The layer, as the model calls it."""
    slot: Annotated[int, Field(ge=0, le=63)]
    """Which of the layer's slots."""


class SeedTransitionStatus(ResourceModel):
    """One step of the seed's life."""

    time: Time
    """When."""
    epoch: Count
    """Epochs completed by then."""
    previous: State
    current: State
    reason: Text = ""
    """Why."""


class SeedStatus(ResourceModel):
    """How the seed stands."""

    observed_generation: Count | None = None
    """The generation of the spec that this is about."""
    conditions: Conditions = ()
    """None so far."""
    state: State = SeedState.DORMANT
    blueprint: Annotated[str, Field(max_length=253)] | None = None
    """What grows."""
    kernel: Annotated[str, Field(max_length=253)] | None = None
    """The kernel that it was made from."""
    alpha_percent: Percent = 0
    """Its share in the layer's output."""
    health_percent: Percent | None = None
    """Health of its layer when it was last probed; 100 is best."""
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
