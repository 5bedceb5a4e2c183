"""What the decisions know of the API server's objects: small, frozen projections.

Tens of thousands of them live in memory, so each keeps what a decision reads and nothing else;
specs and statuses are kept as JSON text and read when they are needed. Times are seconds since the
epoch.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import lru_cache
from sys import intern
from typing import Any

from esper.contracts.base import canonical_json
from esper.contracts.resources import (
    BlueprintSpec,
    CompiledKernelSpec,
    TrainingSessionSpec,
)
from esper_operator.reading import (
    Object,
    annotation_of,
    holding_conditions,
    label_of,
    meta_of,
    moment_of,
    number_of,
)
from esper_operator.times import seconds_of

SESSION_LABEL = "esper.dev/session"
UID_LABEL = "esper.dev/session-uid"
ROLE_LABEL = "esper.dev/role"
ATTEMPT_LABEL = "esper.dev/attempt"
KERNEL_LABEL = "esper.dev/kernel"
DIGEST_ANNOTATION = "esper.dev/digest"
RENEW_ANNOTATION = "esper.dev/renew-after"
POLICY_ANNOTATION = "esper.dev/deletion-policy"
INDEX_ANNOTATION = "batch.kubernetes.io/job-completion-index"
CONTAINER = "worker"
"""The name of the container that works, in every pod that the operator has made."""


@dataclass(frozen=True, slots=True)
class Said:
    """A reason and its message."""

    reason: str
    message: str = ""

    @classmethod
    def of(cls, item: Object) -> Said:
        """Those of a condition, or of a container's state."""
        return cls(intern(str(item.get("reason") or "")), str(item.get("message") or ""))


@dataclass(frozen=True, slots=True)
class MetaView:
    """An object of which no more than its metadata is known, as of a Secret or a Seed."""

    kind: str
    namespace: str
    name: str
    uid: str
    session: str = ""
    """The name of the session that it was made for."""
    session_uid: str = ""
    role: str = ""
    digest: str = ""
    """Hash of the manifest that it was applied from."""
    deleting: bool = False
    renew_after: float = 0.0
    """When a Secret's credentials are to be renewed."""
    kernel: str = ""
    """The kernel that a Secret helps to compile."""
    deletion_policy: str = ""
    """What the hub was told, with a Secret's credentials, becomes of what a session keeps."""

    @classmethod
    def of(cls, data: Object) -> MetaView:
        """Of an object, or of a PartialObjectMetadata whose `kind` says what it stands for."""
        meta = meta_of(data)
        return cls(
            kind=intern(str(data.get("kind", ""))),
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta.get("uid", ""),
            session=label_of(data, SESSION_LABEL),
            session_uid=label_of(data, UID_LABEL),
            role=label_of(data, ROLE_LABEL),
            digest=annotation_of(data, DIGEST_ANNOTATION),
            deleting=meta.get("deletionTimestamp") is not None,
            renew_after=moment_of(annotation_of(data, RENEW_ANNOTATION)),
            kernel=label_of(data, KERNEL_LABEL),
            deletion_policy=intern(annotation_of(data, POLICY_ANNOTATION)),
        )


@dataclass(frozen=True, slots=True)
class SessionView:
    """A TrainingSession."""

    namespace: str
    name: str
    uid: str
    generation: int
    deleting: bool
    spec_text: bytes = field(repr=False)
    status_text: bytes = field(default=b"{}", repr=False)

    @classmethod
    def of(cls, data: Object) -> SessionView:
        """Of the object."""
        meta = meta_of(data)
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            generation=int(meta.get("generation", 1)),
            deleting=meta.get("deletionTimestamp") is not None,
            spec_text=canonical_json(data["spec"]),
            status_text=canonical_json(data.get("status") or {}),
        )

    def spec(self) -> TrainingSessionSpec:
        """The spec as the contract has it.

        Raises:
            pydantic.ValidationError: the API server took what the contract refuses.
        """
        return _session_spec(self.spec_text)

    def status(self) -> dict[str, Any]:
        """The status as it was last written; empty before the first visit."""
        found: dict[str, Any] = json.loads(self.status_text)
        return found


@lru_cache(maxsize=512)
def _session_spec(text: bytes) -> TrainingSessionSpec:
    return TrainingSessionSpec.model_validate(json.loads(text), by_alias=True, by_name=False)


@dataclass(frozen=True, slots=True)
class JobView:
    """A Job: the workers of one attempt of a session, or a compilation."""

    namespace: str
    name: str
    uid: str
    created: float
    session: str = ""
    session_uid: str = ""
    role: str = ""
    attempt: int = 0
    kernel: str = ""
    """The kernel that it compiles."""
    digest: str = ""
    deleting: bool = False
    suspended: bool = False
    completions: int = 1
    started: float | None = None
    """Since when it has not been suspended."""
    pods_since: float = 0.0
    """Pods made before then were ended as it was suspended; infinite while that is so."""
    finished: float | None = None
    """When it was seen to have succeeded or failed."""
    complete: bool = False
    """Whether its work is done, if pods of it may still be ending."""
    failed: Said | None = None

    @classmethod
    def of(cls, data: Object) -> JobView:
        """Of the object."""
        meta, spec, status = meta_of(data), data.get("spec") or {}, data.get("status") or {}
        holding = holding_conditions(data)
        done = holding.get("Complete") or holding.get("SuccessCriteriaMet")
        failed = holding.get("Failed") or holding.get("FailureTarget")
        end = done or failed
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            created=seconds_of(meta.get("creationTimestamp")) or 0.0,
            session=label_of(data, SESSION_LABEL),
            session_uid=label_of(data, UID_LABEL),
            role=label_of(data, ROLE_LABEL),
            attempt=number_of(label_of(data, ATTEMPT_LABEL)),
            kernel=label_of(data, KERNEL_LABEL),
            digest=annotation_of(data, DIGEST_ANNOTATION),
            deleting=meta.get("deletionTimestamp") is not None,
            suspended=bool(spec.get("suspend")),
            completions=int(spec.get("completions") or 1),
            started=seconds_of(status.get("startTime")),
            pods_since=_resumed(status),
            finished=None if end is None else seconds_of(end.get("lastTransitionTime")),
            complete=done is not None,
            failed=None if done is not None or failed is None else Said.of(failed),
        )

    @property
    def ended(self) -> bool:
        """Whether it has come to its end, good or bad."""
        return self.complete or self.failed is not None


def _resumed(status: Object) -> float:
    """When a Job was resumed last; 0 where it never was suspended, infinite while it is."""
    for item in status.get("conditions") or ():
        if item.get("type") == "Suspended":
            resumed = item.get("status") == "False"
            return seconds_of(item.get("lastTransitionTime")) or 0.0 if resumed else math.inf
    return 0.0


@dataclass(frozen=True, slots=True)
class DeploymentView:
    """A Deployment of Tamiyo: a session's own, or that of its namespace."""

    namespace: str
    name: str
    uid: str
    session: str = ""
    session_uid: str = ""
    digest: str = ""
    deleting: bool = False
    available: bool = False
    """Whether it says so and a pod is ready: one that is to have no pod is available, too."""
    failure: Said | None = None
    """Why no pod of it can be made, or why it does not come up in time."""

    @classmethod
    def of(cls, data: Object) -> DeploymentView:
        """Of the object."""
        meta = meta_of(data)
        conditions = (data.get("status") or {}).get("conditions") or ()
        by_type = {item["type"]: item for item in conditions}
        ready = (data.get("status") or {}).get("readyReplicas") or 0
        failing = [
            by_type[kind]
            for kind, status in (("ReplicaFailure", "True"), ("Progressing", "False"))
            if by_type.get(kind, {}).get("status") == status
        ]
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            session=label_of(data, SESSION_LABEL),
            session_uid=label_of(data, UID_LABEL),
            digest=annotation_of(data, DIGEST_ANNOTATION),
            deleting=meta.get("deletionTimestamp") is not None,
            available=ready > 0 and by_type.get("Available", {}).get("status") == "True",
            failure=Said.of(failing[0]) if failing else None,
        )


@dataclass(frozen=True, slots=True)
class BlueprintView:
    """A Blueprint."""

    namespace: str
    name: str
    uid: str
    generation: int
    deleting: bool
    labels: tuple[tuple[str, str], ...]
    spec_text: bytes = field(repr=False)
    status_text: bytes = field(default=b"{}", repr=False)

    @classmethod
    def of(cls, data: Object) -> BlueprintView:
        """Of the object."""
        meta = meta_of(data)
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            generation=int(meta.get("generation", 1)),
            deleting=meta.get("deletionTimestamp") is not None,
            labels=tuple(sorted((meta.get("labels") or {}).items())),
            spec_text=canonical_json(data["spec"]),
            status_text=canonical_json(data.get("status") or {}),
        )

    def spec(self) -> BlueprintSpec:
        """The spec as the contract has it.

        Raises:
            pydantic.ValidationError: the API server took what the contract refuses, as a graph
                whose nodes do not fit together.
        """
        return BlueprintSpec.model_validate(
            json.loads(self.spec_text), by_alias=True, by_name=False
        )

    def status(self) -> dict[str, Any]:
        """The status as it was last written."""
        found: dict[str, Any] = json.loads(self.status_text)
        return found


@dataclass(frozen=True, slots=True)
class KernelView:
    """A CompiledKernel."""

    namespace: str
    name: str
    uid: str
    generation: int
    deleting: bool
    blueprint: str
    session: str
    """The name of the session that asked for it first."""
    session_uid: str
    spec_text: bytes = field(repr=False)
    status_text: bytes = field(default=b"{}", repr=False)

    @classmethod
    def of(cls, data: Object) -> KernelView:
        """Of the object."""
        meta = meta_of(data)
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            generation=int(meta.get("generation", 1)),
            deleting=meta.get("deletionTimestamp") is not None,
            blueprint=intern(data["spec"]["blueprint"]),
            session=label_of(data, SESSION_LABEL),
            session_uid=label_of(data, UID_LABEL),
            spec_text=canonical_json(data["spec"]),
            status_text=canonical_json(data.get("status") or {}),
        )

    def spec(self) -> CompiledKernelSpec:
        """The spec as the contract has it.

        Raises:
            pydantic.ValidationError: the API server took what the contract refuses.
        """
        return CompiledKernelSpec.model_validate(
            json.loads(self.spec_text), by_alias=True, by_name=False
        )

    def status(self) -> dict[str, Any]:
        """The status as it was last written."""
        found: dict[str, Any] = json.loads(self.status_text)
        return found
