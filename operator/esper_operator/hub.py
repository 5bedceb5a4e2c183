"""What the operator asks the hub for; `HttpUrza` is one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Literal, Protocol

from esper.contracts.assets import Blueprint, CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.services.contracts import (
    IssuedCredentials,
    KernelCredentials,
    KernelMetadata,
    OperatorCredentials,
    SweepResult,
    SweptNamespaces,
)


class Hub(Protocol):
    """Everything can be asked again without harm; all raise HubUnavailable without an answer."""

    async def session_credentials(
        self, uid: str, namespace: str, *, deletion_policy: Literal["Retain", "Delete"] = "Retain"
    ) -> IssuedCredentials:
        """What opens a session's rows, objects and streams."""
        ...

    async def namespace_credentials(self, namespace: str) -> IssuedCredentials:
        """What opens the streams of all sessions of a namespace."""
        ...

    async def operator_credentials(self) -> OperatorCredentials:
        """What opens the operator's streams."""
        ...

    async def kernel_credentials(self, kernel: str) -> KernelCredentials:
        """With what that kernel is compiled, and no other."""
        ...

    async def namespaces(self) -> SweptNamespaces:
        """The namespaces in which a sweep may find something, and the hub's time for it."""
        ...

    async def sweep(
        self, namespace: str, live: Sequence[str], gathered_at: datetime
    ) -> SweepResult:
        """End the sessions of a namespace that are not `live`."""
        ...

    async def put_blueprint(
        self, document: BlueprintDocument, *, session: str | None = None
    ) -> Blueprint:
        """The blueprint of that content, made unless it is there."""
        ...

    async def metadata(self, kernel: str) -> KernelMetadata:
        """What is known of a compiled kernel."""
        ...

    async def request_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> CompiledKernel:
        """The kernel for that target, made unless it is there."""
        ...
