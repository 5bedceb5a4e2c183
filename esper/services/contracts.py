"""What services say to each other over Urza's API: assets, cut down to what a caller needs."""

from __future__ import annotations

from typing import Annotated, Generic, Self, TypeVar
from uuid import UUID

from pydantic import Field

from esper.contracts import assets
from esper.contracts.assets import Namespace, SessionUid
from esper.contracts.base import AwareTime, Contract
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState, SessionOutcome
from esper.contracts.ir import LayerKind
from esper.contracts.kernels import Count, Digest, KernelFigures, KernelId, KernelMetadata
from esper.errors import KernelError

__all__ = [
    "DEFAULT_PAGE_ITEMS",
    "MAX_LEASE_SECONDS",
    "MAX_PAGE_ITEMS",
    "BlueprintClaim",
    "BlueprintFilter",
    "IssuedCredentials",
    "KernelClaim",
    "KernelCredentials",
    "KernelFigures",
    "KernelFilter",
    "KernelMetadata",
    "NamespaceCredentials",
    "OperatorCredentials",
    "Page",
    "SessionCredentials",
    "SessionFilter",
    "SimpleBlueprintContract",
    "SimpleCompiledKernelContract",
    "Stored",
    "SweepResult",
    "SweptNamespaces",
]

MAX_PAGE_ITEMS = 500
DEFAULT_PAGE_ITEMS = 100
MAX_LEASE_SECONDS = 86_400.0

Item = TypeVar("Item")
AnyAsset = TypeVar("AnyAsset", bound=assets.Asset)
LeaseToken = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
Name = Annotated[str, Field(min_length=1, max_length=253)]


class SimpleBlueprintContract(Contract):
    """A blueprint without its graph: what a list of blueprints shows."""

    name: str
    description: str
    digest: Digest
    hosts: tuple[LayerKind, ...]
    state: BlueprintState

    @classmethod
    def of(cls, blueprint: assets.Blueprint) -> Self:
        """The outline of a blueprint in the hub."""
        document = blueprint.document
        return cls(
            name=document.name,
            description=document.description,
            digest=blueprint.digest,
            hosts=document.hosts,
            state=blueprint.state,
        )


class SimpleCompiledKernelContract(Contract):
    """A compiled kernel, or one that was asked for: where it stands and where its bytes are."""

    kernel: KernelId
    blueprint: str
    blueprint_digest: Digest
    state: BlueprintState
    artifact_digest: Digest | None = None
    artifact_bytes: Count | None = None
    figures: KernelFigures | None = None
    error: str | None = None

    @classmethod
    def of(cls, kernel: assets.CompiledKernel, figures: KernelFigures | None = None) -> Self:
        """The outline of a kernel in the hub, with what was measured beside it."""
        return cls(
            kernel=kernel.kernel,
            blueprint=kernel.blueprint,
            blueprint_digest=kernel.blueprint_digest,
            state=kernel.state,
            artifact_digest=kernel.artifact_digest,
            artifact_bytes=kernel.artifact_bytes,
            figures=figures,
            error=kernel.error,
        )

    def metadata(self) -> KernelMetadata:
        """What a cache needs to fetch the artifact.

        Raises:
            KernelError: the kernel is not compiled, or its compilation failed.
        """
        if self.artifact_digest is None or self.artifact_bytes is None:
            reason = f": {self.error}" if self.error else ""
            raise KernelError(f"kernel {self.kernel}: no artifact in state {self.state}{reason}")
        return KernelMetadata(
            kernel=self.kernel,
            blueprint_digest=self.blueprint_digest,
            artifact_digest=self.artifact_digest,
            artifact_bytes=self.artifact_bytes,
            figures=self.figures,
        )


class KernelClaim(Contract):
    """A worker may compile `kernel` until `expires_at`, and longer with each heartbeat.

    `lease` is the worker's alone; it stands under each heartbeat and under the result.
    """

    kernel: KernelId
    blueprint: BlueprintDocument
    target: KernelTarget
    lease: LeaseToken
    expires_at: AwareTime


class BlueprintClaim(Contract):
    """A worker may validate a blueprint until `expires_at`, and longer with each heartbeat."""

    digest: Digest
    document: BlueprintDocument
    lease: LeaseToken
    expires_at: AwareTime


def entity_tag(key: UUID, version: int) -> str:
    """What tells a state of an asset from all others: also from those of one made in its place."""
    return f"{key.hex}-{version}"


class Stored(Contract, Generic[AnyAsset]):
    """An asset as it stands in the hub; `version` grows by one with every change."""

    item: AnyAsset
    version: Annotated[int, Field(ge=1)]

    @property
    def tag(self) -> str:
        """Its entity tag."""
        return entity_tag(self.item.id, self.version)


class Page(Contract, Generic[Item]):
    """Some of a list, the oldest first; `next_cursor` asks for the rest, None at the end."""

    items: tuple[Item, ...]
    next_cursor: str | None = None


class BlueprintFilter(Contract):
    """Which blueprints to list; without `states` all but the archived ones."""

    states: tuple[BlueprintState, ...] | None = None
    name: Name | None = None
    session: SessionUid | None = None


class KernelFilter(Contract):
    """Which kernels to list; `blueprint` is a digest, `name` the blueprint's name.

    Without `states` all but the archived ones.
    """

    states: tuple[BlueprintState, ...] | None = None
    name: Name | None = None
    blueprint: Digest | None = None
    session: SessionUid | None = None


class SessionFilter(Contract):
    """Which sessions to list; without `archived` those that are not."""

    name: Name | None = None
    namespace: Namespace | None = None
    outcome: SessionOutcome | None = None
    live: bool | None = None
    archived: bool = False


class SessionCredentials(Contract):
    """What the hub knows of the credentials that it made for a session; they hold no secret.

    `removes`: once they are revoked, what the session keeps at the hub is still to be removed.
    """

    uid: SessionUid
    namespace: Namespace
    created_at: AwareTime
    expires_at: AwareTime
    revoked: bool = False
    removes: bool = False


class NamespaceCredentials(Contract):
    """What the hub knows of the credentials that it made for a namespace; they hold no secret."""

    namespace: Namespace
    created_at: AwareTime
    expires_at: AwareTime


class IssuedCredentials(Contract):
    """What opens a session's rows and streams, or those of a namespace (then `uid` is None).

    Asking again gives the same. Without a Redis behind the hub there is no user.
    """

    uid: SessionUid | None = None
    namespace: Namespace
    hub_token: Annotated[str, Field(repr=False)]
    redis_username: str | None = None
    redis_password: Annotated[str | None, Field(repr=False)] = None
    expires_at: AwareTime


class OperatorCredentials(Contract):
    """What opens the streams that the operator needs.

    The Redis user hears how the sessions of all namespaces stand and which kernels they ask for,
    and tells them which are ready. Without a Redis behind the hub there is no user.
    """

    redis_username: str | None = None
    redis_password: Annotated[str | None, Field(repr=False)] = None


class KernelCredentials(Contract):
    """With what one kernel is compiled: its claim, its artifact and its result, and no other's."""

    kernel: KernelId
    hub_token: Annotated[str, Field(repr=False)]
    expires_at: AwareTime


class SweptNamespaces(Contract):
    """The namespaces in which a sweep may find something."""

    namespaces: tuple[Namespace, ...]
    as_of: AwareTime
    """The hub's own time: what it knows from before may be swept if it is gone by now."""


class SweepResult(Contract):
    """What a sweep found: sessions that it ended, and revoked credentials to be removed."""

    ended: tuple[SessionUid, ...]
    revoked: tuple[SessionUid, ...]
