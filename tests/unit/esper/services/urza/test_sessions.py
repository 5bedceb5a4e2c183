"""Sessions' endings, credentials and the sweep, on both databases."""

import asyncio
from datetime import timedelta

import pytest

from esper.contracts.assets import TrainingSession, session_uid
from esper.contracts.enums import SessionOutcome
from esper.errors import BadInput, Conflict, ConflictReason, NotFound
from esper.services.contracts import SessionFilter, SweepResult
from esper.services.urza.store_sessions import MAX_CREDENTIAL_SECONDS
from tests.unit.esper.services.urza.hubs import Clock, opened


def session(name="s", **fields):
    return TrainingSession.model_validate(
        {"name": name, "epochs": 10, "num_layers": 2, "num_slots": 1, **fields}
    )


def made_at(clock, uid, **fields):
    return session(uid=uid, created_at=clock.now, updated_at=clock.now, **fields)


def test_a_session_without_a_uid_has_one_that_follows_from_its_name():
    assert session().uid == session().uid == session_uid("default", "s")
    assert len({session().uid, session("t").uid, session(namespace="team").uid}) == 3


def test_one_name_may_be_borne_by_sessions_in_turn(place):
    async def life():
        async with opened(place) as hub:
            first = await hub.register_session(session(uid="first"))
            second = await hub.register_session(session(uid="second"))
            assert first.id != second.id
            found = (await hub.list_sessions(SessionFilter(name="s"))).items
            assert {stored.item.uid for stored in found} == {"first", "second"}
            assert (await hub.read_session("second")).item == second
            assert (await hub.read_session("first")).item == first
            with pytest.raises(NotFound, match="session uid: got third"):
                await hub.read_session("third")

    asyncio.run(life())


def test_registered_at_once_it_is_one(place):
    async def life():
        async with opened(place) as here, opened(place) as there:
            came = await asyncio.gather(
                *((here, there)[n % 2].register_session(session()) for n in range(8))
            )
            assert len({one.id for one in came}) == 1

    asyncio.run(life())


def test_a_session_keeps_who_it_is(place):
    async def life():
        async with opened(place) as hub:
            made = await hub.register_session(session(uid="u"))
            for change in ({"name": "t"}, {"namespace": "team"}, {"id": session().id}):
                with pytest.raises(BadInput, match=f"session.{next(iter(change))}: got"):
                    await hub.update_session(made.changed(**change))
            assert (await hub.read_session("u")).version == 1

    asyncio.run(life())


def test_a_live_session_is_neither_archived_nor_deleted(place):
    async def life():
        async with opened(place) as hub:
            made = await hub.register_session(session(uid="u"))
            for call in (hub.archive_session("u"), hub.delete_session("u")):
                with pytest.raises(Conflict, match="it is live") as caught:
                    await call
                assert caught.value.reason is ConflictReason.IN_USE
            await hub.update_session(made.changed(outcome=SessionOutcome.SUCCEEDED))
            assert (await hub.archive_session("u")).version == 3
            assert (await hub.archive_session("u")).version == 3
            assert await hub.delete_session("u", match=[(await hub.read_session("u")).tag])
            assert not await hub.delete_session("u")
            with pytest.raises(NotFound):
                await hub.archive_session("u")
            assert (await hub.list_sessions()).items == ()

    asyncio.run(life())


def test_credentials_are_the_same_until_half_of_their_time_is_gone(place):
    async def life():
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            first = await hub.put_credentials("u", "team", 100)
            assert (first.uid, first.namespace, first.revoked) == ("u", "team", False)
            assert first.expires_at == clock.now + timedelta(seconds=100)
            clock.advance(50)
            assert await hub.put_credentials("u", "team", 100) == first
            clock.advance(1)
            renewed = await hub.put_credentials("u", "team", 100)
            assert renewed.created_at == first.created_at
            assert renewed.expires_at == clock.now + timedelta(seconds=100)
            clock.advance(1000)
            late = await hub.put_credentials("u", "team", 100)
            assert late.expires_at == clock.now + timedelta(seconds=100)
            assert await hub.credentials("u") == late

    asyncio.run(life())


def test_credentials_asked_for_at_once_are_one(place):
    async def life():
        async with opened(place) as here, opened(place) as there:
            came = await asyncio.gather(
                *((here, there)[n % 2].put_credentials("u", "team", 100) for n in range(8))
            )
            assert len({one.expires_at for one in came}) == 1
            assert len(await here.list_credentials()) == 1

    asyncio.run(life())


def test_revoked_credentials_stay_so_until_they_are_forgotten(place):
    async def life():
        async with opened(place) as hub:
            await hub.put_credentials("u", "team", 100)
            await hub.put_credentials("v", "other", 100)
            assert await hub.revoke_credentials("u")
            assert not await hub.revoke_credentials("nobody")
            assert (await hub.credentials("u")).revoked
            with pytest.raises(Conflict, match="were revoked") as caught:
                await hub.put_credentials("u", "team", 100)
            assert caught.value.reason is ConflictReason.REVOKED

            async def uids(*args, **fields):
                return [one.uid for one in await hub.list_credentials(*args, **fields)]

            assert sorted(await uids()) == ["u", "v"]
            assert await uids("team") == ["u"]
            assert await uids(revoked=True) == ["u"]
            assert await uids(revoked=False) == ["v"]
            assert await uids("other", revoked=True) == []
            assert await hub.delete_credentials("u")
            assert not await hub.delete_credentials("u")
            with pytest.raises(NotFound, match="session uid: got u"):
                await hub.credentials("u")
            assert not (await hub.put_credentials("u", "team", 100)).revoked

    asyncio.run(life())


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), MAX_CREDENTIAL_SECONDS + 1])
def test_a_lifetime_has_bounds(place, seconds):
    async def life():
        async with opened(place) as hub:
            with pytest.raises(BadInput, match="lifetime seconds"):
                await hub.put_credentials("u", "team", seconds)
            assert await hub.list_credentials() == ()

    asyncio.run(life())


def test_credentials_belong_to_one_namespace(place):
    async def life():
        async with opened(place) as hub:
            await hub.put_credentials("u", "team", 100)
            with pytest.raises(BadInput, match="namespace: got other; allowed: team"):
                await hub.put_credentials("u", "other", 100)

    asyncio.run(life())


def test_a_sweep_ends_what_is_gone_and_leaves_the_rest(place):
    async def life():
        clock = Clock()
        async with opened(place, clock=clock) as hub:
            for uid in ("gone", "there", "done"):
                await hub.register_session(made_at(clock, uid))
                await hub.put_credentials(uid, "default", 1000)
            await hub.register_session(made_at(clock, "elsewhere", namespace="team"))
            await hub.put_credentials("elsewhere", "team", 1000)
            done = (await hub.read_session("done")).item
            await hub.update_session(done.changed(outcome=SessionOutcome.SUCCEEDED))
            # Credentials come first; the session of these never registered.
            await hub.put_credentials("stillborn", "default", 1000)
            clock.advance(10)
            listed = clock.now
            clock.advance(10)
            await hub.register_session(made_at(clock, "late"))
            await hub.put_credentials("late", "default", 1000)

            swept = await hub.sweep("default", {"there"}, before=listed)
            assert swept == SweepResult(ended=("gone",), revoked=("done", "gone", "stillborn"))
            gone = (await hub.read_session("gone")).item
            assert (gone.outcome, gone.ended_at) == (SessionOutcome.INTERRUPTED, clock.now)
            assert (await hub.read_session("done")).item.outcome is SessionOutcome.SUCCEEDED
            for uid in ("there", "late", "elsewhere"):
                assert (await hub.read_session(uid)).item.ended_at is None
                assert not (await hub.credentials(uid)).revoked

            # Whoever crashed before it removed what lives in Redis is told again.
            again = await hub.sweep("default", {"there"}, before=listed)
            assert again == SweepResult(ended=(), revoked=("done", "gone", "stillborn"))
            for uid in again.revoked:
                assert await hub.delete_credentials(uid)
            last = await hub.sweep("default", {"there"}, before=listed)
            assert last == SweepResult(ended=(), revoked=())

    asyncio.run(life())


def test_two_sweeps_at_once_end_each_session_once(place):
    async def life():
        clock = Clock()
        async with opened(place, clock=clock) as here, opened(place, clock=clock) as there:
            uids = [f"u{number}" for number in range(10)]
            for uid in uids:
                await here.register_session(made_at(clock, uid))
            clock.advance(1)
            swept = await asyncio.gather(
                here.sweep("default", (), before=clock.now),
                there.sweep("default", (), before=clock.now),
            )
            assert sorted([*swept[0].ended, *swept[1].ended]) == uids
            assert {(await here.read_session(uid)).version for uid in uids} == {2}

    asyncio.run(life())
