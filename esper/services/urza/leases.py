"""How the hub leases work: kernels to compile and blueprints to validate, one worker each.

A claim over the wire is a lease: it has a token, and lasts until a moment that heartbeats move on.
Past that moment another worker may claim the work; until one does, the first may still finish. A
result counts while its token is the row's, so exactly one is accepted, whatever the clocks say.

Work that is lost again and again, because it ends whoever does it, is given up after
`MAX_ATTEMPTS`; until then what was tried less comes first, so that it holds up nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from sqlalchemy import ColumnElement, and_, case, or_, select, true, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute

from esper.contracts.enums import BlueprintState
from esper.errors import BadInput, Conflict, ConflictReason
from esper.services.contracts import MAX_LEASE_SECONDS
from esper.services.urza import models

MAX_WORKER_CHARACTERS = 253
MAX_ATTEMPTS = 8
NO_LEASE: Mapping[str, Any] = {"claimed_by": None, "lease_token": None, "lease_expires_at": None}
"""The columns of a row that nobody works on."""

BULK = {"synchronize_session": False}
"""How rows are changed that no object of the transaction stands for."""

AnyLeasable = TypeVar("AnyLeasable", models.Blueprint, models.CompiledKernel)


@dataclass(frozen=True)
class Leases(Generic[AnyLeasable]):
    """The leases on one kind of row.

    Args:
        what: what one of the rows is called in errors.
        row: the rows, and `key` the column that names one.
        working: the state of a row that is worked on.
        find: the row of that name; NotFound where there is none.
        sensible: of which rows the work is of use at all.
    """

    what: str
    row: type[AnyLeasable]
    key: InstrumentedAttribute[str]
    working: BlueprintState
    find: Callable[[AsyncSession, str], Awaitable[AnyLeasable]]
    sensible: ColumnElement[bool]

    def free(self, now: datetime) -> ColumnElement[bool]:
        """Whether nobody works on it: it waits, or whoever did let the lease run out."""
        row = self.row
        expired = and_(row.state == self.working, row.lease_expires_at < now)
        waits = or_(row.state == BlueprintState.PROPOSED, expired)
        return and_(row.archived_at.is_(None), self.sensible, waits)

    async def claim(
        self,
        session: AsyncSession,
        worker: str,
        token: str | None,
        now: datetime,
        lease_seconds: float,
        *,
        name: str | None = None,
    ) -> AnyLeasable | None:
        """Lease the row of that name, by default the next, if nobody works on it; else None.

        A worker that asks again with its token, for want of an answer, gets what it has. Without
        `token` the lease has a new one.

        Raises:
            BadInput: a worker without a name, or a lease that is too long or not positive.
        """
        until = lease_end(now, lease_seconds)
        if not 1 <= len(worker) <= MAX_WORKER_CHARACTERS:
            raise BadInput("worker", worker, f"a name of 1 to {MAX_WORKER_CHARACTERS} characters")
        row = self.row
        named = true() if name is None else self.key == name
        if token is not None:
            own = and_(row.state == self.working, row.claimed_by == worker)
            own = and_(named, own, row.lease_token == token)
            held = await self._set(session, own, now, lease_expires_at=until)
            if held is not None:
                return await session.get_one(row, held)
        await self._give_up(session, now)
        which = and_(named, self.free(now))
        if name is None:
            # On Postgres claims made at once each get another.
            which = row.id == (
                select(row.id)
                .where(which)
                .order_by(row.attempts, row.updated_at, row.id)
                .limit(1)
                .with_for_update(skip_locked=True)
                .scalar_subquery()
            )
        claimed = await self._set(
            session,
            and_(which, self.free(now)),
            now,
            state=self.working,
            claimed_by=worker,
            lease_token=token or secrets.token_hex(16),
            lease_expires_at=until,
            attempts=row.attempts + 1,
        )
        return None if claimed is None else await session.get_one(row, claimed)

    async def extend(
        self, session: AsyncSession, name: str, token: str, now: datetime, lease_seconds: float
    ) -> datetime:
        """Keep a lease for that long from now; returns when it ends.

        Raises:
            NotFound: there is no such row.
            Conflict: the lease is lost, or its result was accepted.
            BadInput: a lease that is too long or not positive.
        """
        row = self.row
        # Nothing that is shown changes, so neither do version and time of change.
        end = await session.scalar(
            update(row)
            .where(self.key == name, row.state == self.working, row.lease_token == token)
            .values(lease_expires_at=lease_end(now, lease_seconds), updated_at=row.updated_at)
            .returning(row.lease_expires_at)
            .execution_options(**BULK)
        )
        if end is None:
            await self.find(session, name)
            raise self.lost(name)
        return end

    async def release(
        self,
        session: AsyncSession,
        name: str,
        worker: str,
        token: str | None,
        now: datetime,
        *,
        blamed: bool,
    ) -> None:
        """Give up that worker's lease; a lost one changes nothing.

        What is not `blamed` was given up for another reason than the work itself, and was no
        attempt at it.
        """
        row = self.row
        held = and_(
            self.key == name,
            row.state == self.working,
            row.lease_token.is_not_distinct_from(token),
            row.claimed_by == worker,
        )
        if blamed:
            await self._set(session, held, now, lease_expires_at=now - timedelta(microseconds=1))
            await self._give_up(session, now)
        # A claim in the hub's own process has counted none that could be taken back.
        fewer = case((row.attempts > 0, row.attempts - 1), else_=0)
        attempts = row.attempts if blamed else fewer
        await self._set(
            session, held, now, **NO_LEASE, state=BlueprintState.PROPOSED, attempts=attempts
        )

    async def settle(
        self,
        session: AsyncSession,
        name: str,
        token: str | None,
        now: datetime,
        state: BlueprintState,
        **values: object,
    ) -> AnyLeasable:
        """Move an unsettled row to its last state; one that is settled already stays as it is.

        Raises:
            NotFound: there is no such row.
            Conflict: the lease is lost.
        """
        row = self.row
        unsettled = row.state.in_((BlueprintState.PROPOSED, self.working))
        mine = and_(self.key == name, unsettled, row.lease_token.is_not_distinct_from(token))
        # The token stays: it says whose result was accepted.
        done = {"state": state, "claimed_by": None, "lease_expires_at": None}
        await self._set(session, mine, now, **done, **values)
        found = await self.find(session, name)
        self.settled(found, token)
        return found

    def settled(self, found: AnyLeasable, token: str | None) -> bool:
        """Whether a row is settled, as far as the holder of `token` may know.

        Raises:
            Conflict: the lease is lost.
        """
        settled = found.state not in (BlueprintState.PROPOSED, self.working)
        if found.lease_token != token and not (settled and token is None):
            raise self.lost(getattr(found, self.key.key))
        return settled

    def lost(self, name: str) -> Conflict:
        """The refusal of whatever comes under a lease that is lost."""
        return Conflict(
            ConflictReason.LEASE_LOST,
            f"{self.what} {name}: the lease is lost; another worker may have it, "
            "or it was given up",
        )

    async def _give_up(self, session: AsyncSession, now: datetime) -> None:
        """Fail what was lost too often: nobody would come to an end with it."""
        row = self.row
        hopeless = and_(row.state == self.working, row.lease_expires_at < now)
        reason = f"given up: {MAX_ATTEMPTS} workers were lost, or killed, while they were at it"
        await self._set(
            session,
            and_(hopeless, row.attempts >= MAX_ATTEMPTS),
            now,
            **NO_LEASE,
            state=BlueprintState.FAILED,
            error=reason,
        )

    async def _set(
        self, session: AsyncSession, which: ColumnElement[bool], now: datetime, **values: object
    ) -> object | None:
        """Change the rows that `which` picks; the id of one of them."""
        row = self.row
        return await session.scalar(
            update(row)
            .where(which)
            .values({**values, "updated_at": now, "version": row.version + 1})
            .returning(row.id)
            .execution_options(**BULK)
        )


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
