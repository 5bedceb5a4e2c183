"""The hub's kernels: asked for, read, archived, deleted.

`store_kernel_leases` has them worked on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from sqlalchemy import delete, select
from sqlalchemy.exc import IntegrityError

from esper.contracts.assets import CompiledKernel
from esper.contracts.blueprints import KernelTarget, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelFigures, KernelMetadata, artifact_key
from esper.errors import BlueprintNotFound, Conflict, ConflictReason, KernelError, KernelNotFound
from esper.services.contracts import (
    DEFAULT_PAGE_ITEMS,
    KernelFilter,
    Page,
    SimpleCompiledKernelContract,
    Stored,
)
from esper.services.urza import models
from esper.services.urza.store_rows import (
    Collided,
    HubRows,
    Match,
    archive,
    blueprint_row,
    bring_back,
    check_match,
    in_states,
    insert_unless_there,
    kept,
    kernel_row,
    mark_used,
    of_namespace,
    of_session,
    page_of,
    retried,
)


class HubKernels(HubRows):
    """Kernels, one for each blueprint and target that were asked for."""

    async def request_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> CompiledKernel:
        """The kernel of that blueprint for that target, made in state proposed unless it is there.

        An archived one comes out of the archive, its blueprint too. `session` is the uid of the
        session that uses the kernel from now on.

        Raises:
            BlueprintNotFound: no blueprint has that digest.
            NotFound: no session of that uid is registered.
        """
        return (await self.add_kernel(blueprint_digest, target, session=session))[0].item

    @retried
    async def add_kernel(
        self, blueprint_digest: str, target: KernelTarget, *, session: str | None = None
    ) -> tuple[Stored[CompiledKernel], bool]:
        """As `request_kernel`, with its version, and whether this call made it."""
        row, key, made = models.CompiledKernel, kernel_id(blueprint_digest, target), False
        used = session is not None
        query = kept(select(row).where(row.kernel == key), row, used=used)
        try:
            async with self._database.transaction(writing=used) as transaction:
                found = await transaction.scalar(query)
                if found is None:
                    blueprint = await blueprint_row(transaction, blueprint_digest)
                    kernel = CompiledKernel(
                        kernel=key,
                        blueprint_digest=blueprint_digest,
                        blueprint=str(blueprint.document["name"]),
                        target=target,
                    )
                    made = await insert_unless_there(transaction, row.of(kernel, blueprint.id))
                    found = await kernel_row(transaction, key)
                if found.archived_at is not None:
                    await bring_back(transaction, row, found.id)
                    found = await transaction.scalar(
                        query.execution_options(populate_existing=True)
                    )
                    if found is None:
                        raise Collided(f"kernel {key} was deleted at the same moment")
                if found.blueprint.archived_at is not None:
                    await bring_back(transaction, models.Blueprint, found.blueprint_id)
                if session is not None:
                    await mark_used(transaction, session, kernels=[key])
                return found.as_stored(), made
        except IntegrityError as error:
            raise BlueprintNotFound(
                "blueprint digest", blueprint_digest, "a blueprint that is not being deleted"
            ) from error

    async def kernel(self, kernel: str) -> CompiledKernel:
        """The kernel of that id, in whatever state.

        Raises:
            KernelNotFound: there is none.
        """
        return (await self.read_kernel(kernel)).item

    async def read_kernel(self, kernel: str) -> Stored[CompiledKernel]:
        """The kernel of that id, with its version.

        Raises:
            KernelNotFound: there is none.
        """
        async with self._database.reading() as session:
            return (await kernel_row(session, kernel)).as_stored()

    async def uses_kernel(
        self, kernel: str, *, session: str | None = None, namespace: str | None = None
    ) -> bool:
        """Whether the session of that uid, and one of that namespace, uses the kernel.

        Who names neither asks only whether it is there.
        """
        row, uses = models.CompiledKernel, models.SessionKernel.kernel_id
        query = select(row.id).where(row.kernel == kernel)
        if session is not None:
            query = query.where(row.id.in_(of_session(session, uses)))
        if namespace is not None:
            query = query.where(row.id.in_(of_namespace(namespace, uses)))
        async with self._database.reading() as transaction:
            return await transaction.scalar(query) is not None

    async def kernels(
        self, states: Sequence[BlueprintState] = tuple(BlueprintState)
    ) -> tuple[CompiledKernel, ...]:
        """The kernels in one of `states`, the oldest first."""
        row = models.CompiledKernel
        async with self._database.transaction() as session:
            query = select(row).where(in_states(row, states)).order_by(row.created_at, row.id)
            return tuple(found.as_asset() for found in await session.scalars(query))

    async def list_kernels(
        self,
        where: KernelFilter | None = None,
        *,
        limit: int = DEFAULT_PAGE_ITEMS,
        cursor: str | None = None,
        namespace: str | None = None,
    ) -> Page[Stored[CompiledKernel]]:
        """Some of the kernels that pass the filter, the oldest first.

        With a `namespace` those alone that sessions of it use.

        Raises:
            BadInput: `limit` is out of bounds, or `cursor` is none that a page gave.
        """
        asked = where or KernelFilter()
        row, blueprint = models.CompiledKernel, models.Blueprint
        query = select(row).where(in_states(row, asked.states))
        if asked.name is not None:
            name = blueprint.document["name"].as_string()
            query = query.where(row.blueprint.has(name == asked.name))
        if asked.blueprint is not None:
            query = query.where(row.blueprint.has(blueprint.digest == asked.blueprint))
        if asked.session is not None:
            query = query.where(
                row.id.in_(of_session(asked.session, models.SessionKernel.kernel_id))
            )
        if namespace is not None:
            query = query.where(row.id.in_(of_namespace(namespace, models.SessionKernel.kernel_id)))
        async with self._database.transaction() as session:
            rows, after = await page_of(session, row, query, limit, cursor)
            items = tuple(found.as_stored() for found in rows)
        return Page[Stored[CompiledKernel]](items=items, next_cursor=after)

    @retried
    async def archive_kernel(self, kernel: str, *, match: Match = None) -> Stored[CompiledKernel]:
        """Take a kernel out of lists and of work; its artifact can still be read.

        Whoever requests it again brings it back.

        Raises:
            KernelNotFound: there is none.
            Conflict: it is not in a state of `match` any more.
        """
        async with self._database.transaction(writing=True) as session:
            row = await kernel_row(session, kernel, lock=True)
            check_match(f"kernel {kernel}", row, match)
            archive(row, self._clock())
            return row.as_stored()

    @retried
    async def delete_kernel(self, kernel: str, *, match: Match = None) -> bool:
        """Remove a kernel and its artifact; whether there was one.

        Raises:
            Conflict: it is not in a state of `match` any more, or a live session uses it.
        """
        user, uses = models.TrainingSession, models.SessionKernel
        async with self._database.transaction(writing=True) as session:
            try:
                row = await kernel_row(session, kernel, lock=True)
            except KernelNotFound:
                return False
            check_match(f"kernel {kernel}", row, match)
            name = await session.scalar(
                select(user.name)
                .join(uses, uses.session_id == user.id)
                .where(uses.kernel_id == row.id, user.ended_at.is_(None))
                .limit(1)
            )
            if name is not None:
                raise Conflict(
                    ConflictReason.IN_USE, f"kernel {kernel}: the live session {name} uses it"
                )
            artifact = row.artifact_digest
            await session.execute(
                delete(models.CompiledKernel).where(models.CompiledKernel.id == row.id)
            )
        # Rows first: an artifact without a row is only wasted room, the reverse is an error.
        await self._remove_artifacts([artifact])
        return True

    async def metadata(self, kernel: str) -> KernelMetadata:
        """What is known of a compiled kernel.

        Raises:
            KernelNotFound: there is no such kernel.
            KernelError: it is not compiled.
        """
        async with self._database.reading() as session:
            row = await kernel_row(session, kernel)
        figures = None if row.figures is None else KernelFigures.model_validate(row.figures)
        return SimpleCompiledKernelContract.of(row.as_asset(), figures).metadata()

    async def artifact(self, kernel: str) -> bytes:
        """The bytes of a compiled kernel.

        Raises:
            KernelNotFound: there is no such kernel.
            KernelError: it is not compiled, or the store has lost or changed its artifact.
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
