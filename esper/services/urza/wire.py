"""The bodies of requests to Urza that are no contract of their own; both ends build on them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from esper.contracts.assets import Namespace, SessionUid
from esper.contracts.base import AwareTime, Contract, utc_now
from esper.contracts.blueprints import KernelTarget
from esper.contracts.kernels import Count, Digest, KernelMetadata
from esper.services.contracts import MAX_LEASE_SECONDS, LeaseToken

MAX_SWEPT = 10_000
LEASE_HEADER = "X-Lease"
"""Carries an upload's lease: a query would stand in logs."""

Worker = Annotated[str, Field(min_length=1, max_length=253, examples=["tezzeret-0"])]
DeletionPolicy = Literal["Retain", "Delete"]
LeaseSeconds = Annotated[float, Field(gt=0, le=MAX_LEASE_SECONDS, allow_inf_nan=False)]
Reason = Annotated[str, Field(min_length=1, max_length=10_000)]


class BlueprintChange(Contract):
    """Another name or description; what a blueprint does never changes."""

    name: Annotated[str | None, Field(pattern=r"^[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?$")] = None
    description: Annotated[str | None, Field(max_length=1024)] = None


class KernelCreation(Contract):
    """Asks for the kernel of a blueprint for a target."""

    blueprint_digest: Digest
    target: KernelTarget


class ClaimRequest(Contract):
    """`worker` asks for work; without `lease_seconds` the hub's own setting holds.

    `lease` is the token that the worker will hold it under. Asking again under it, because the
    answer was lost, finds the same work; without one the hub draws a token.
    """

    worker: Worker
    lease_seconds: LeaseSeconds | None = None
    lease: LeaseToken | None = None


class LeaseRequest(Contract):
    """Whoever holds `lease` goes on with its work."""

    lease: LeaseToken
    lease_seconds: LeaseSeconds | None = None


class ReleaseRequest(Contract):
    """`worker` gives up its `lease`; `blamed` if the work itself ended the attempt.

    Such attempts count: work that ends whoever does it is given up.
    """

    worker: Worker
    lease: LeaseToken
    blamed: bool = False


class KernelResult(Contract):
    """What became of a kernel: the metadata of an artifact that was uploaded, or an error."""

    lease: LeaseToken
    metadata: KernelMetadata | None = None
    error: Reason | None = None

    @model_validator(mode="after")
    def _one_outcome(self) -> Self:
        if (self.metadata is None) == (self.error is None):
            raise ValueError("metadata: got both or neither; allowed: metadata or error")
        return self


class BlueprintResult(Contract):
    """What became of a blueprint: it is sound, or `error` says why not."""

    lease: LeaseToken
    error: Reason | None = None


class CredentialsRequest(Contract):
    """Asks for what opens a session of `namespace`.

    `deletion_policy` says whether what it keeps at the hub goes with the session; what was said
    last counts.
    """

    namespace: Namespace
    deletion_policy: DeletionPolicy = "Retain"


class StoredObject(Contract):
    """An object that a session keeps at the hub."""

    name: str
    size: Annotated[int, Field(ge=0, alias="bytes")]


class SessionObjects(Contract):
    """All that a session keeps."""

    objects: tuple[StoredObject, ...]


class SweepRequest(Contract):
    """The uids of all sessions of `namespace` that there are; the others are ended.

    What was made after `gathered_at`, when the uids were gathered, is left alone.
    """

    namespace: Namespace
    live_uids: Annotated[tuple[SessionUid, ...], Field(max_length=MAX_SWEPT)]
    gathered_at: Annotated[AwareTime, Field(default_factory=utc_now)]


class LeaseExtension(Contract):
    """Until when a lease lasts now."""

    expires_at: AwareTime


class UploadedArtifact(Contract):
    """An artifact that the store has, whole and with that SHA-256."""

    artifact_digest: Digest
    artifact_bytes: Count
