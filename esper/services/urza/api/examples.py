"""Examples for the API's reference: what a small blueprint goes through, made as the hub does."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from esper.contracts.assets import Blueprint, CompiledKernel, TrainingSession
from esper.contracts.base import Contract
from esper.contracts.blueprints import KernelTarget, LayerGeometry, builtin, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelMetadata
from esper.errors import KernelNotFound
from esper.services.contracts import (
    BlueprintClaim,
    IssuedCredentials,
    KernelClaim,
    KernelCredentials,
    OperatorCredentials,
    SweepResult,
    SweptNamespaces,
)
from esper.services.urza.problems import Problem
from esper.services.urza.wire import (
    BlueprintChange,
    BlueprintResult,
    ClaimRequest,
    CredentialsRequest,
    KernelCreation,
    KernelResult,
    LeaseExtension,
    LeaseRequest,
    ReleaseRequest,
    SessionObjects,
    StoredObject,
    SweepRequest,
    UploadedArtifact,
)

_NOON = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
_LATER = _NOON + timedelta(seconds=60)
_LEASE = "0123456789abcdef" * 2
_UID = "2b8c4a58-6c1f-4c6e-9a55-5f6f1f0f7a01"
_DOCUMENT = builtin("affine", {})
_TARGET = KernelTarget(
    layer=LayerGeometry(kind="Linear", inputs=64, outputs=16),
    input_shape=(64,),
    output_shape=(16,),
)
_KERNEL = kernel_id(_DOCUMENT.digest, _TARGET)
_IDENTITY = {
    "id": UUID(int=2**100 + 7),
    "created_at": _NOON,
    "updated_at": _NOON,
}
_METADATA = KernelMetadata(
    kernel=_KERNEL,
    blueprint_digest=_DOCUMENT.digest,
    artifact_digest="5f" * 32,
    artifact_bytes=1504,
)

_MADE: tuple[Contract, ...] = (
    _DOCUMENT,
    _METADATA,
    Blueprint.model_validate({**_IDENTITY, "document": _DOCUMENT, "digest": _DOCUMENT.digest}),
    CompiledKernel.model_validate(
        {
            **_IDENTITY,
            "kernel": _KERNEL,
            "blueprint_digest": _DOCUMENT.digest,
            "blueprint": _DOCUMENT.name,
            "target": _TARGET,
            "state": BlueprintState.CHARACTERIZED,
            "artifact_digest": _METADATA.artifact_digest,
            "artifact_bytes": _METADATA.artifact_bytes,
        }
    ),
    TrainingSession.model_validate(
        {**_IDENTITY, "name": "digits", "uid": _UID, "epochs": 60, "num_layers": 2, "num_slots": 1}
    ),
    BlueprintChange(description="A gain and an offset for each channel."),
    KernelCreation(blueprint_digest=_DOCUMENT.digest, target=_TARGET),
    ClaimRequest(worker="tezzeret-0", lease_seconds=60),
    KernelClaim(
        kernel=_KERNEL, blueprint=_DOCUMENT, target=_TARGET, lease=_LEASE, expires_at=_LATER
    ),
    BlueprintClaim(digest=_DOCUMENT.digest, document=_DOCUMENT, lease=_LEASE, expires_at=_LATER),
    LeaseRequest(lease=_LEASE),
    ReleaseRequest(worker="tezzeret-0", lease=_LEASE),
    LeaseExtension(expires_at=_LATER),
    UploadedArtifact(
        artifact_digest=_METADATA.artifact_digest, artifact_bytes=_METADATA.artifact_bytes
    ),
    KernelResult(lease=_LEASE, metadata=_METADATA),
    BlueprintResult(lease=_LEASE, error="no host of kind Conv1d compiles"),
    CredentialsRequest(namespace="team-a"),
    IssuedCredentials(
        uid=_UID,
        namespace="team-a",
        hub_token="eyJhbGciOiJIUzI1NiIs….….…",
        redis_username=f"esper-session:team-a:{_UID}",
        redis_password="64 hex digits",
        expires_at=_NOON + timedelta(days=90),
    ),
    OperatorCredentials(redis_username="esper-operator", redis_password="64 hex digits"),
    KernelCredentials(
        kernel=_KERNEL,
        hub_token="eyJhbGciOiJIUzI1NiIs….….…",
        expires_at=_NOON + timedelta(days=1),
    ),
    SessionObjects(objects=(StoredObject(name="checkpoints/epoch-000012/state.json", size=1504),)),
    StoredObject(name="checkpoints/epoch-000012/state.json", size=1504),
    SweepRequest(namespace="team-a", live_uids=(_UID,), gathered_at=_NOON),
    SweptNamespaces(namespaces=("team-a",), as_of=_NOON),
    SweepResult(ended=("9d1e",), revoked=("9d1e",)),
    Problem.of(KernelNotFound("kernel", _KERNEL, "a kernel that was requested")),
)

EXAMPLES: dict[str, dict[str, Any]] = {type(made).__name__: made.to_wire() for made in _MADE}
"""One example of each contract, by the name of its schema."""
