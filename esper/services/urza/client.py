"""Urza as other services see it: the port, and the hub that lives in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Protocol

from esper.configs import DatabaseConfig, StorageConfig
from esper.contracts.assets import Blueprint, CompiledKernel, TrainingSession
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelMetadata
from esper.services.contracts import BlueprintClaim, KernelClaim


class UrzaClient(Protocol):
    """The hub. `metadata` and `artifact` are what a kernel cache reads from.

    Everything can be asked again without harm. All methods raise HubUnavailable when the hub
    does not answer; `UrzaHub` has the same methods and says what else each of them raises.
    """

    async def put_blueprint(
        self, document: BlueprintDocument, *, session: str | None = None
    ) -> Blueprint:
        """The blueprint of that content, made unless it is there; its first name stays.

        `session` is the uid of a registered session that uses it: while it lives, it is kept.
        """
        ...

    async def blueprint(self, digest: str) -> Blueprint:
        """The blueprint of that digest; BlueprintError where there is none."""
        ...

    async def blueprints(self) -> tuple[Blueprint, ...]:
        """All blueprints, the oldest first."""
        ...

    async def request_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> CompiledKernel:
        """The kernel for that target, made in state proposed unless it is there.

        `session` is the uid of a registered session that uses it: while it lives, it is kept.
        """
        ...

    async def kernel(self, kernel: str) -> CompiledKernel:
        """The kernel of that id, in whatever state; KernelError where there is none."""
        ...

    async def kernels(self, states: Sequence[BlueprintState] = ...) -> tuple[CompiledKernel, ...]:
        """The kernels in one of `states`, by default all, the oldest first."""
        ...

    async def claim_kernel(self, kernel: str, worker: str) -> bool:
        """Whether `worker` may now compile the kernel."""
        ...

    async def claim_next_kernel(self, worker: str, lease_seconds: float) -> KernelClaim | None:
        """Lease the oldest kernel that nobody compiles; None where there is none."""
        ...

    async def lease_kernel(
        self, kernel: str, worker: str, lease_seconds: float
    ) -> KernelClaim | None:
        """Lease that kernel; None where it is settled or another worker has it."""
        ...

    async def heartbeat_kernel(self, kernel: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; Conflict where it is lost."""
        ...

    async def release_kernel(
        self, kernel: str, worker: str, *, token: str | None = None, blamed: bool = False
    ) -> None:
        """Give up `worker`'s claim; `blamed` where the kernel itself ended the attempt."""
        ...

    async def complete_kernel(
        self, metadata: KernelMetadata, data: bytes, *, token: str | None = None
    ) -> CompiledKernel:
        """Keep a compiled kernel's artifact; Conflict where the lease is lost."""
        ...

    async def fail_kernel(
        self, kernel: str, error: str, *, token: str | None = None
    ) -> CompiledKernel:
        """Record why a kernel can't be compiled; Conflict where the lease is lost."""
        ...

    async def claim_next_blueprint(
        self, worker: str, lease_seconds: float
    ) -> BlueprintClaim | None:
        """Lease the oldest blueprint that nobody has validated; None where there is none."""
        ...

    async def heartbeat_blueprint(self, digest: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; Conflict where it is lost."""
        ...

    async def complete_blueprint(self, digest: str, token: str) -> Blueprint:
        """Record that a blueprint is valid; Conflict where the lease is lost."""
        ...

    async def fail_blueprint(self, digest: str, token: str, error: str) -> Blueprint:
        """Record why a blueprint is not valid; Conflict where the lease is lost."""
        ...

    async def release_blueprint(
        self, digest: str, worker: str, *, token: str, blamed: bool = False
    ) -> None:
        """Give up `worker`'s lease; `blamed` where the blueprint itself ended the attempt."""
        ...

    async def metadata(self, kernel: str) -> KernelMetadata:
        """What is known of a compiled kernel; KernelError where it is not compiled."""
        ...

    async def artifact(self, kernel: str) -> bytes:
        """The verified bytes of a compiled kernel; KernelError where they are lost or changed."""
        ...

    async def register_session(self, session: TrainingSession) -> TrainingSession:
        """The session of that uid: `session` itself the first time, as stored from then on."""
        ...

    async def update_session(self, session: TrainingSession) -> TrainingSession:
        """Replace what is stored of a registered session."""
        ...

    async def health(self) -> bool:
        """Whether the hub answers."""
        ...


@asynccontextmanager
async def in_process_urza(
    database: DatabaseConfig, storage: StorageConfig
) -> AsyncIterator[UrzaClient]:
    """The hub in this process, over that database and that store, closed at the end.

    Raises:
        ConfigError: the database's URL can't be read, or the store's settings contradict each
            other.
        HubUnavailable: the database can't be opened.
    """
    # Whoever speaks to a hub elsewhere needs no database library.
    from esper.services.urza.database import Database
    from esper.services.urza.store import UrzaHub
    from esper.utils.object_store import open_store

    store = open_store(storage)
    try:
        async with Database(database) as opened:
            yield UrzaHub(opened, store)
    finally:
        await store.close()
