"""What travels on Oona: the envelope, the topics, and the payload each topic carries."""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum
from typing import Annotated
from uuid import uuid4

from pydantic import Field, JsonValue

from esper.contracts.base import Contract, utc_now
from esper.contracts.blueprints import KernelTarget
from esper.contracts.enums import ComponentType
from esper.contracts.operational import (
    AdaptationDecision,
    SeedTransition,
    SessionEvent,
    SessionSnapshot,
    SystemStatePacket,
)

SCHEMA_VERSION = 1


Scope = Annotated[str, Field(pattern=r"^([A-Za-z0-9][A-Za-z0-9_.-]{0,127})?$")]


class BlueprintSubmitted(Contract):
    """A blueprint is in the hub and waits for validation."""

    blueprint: str
    digest: str


class KernelRequested(Contract):
    """A decision names a kernel that is not compiled yet."""

    session: str
    kernel: str
    blueprint: str
    blueprint_digest: str
    target: KernelTarget


class KernelReady(Contract):
    """A kernel's artifact is in the store, or its compilation failed for `error`."""

    kernel: str
    blueprint: str
    artifact_digest: str | None = None
    error: str | None = None


class TopicNames(StrEnum):
    """Every topic; `PAYLOADS` names the payload of each."""

    PACKETS = "telemetry.packets"
    DECISIONS = "control.decisions"
    TRANSITIONS = "seeds.transitions"
    EVENTS = "sessions.events"
    STATUS = "sessions.status"
    BLUEPRINT_SUBMITTED = "blueprints.submitted"
    KERNEL_REQUESTED = "kernels.requested"
    KERNEL_READY = "kernels.ready"


PAYLOADS: dict[TopicNames, type[Contract]] = {
    TopicNames.PACKETS: SystemStatePacket,
    TopicNames.DECISIONS: AdaptationDecision,
    TopicNames.TRANSITIONS: SeedTransition,
    TopicNames.EVENTS: SessionEvent,
    TopicNames.STATUS: SessionSnapshot,
    TopicNames.BLUEPRINT_SUBMITTED: BlueprintSubmitted,
    TopicNames.KERNEL_REQUESTED: KernelRequested,
    TopicNames.KERNEL_READY: KernelReady,
}


class OonaMessage(Contract):
    """The envelope. `trace_id` stays the same along a chain of messages caused by one another.

    `scope` is the uid of the session that the message belongs to; empty, it belongs to none.
    """

    id: Annotated[str, Field(default_factory=lambda: uuid4().hex)]
    topic: TopicNames
    type: str
    sender: ComponentType
    trace_id: Annotated[str, Field(default_factory=lambda: uuid4().hex)]
    created_at: Annotated[datetime, Field(default_factory=utc_now)]
    schema_version: int = SCHEMA_VERSION
    scope: Scope = ""
    payload: dict[str, JsonValue]

    @classmethod
    def carrying(
        cls,
        topic: TopicNames,
        payload: Contract,
        sender: ComponentType,
        trace_id: str | None = None,
        scope: str = "",
    ) -> OonaMessage:
        """An envelope around `payload`.

        Raises:
            TypeError: the topic carries another payload.
        """
        if not isinstance(payload, PAYLOADS[topic]):
            raise TypeError(
                f"{topic}: got {type(payload).__name__}; allowed: {PAYLOADS[topic].__name__}"
            )
        message: dict[str, object] = {
            "topic": topic,
            "type": type(payload).__name__,
            "sender": sender,
            "scope": scope,
            "payload": payload.to_wire(),
        }
        if trace_id is not None:
            message["traceId"] = trace_id
        return cls.model_validate(message)

    def open(self) -> Contract:
        """The payload as the contract its topic carries.

        Raises:
            pydantic.ValidationError: the payload is not of that contract.
        """
        return PAYLOADS[self.topic].model_validate(self.payload)
