"""Kernels handed out to be compiled, and what came of it."""

from __future__ import annotations

import hashlib
from datetime import datetime

from sqlalchemy import and_, or_, update

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelMetadata, artifact_key
from esper.errors import KernelError
from esper.services.contracts import KernelClaim
from esper.services.urza import models
from esper.services.urza.leases import BULK, NO_LEASE, Leases
from esper.services.urza.store_rows import (
    HubRows,
    kernel_row,
    lock_artifact,
    retried,
    shortened,
)

_COMPILING, _CHARACTERIZED = BlueprintState.COMPILING, BlueprintState.CHARACTERIZED
_LEASES = Leases(
    "kernel",
    models.CompiledKernel,
    models.CompiledKernel.kernel,
    _COMPILING,
    kernel_row,
    models.CompiledKernel.blueprint.has(models.Blueprint.archived_at.is_(None)),
)


class HubKernelLeases(HubRows):
    """Kernels on their way from proposed to characterized or failed."""

    @retried
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
                .where(or_(_LEASES.free(self._clock()), own))
                .values(
                    {
                        **NO_LEASE,
                        "state": _COMPILING,
                        "claimed_by": worker,
                        "updated_at": self._clock(),
                        "version": row.version + 1,
                    }
                )
                .returning(row.id)
                .execution_options(**BULK)
            )
            if claimed is None:
                await kernel_row(session, kernel)
        return claimed is not None

    @retried
    async def claim_next_kernel(
        self, worker: str, lease_seconds: float, *, token: str | None = None
    ) -> KernelClaim | None:
        """Lease the oldest kernel that nobody compiles; None where there is none.

        What was tried before comes after what was not. Whoever asks again under the same `token`
        gets what it has.

        Raises:
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        async with self._database.transaction() as session:
            row = await _LEASES.claim(session, worker, token, self._clock(), lease_seconds)
            return None if row is None else _claim(row)

    @retried
    async def lease_kernel(
        self, kernel: str, worker: str, lease_seconds: float, *, token: str | None = None
    ) -> KernelClaim | None:
        """Lease that kernel; None where it is settled, archived, or another worker has it.

        Whoever asks again under the same `token` gets what it has.

        Raises:
            KernelNotFound: there is no such kernel.
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        async with self._database.transaction() as session:
            now = self._clock()
            row = await _LEASES.claim(session, worker, token, now, lease_seconds, name=kernel)
            if row is None:
                await kernel_row(session, kernel)
                return None
            return _claim(row)

    @retried
    async def heartbeat_kernel(self, kernel: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; returns when it ends.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost, or its result was accepted.
            BadInput: a lease that is too long or not positive.
        """
        async with self._database.transaction() as session:
            return await _LEASES.extend(session, kernel, token, self._clock(), lease_seconds)

    @retried
    async def release_kernel(
        self, kernel: str, worker: str, *, token: str | None = None, blamed: bool = False
    ) -> None:
        """Give up `worker`'s claim, so that anyone may compile the kernel; else do nothing.

        Where the kernel itself ended the attempt it is `blamed`, and the attempt counts.
        """
        async with self._database.transaction() as session:
            await _LEASES.release(session, kernel, worker, token, self._clock(), blamed=blamed)

    async def check_lease(self, kernel: str, token: str) -> CompiledKernel:
        """The kernel, whose result under that token would be accepted, or was.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost.
        """
        async with self._database.transaction() as session:
            row = await kernel_row(session, kernel)
            _LEASES.settled(row, token)
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
        while True:
            # The bytes before the row: whoever sees the row finds the bytes, also after a crash.
            await self._store.put(artifact_key(digest), data)
            done = await self._settle_compiled(metadata, token)
            if done is not None:
                return done
            # Another kernel with the same bytes was deleted in between, and took them along.

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
        done = settled or await self._settle_compiled(metadata, token)
        if done is None:
            raise KernelError(
                f"kernel {metadata.kernel}: its artifact {metadata.artifact_digest} is not in "
                "the store; upload it first"
            )
        return done

    async def fail_kernel(
        self, kernel: str, error: str, *, token: str | None = None
    ) -> CompiledKernel:
        """Record why a kernel can't be compiled; one that is settled already stays as it is.

        Raises:
            KernelNotFound: there is no such kernel.
            Conflict: the lease is lost, or without `token` another worker has one.
        """
        return await self._settle_failed(kernel, token, shortened(error))

    @retried
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
            return row.as_asset() if _LEASES.settled(row, token) else None

    @retried
    async def _settle_compiled(
        self, metadata: KernelMetadata, token: str | None
    ) -> CompiledKernel | None:
        """Accept the result; None where the store has not the artifact."""
        digest = metadata.artifact_digest
        async with self._database.transaction(writing=True) as session:
            await lock_artifact(session, digest)
            if not await self._store.exists(artifact_key(digest)):
                return None
            row = await _LEASES.settle(
                session,
                metadata.kernel,
                token,
                self._clock(),
                _CHARACTERIZED,
                artifact_digest=digest,
                artifact_bytes=metadata.artifact_bytes,
                figures=metadata.figures.to_wire() if metadata.figures else None,
            )
            return row.as_asset()

    @retried
    async def _settle_failed(self, kernel: str, token: str | None, error: str) -> CompiledKernel:
        failed = BlueprintState.FAILED
        async with self._database.transaction() as session:
            row = await _LEASES.settle(session, kernel, token, self._clock(), failed, error=error)
            return row.as_asset()


def _claim(row: models.CompiledKernel) -> KernelClaim:
    return KernelClaim.model_validate(
        {
            "kernel": row.kernel,
            "blueprint": BlueprintDocument.model_validate(row.blueprint.document),
            "target": KernelTarget.model_validate(row.target),
            "lease": row.lease_token,
            "expires_at": row.lease_expires_at,
        }
    )
