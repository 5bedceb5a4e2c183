"""How the hub leases work: kernels to compile and blueprints to validate, one worker each.

A claim over the wire is a lease: it has a token, and lasts until a moment that heartbeats move on.
Past that moment another worker may claim the work; until one does, the first may still finish. A
result counts while its token is the row's, so exactly one is accepted, whatever the clocks say.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import TypeVar
from uuid import UUID

from sqlalchemy import ColumnElement, ScalarSelect, and_, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.enums import BlueprintState
from esper.errors import BadInput, Conflict, ConflictReason
from esper.services.contracts import MAX_LEASE_SECONDS
from esper.services.urza import models

MAX_WORKER_CHARACTERS = 253
NO_LEASE = {"claimed_by": None, "lease_token": None, "lease_expires_at": None}
"""The columns of a row that nobody works on."""

Leasable = models.Blueprint | models.CompiledKernel
BULK = {"synchronize_session": False}
"""How rows are changed that no object of the transaction stands for."""

AnyLeasable = TypeVar("AnyLeasable", models.Blueprint, models.CompiledKernel)


def lease_end(now: datetime, lease_seconds: float) -> datetime:
    """When a lease of that length ends.

    Raises:
        BadInput: it is too long or not positive.
    """
    if not 0 < lease_seconds <= MAX_LEASE_SECONDS:
        raise BadInput(
            "lease seconds", lease_seconds, f"more than 0, at most {MAX_LEASE_SECONDS:g}"
        )
    return now + timedelta(seconds=lease_seconds)


def free_of(row: type[Leasable], working: BlueprintState, now: datetime) -> ColumnElement[bool]:
    """Whether nobody works on it: it waits, or whoever did let the lease run out."""
    expired = and_(row.state == working, row.lease_expires_at < now)
    return and_(row.archived_at.is_(None), or_(row.state == BlueprintState.PROPOSED, expired))


def next_free(row: type[Leasable], working: BlueprintState, now: datetime) -> ScalarSelect[UUID]:
    """The oldest that nobody works on. On Postgres claims made at once each get another."""
    return (
        select(row.id)
        .where(free_of(row, working, now))
        .order_by(row.created_at, row.id)
        .limit(1)
        .with_for_update(skip_locked=True)
        .scalar_subquery()
    )


async def lease(
    session: AsyncSession,
    row: type[AnyLeasable],
    which: ColumnElement[bool],
    working: BlueprintState,
    worker: str,
    token: str,
    now: datetime,
    until: datetime,
) -> AnyLeasable | None:
    """Lease the row, which `which` picks, if nobody works on it; None otherwise.

    Raises:
        BadInput: a worker without a name.
    """
    if not 1 <= len(worker) <= MAX_WORKER_CHARACTERS:
        raise BadInput("worker", worker, f"a name of 1 to {MAX_WORKER_CHARACTERS} characters")
    key = await session.scalar(
        update(row)
        .where(which, free_of(row, working, now))
        .values(
            state=working,
            claimed_by=worker,
            lease_token=token,
            lease_expires_at=until,
            updated_at=now,
            version=row.version + 1,
        )
        .returning(row.id)
        .execution_options(**BULK)
    )
    return None if key is None else await session.get_one(row, key)


async def extend(
    session: AsyncSession,
    row: type[AnyLeasable],
    which: ColumnElement[bool],
    working: BlueprintState,
    token: str,
    until: datetime,
) -> datetime | None:
    """Move the end of the lease of that token; None where it is lost."""
    # Nothing that is shown changes, so neither do version and time of change.
    return await session.scalar(
        update(row)
        .where(which, row.state == working, row.lease_token == token)
        .values(lease_expires_at=until, updated_at=row.updated_at)
        .returning(row.lease_expires_at)
        .execution_options(**BULK)
    )


def lost(what: str) -> Conflict:
    """The refusal of whatever comes under a lease that is lost."""
    return Conflict(
        ConflictReason.LEASE_LOST,
        f"{what}: the lease is lost; another worker may have it, or it was given up",
    )
