"""Pages, filters, versions, the archive, and what live sessions protect."""

import asyncio
import base64
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.contracts.assets import Seed, TrainingSession
from esper.contracts.blueprints import builtin
from esper.contracts.enums import BlueprintState, SeedState, SessionOutcome
from esper.errors import (
    BadInput,
    BlueprintNotFound,
    Conflict,
    ConflictReason,
    KernelNotFound,
    NotFound,
)
from esper.services.contracts import BlueprintFilter, KernelFilter, SessionFilter, entity_tag
from esper.services.urza import models
from esper.services.urza.store import UrzaHub, artifact_key
from tests.unit.esper.services.urza.hubs import (
    DATA,
    DIGEST,
    DOCUMENT,
    OTHER,
    UNKNOWN,
    Clock,
    described,
    opened,
    requested,
    target,
)


def session(name: str = "s", **fields: object) -> TrainingSession:
    return TrainingSession.model_validate(
        {"name": name, "epochs": 10, "num_layers": 2, "num_slots": 1, **fields}
    )


@asynccontextmanager
async def refused(reason: ConflictReason) -> AsyncIterator[None]:
    with pytest.raises(Conflict) as caught:
        yield
    assert caught.value.reason is reason


async def all_pages(call, *args, limit):
    items, cursor, pages = [], None, 0
    while True:
        page = await call(*args, limit=limit, cursor=cursor)
        assert len(page.items) <= limit
        items += page.items
        pages += 1
        if page.next_cursor is None:
            return items, pages
        assert len(page.items) == limit
        cursor = page.next_cursor


# Pages


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8, 500])
def test_pages_hold_everything_once_in_order(place, limit):
    async def life() -> None:
        async with opened(place) as hub:
            made = [
                await hub.put_blueprint(builtin("low-rank", {"rank": rank})) for rank in range(1, 8)
            ]
            items, pages = await all_pages(hub.list_blueprints, limit=limit)
            assert [one.item for one in items] == made
            assert {one.version for one in items} == {1}
            assert pages == max(1, -(-len(made) // limit))

    asyncio.run(life())


def test_rows_of_one_moment_are_parted_by_their_id(place):
    async def life() -> None:
        async with opened(place, clock=Clock()) as hub:
            for number in range(7):
                await hub.register_session(session(uid=f"u{number}"))
            items, _ = await all_pages(hub.list_sessions, limit=2)
            assert {one.item.uid for one in items} == {f"u{number}" for number in range(7)}
            ids = [one.item.id for one in items]
            assert ids == sorted(ids, key=str)

    asyncio.run(life())


def test_what_comes_while_pages_are_read_comes_at_the_end(place):
    async def life() -> None:
        async with opened(place) as hub:
            await requested(hub, inputs=1)
            await requested(hub, inputs=2)
            first = await hub.list_kernels(limit=1)
            late = await requested(hub, inputs=3)
            rest = await hub.list_kernels(limit=10, cursor=first.next_cursor)
            assert [one.item.kernel for one in rest.items][-1] == late
            assert len(rest.items) == 2

    asyncio.run(life())


@pytest.mark.parametrize("limit", [0, -1, 501])
def test_a_page_has_bounds(place, limit):
    async def life() -> None:
        async with opened(place) as hub:
            for call in (hub.list_blueprints, hub.list_kernels, hub.list_sessions):
                with pytest.raises(BadInput, match=r"limit: got .* allowed: 1 to 500"):
                    await call(limit=limit)

    asyncio.run(life())


def encoded(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "cursor",
    [
        "",
        "x",
        "ü",
        "====",
        "' OR 1=1 --",
        encoded("not a moment at all"),
        encoded(f"2026-01-01T00:00:00+00:00 {'g' * 32}"),
        encoded(f"0001-01-01T00:00:00+23:00 {'0' * 32}"),
        encoded(f"2026-13-01 {'0' * 32}"),
    ],
)
def test_a_cursor_that_no_page_gave_is_refused(sqlite_place, cursor):
    async def life() -> None:
        async with opened(sqlite_place) as hub:
            with pytest.raises(BadInput, match="cursor: got"):
                await hub.list_kernels(cursor=cursor)

    asyncio.run(life())


def test_no_cursor_is_anything_but_refused_or_a_page(sqlite_place):
    async def asked(hub: UrzaHub, cursor: str) -> None:
        try:
            page = await hub.list_blueprints(cursor=cursor)
        except BadInput:
            return
        assert page.items == ()

    with asyncio.Runner() as runner:
        opening = opened(sqlite_place)
        hub = runner.run(opening.__aenter__())

        @given(cursor=st.text(max_size=80))
        @settings(deadline=None)
        def answered(cursor: str) -> None:
            runner.run(asked(hub, cursor))

        try:
            answered()
        finally:
            runner.run(opening.__aexit__(None, None, None))


# Filters


def test_blueprints_and_kernels_are_filtered(place):
    async def life() -> None:
        async with opened(place) as hub:
            done, open_ = await requested(hub), await requested(hub, OTHER, 5)
            await hub.complete_kernel(described(done), DATA)
            renamed = await hub.update_blueprint(OTHER.digest, name="other")
            assert renamed.item.document.name == "other"
            user = await hub.register_session(session())
            await hub.request_kernel(OTHER.digest, target(5), session=user.uid)
            await hub.put_blueprint(DOCUMENT, session=user.uid)

            async def kernels(**fields: object) -> list[str]:
                page = await hub.list_kernels(KernelFilter.model_validate(fields))
                return [one.item.kernel for one in page.items]

            async def blueprints(**fields: object) -> list[str]:
                page = await hub.list_blueprints(BlueprintFilter.model_validate(fields))
                return [one.item.digest for one in page.items]

            assert await kernels() == [done, open_]
            assert await kernels(states=[BlueprintState.CHARACTERIZED]) == [done]
            assert await kernels(states=[BlueprintState.PROPOSED]) == [open_]
            assert await kernels(states=[]) == []
            assert await kernels(name="other") == [open_]
            assert await kernels(name=DOCUMENT.name) == [done]
            assert await kernels(blueprint=OTHER.digest) == [open_]
            assert await kernels(blueprint=DIGEST) == []
            assert await kernels(session=user.uid) == [open_]
            assert await kernels(session="nobody") == []
            assert await kernels(name="other", states=[BlueprintState.FAILED]) == []
            assert await blueprints() == [DOCUMENT.digest, OTHER.digest]
            claim = await hub.claim_next_blueprint("one", 60)
            assert claim is not None
            await hub.complete_blueprint(claim.digest, claim.lease)
            assert await blueprints(states=[BlueprintState.CHARACTERIZED]) == [claim.digest]
            assert await blueprints(name="other") == [OTHER.digest]
            assert await blueprints(name="x' OR '1'='1") == []
            assert await blueprints(session=user.uid) == [DOCUMENT.digest]

    asyncio.run(life())


def test_sessions_are_filtered(place):
    async def life() -> None:
        async with opened(place) as hub:
            one = await hub.register_session(session("a"))
            await hub.register_session(session("a", uid="second"))
            await hub.register_session(session("b", namespace="team"))
            await hub.update_session(one.changed(outcome=SessionOutcome.FAILED))

            async def found(**fields: object) -> list[tuple[str, str]]:
                page = await hub.list_sessions(SessionFilter.model_validate(fields))
                return [(stored.item.namespace, stored.item.uid) for stored in page.items]

            first = ("default", one.uid)
            second, other = ("default", "second"), ("team", session("b", namespace="team").uid)
            assert await found() == [first, second, other]
            assert await found(name="a") == [first, second]
            assert await found(namespace="team") == [other]
            assert await found(live=True) == [second, other]
            assert await found(live=False) == [first]
            assert await found(outcome=SessionOutcome.FAILED) == [first]
            assert await found(archived=True) == []
            await hub.archive_session(one.uid)
            assert await found() == [second, other]
            assert await found(archived=True) == [first]

    asyncio.run(life())


# Versions


def test_every_change_makes_the_next_version(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            assert (await hub.read_kernel(kernel)).version == 1
            claim = await hub.claim_next_kernel("one", 60)
            assert claim is not None
            assert (await hub.read_kernel(kernel)).version == 2
            await hub.complete_kernel(described(kernel), DATA, token=claim.lease)
            assert (await hub.read_kernel(kernel)).version == 3
            assert (await hub.read_blueprint(DOCUMENT.digest)).version == 1
            await hub.put_blueprint(DOCUMENT)
            await hub.request_kernel(DOCUMENT.digest, target())
            assert (await hub.read_kernel(kernel)).version == 3
            assert (await hub.archive_kernel(kernel)).version == 4
            assert (await hub.archive_kernel(kernel)).version == 4
            await hub.request_kernel(DOCUMENT.digest, target())
            assert (await hub.read_kernel(kernel)).version == 5
            # A kernel is shown with its blueprint's name, not with its description.
            await hub.update_blueprint(DOCUMENT.digest, description="anew")
            assert (await hub.read_kernel(kernel)).version == 5
            await hub.update_blueprint(DOCUMENT.digest, name="another")
            assert (await hub.read_kernel(kernel)).version == 6

    asyncio.run(life())


def test_a_change_of_another_version_is_refused(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            user = await hub.register_session(session())
            stale = [entity_tag(uuid.uuid4(), 1), entity_tag(user.id, 7)]
            for call in (
                hub.update_blueprint(DOCUMENT.digest, name="x", match=stale),
                hub.archive_blueprint(DOCUMENT.digest, match=stale),
                hub.delete_blueprint(DOCUMENT.digest, match=stale),
                hub.archive_kernel(kernel, match=stale),
                hub.delete_kernel(kernel, match=stale),
                hub.update_session(user, match=stale),
                hub.archive_session(user.uid, match=stale),
                hub.delete_session(user.uid, match=stale),
            ):
                async with refused(ConflictReason.STALE_VERSION):
                    await call
            assert (await hub.read_blueprint(DOCUMENT.digest)).version == 1
            assert (await hub.read_kernel(kernel)).version == 1
            assert (await hub.read_session(user.uid)).version == 1
            known = [*stale, (await hub.read_kernel(kernel)).tag]
            assert await hub.delete_kernel(kernel, match=known)
            now = (await hub.read_blueprint(DOCUMENT.digest)).tag
            renamed = await hub.update_blueprint(DOCUMENT.digest, name="x", match=[now])
            assert renamed.version == 2
            # What is made in the place of another is no later state of that one.
            await hub.delete_blueprint(DOCUMENT.digest)
            again, _ = await hub.add_blueprint(DOCUMENT)
            assert again.version == 1
            assert again.tag != now

    asyncio.run(life())


def test_of_changes_made_at_once_from_one_version_one_is_made(place):
    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            made, _ = await here.add_blueprint(DOCUMENT)
            calls = (
                (here, there)[number % 2].update_blueprint(
                    DOCUMENT.digest, name=f"name-{number}", match=[made.tag]
                )
                for number in range(8)
            )
            came = await asyncio.gather(*calls, return_exceptions=True)
            won = [one for one in came if not isinstance(one, BaseException)]
            lost = [one for one in came if isinstance(one, Conflict)]
            assert (len(won), len(lost)) == (1, 7)
            assert await here.read_blueprint(DOCUMENT.digest) == won[0]

    asyncio.run(life())


def test_a_blueprint_can_be_renamed_and_stays_what_it_is(place):
    async def life() -> None:
        async with opened(place) as hub:
            before = await hub.put_blueprint(DOCUMENT)
            same = await hub.update_blueprint(DOCUMENT.digest, description="new words")
            assert same.item.document.name == DOCUMENT.name
            assert same.item.document.description == "new words"
            assert (same.item.digest, same.item.id) == (before.digest, before.id)
            assert same.item.updated_at > before.updated_at
            with pytest.raises(ValidationError):
                await hub.update_blueprint(DOCUMENT.digest, name="")
            assert await hub.read_blueprint(DOCUMENT.digest) == same
            with pytest.raises(BlueprintNotFound):
                await hub.update_blueprint(DIGEST, name="x")

    asyncio.run(life())


# The archive


def test_an_archived_kernel_is_out_of_sight_and_work_but_can_be_read(place):
    async def life() -> None:
        async with opened(place) as hub:
            done, waiting = await requested(hub), await requested(hub, inputs=5)
            await hub.complete_kernel(described(done), DATA)
            for kernel in (done, waiting):
                assert (await hub.archive_kernel(kernel)).item.state is BlueprintState.ARCHIVED
            assert (await hub.list_kernels()).items == ()
            archived = KernelFilter(states=(BlueprintState.ARCHIVED,))
            assert len((await hub.list_kernels(archived)).items) == 2
            assert len(await hub.kernels()) == 2
            assert await hub.kernels([BlueprintState.PROPOSED]) == ()
            assert await hub.claim_next_kernel("one", 60) is None
            assert await hub.lease_kernel(waiting, "one", 60) is None
            assert await hub.artifact(done) == DATA
            back = await hub.request_kernel(DOCUMENT.digest, target())
            assert (back.state, back.artifact_digest) == (BlueprintState.CHARACTERIZED, DIGEST)
            again = await hub.request_kernel(DOCUMENT.digest, target(5))
            assert again.state is BlueprintState.PROPOSED
            assert await hub.lease_kernel(waiting, "one", 60) is not None
            with pytest.raises(KernelNotFound):
                await hub.archive_kernel(UNKNOWN)

    asyncio.run(life())


def test_an_archived_blueprint_comes_back_when_it_is_put_again(place):
    async def life() -> None:
        async with opened(place) as hub:
            await hub.put_blueprint(DOCUMENT)
            archived = await hub.archive_blueprint(DOCUMENT.digest)
            assert archived.item.state is BlueprintState.ARCHIVED
            assert (await hub.list_blueprints()).items == ()
            assert await hub.claim_next_blueprint("one", 60) is None
            assert (await hub.put_blueprint(DOCUMENT)).state is BlueprintState.PROPOSED
            assert await hub.claim_next_blueprint("one", 60) is not None
            with pytest.raises(BlueprintNotFound):
                await hub.archive_blueprint(DIGEST)

    asyncio.run(life())


# In use


async def using(hub: UrzaHub, kernel: str, name: str = "s") -> TrainingSession:
    """A live session with a seed that grows that kernel."""
    seed = Seed(seed_id=(0, 0), layer="fc", state=SeedState.TRAINING, blueprint="x", kernel=kernel)
    made = await hub.register_session(session(name))
    return await hub.update_session(made.changed(seeds=(seed,)))


def test_what_a_live_session_uses_can_not_be_deleted(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel, free = await requested(hub), await requested(hub, inputs=5)
            await hub.complete_kernel(described(kernel), DATA)
            user = await using(hub, kernel)
            async with refused(ConflictReason.IN_USE):
                await hub.delete_kernel(kernel)
            async with refused(ConflictReason.IN_USE):
                await hub.delete_blueprint(DOCUMENT.digest)
            assert await hub.artifact(kernel) == DATA
            assert await hub.delete_kernel(free)
            # A seed that has gone on still counts: a resumed session may come back to it.
            user = await hub.update_session(user.changed(seeds=()))
            async with refused(ConflictReason.IN_USE):
                await hub.delete_kernel(kernel)
            interrupted = user.changed(outcome=SessionOutcome.INTERRUPTED)
            await hub.update_session(interrupted)
            async with refused(ConflictReason.IN_USE):
                await hub.delete_kernel(kernel)
            await hub.update_session(user.changed(outcome=SessionOutcome.SUCCEEDED))
            assert await hub.delete_kernel(kernel)
            assert not await hub.delete_kernel(kernel)
            assert await hub.delete_blueprint(DOCUMENT.digest)
            assert await hub.read_session(user.uid)
        assert not (place.artifacts / artifact_key(DIGEST)).exists()

    asyncio.run(life())


@pytest.mark.parametrize("through", ["blueprint", "kernel"])
def test_what_a_session_asked_for_is_in_use(place, through):
    async def life() -> None:
        async with opened(place) as hub:
            await requested(hub)
            user = await hub.register_session(session())
            for _ in range(2):
                if through == "blueprint":
                    await hub.put_blueprint(DOCUMENT, session=user.uid)
                else:
                    await hub.request_kernel(DOCUMENT.digest, target(), session=user.uid)
            async with refused(ConflictReason.IN_USE):
                await hub.delete_blueprint(DOCUMENT.digest)
            for call in (
                hub.put_blueprint(OTHER, session="nobody"),
                hub.request_kernel(DOCUMENT.digest, target(5), session="nobody"),
            ):
                with pytest.raises(NotFound, match="session uid: got nobody"):
                    await call
            assert len(await hub.kernels()) == 1
            assert len(await hub.blueprints()) == 1

    asyncio.run(life())


def test_the_kernels_of_a_registered_sessions_seeds_are_in_use(place):
    async def life() -> None:
        async with opened(place) as hub:
            kernel = await requested(hub)
            seed = Seed(
                seed_id=(0, 0), layer="a", state=SeedState.TRAINING, blueprint="x", kernel=kernel
            )
            await hub.register_session(session(uid="u", seeds=(seed,)))
            with pytest.raises(Conflict) as caught:
                await hub.delete_kernel(kernel)
            assert caught.value.reason is ConflictReason.IN_USE

    asyncio.run(life())


def test_a_deletion_and_a_use_at_once_leave_no_session_without_its_kernel(place):
    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            user = await here.register_session(session())
            for inputs in range(1, 13):
                kernel = await requested(here, inputs=inputs)

                async def use(inputs: int = inputs) -> None:
                    await there.request_kernel(DOCUMENT.digest, target(inputs), session=user.uid)

                came = await asyncio.gather(
                    here.delete_kernel(kernel), use(), return_exceptions=True
                )
                used = await here.list_kernels(KernelFilter(session=user.uid), limit=500)
                kept = {one.item.kernel for one in used.items}
                # Used first, it can't be deleted then; deleted first, it is made anew.
                assert isinstance(came[0], Conflict) or came[0] is True
                assert came[1] is None
                assert kernel in kept

    asyncio.run(life())


def test_an_artifact_that_another_kernel_has_as_well_is_kept(place):
    async def life() -> None:
        async with opened(place) as hub:
            one, two = await requested(hub), await requested(hub, inputs=5)
            for kernel in (one, two):
                await hub.complete_kernel(described(kernel), DATA)
            assert await hub.delete_kernel(one)
            assert await hub.artifact(two) == DATA
            assert await hub.delete_kernel(two)
        assert not (place.artifacts / artifact_key(DIGEST)).exists()

    asyncio.run(life())


def test_deletions_and_claims_at_once_do_not_lock_each_other_out(place):
    async def life() -> None:
        async with opened(place) as here, opened(place) as there:
            for _ in range(6):
                for inputs in range(1, 5):
                    await requested(here, inputs=inputs)
                came = await asyncio.gather(
                    here.delete_blueprint(DOCUMENT.digest),
                    *(there.claim_next_kernel(f"w{n}", 60) for n in range(4)),
                    return_exceptions=True,
                )
                assert [one for one in came if isinstance(one, BaseException)] == []
                assert came[0] is True
                assert await here.kernels() == ()

    asyncio.run(life())


# What rows say of themselves


def test_a_row_is_what_was_made_of_it(place):
    clock = Clock()
    made = session(
        uid=str(uuid.uuid4()), namespace="team", created_at=clock.now, updated_at=clock.now
    )

    async def life() -> None:
        async with opened(place, clock=clock) as hub:
            assert await hub.register_session(made) == made
            assert (await hub.read_session(made.uid)).item == made
            ended = await hub.update_session(made.changed(outcome=SessionOutcome.FAILED))
            assert ended.ended_at == clock.now
            live = await hub.update_session(ended.changed(outcome=SessionOutcome.RUNNING))
            assert live.ended_at is None
            twin = session("twin", id=made.id)
            with pytest.raises(BadInput, match=r"session\.id"):
                await hub.register_session(twin)

    asyncio.run(life())
    assert models.TrainingSession.of(made).as_asset() == made
