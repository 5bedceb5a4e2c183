"""Blueprints handed out to be validated, and what came of it."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import true

from esper.contracts.assets import Blueprint
from esper.contracts.blueprints import BlueprintDocument
from esper.contracts.enums import BlueprintState
from esper.services.contracts import BlueprintClaim
from esper.services.urza import models
from esper.services.urza.leases import Leases
from esper.services.urza.store_rows import HubRows, blueprint_row, retried, shortened

_LEASES = Leases(
    "blueprint",
    models.Blueprint,
    models.Blueprint.digest,
    BlueprintState.VALIDATING,
    blueprint_row,
    true(),
)


class HubBlueprintLeases(HubRows):
    """Blueprints on their way from proposed through validation."""

    @retried
    async def claim_next_blueprint(
        self, worker: str, lease_seconds: float, *, token: str | None = None
    ) -> BlueprintClaim | None:
        """Lease the oldest blueprint that nobody has validated; None where there is none.

        Whoever asks again under the same `token` gets what it has.

        Raises:
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        async with self._database.transaction() as session:
            row = await _LEASES.claim(session, worker, token, self._clock(), lease_seconds)
            if row is None:
                return None
            return BlueprintClaim.model_validate(
                {
                    "digest": row.digest,
                    "document": BlueprintDocument.model_validate(row.document),
                    "lease": row.lease_token,
                    "expires_at": row.lease_expires_at,
                }
            )

    @retried
    async def heartbeat_blueprint(self, digest: str, token: str, lease_seconds: float) -> datetime:
        """Keep a lease for that long from now; returns when it ends.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost, or its result was accepted.
            BadInput: a lease that is too long or not positive.
        """
        async with self._database.transaction() as session:
            return await _LEASES.extend(session, digest, token, self._clock(), lease_seconds)

    async def complete_blueprint(self, digest: str, token: str) -> Blueprint:
        """Record that a blueprint is valid; the same result again changes nothing.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost.
        """
        return await self._validated(digest, token, BlueprintState.CHARACTERIZED, None)

    async def fail_blueprint(self, digest: str, token: str, error: str) -> Blueprint:
        """Record why a blueprint is not valid; the same result again changes nothing.

        Raises:
            BlueprintNotFound: there is no such blueprint.
            Conflict: the lease is lost.
        """
        return await self._validated(digest, token, BlueprintState.FAILED, shortened(error))

    @retried
    async def release_blueprint(
        self, digest: str, worker: str, *, token: str, blamed: bool = False
    ) -> None:
        """Give up `worker`'s lease, so that anyone may validate the blueprint; else do nothing.

        Where the blueprint itself ended the attempt it is `blamed`, and the attempt counts.
        """
        async with self._database.transaction() as session:
            await _LEASES.release(session, digest, worker, token, self._clock(), blamed=blamed)

    @retried
    async def _validated(
        self, digest: str, token: str, state: BlueprintState, error: str | None
    ) -> Blueprint:
        async with self._database.transaction() as session:
            row = await _LEASES.settle(session, digest, token, self._clock(), state, error=error)
            return row.as_asset()
