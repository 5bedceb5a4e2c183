"""The hub's sessions: what they use is kept while they live, and a sweep ends the forgotten."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta

from sqlalchemy import delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.assets import TrainingSession
from esper.contracts.enums import SessionOutcome
from esper.errors import BadInput, Conflict, ConflictReason, NotFound
from esper.services.contracts import (
    DEFAULT_PAGE_ITEMS,
    NamespaceCredentials,
    Page,
    SessionCredentials,
    SessionFilter,
    Stored,
    SweepResult,
)
from esper.services.urza import models
from esper.services.urza.store_rows import (
    HubRows,
    Match,
    archive,
    change,
    check_match,
    insert_unless_there,
    mark_used,
    page_of,
    session_row,
)

MAX_CREDENTIAL_SECONDS = 366 * 86_400.0
_ENDED = (SessionOutcome.SUCCEEDED, SessionOutcome.FAILED)


class HubSessions(HubRows):
    """Training sessions and the credentials that were made for them."""

    async def register_session(self, session: TrainingSession) -> TrainingSession:
        """The session of that uid: `session` the first time, as stored from then on.

        When it was made and changed is told by the hub's clock, as for all else in it. The kernels
        that its seeds name are in use by it, if the hub has them.

        Raises:
            BadInput: its id is that of another session.
            Conflict: it is new, and its credentials were revoked.
        """
        return (await self.add_session(session))[0].item

    async def add_session(self, session: TrainingSession) -> tuple[Stored[TrainingSession], bool]:
        """As `register_session`, with its version, and whether this call made it."""
        row, now = models.TrainingSession.of(session), self._clock()
        row.created_at = row.updated_at = now
        row.ended_at = now if session.outcome in _ENDED else None
        async with self._database.transaction() as transaction:
            made = await insert_unless_there(transaction, row)
            try:
                stored = await session_row(transaction, session.uid)
            except NotFound:
                raise BadInput("session.id", str(session.id), "an id of its own") from None
            if made:
                await _refuse_revoked(transaction, session.uid)
                await mark_used(transaction, session.uid, kernels=_kernels(session))
            return stored.as_stored(), made

    async def update_session(
        self, session: TrainingSession, *, match: Match = None
    ) -> TrainingSession:
        """Replace what is stored of a registered session; returns what is stored now.

        Success and failure end it; any other outcome has it live again. The kernels that its
        seeds name are in use by it from now on, if the hub has them.

        Raises:
            NotFound: no session of that uid is registered.
            BadInput: it is registered under another id, name or namespace.
            Conflict: it is not in a state of `match` any more, or its credentials were revoked.
        """
        return (await self.replace_session(session, match=match)).item

    async def replace_session(
        self, session: TrainingSession, *, match: Match = None
    ) -> Stored[TrainingSession]:
        """As `update_session`, with its version."""
        async with self._database.transaction(writing=True) as transaction:
            row = await session_row(transaction, session.uid, lock=True)
            for field in ("id", "name", "namespace"):
                came, stored = getattr(session, field), getattr(row, field)
                if came != stored:
                    raise BadInput(f"session.{field}", str(came), str(stored))
            check_match(f"session {session.name}", row, match)
            await _refuse_revoked(transaction, session.uid)
            change(row, self._clock())
            row.outcome = session.outcome
            row.epoch, row.epochs = session.epoch, session.epochs
            row.num_layers, row.num_slots = session.num_layers, session.num_slots
            row.seeds = [seed.to_wire() for seed in session.seeds]
            ended = session.outcome in _ENDED
            row.ended_at = (row.ended_at or self._clock()) if ended else None
            await mark_used(transaction, session.uid, kernels=_kernels(session))
            return row.as_stored()

    async def read_session(self, uid: str) -> Stored[TrainingSession]:
        """The session of that uid, with its version.

        Raises:
            NotFound: there is none.
        """
        async with self._database.reading() as session:
            return (await session_row(session, uid)).as_stored()

    async def list_sessions(
        self,
        where: SessionFilter | None = None,
        *,
        limit: int = DEFAULT_PAGE_ITEMS,
        cursor: str | None = None,
        uid: str | None = None,
    ) -> Page[Stored[TrainingSession]]:
        """Some of the sessions that pass the filter, the oldest first; with `uid` at most that one.

        Raises:
            BadInput: `limit` is out of bounds, or `cursor` is none that a page gave.
        """
        asked = where or SessionFilter()
        row = models.TrainingSession
        archived = row.archived_at.is_not(None) if asked.archived else row.archived_at.is_(None)
        query = select(row).where(archived)
        for column, value in (
            (row.name, asked.name),
            (row.namespace, asked.namespace),
            (row.outcome, asked.outcome),
            (row.uid, uid),
        ):
            if value is not None:
                query = query.where(column == value)
        if asked.live is not None:
            ended = row.ended_at
            query = query.where(ended.is_(None) if asked.live else ended.is_not(None))
        async with self._database.transaction() as session:
            rows, after = await page_of(session, row, query, limit, cursor)
            items = tuple(found.as_stored() for found in rows)
        return Page[Stored[TrainingSession]](items=items, next_cursor=after)

    async def archive_session(self, uid: str, *, match: Match = None) -> Stored[TrainingSession]:
        """Take an ended session out of lists.

        Raises:
            NotFound: there is none.
            Conflict: it is not in a state of `match` any more, or it is live.
        """
        async with self._database.transaction(writing=True) as session:
            row = await session_row(session, uid, lock=True)
            _check_ended(row, match)
            archive(row, self._clock())
            return row.as_stored()

    async def delete_session(self, uid: str, *, match: Match = None) -> bool:
        """Remove an ended session; whether there was one.

        Raises:
            Conflict: it is not in a state of `match` any more, or it is live.
        """
        async with self._database.transaction(writing=True) as session:
            try:
                row = await session_row(session, uid, lock=True)
            except NotFound:
                return False
            _check_ended(row, match)
            await session.delete(row)
        return True

    # Credentials

    async def put_credentials(
        self, uid: str, namespace: str, lifetime_seconds: float, *, removes: bool = False
    ) -> SessionCredentials:
        """The credentials of that session, made unless they are there.

        Asked for again they are the same; only once less than half of the lifetime is left do
        they last for a whole one again. `removes` says whether what the session keeps goes with
        it; what was said last counts.

        Raises:
            BadInput: a lifetime that is too long or not positive, or another namespace than theirs.
            Conflict: they were revoked.
        """
        if not 0 < lifetime_seconds <= MAX_CREDENTIAL_SECONDS:
            raise BadInput(
                "lifetime seconds",
                lifetime_seconds,
                f"more than 0, at most {MAX_CREDENTIAL_SECONDS:g}",
            )
        now = self._clock()
        made = models.SessionCredential(
            uid=uid,
            namespace=namespace,
            created_at=now,
            expires_at=now + timedelta(seconds=lifetime_seconds),
            revoked=False,
            removes=removes,
        )
        row = models.SessionCredential
        async with self._database.transaction(writing=True) as session:
            await insert_unless_there(session, made)
            found = await session.scalar(select(row).where(row.uid == uid).with_for_update())
            if found is None:
                raise NotFound("session uid", uid, "credentials that are not being deleted")
            if found.namespace != namespace:
                raise BadInput("namespace", namespace, found.namespace)
            if found.revoked:
                raise revocation(uid)
            found.removes = removes
            if found.expires_at < now + timedelta(seconds=lifetime_seconds / 2):
                found.expires_at = made.expires_at
            return found.as_contract()

    async def credentials(self, uid: str) -> SessionCredentials:
        """What is known of a session's credentials.

        Raises:
            NotFound: none were made.
        """
        async with self._database.transaction() as session:
            row = await session.get(models.SessionCredential, uid)
        if row is None:
            raise NotFound("session uid", uid, "a session that credentials were made for")
        return row.as_contract()

    async def list_credentials(
        self, namespace: str | None = None, *, revoked: bool | None = None
    ) -> tuple[SessionCredentials, ...]:
        """The credentials of one namespace, or of all, that are or are not `revoked`, or both."""
        row = models.SessionCredential
        query = select(row).order_by(row.created_at, row.uid)
        if namespace is not None:
            query = query.where(row.namespace == namespace)
        if revoked is not None:
            query = query.where(row.revoked.is_(revoked))
        async with self._database.transaction() as session:
            return tuple(found.as_contract() for found in await session.scalars(query))

    async def swept_namespaces(self) -> tuple[str, ...]:
        """The namespaces in which a sweep may find something: those of credentials not revoked."""
        row = models.SessionCredential
        query = select(row.namespace).distinct().where(or_(~row.revoked, row.removes))
        async with self._database.transaction() as session:
            return tuple(await session.scalars(query.order_by(row.namespace)))

    async def revoke_credentials(self, uid: str) -> bool:
        """Mark a session's credentials as revoked, for good; whether there were any."""
        row = models.SessionCredential
        async with self._database.transaction() as session:
            changed = update(row).where(row.uid == uid).values(revoked=True).returning(row.uid)
            return await session.scalar(changed) is not None

    async def mark_removed(self, uid: str) -> None:
        """Nothing that the session kept is left, or what is left stays."""
        row = models.SessionCredential
        async with self._database.transaction() as session:
            await session.execute(update(row).where(row.uid == uid).values(removes=False))

    async def delete_credentials(self, uid: str) -> bool:
        """Forget a session's credentials, once nothing in Redis knows them; whether there were."""
        row = models.SessionCredential
        async with self._database.transaction() as session:
            gone = delete(row).where(row.uid == uid).returning(row.uid)
            return await session.scalar(gone) is not None

    async def put_namespace(self, namespace: str, expires_at: datetime) -> NamespaceCredentials:
        """Record that a namespace was given credentials that are good until then, or longer."""
        now, row = self._clock(), models.NamespaceCredential
        made = row(namespace=namespace, created_at=now, expires_at=expires_at)
        async with self._database.transaction(writing=True) as session:
            await insert_unless_there(session, made)
            found = await session.scalar(
                select(row).where(row.namespace == namespace).with_for_update()
            )
            if found is None:
                raise NotFound("namespace", namespace, "credentials that are not being deleted")
            found.expires_at = max(found.expires_at, expires_at)
            return found.as_contract()

    async def list_namespaces(self) -> tuple[NamespaceCredentials, ...]:
        """The namespaces that were given credentials, by name."""
        row = models.NamespaceCredential
        async with self._database.reading() as session:
            found = await session.scalars(select(row).order_by(row.namespace))
            return tuple(given.as_contract() for given in found)

    async def forget_namespaces(self, before: datetime) -> None:
        """Forget the namespaces whose credentials were good until `before` at most."""
        row = models.NamespaceCredential
        async with self._database.transaction() as session:
            await session.execute(delete(row).where(row.expires_at <= before))

    async def sweep(self, namespace: str, live: Collection[str], before: datetime) -> SweepResult:
        """End the sessions of a namespace that are gone, and revoke their credentials.

        Args:
            namespace: only its sessions are looked at.
            live: the uids of those that are there.
            before: when `live` was gathered; what was made later is left alone.

        Returns:
            The sessions that were ended, and all revoked credentials of the namespace, also those
            of an earlier sweep whose caller did not come to `delete_credentials`.
        """
        kept, now = frozenset(live), self._clock()
        row, credential = models.TrainingSession, models.SessionCredential
        old = select(row).where(
            row.namespace == namespace, row.ended_at.is_(None), row.created_at < before
        )
        made = select(credential).where(credential.namespace == namespace)
        async with self._database.transaction(writing=True) as session:
            ended = []
            for found in await session.scalars(old.order_by(row.id).with_for_update()):
                if found.uid not in kept:
                    found.ended_at = now
                    if found.outcome is SessionOutcome.RUNNING:
                        found.outcome = SessionOutcome.INTERRUPTED
                    change(found, now)
                    ended.append(found.uid)
            gone = []
            for given in await session.scalars(made.order_by(credential.uid).with_for_update()):
                if given.uid not in kept and given.created_at < before:
                    given.revoked = True
                if given.revoked:
                    gone.append(given.uid)
        return SweepResult(ended=tuple(ended), revoked=tuple(gone))


def revocation(uid: str) -> Conflict:
    """The refusal of a session whose credentials were revoked."""
    return Conflict(ConflictReason.REVOKED, f"session {uid}: its credentials were revoked")


async def _refuse_revoked(session: AsyncSession, uid: str) -> None:
    given = await session.get(models.SessionCredential, uid)
    if given is not None and given.revoked:
        raise revocation(uid)


def _kernels(session: TrainingSession) -> list[str]:
    """The kernels that its seeds name."""
    return sorted({seed.kernel for seed in session.seeds if seed.kernel is not None})


def _check_ended(row: models.TrainingSession, match: Match) -> None:
    check_match(f"session {row.name}", row, match)
    if row.ended_at is None:
        raise Conflict(ConflictReason.IN_USE, f"session {row.name}: it is live; end it first")
