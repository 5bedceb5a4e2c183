"""What Urza does: keep blueprints, hand out work to compile, keep kernels and sessions.

All of it is idempotent: blueprints and kernels are addressed by content, a claim has one winner,
and a kernel that is compiled, or has failed, stays so.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence

from sqlalchemy import and_, delete, or_, select, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.assets import Blueprint, CompiledKernel, TrainingSession
from esper.contracts.base import utc_now
from esper.contracts.blueprints import BlueprintDocument, KernelTarget, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelFigures, KernelMetadata
from esper.errors import BadInput, BlueprintError, KernelError, one_line
from esper.services.contracts import SimpleCompiledKernelContract
from esper.services.urza import models
from esper.services.urza.database import Database
from esper.utils.object_store import ObjectStore

MAX_ERROR_CHARACTERS = 2000
_UNSETTLED = (BlueprintState.PROPOSED, BlueprintState.COMPILING)


class UrzaHub:
    """The hub over a database and an object store.

    Every method raises HubUnavailable, StoreUnavailable or StorageFull when what lies beneath
    doesn't answer or has no room.
    """

    def __init__(self, database: Database, store: ObjectStore) -> None:
        self._database = database
        self._store = store

    # Blueprints

    async def put_blueprint(self, document: BlueprintDocument) -> Blueprint:
        """The blueprint of that content, made unless it is there; its first name stays."""
        await self._insert(models.Blueprint.of(Blueprint.proposed(document)))
        return await self.blueprint(document.digest)

    async def blueprint(self, digest: str) -> Blueprint:
        """The blueprint of that digest.

        Raises:
            BlueprintError: there is none.
        """
        async with self._database.transaction() as session:
            return (await _blueprint_row(session, digest)).as_asset()

    async def blueprints(self) -> tuple[Blueprint, ...]:
        """All blueprints, the oldest first."""
        async with self._database.transaction() as session:
            query = select(models.Blueprint).order_by(models.Blueprint.created_at)
            return tuple(row.as_asset() for row in await session.scalars(query))

    async def delete_blueprint(self, digest: str) -> bool:
        """Remove a blueprint, its kernels and their artifacts; whether there was one."""
        async with self._database.transaction() as session:
            query = (
                select(models.CompiledKernel.artifact_digest)
                .join(models.CompiledKernel.blueprint)
                .where(models.Blueprint.digest == digest)
            )
            artifacts = set((await session.scalars(query)).all())
            gone = await session.scalar(
                delete(models.Blueprint)
                .where(models.Blueprint.digest == digest)
                .returning(models.Blueprint.id)
            )
        # Rows first: an artifact without a row is only wasted room, the reverse is an error.
        for artifact in sorted(filter(None, artifacts)):
            await self._store.delete(artifact_key(artifact))
        return gone is not None

    # Kernels

    async def request_kernel(self, blueprint_digest: str, target: KernelTarget) -> CompiledKernel:
        """The kernel of that blueprint for that target, made in state proposed unless it is there.

        Raises:
            BlueprintError: no blueprint has that digest.
        """
        blueprint = await self.blueprint(blueprint_digest)
        kernel = CompiledKernel(
            kernel=kernel_id(blueprint_digest, target),
            blueprint_digest=blueprint_digest,
            blueprint=blueprint.document.name,
            target=target,
        )
        await self._insert(models.CompiledKernel.of(kernel, blueprint.id))
        return await self.kernel(kernel.kernel)

    async def kernel(self, kernel: str) -> CompiledKernel:
        """The kernel of that id, in whatever state.

        Raises:
            KernelError: there is none.
        """
        async with self._database.transaction() as session:
            return (await _kernel_row(session, kernel)).as_asset()

    async def kernels(
        self, states: Sequence[BlueprintState] = tuple(BlueprintState)
    ) -> tuple[CompiledKernel, ...]:
        """The kernels in one of `states`, the oldest first."""
        async with self._database.transaction() as session:
            query = (
                select(models.CompiledKernel)
                .where(models.CompiledKernel.state.in_(states))
                .order_by(models.CompiledKernel.created_at)
            )
            return tuple(row.as_asset() for row in await session.scalars(query))

    async def claim_kernel(self, kernel: str, worker: str) -> bool:
        """Whether `worker` may now compile the kernel: it was free, or its own claim already.

        A worker that was killed finds its claim again under its name; two workers have two names.

        Raises:
            KernelError: there is no such kernel.
        """
        row = models.CompiledKernel
        async with self._database.transaction() as session:
            claimed = await session.scalar(
                update(row)
                .where(row.kernel == kernel)
                .where(
                    or_(
                        row.state == BlueprintState.PROPOSED,
                        and_(row.state == BlueprintState.COMPILING, row.claimed_by == worker),
                    )
                )
                .values(state=BlueprintState.COMPILING, claimed_by=worker, updated_at=utc_now())
                .returning(row.blueprint_id)
            )
            if claimed is None:
                await _kernel_row(session, kernel)
                return False
            await session.execute(
                update(models.Blueprint)
                .where(models.Blueprint.id == claimed)
                .where(models.Blueprint.state == BlueprintState.PROPOSED)
                .values(state=BlueprintState.COMPILING, updated_at=utc_now())
            )
        return True

    async def release_kernel(self, kernel: str, worker: str) -> None:
        """Give up `worker`'s claim, so that anyone may compile the kernel; else do nothing."""
        row = models.CompiledKernel
        async with self._database.transaction() as session:
            await session.execute(
                update(row)
                .where(row.kernel == kernel)
                .where(row.state == BlueprintState.COMPILING, row.claimed_by == worker)
                .values(state=BlueprintState.PROPOSED, claimed_by=None, updated_at=utc_now())
            )

    async def complete_kernel(self, metadata: KernelMetadata, data: bytes) -> CompiledKernel:
        """Keep a compiled kernel's artifact; one that is settled already stays as it is.

        Raises:
            KernelError: there is no such kernel, or `data` is not what `metadata` describes.
        """
        digest = hashlib.sha256(data).hexdigest()
        if (digest, len(data)) != (metadata.artifact_digest, metadata.artifact_bytes):
            raise KernelError(
                f"kernel {metadata.kernel}: got {len(data)} bytes with digest {digest}; allowed: "
                f"{metadata.artifact_bytes} bytes with digest {metadata.artifact_digest}"
            )
        kernel = await self.kernel(metadata.kernel)
        if metadata.blueprint_digest != kernel.blueprint_digest:
            raise KernelError(
                f"kernel {kernel.kernel}: got an artifact of blueprint "
                f"{metadata.blueprint_digest}; allowed: {kernel.blueprint_digest}"
            )
        if kernel.state not in _UNSETTLED:
            return kernel
        # The bytes before the row: whoever sees the row finds the bytes, also after a crash.
        await self._store.put(artifact_key(digest), data)
        return await self._settle(
            metadata.kernel,
            BlueprintState.CHARACTERIZED,
            artifact_digest=digest,
            artifact_bytes=len(data),
            figures=metadata.figures.to_wire() if metadata.figures else None,
        )

    async def fail_kernel(self, kernel: str, error: str) -> CompiledKernel:
        """Record why a kernel can't be compiled; one that is settled already stays as it is.

        Raises:
            KernelError: there is no such kernel.
        """
        reason = error[:MAX_ERROR_CHARACTERS] or "no reason was given"
        return await self._settle(kernel, BlueprintState.FAILED, error=reason)

    async def metadata(self, kernel: str) -> KernelMetadata:
        """What is known of a compiled kernel.

        Raises:
            KernelError: there is no such kernel, or it is not compiled.
        """
        async with self._database.transaction() as session:
            row = await _kernel_row(session, kernel)
        figures = None if row.figures is None else KernelFigures.model_validate(row.figures)
        return SimpleCompiledKernelContract.of(row.as_asset(), figures).metadata()

    async def artifact(self, kernel: str) -> bytes:
        """The bytes of a compiled kernel.

        Raises:
            KernelError: it is not there or not compiled, or the store has lost or changed it.
        """
        expected = (await self.metadata(kernel)).artifact_digest
        data = await self._store.get(artifact_key(expected))
        if data is None:
            raise KernelError(f"kernel {kernel}: its artifact {expected} is not in the store")
        came = hashlib.sha256(data).hexdigest()
        if came != expected:
            raise KernelError(
                f"kernel {kernel}: got an artifact with digest {came}; allowed: {expected}"
            )
        return data

    # Sessions

    async def register_session(self, session: TrainingSession) -> TrainingSession:
        """The session of that name: `session` itself the first time, as stored from then on."""
        await self._insert(models.TrainingSession.of(session))
        return await self.session(session.name)

    async def update_session(self, session: TrainingSession) -> TrainingSession:
        """Replace what is stored of a registered session.

        Raises:
            BadInput: no session of that name and id is registered.
        """
        async with self._database.transaction() as transaction:
            row = await _session_row(transaction, session.name)
            if row.id != session.id:
                raise BadInput("session.id", str(session.id), str(row.id))
            await transaction.merge(models.TrainingSession.of(session))
        return session

    async def session(self, name: str) -> TrainingSession:
        """The session of that name.

        Raises:
            BadInput: there is none.
        """
        async with self._database.transaction() as transaction:
            return (await _session_row(transaction, name)).as_asset()

    async def sessions(self) -> tuple[TrainingSession, ...]:
        """All sessions, the oldest first."""
        async with self._database.transaction() as transaction:
            query = select(models.TrainingSession).order_by(models.TrainingSession.created_at)
            return tuple(row.as_asset() for row in await transaction.scalars(query))

    async def health(self) -> bool:
        """Whether the database answers."""
        return await self._database.health()

    async def _insert(self, row: models.Base) -> None:
        """Insert `row` unless its like is there; unlike a look before it, this has no gap."""
        with contextlib.suppress(IntegrityError):
            async with self._database.transaction() as session:
                session.add(row)

    async def _settle(self, kernel: str, state: BlueprintState, **values: object) -> CompiledKernel:
        """Move an unsettled kernel to its final state, and its blueprint along."""
        # One kernel that compiles shows that the blueprint is sound; a later failure is the
        # target's, so it takes nothing back.
        replaced = {
            BlueprintState.CHARACTERIZED: (*_UNSETTLED, BlueprintState.FAILED),
            BlueprintState.FAILED: _UNSETTLED,
        }[state]
        async with self._database.transaction() as session:
            settled = await session.scalar(
                update(models.CompiledKernel)
                .where(models.CompiledKernel.kernel == kernel)
                .where(models.CompiledKernel.state.in_(_UNSETTLED))
                .values(state=state, claimed_by=None, updated_at=utc_now(), **values)
                .returning(models.CompiledKernel.blueprint_id)
            )
            if settled is not None:
                await session.execute(
                    update(models.Blueprint)
                    .where(models.Blueprint.id == settled)
                    .where(models.Blueprint.state.in_(replaced))
                    .values(state=state, updated_at=utc_now())
                )
        return await self.kernel(kernel)


def artifact_key(digest: str) -> str:
    """Where the artifact with that SHA-256 lies in the object store."""
    return f"kernels/{digest}.safetensors"


async def _blueprint_row(session: AsyncSession, digest: str) -> models.Blueprint:
    query = select(models.Blueprint).where(models.Blueprint.digest == digest)
    row = await session.scalar(query)
    if row is None:
        raise BlueprintError("blueprint digest", digest, "a blueprint that was put into the hub")
    return row


async def _kernel_row(session: AsyncSession, kernel: str) -> models.CompiledKernel:
    query = select(models.CompiledKernel).where(models.CompiledKernel.kernel == kernel)
    row = await session.scalar(query)
    if row is None:
        raise KernelError(f"kernel {one_line(kernel)}: the hub does not know it; request it first")
    return row


async def _session_row(session: AsyncSession, name: str) -> models.TrainingSession:
    query = select(models.TrainingSession).where(models.TrainingSession.name == name)
    row = await session.scalar(query)
    if row is None:
        raise BadInput("session name", name, "a session that was registered")
    return row
