"""Users in Redis follow the hub's rows, whatever changes at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import SecretStr
from redis.exceptions import AuthenticationError
from redis.exceptions import ConnectionError as RedisAway

from esper.services.urza.auth import Tokens
from esper.services.urza.credentials import Secrets
from esper.services.urza.redis_upkeep import RedisUpkeep
from esper.services.urza.redis_users import OPERATOR_USER, RedisUsers
from tests.unit.esper.services.urza.hubs import Clock, Place, opened
from tests.unit.esper.services.urza.issuing import made, redis_of, until
from tests.unit.esper.services.urza.serving import KEY, serving, settings, trained

LIFETIME = 100.0


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


@asynccontextmanager
async def kept(place: Place, server: Any) -> AsyncIterator[SimpleNamespace]:
    """A hub's upkeep with a clock that is moved by hand, and who its users are."""
    clock, users = Clock(), RedisUsers(server.url)
    key = SecretStr(KEY)
    secrets = Secrets(key, Tokens(key), has_redis=True)
    try:
        async with opened(place, clock=clock) as hub, server.async_client() as admin:

            async def names(namespace: str) -> list[str]:
                found = await admin.execute_command("ACL", "USERS")
                return sorted(name for name in found if f":{namespace}" in name)

            upkeep = RedisUpkeep(hub, secrets, users, clock=clock)
            yield SimpleNamespace(
                clock=clock, hub=hub, users=users, secrets=secrets, upkeep=upkeep, names=names
            )
    finally:
        await users.close()


def while_applying(users: RedisUsers, meanwhile: Any) -> None:
    """Have `meanwhile` happen after the rows were read and before their users are set."""
    apply = users.apply

    async def late(found: Any) -> None:
        given = list(found)
        # The hub's own first look may come only now; it finds no rows, and sets the operator's.
        if any(user.name != OPERATOR_USER for user in given):
            users.apply = apply  # type: ignore[method-assign]
            await meanwhile()
        await apply(given)

    users.apply = late  # type: ignore[method-assign]


def test_a_user_that_is_set_after_its_revocation_is_removed(place, redis_server, redis_namespace):
    async def life() -> None:
        async with kept(place, redis_server) as at:
            row = await at.hub.put_credentials("uid-1", redis_namespace, LIFETIME)

            async def revoked() -> None:
                await at.hub.revoke_credentials("uid-1")
                await at.users.remove_sessions(redis_namespace, {"uid-1"})

            while_applying(at.users, revoked)
            assert not await at.upkeep.give(at.secrets.session_user(row))
            assert await at.names(redis_namespace) == []

    asyncio.run(life())


@pytest.mark.parametrize("forgotten", [False, True])
def test_a_user_that_upkeep_sets_after_its_revocation_is_removed(
    place, redis_server, redis_namespace, forgotten
):
    async def life() -> None:
        async with kept(place, redis_server) as at:
            await at.hub.put_credentials("uid-1", redis_namespace, LIFETIME)
            await at.hub.put_credentials("uid-2", redis_namespace, LIFETIME)

            async def revoked() -> None:
                await at.hub.revoke_credentials("uid-1")
                await at.users.remove_sessions(redis_namespace, {"uid-1"})
                if forgotten:
                    await at.hub.delete_credentials("uid-1")

            while_applying(at.users, revoked)
            assert await at.upkeep.look() == 3, "the operator's too"
            assert await at.names(redis_namespace) == [f"esper-session:{redis_namespace}:uid-2"]

    asyncio.run(life())


def test_users_go_when_their_rows_have_expired_or_were_revoked(
    place, redis_server, redis_namespace
):
    async def life() -> None:
        async with kept(place, redis_server) as at:
            for uid in ("uid-1", "uid-2"):
                await at.hub.put_credentials(uid, redis_namespace, LIFETIME)
            until = at.clock.now + timedelta(seconds=LIFETIME)
            await at.hub.put_namespace(redis_namespace, until)
            assert await at.upkeep.look() == 4
            assert len(await at.names(redis_namespace)) == 3
            assert await at.upkeep.look() == 0
            # Another process revoked it, and ended before it came to Redis.
            await at.hub.revoke_credentials("uid-1")
            await at.upkeep.look()
            assert len(await at.names(redis_namespace)) == 2
            at.clock.advance(LIFETIME)
            await at.upkeep.look()
            assert await at.names(redis_namespace) == []
            assert await at.hub.list_namespaces() == ()
            # Redis was started anew, as far as another process of the hub knows.
            again = RedisUpkeep(at.hub, at.secrets, at.users, clock=at.clock)
            assert await again.look() == 1, "the operator's"
            await at.hub.put_credentials("uid-2", redis_namespace, LIFETIME)
            assert await RedisUpkeep(at.hub, at.secrets, at.users, clock=at.clock).look() == 2

    asyncio.run(life())


def test_a_user_that_is_renewed_while_upkeep_removes_it_is_there(
    place, redis_server, redis_namespace
):
    async def life() -> None:
        async with kept(place, redis_server) as at:
            await at.hub.put_credentials("uid-1", redis_namespace, LIFETIME)
            await at.upkeep.look()
            at.clock.advance(LIFETIME)
            remove = at.users.remove

            async def late(names: Any) -> None:
                at.users.remove = remove
                row = await at.hub.put_credentials("uid-1", redis_namespace, LIFETIME)
                await at.users.apply([at.secrets.session_user(row)])
                await remove(names)

            at.users.remove = late
            await at.upkeep.look()
            assert await at.names(redis_namespace) == [f"esper-session:{redis_namespace}:uid-1"]

    asyncio.run(life())


def test_credentials_that_are_revoked_while_they_are_made_are_refused(
    place, redis_server, redis_namespace
):
    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            users = client.app.state.urza.users
            path = "/internal/sessions/uid-1/credentials"

            async def revoked() -> None:
                assert (await client.delete(path)).status_code == 204

            while_applying(users, revoked)
            answer = await client.post(path, json={"namespace": redis_namespace})
            assert (answer.status_code, answer.json()["reason"]) == (409, "Revoked")

    asyncio.run(life())


def test_a_namespaces_user_comes_back_without_any_session(place, private_redis):
    config = settings(place, private_redis.url, upkeep_seconds=0.05)

    async def life() -> None:
        async with serving(config) as client:
            path = "/internal/namespaces/team-a/credentials"
            issued = (await client.post(path)).json()
            # A session of another namespace brings no user of that namespace.
            await made(client, "uid-1", "team-b")
            await client.post("/api/v1/sessions/", json=trained("uid-1").to_wire())
            private_redis.kill()
            private_redis.start()

            async def back() -> bool:
                try:
                    async with redis_of(private_redis, issued) as redis:
                        await redis.ping()
                except (AuthenticationError, RedisAway):
                    return False
                return True

            await until(back)
            async with private_redis.async_client() as admin:
                found = await admin.execute_command("ACL", "USERS")
                assert sorted(found) == [
                    "default",
                    "esper-namespace:team-a",
                    "esper-operator",
                    "esper-session:team-b:uid-1",
                ]

    asyncio.run(life())
