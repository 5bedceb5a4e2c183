"""What services exchange: seeds, blueprints, kernels and sessions, each with its identity.

An asset is a snapshot. Whoever owns the thing makes the next snapshot with `changed`; what is
stored stands in `esper.services.urza.models`, what kubectl applies in `esper.contracts.resources`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Self
from uuid import UUID, uuid4, uuid5

from pydantic import Field, StrictInt, model_validator

from esper.contracts.base import AwareTime, Contract, utc_now
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState, SeedState, SessionOutcome
from esper.contracts.kernels import Digest, KernelId
from esper.contracts.operational import Count, LayerName, Share
from esper.contracts.validators import validate_seed_id

SeedId = tuple[StrictInt, StrictInt]
Namespace = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$")]
# It stands in stream names and in the patterns of Redis users, so it has no ":" and no "*".
SessionUid = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9-]{0,62}$")]
DEFAULT_NAMESPACE = "default"
MAX_SEEDS = 64
"""Of one session, as many as it may have resources of."""

_UNNAMED_UIDS = UUID("8f8a8c3e-6a5d-5c0e-9d0f-5b1c1f5e7a11")


def session_uid(namespace: str, name: str) -> str:
    """The uid of a session that no cluster gave one: the same for the same name."""
    return str(uuid5(_UNNAMED_UIDS, f"{namespace}/{name}"))


def _uid_of(fields: Mapping[str, object]) -> str:
    return session_uid(str(fields["namespace"]), str(fields["name"]))


class Asset(Contract):
    """Identity and audit times, in UTC. The times serve people and enter no digest."""

    id: Annotated[UUID, Field(default_factory=uuid4)]
    created_at: Annotated[AwareTime, Field(default_factory=utc_now)]
    updated_at: Annotated[AwareTime, Field(default_factory=utc_now)]

    def changed(self, **fields: object) -> Self:
        """The next snapshot: `fields` replaced, all validated again, `updated_at` now.

        Raises:
            pydantic.ValidationError: a field that does not exist, or a wrong value.
        """
        values = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_validate({**values, "updated_at": utc_now(), **fields})


class Seed(Asset):
    """A slot of a host layer, and what grows in it.

    `seed_id` is (index of the host layer in execution order, slot), `layer` that layer's name.
    """

    seed_id: SeedId
    layer: LayerName
    state: SeedState = SeedState.DORMANT
    cycle: Count = 0
    alpha: Share = 0.0
    blueprint: Annotated[str | None, Field(max_length=253)] = None
    kernel: KernelId | None = None

    @model_validator(mode="after")
    def _live_seeds_have_a_kernel(self) -> Self:
        live = self.state not in {SeedState.DORMANT, SeedState.CULLED}
        if live and (self.kernel is None or self.blueprint is None):
            raise ValueError(
                f"state: got {self.state.value!r} without blueprint and kernel; allowed: both"
            )
        return self


class Blueprint(Asset):
    """A blueprint in the hub. Its identity is its content: equal digests are one blueprint.

    `error` says why it did not pass validation.
    """

    document: BlueprintDocument
    digest: Digest
    state: BlueprintState = BlueprintState.PROPOSED
    error: str | None = None

    @classmethod
    def proposed(cls, document: BlueprintDocument) -> Self:
        """A new blueprint of `document`."""
        return cls(document=document, digest=document.digest)

    @model_validator(mode="after")
    def _digest_is_the_documents(self) -> Self:
        if self.digest != self.document.digest:
            raise ValueError(f"digest: got {self.digest}; allowed: {self.document.digest}")
        return self


class CompiledKernel(Asset):
    """A blueprint compiled, or to be compiled, for one kind of host.

    `kernel` is its content address. `artifact_digest` is the SHA-256 of the artifact's bytes,
    there once the state is characterized; `error` says why compilation failed. An archived kernel
    keeps either.
    """

    kernel: KernelId
    blueprint_digest: Digest
    blueprint: str
    target: KernelTarget
    state: BlueprintState = BlueprintState.PROPOSED
    artifact_digest: Digest | None = None
    artifact_bytes: Count | None = None
    error: str | None = None

    @model_validator(mode="after")
    def _outcome_matches_state(self) -> Self:
        if self.state is BlueprintState.ARCHIVED:
            return self
        compiled = self.state is BlueprintState.CHARACTERIZED
        if compiled != (self.artifact_digest is not None and self.artifact_bytes is not None):
            raise ValueError(
                f"artifactDigest: got {self.artifact_digest} in state {self.state.value}; "
                "allowed: digest and size in state characterized, and only there"
            )
        if (self.state is BlueprintState.FAILED) != (self.error is not None):
            raise ValueError(
                f"error: got {self.error!r} in state {self.state.value}; "
                "allowed: a reason in state failed, and only there"
            )
        return self


class TrainingSession(Asset):
    """A training session as the hub knows it.

    `uid` tells apart sessions that bear one name in turn; on Kubernetes it is the resource's. A
    session is live, and what it uses is kept, until the hub sets `ended_at`.
    `num_layers` host layers of `num_slots` seeds each bound the ids of `seeds`, which lists the
    seeds that have left dormancy at least once.
    """

    name: Annotated[str, Field(min_length=1, max_length=253)]
    namespace: Namespace = DEFAULT_NAMESPACE
    uid: Annotated[SessionUid, Field(default_factory=_uid_of)]
    ended_at: AwareTime | None = None
    outcome: SessionOutcome = SessionOutcome.RUNNING
    epoch: Count = 0
    epochs: Annotated[int, Field(ge=1)]
    num_layers: Count
    num_slots: Annotated[int, Field(ge=1)]
    seeds: Annotated[tuple[Seed, ...], Field(max_length=MAX_SEEDS)] = ()

    @model_validator(mode="after")
    def _seeds_within_the_model(self) -> Self:
        seen: set[tuple[int, int]] = set()
        for index, seed in enumerate(self.seeds):
            seed_id = validate_seed_id(seed.seed_id, self.num_layers, self.num_slots)
            if seed_id in seen:
                raise ValueError(f"seeds[{index}].seedId: got {seed_id} again; allowed: once each")
            seen.add(seed_id)
        if self.epoch > self.epochs:
            raise ValueError(f"epoch: got {self.epoch}; allowed: 0 to {self.epochs}")
        return self
