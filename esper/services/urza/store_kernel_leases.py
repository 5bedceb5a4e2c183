"""Kernels handed out to be compiled, and what came of it."""

from __future__ import annotations

import hashlib
import secrets
from datetime import datetime

from sqlalchemy import ColumnElement, and_, or_, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelMetadata
from esper.errors import KernelError
from esper.services.contracts import KernelClaim
from esper.services.urza import models
from esper.services.urza.leases import (
    BULK,
    NO_LEASE,
    extend,
    free_of,
    lease,
    lease_end,
    lost,
    next_free,
)
from esper.services.urza.store_rows import HubRows, artifact_key, kernel_row, shortened

_PROPOSED, _COMPILING = BlueprintState.PROPOSED, BlueprintState.COMPILING
_CHARACTERIZED, _FAILED = BlueprintState.CHARACTERIZED, BlueprintState.FAILED
_UNSETTLED = (_PROPOSED, _COMPILING)


class HubKernelLeases(HubRows):
    """Kernels on their way from proposed to characterized or failed."""

    async def claim_kernel(self, kernel: str, worker: str) -> bool:
        """Whether `worker` may now compile the kernel: it was free, or its own claim already.

        For the worker in the hub's own process: the claim lasts until it is given up, and one
        that was killed finds its claim again under its name; two workers have two names.

        Raises:
            KernelNotFound: there is no such kernel.
        """
        row = models.CompiledKernel
        own = and_(row.state == _COMPILING, row.claimed_by == worker, row.lease_token.is_(None))
        async with self._database.transaction() as session:
            claimed = await session.scalar(
                update(row)
                .where(row.kernel == kernel)
                .where(or_(free_of(row, _COMPILING, self._clock()), own))
                .values(
                    {
                        **NO_LEASE,
                        "state": _COMPILING,
                        "claimed_by": worker,
                        "updated_at": self._clock(),
                        "version": row.version + 1,
                    }
                )
                .returning(row.blueprint_id)
                .execution_options(**BULK)
            )
            if claimed is None:
                await kernel_row(session, kernel)
                return False
            await _move_blueprint(session, claimed, _COMPILING, (_PROPOSED,), self._clock())
        return True

    async def claim_next_kernel(self, worker: str, lease_seconds: float) -> KernelClaim | None:
        """Lease the oldest kernel that nobody compiles; None where there is none.

        Raises:
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        row = models.CompiledKernel
        return await self._leased(
            worker, lease_seconds, row.id == next_free(row, _COMPILING, self._clock())
        )

    async def lease_kernel(
        self, kernel: str, worker: str, lease_seconds: float
    ) -> KernelClaim | None:
        """Lease that kernel; None where it is settled, archived, or another worker has it.

        Raises:
            KernelNotFound: there is no such kernel.
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        claim = await self._leased(worker, lease_seconds, models.CompiledKernel.kernel == kernel)
        if claim is None:
            async with self._database.transaction() as session:
                await kernel_row(session, kernel)
        return claim

    async def heartbeat_kernel(self, kernel: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; returns when it ends.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost, or its result was accepted.
            BadInput: a lease that is too long or not positive.
        """
        row = models.CompiledKernel
        async with self._database.transaction() as session:
            end = await extend(
                session,
                row,
                row.kernel == kernel,
                _COMPILING,
                token,
                lease_end(self._clock(), lease_seconds),
            )
            if end is None:
                await kernel_row(session, kernel)
                raise lost(f"kernel {kernel}")
        return end

    async def release_kernel(self, kernel: str, worker: str, *, token: str | None = None) -> None:
        """Give up `worker`'s claim, so that anyone may compile the kernel; else do nothing."""
        row = models.CompiledKernel
        async with self._database.transaction() as session:
            await session.execute(
                update(row)
                .where(row.kernel == kernel, row.state == _COMPILING)
                .where(row.claimed_by == worker, row.lease_token.is_not_distinct_from(token))
                .values(
                    {
                        **NO_LEASE,
                        "state": _PROPOSED,
                        "updated_at": self._clock(),
                        "version": row.version + 1,
                    }
                )
            )

    async def check_lease(self, kernel: str, token: str) -> CompiledKernel:
        """The kernel, whose result under that token would be accepted, or was.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost.
        """
        async with self._database.transaction() as session:
            row = await kernel_row(session, kernel)
            if row.lease_token != token:
                raise lost(f"kernel {kernel}")
            return row.as_asset()

    async def complete_kernel(
        self, metadata: KernelMetadata, data: bytes, *, token: str | None = None
    ) -> CompiledKernel:
        """Keep a compiled kernel's artifact; one that is settled already stays as it is.

        Args:
            metadata: what `data` is.
            data: the artifact.
            token: the lease's; None for the worker in the hub's own process.

        Raises:
            KernelNotFound: there is no such kernel.
            KernelError: `data` is not what `metadata` describes.
            Conflict: the lease is lost, or without `token` another worker has one.
        """
        digest = hashlib.sha256(data).hexdigest()
        if (digest, len(data)) != (metadata.artifact_digest, metadata.artifact_bytes):
            raise KernelError(
                f"kernel {metadata.kernel}: got {len(data)} bytes with digest {digest}; allowed: "
                f"{metadata.artifact_bytes} bytes with digest {metadata.artifact_digest}"
            )
        settled = await self._settled_already(metadata, token)
        if settled is not None:
            return settled
        # The bytes before the row: whoever sees the row finds the bytes, also after a crash.
        await self._store.put(artifact_key(digest), data)
        return await self._settle_compiled(metadata, token)

    async def complete_uploaded_kernel(
        self, metadata: KernelMetadata, *, token: str | None = None
    ) -> CompiledKernel:
        """Keep a compiled kernel whose artifact's verified bytes lie in the store already.

        Whoever put them there, under `artifact_key`, has checked their digest and size.

        Raises:
            KernelNotFound: there is no such kernel.
            KernelError: the store does not have them, or they are of another blueprint.
            Conflict: the lease is lost, or without `token` another worker has one.
        """
        settled = await self._settled_already(metadata, token)
        if settled is not None:
            return settled
        if not await self._store.exists(artifact_key(metadata.artifact_digest)):
            raise KernelError(
                f"kernel {metadata.kernel}: its artifact {metadata.artifact_digest} is not in "
                "the store; upload it first"
            )
        return await self._settle_compiled(metadata, token)

    async def fail_kernel(
        self, kernel: str, error: str, *, token: str | None = None
    ) -> CompiledKernel:
        """Record why a kernel can't be compiled; one that is settled already stays as it is.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost, or without `token` another worker has one.
        """
        return await self._settle(kernel, token, _FAILED, error=shortened(error))

    async def _leased(
        self, worker: str, lease_seconds: float, which: ColumnElement[bool]
    ) -> KernelClaim | None:
        now, token, row = self._clock(), secrets.token_hex(16), models.CompiledKernel
        until = lease_end(now, lease_seconds)
        async with self._database.transaction() as session:
            claimed = await lease(session, row, which, _COMPILING, worker, token, now, until)
            if claimed is None:
                return None
            await _move_blueprint(session, claimed.blueprint_id, _COMPILING, (_PROPOSED,), now)
            document = claimed.blueprint.document
        return KernelClaim(
            kernel=claimed.kernel,
            blueprint=BlueprintDocument.model_validate(document),
            target=KernelTarget.model_validate(claimed.target),
            lease=token,
            expires_at=until,
        )

    async def _settled_already(
        self, metadata: KernelMetadata, token: str | None
    ) -> CompiledKernel | None:
        """The kernel if its result was accepted before; None if this one can be."""
        async with self._database.transaction() as session:
            row = await kernel_row(session, metadata.kernel)
            if metadata.blueprint_digest != row.blueprint.digest:
                raise KernelError(
                    f"kernel {row.kernel}: got an artifact of blueprint "
                    f"{metadata.blueprint_digest}; allowed: {row.blueprint.digest}"
                )
            return _accepted(row, token)

    async def _settle_compiled(self, metadata: KernelMetadata, token: str | None) -> CompiledKernel:
        return await self._settle(
            metadata.kernel,
            token,
            _CHARACTERIZED,
            artifact_digest=metadata.artifact_digest,
            artifact_bytes=metadata.artifact_bytes,
            figures=metadata.figures.to_wire() if metadata.figures else None,
        )

    async def _settle(
        self, kernel: str, token: str | None, state: BlueprintState, **values: object
    ) -> CompiledKernel:
        """Move an unsettled kernel to its final state, and its blueprint along."""
        # One kernel that compiles shows that the blueprint is sound; a later failure is the
        # target's, so it takes nothing back. Validation has its own result.
        replaced = {_CHARACTERIZED: (*_UNSETTLED, _FAILED), _FAILED: _UNSETTLED}[state]
        row, now = models.CompiledKernel, self._clock()
        async with self._database.transaction() as session:
            settled = await session.scalar(
                update(row)
                .where(row.kernel == kernel, row.state.in_(_UNSETTLED))
                .where(row.lease_token.is_not_distinct_from(token))
                .values(
                    {
                        **values,
                        "state": state,
                        "claimed_by": None,
                        "lease_expires_at": None,
                        "updated_at": now,
                        "version": row.version + 1,
                    }
                )
                .returning(row.blueprint_id)
                .execution_options(**BULK)
            )
            if settled is not None:
                await _move_blueprint(session, settled, state, replaced, now)
            found = await kernel_row(session, kernel)
            return _accepted(found, token) or found.as_asset()


async def _move_blueprint(
    session: AsyncSession,
    blueprint_id: object,
    state: BlueprintState,
    replaced: tuple[BlueprintState, ...],
    now: datetime,
) -> None:
    row = models.Blueprint
    values = {"state": state, "updated_at": now, "version": row.version + 1}
    if state is _CHARACTERIZED:
        values["error"] = None
    await session.execute(
        update(row)
        .where(row.id == blueprint_id, row.state.in_(replaced))
        .values(values)
        .execution_options(**BULK)
    )


def _accepted(row: models.CompiledKernel, token: str | None) -> CompiledKernel | None:
    """The kernel if it is settled, for whoever may know; None if `token` can still settle it."""
    if row.state in _UNSETTLED:
        if row.lease_token != token:
            raise lost(f"kernel {row.kernel}")
        return None
    if token is not None and row.lease_token != token:
        raise lost(f"kernel {row.kernel}")
    return row.as_asset()
