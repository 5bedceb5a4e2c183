"""The hub's blueprints."""

from __future__ import annotations

from sqlalchemy import delete, exists, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from esper.contracts.assets import Blueprint
from esper.contracts.blueprints import BlueprintDocument
from esper.errors import BlueprintNotFound, Conflict, ConflictReason
from esper.services.contracts import DEFAULT_PAGE_ITEMS, BlueprintFilter, Page, Stored
from esper.services.urza import models
from esper.services.urza.store_rows import (
    Collided,
    HubRows,
    Match,
    archive,
    blueprint_row,
    bring_back,
    change,
    check_match,
    in_states,
    insert_unless_there,
    kept,
    mark_used,
    of_namespace,
    of_session,
    page_of,
    retried,
)


class HubBlueprints(HubRows):
    """Blueprints: equal content is one, under the first name that it came with."""

    async def put_blueprint(
        self, document: BlueprintDocument, *, session: str | None = None
    ) -> Blueprint:
        """The blueprint of that content, made unless it is there; its first name stays.

        An archived one comes out of the archive. `session` is the uid of the session that uses
        the blueprint from now on.

        Raises:
            NotFound: no session of that uid is registered.
        """
        return (await self.add_blueprint(document, session=session))[0].item

    @retried
    async def add_blueprint(
        self, document: BlueprintDocument, *, session: str | None = None
    ) -> tuple[Stored[Blueprint], bool]:
        """As `put_blueprint`, with its version, and whether this call made it."""
        row, used = models.Blueprint, session is not None
        query = kept(select(row).where(row.digest == document.digest), row, used=used)
        async with self._database.transaction(writing=used) as transaction:
            found = await transaction.scalar(query)
            if found is None:
                blueprint = Blueprint.proposed(document)
                if await insert_unless_there(transaction, row.of(blueprint)):
                    if session is not None:
                        await mark_used(transaction, session, digest=document.digest)
                    return Stored[Blueprint](item=blueprint, version=1), True
                found = await blueprint_row(transaction, document.digest)
            if found.archived_at is not None:
                await bring_back(transaction, row, found.id)
                found = await transaction.scalar(query.execution_options(populate_existing=True))
                if found is None:
                    raise Collided(f"blueprint {document.digest} was deleted at the same moment")
            if session is not None:
                await mark_used(transaction, session, digest=document.digest)
            return found.as_stored(), False

    async def blueprint(self, digest: str) -> Blueprint:
        """The blueprint of that digest.

        Raises:
            BlueprintNotFound: there is none.
        """
        return (await self.read_blueprint(digest)).item

    async def read_blueprint(self, digest: str) -> Stored[Blueprint]:
        """The blueprint of that digest, with its version.

        Raises:
            BlueprintNotFound: there is none.
        """
        async with self._database.reading() as session:
            return (await blueprint_row(session, digest)).as_stored()

    async def blueprints(self) -> tuple[Blueprint, ...]:
        """All blueprints, the oldest first."""
        row = models.Blueprint
        async with self._database.transaction() as session:
            query = select(row).order_by(row.created_at, row.id)
            return tuple(found.as_asset() for found in await session.scalars(query))

    async def list_blueprints(
        self,
        where: BlueprintFilter | None = None,
        *,
        limit: int = DEFAULT_PAGE_ITEMS,
        cursor: str | None = None,
        namespace: str | None = None,
    ) -> Page[Stored[Blueprint]]:
        """Some of the blueprints that pass the filter, the oldest first.

        With a `namespace` those alone that sessions of it use.

        Raises:
            BadInput: `limit` is out of bounds, or `cursor` is none that a page gave.
        """
        asked = where or BlueprintFilter()
        row = models.Blueprint
        query = select(row).where(in_states(row, asked.states))
        if asked.name is not None:
            query = query.where(row.document["name"].as_string() == asked.name)
        if asked.session is not None:
            used = of_session(asked.session, models.SessionBlueprint.blueprint_id)
            query = query.where(row.id.in_(used))
        if namespace is not None:
            query = query.where(
                row.id.in_(of_namespace(namespace, models.SessionBlueprint.blueprint_id))
            )
        async with self._database.transaction() as session:
            rows, after = await page_of(session, row, query, limit, cursor)
            items = tuple(found.as_stored() for found in rows)
        return Page[Stored[Blueprint]](items=items, next_cursor=after)

    @retried
    async def update_blueprint(
        self,
        digest: str,
        *,
        name: str | None = None,
        description: str | None = None,
        match: Match = None,
    ) -> Stored[Blueprint]:
        """Give a blueprint another name or description; its content never changes.

        Raises:
            BlueprintNotFound: there is none.
            Conflict: it is not in a state of `match` any more.
            pydantic.ValidationError: a name or a description that no blueprint can have.
        """
        async with self._database.transaction(writing=True) as session:
            row = await blueprint_row(session, digest, lock=True)
            check_match(f"blueprint {digest}", row, match)
            given = {"name": name, "description": description}
            changed = {key: value for key, value in given.items() if value is not None}
            was = row.document["name"]
            document = BlueprintDocument.model_validate({**row.document, **changed})
            row.document = document.to_wire()
            change(row, self._clock())
            if document.name != was:
                # Kernels are shown with their blueprint's name.
                kernel = models.CompiledKernel
                await session.execute(
                    update(kernel)
                    .where(kernel.blueprint_id == row.id)
                    .values(version=kernel.version + 1, updated_at=kernel.updated_at)
                )
            return row.as_stored()

    @retried
    async def archive_blueprint(self, digest: str, *, match: Match = None) -> Stored[Blueprint]:
        """Take a blueprint out of lists and of work; whoever puts it again brings it back.

        Raises:
            BlueprintNotFound: there is none.
            Conflict: it is not in a state of `match` any more.
        """
        async with self._database.transaction(writing=True) as session:
            row = await blueprint_row(session, digest, lock=True)
            check_match(f"blueprint {digest}", row, match)
            archive(row, self._clock())
            return row.as_stored()

    @retried
    async def delete_blueprint(self, digest: str, *, match: Match = None) -> bool:
        """Remove a blueprint, its kernels and their artifacts; whether there was one.

        Raises:
            Conflict: it is not in a state of `match` any more, or a live session uses it or a
                kernel of it.
        """
        kernel = models.CompiledKernel
        async with self._database.transaction(writing=True) as session:
            try:
                blueprint = await blueprint_row(session, digest, lock=True)
            except BlueprintNotFound:
                return False
            check_match(f"blueprint {digest}", blueprint, match)
            # A session that begins to use a kernel of it at this moment is waited for.
            await session.execute(
                select(kernel.id)
                .where(kernel.blueprint_id == blueprint.id)
                .order_by(kernel.id)
                .with_for_update()
            )
            await _refuse_in_use(session, blueprint)
            found = select(kernel.artifact_digest).where(kernel.blueprint_id == blueprint.id)
            artifacts = (await session.scalars(found)).all()
            await session.execute(
                delete(models.Blueprint).where(models.Blueprint.id == blueprint.id)
            )
        # Rows first: an artifact without a row is only wasted room, the reverse is an error.
        await self._remove_artifacts(artifacts)
        return True


async def _refuse_in_use(session: AsyncSession, blueprint: models.Blueprint) -> None:
    user, kernel = models.TrainingSession, models.CompiledKernel
    whole, part = models.SessionBlueprint, models.SessionKernel
    used = or_(
        exists().where(whole.session_id == user.id, whole.blueprint_id == blueprint.id),
        exists().where(
            part.session_id == user.id,
            part.kernel_id == kernel.id,
            kernel.blueprint_id == blueprint.id,
        ),
    )
    name = await session.scalar(select(user.name).where(user.ended_at.is_(None), used).limit(1))
    if name is not None:
        raise Conflict(
            ConflictReason.IN_USE,
            f"blueprint {blueprint.digest}: the live session {name} uses it or a kernel of it",
        )
