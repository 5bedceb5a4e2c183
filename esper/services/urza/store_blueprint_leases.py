"""Blueprints handed out to be validated, and what came of it."""

from __future__ import annotations

import secrets
from datetime import datetime

from sqlalchemy import update

from esper.contracts.assets import Blueprint
from esper.contracts.blueprints import BlueprintDocument
from esper.contracts.enums import BlueprintState
from esper.services.contracts import BlueprintClaim
from esper.services.urza import models
from esper.services.urza.leases import NO_LEASE, extend, lease, lease_end, lost, next_free
from esper.services.urza.store_rows import HubRows, blueprint_row, shortened

_PROPOSED, _VALIDATING = BlueprintState.PROPOSED, BlueprintState.VALIDATING
_CHARACTERIZED, _FAILED = BlueprintState.CHARACTERIZED, BlueprintState.FAILED


class HubBlueprintLeases(HubRows):
    """Blueprints on their way from proposed through validation."""

    async def claim_next_blueprint(
        self, worker: str, lease_seconds: float
    ) -> BlueprintClaim | None:
        """Lease the oldest blueprint that nobody has validated; None where there is none.

        Raises:
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        now, token, row = self._clock(), secrets.token_hex(16), models.Blueprint
        until = lease_end(now, lease_seconds)
        async with self._database.transaction() as session:
            which = row.id == next_free(row, _VALIDATING, now)
            claimed = await lease(session, row, which, _VALIDATING, worker, token, now, until)
            if claimed is None:
                return None
            return BlueprintClaim(
                digest=claimed.digest,
                document=BlueprintDocument.model_validate(claimed.document),
                lease=token,
                expires_at=until,
            )

    async def heartbeat_blueprint(self, digest: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; returns when it ends.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost, or its result was accepted.
            BadInput: a lease that is too long or not positive.
        """
        row = models.Blueprint
        async with self._database.transaction() as session:
            end = await extend(
                session,
                row,
                row.digest == digest,
                _VALIDATING,
                token,
                lease_end(self._clock(), lease_seconds),
            )
            if end is None:
                await blueprint_row(session, digest)
                raise lost(f"blueprint {digest}")
        return end

    async def complete_blueprint(self, digest: str, token: str) -> Blueprint:
        """Record that a blueprint is valid; the same result again changes nothing.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost.
        """
        return await self._validated(digest, token, _CHARACTERIZED, None)

    async def fail_blueprint(self, digest: str, token: str, error: str) -> Blueprint:
        """Record why a blueprint is not valid; the same result again changes nothing.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost.
        """
        return await self._validated(digest, token, _FAILED, shortened(error))

    async def release_blueprint(self, digest: str, token: str) -> None:
        """Give up a lease, so that anyone may validate the blueprint; else do nothing."""
        row = models.Blueprint
        async with self._database.transaction() as session:
            await session.execute(
                update(row)
                .where(row.digest == digest, row.state == _VALIDATING, row.lease_token == token)
                .values(
                    {
                        **NO_LEASE,
                        "state": _PROPOSED,
                        "updated_at": self._clock(),
                        "version": row.version + 1,
                    }
                )
            )

    async def _validated(
        self, digest: str, token: str, state: BlueprintState, error: str | None
    ) -> Blueprint:
        row = models.Blueprint
        async with self._database.transaction() as session:
            await session.execute(
                update(row)
                .where(row.digest == digest, row.state == _VALIDATING, row.lease_token == token)
                .values(
                    state=state,
                    error=error,
                    claimed_by=None,
                    lease_expires_at=None,
                    updated_at=self._clock(),
                    version=row.version + 1,
                )
            )
            found = await blueprint_row(session, digest)
            if found.lease_token != token:
                raise lost(f"blueprint {digest}")
            return found.as_asset()
