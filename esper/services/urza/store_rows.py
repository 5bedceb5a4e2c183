"""What all parts of the hub do with rows: find, lock, insert once, list in pages, mark as used."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Callable, Collection, Coroutine, Sequence
from datetime import UTC, datetime
from functools import cache, wraps
from typing import Any, Concatenate, ParamSpec, TypeVar, cast
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Select,
    Table,
    and_,
    func,
    literal,
    or_,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import InstrumentedAttribute
from sqlalchemy.sql.dml import ReturningInsert

from esper.contracts.base import utc_now
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import artifact_key
from esper.errors import (
    BadInput,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    HubUnavailable,
    KernelNotFound,
    NotFound,
)
from esper.services.contracts import MAX_PAGE_ITEMS, entity_tag
from esper.services.urza import models
from esper.services.urza.database import Database
from esper.services.urza.database_errors import sqlstate
from esper.utils.object_store import ObjectStore

MAX_ERROR_CHARACTERS = 2000

Clock = Callable[[], datetime]
Match = Collection[str] | None
"""The entity tags of the states that a change is meant for; None: any."""
AnyRow = TypeVar("AnyRow", bound=models.Row)
Hub = TypeVar("Hub")
Outcome = TypeVar("Outcome")
Given = ParamSpec("Given")

COLLISIONS = {"40P01", "40001"}
"""Postgres's codes for a deadlock and for two transactions that can't both be."""
ATTEMPTS = 5
PAUSE_SECONDS = 0.02


def retried(
    work: Callable[Concatenate[Hub, Given], Coroutine[Any, Any, Outcome]],
) -> Callable[Concatenate[Hub, Given], Coroutine[Any, Any, Outcome]]:
    """A method that is one transaction, done again where another one was in its way.

    Postgres breaks a deadlock by ending one of the two; what ended left nothing behind.
    """

    @wraps(work)
    async def attempted(self: Hub, /, *given: Given.args, **named: Given.kwargs) -> Outcome:
        for attempt in range(1, ATTEMPTS):
            try:
                return await work(self, *given, **named)
            except HubUnavailable as error:
                if not (isinstance(error, Collided) or sqlstate(error) in COLLISIONS):
                    raise
                await asyncio.sleep(random.uniform(0.0, attempt * PAUSE_SECONDS))
        return await work(self, *given, **named)

    return attempted


class Collided(HubUnavailable):
    """What a transaction had found was removed by another before it came to change it."""


class HubRows:
    """What the hub works on: a database, an object store, and a clock for leases and endings.

    Leases are reckoned by this process's clock: where the clocks of two hubs differ, a lease is
    shorter or longer by that much, and still only one result is accepted.
    """

    def __init__(self, database: Database, store: ObjectStore, *, clock: Clock = utc_now) -> None:
        self._database = database
        self._store = store
        self._clock = clock

    async def health(self) -> bool:
        """Whether the database answers."""
        return await self._database.health()

    async def _remove_artifacts(self, digests: Sequence[str | None]) -> None:
        """Remove the artifacts that no kernel has any more."""
        for digest in sorted({digest for digest in digests if digest is not None}):
            await self._remove_unused(digest)

    @retried
    async def _remove_unused(self, digest: str) -> None:
        row = models.CompiledKernel
        async with self._database.transaction(writing=True) as session:
            await lock_artifact(session, digest)
            used = select(row.id).where(row.artifact_digest == digest).limit(1)
            if await session.scalar(used) is None:
                await self._store.delete(artifact_key(digest))


def shortened(error: str) -> str:
    """A reason that is never empty nor endless."""
    return error[:MAX_ERROR_CHARACTERS] or "no reason was given"


async def lock_artifact(session: AsyncSession, digest: str) -> None:
    """Be the only one that takes up or removes that artifact, until the transaction ends.

    On SQLite whoever writes is the only one anyway.
    """
    if _dialect(session) == "postgresql":
        number = int.from_bytes(bytes.fromhex(digest[:16]), signed=True)
        await session.execute(select(func.pg_advisory_xact_lock(number)))


async def blueprint_row(
    session: AsyncSession, digest: str, *, lock: bool = False
) -> models.Blueprint:
    """The blueprint's row, as it stands once it is locked; BlueprintNotFound where there is none.

    Whoever locks both a blueprint and kernels of it locks the blueprint first.
    """
    query = select(models.Blueprint).where(models.Blueprint.digest == digest)
    if lock:
        query = query.with_for_update().execution_options(populate_existing=True)
    row = await session.scalar(query)
    if row is None:
        raise BlueprintNotFound("blueprint digest", digest, "a blueprint that was put into the hub")
    return row


async def kernel_row(
    session: AsyncSession, kernel: str, *, lock: bool = False
) -> models.CompiledKernel:
    """The kernel's row; KernelNotFound where there is none."""
    query = select(models.CompiledKernel).where(models.CompiledKernel.kernel == kernel)
    if lock:
        query = query.with_for_update(of=models.CompiledKernel)
    row = await session.scalar(query)
    if row is None:
        raise no_kernel(kernel)
    return row


def no_kernel(kernel: str) -> KernelNotFound:
    """What is said of a kernel that is not there, or not for whoever asks."""
    return KernelNotFound("kernel", kernel, "a kernel that was requested; the hub does not know it")


def kept(query: Select[AnyRow], row: type[AnyRow], *, used: bool) -> Select[AnyRow]:
    """The query; if what it finds will be `used`, nobody may delete that until the end."""
    return query.with_for_update(read=True, key_share=True, of=row) if used else query


async def session_row(
    session: AsyncSession, uid: str, *, lock: bool = False
) -> models.TrainingSession:
    """The session's row; NotFound where there is none."""
    query = select(models.TrainingSession).where(models.TrainingSession.uid == uid)
    row = await session.scalar(query.with_for_update() if lock else query)
    if row is None:
        raise NotFound("session uid", uid, "a session that was registered")
    return row


async def insert_unless_there(session: AsyncSession, row: models.Base) -> bool:
    """Insert `row` unless its like is there; whether it was. Unlike a look, it leaves no gap."""
    values = {
        attribute.key: getattr(row, attribute.key)
        for attribute in row.__mapper__.column_attrs
        if getattr(row, attribute.key) is not None
    }
    made = await session.execute(_insert_statement(type(row), _dialect(session)), values)
    return made.scalar() is not None


@cache
def _insert_statement(model: type[models.Base], dialect: str) -> ReturningInsert[tuple[int]]:
    """Built once: what a statement is made of costs more than sending it."""
    make = sqlite.insert if dialect == "sqlite" else postgresql.insert
    return make(cast("Table", model.__table__)).on_conflict_do_nothing().returning(literal(1))


async def mark_used(
    session: AsyncSession, uid: str, *, digest: str | None = None, kernels: Sequence[str] = ()
) -> None:
    """Record that the session of that uid uses a blueprint, or kernels; those not there pass.

    Raises:
        NotFound: no session of that uid is registered.
    """
    user = literal((await session_row(session, uid)).id, models.TrainingSession.id.type)
    if digest is not None:
        blueprint = models.Blueprint
        found = select(user, blueprint.id).where(blueprint.digest == digest)
        await _insert_uses(session, models.SessionBlueprint, "blueprint_id", found)
    if kernels:
        kernel = models.CompiledKernel
        found = select(user, kernel.id).where(kernel.kernel.in_(kernels))
        await _insert_uses(session, models.SessionKernel, "kernel_id", found)


async def _insert_uses(
    session: AsyncSession, model: type[models.Base], column: str, found: Select[UUID, UUID]
) -> None:
    make = sqlite.insert if _dialect(session) == "sqlite" else postgresql.insert
    # What is being deleted at this moment is waited for, and then not found.
    locked = found.with_for_update(read=True, key_share=True)
    await session.execute(
        make(model).from_select(["session_id", column], locked).on_conflict_do_nothing()
    )


def archive(row: models.Row, now: datetime) -> None:
    """Put a row that this transaction has locked into the archive, if it is not there."""
    if row.archived_at is None:
        row.archived_at = now
        change(row, now)


async def bring_back(session: AsyncSession, row: type[models.Row], key: UUID) -> None:
    """Take a row out of the archive, if it is there."""
    await session.execute(
        update(row)
        .where(row.id == key, row.archived_at.is_not(None))
        .values(archived_at=None, version=row.version + 1)
    )


def in_states(
    row: type[models.Blueprint] | type[models.CompiledKernel],
    states: Sequence[BlueprintState] | None,
) -> ColumnElement[bool]:
    """The rows that are shown in one of `states`; by default all that are not archived."""
    shown = row.archived_at.is_(None)
    if states is None:
        return shown
    found = and_(shown, row.state.in_(states))
    if BlueprintState.ARCHIVED in states:
        return or_(found, row.archived_at.is_not(None))
    return found


def of_session(uid: str, uses: InstrumentedAttribute[UUID]) -> Select[UUID]:
    """The ids in the column `uses` of what the session of that uid uses."""
    user = models.TrainingSession
    return select(uses).join(user, user.id == uses.class_.session_id).where(user.uid == uid)


def of_namespace(namespace: str, uses: InstrumentedAttribute[UUID]) -> Select[UUID]:
    """The ids in the column `uses` of what sessions of that namespace use."""
    user = models.TrainingSession
    used = select(uses).join(user, user.id == uses.class_.session_id)
    return used.where(user.namespace == namespace)


def check_match(what: str, row: models.Row, match: Match) -> None:
    """Refuse a change of another state than one that was read.

    Raises:
        Conflict: it was changed meanwhile.
    """
    now = entity_tag(row.id, row.version)
    if match is not None and now not in match:
        raise Conflict(
            ConflictReason.STALE_VERSION,
            f"{what}: got entity tag {', '.join(sorted(match)) or 'none'}; allowed: {now}, "
            "it was changed meanwhile",
        )


def change(row: models.Row, now: datetime) -> None:
    """Make the next version of a row that this transaction has locked."""
    row.version += 1
    row.updated_at = now


async def page_of(
    session: AsyncSession,
    row: type[AnyRow],
    query: Select[AnyRow],
    limit: int,
    cursor: str | None,
) -> tuple[list[AnyRow], str | None]:
    """The next `limit` rows of `query` after `cursor`, the oldest first, and their end's cursor.

    Raises:
        BadInput: `limit` is out of bounds, or `cursor` is none that a page gave.
    """
    if not 1 <= limit <= MAX_PAGE_ITEMS:
        raise BadInput("limit", limit, f"1 to {MAX_PAGE_ITEMS}")
    if cursor is not None:
        moment, key = _parsed(cursor)
        after = tuple_(
            literal(moment, row.created_at.type),
            literal(key, row.id.type),
        )
        query = query.where(tuple_(row.created_at, row.id) > after)
    query = query.order_by(row.created_at, row.id).limit(limit + 1)
    found = list((await session.scalars(query)).all())
    rows = found[:limit]
    return rows, _cursor(rows[-1]) if len(found) > limit else None


def _cursor(row: models.Row) -> str:
    text = f"{row.created_at.isoformat()} {row.id.hex}"
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _parsed(cursor: str) -> tuple[datetime, UUID]:
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        text = base64.b64decode(padded.encode("ascii"), altchars=b"-_", validate=True)
        moment, key = text.decode("ascii").split(" ")
        return datetime.fromisoformat(moment).astimezone(UTC), UUID(hex=key)
    except (ValueError, OverflowError) as error:
        raise BadInput("cursor", cursor, "the nextCursor of an earlier page") from error


def _dialect(session: AsyncSession) -> str:
    return session.get_bind().dialect.name
