"""Credentials of sessions: the same when asked for again, good for one session, gone with it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError
from redis.exceptions import ConnectionError as RedisAway

from esper.configs import RedisConfig
from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.errors import BusUnavailable, ConfigError
from esper.services.oona_client import OonaClient
from esper.services.urza.auth import Role
from esper.services.urza.redis_users import RedisUser, RedisUsers
from tests.unit.esper.services.urza.hubs import Place
from tests.unit.esper.services.urza.serving import KEY, Client, bearer, serving, settings, trained


@pytest.fixture
def place(tmp_path):
    """The database's kind makes no difference here."""
    return Place(f"sqlite+aiosqlite:///{tmp_path}/urza.sqlite", tmp_path)


async def made(client: Client, uid: str, namespace: str) -> dict[str, Any]:
    answer = await client.post(
        f"/internal/sessions/{uid}/credentials", json={"namespace": namespace}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


@asynccontextmanager
async def redis_of(server: Any, issued: dict[str, Any]) -> AsyncIterator[Redis]:
    client = Redis(
        host="127.0.0.1",
        port=server.port,
        username=issued["redisUsername"],
        password=issued["redisPassword"],
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        yield client
    finally:
        await client.aclose()


async def until(condition: Any) -> None:
    for _ in range(400):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")


def test_credentials_are_the_same_when_asked_for_again(place, redis_server, redis_namespace):
    config = settings(place, redis_server.url)

    async def life() -> None:
        async with serving(config) as one, serving(config) as two:
            first = await made(one, "uid-1", redis_namespace)
            assert await made(one, "uid-1", redis_namespace) == first
            # Another process of the same hub; and one that was started anew.
            assert await made(two, "uid-1", redis_namespace) == first
            other = await made(two, "uid-2", redis_namespace)
            assert other["redisPassword"] != first["redisPassword"]
            refused = await one.post(
                "/internal/sessions/uid-1/credentials", json={"namespace": "elsewhere"}
            )
            assert refused.status_code == 422
        async with serving(config) as later:
            assert await made(later, "uid-1", redis_namespace) == first

    asyncio.run(life())


def test_a_sessions_user_reaches_its_own_streams_alone(place, redis_server, redis_namespace):
    own, foreign = (
        f"esper:{redis_namespace}:uid-1:packets",
        f"esper:{redis_namespace}:uid-2:packets",
    )

    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            issued = await made(client, "uid-1", redis_namespace)
            async with redis_of(server=redis_server, issued=issued) as redis:
                await redis.xgroup_create(own, "readers", id="0", mkstream=True)
                key = await redis.xadd(own, {"a": "b"})
                read = await redis.xreadgroup("readers", "me", {own: ">"})
                assert read[0][1][0][0] == key
                assert await redis.xack(own, "readers", key) == 1
                assert await redis.xlen(own) == 1
                for refused in (
                    redis.xadd(foreign, {"a": "b"}),
                    redis.xrange(foreign),
                    redis.xadd("esper:other:uid-1:packets", {"a": "b"}),
                    redis.set(own, "x"),
                    redis.delete(own),
                    redis.keys("*"),
                    redis.execute_command("SCAN", "0"),
                    redis.config_get("*"),
                    redis.acl_list(),
                    redis.eval("return 1", 0),
                    redis.publish("channel", "x"),
                    redis.flushall(),
                ):
                    with pytest.raises(NoPermissionError):
                        await refused

    asyncio.run(life())


def test_a_namespaces_user_reaches_its_sessions(place, redis_server, redis_namespace):
    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            path = f"/internal/namespaces/{redis_namespace}/credentials"
            issued = (await client.post(path)).json()
            assert "uid" not in issued
            assert (await client.post(path)).json() == issued
            async with redis_of(redis_server, issued) as redis:
                key = f"esper:{redis_namespace}:uid-9:decisions"
                await redis.xadd(key, {"a": "b"})
                found = [name async for name in redis.scan_iter(match=f"esper:{redis_namespace}:*")]
                assert found == [key]
                with pytest.raises(NoPermissionError):
                    await redis.xadd("esper:other:uid-9:decisions", {"a": "b"})
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            assert (await client.get("/api/v1/sessions/", headers=token)).status_code == 200
            put = await client.post("/api/v1/blueprints/", json={}, headers=token)
            assert put.status_code == 403

    asyncio.run(life())


def test_the_bus_works_with_the_credentials_alone(place, redis_server, redis_namespace):
    def bus(issued: dict[str, Any], scope: str | None) -> OonaClient:
        user = quote(issued["redisUsername"], safe="")
        url = f"redis://{user}:{issued['redisPassword']}@127.0.0.1:{redis_server.port}/0"
        return OonaClient(
            RedisConfig(url=url, namespace=redis_namespace, discovery_seconds=0.1), scope=scope
        )

    def message(trace: str) -> OonaMessage:
        told = KernelReady(kernel="0" * 40, blueprint="gain", error="it does not fit")
        return OonaMessage.carrying(
            TopicNames.KERNEL_READY, told, ComponentType.TEZZERET, trace, scope="uid-1"
        )

    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            mine = bus(await made(client, "uid-1", redis_namespace), "uid-1")
            path = f"/internal/namespaces/{redis_namespace}/credentials"
            tamiyos = bus((await client.post(path)).json(), None)
            try:
                everything = await tamiyos.subscribe({TopicNames.KERNEL_READY}, "tamiyo")
                own = await mine.subscribe({TopicNames.KERNEL_READY}, "tolaria")
                for sender in (mine, tamiyos):
                    sent = message(uuid4().hex)
                    await sender.publish(sent)
                    for receiver in (everything, own):
                        came = await asyncio.wait_for(receiver.receive(), 30)
                        assert (came.id, came.scope) == (sent.id, "uid-1")
                        await receiver.acknowledge(came)
                assert await mine.health()
                assert await tamiyos.health()
                for reader in (mine, tamiyos):
                    kept = [came.id async for came in reader.history({TopicNames.KERNEL_READY})]
                    assert len(kept) == 2
            finally:
                await mine.close()
                await tamiyos.close()

    asyncio.run(life())


def test_a_sessions_token_opens_its_own_rows_alone(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            issued = await made(client, "uid-1", "team-a")
            assert "redisUsername" not in issued  # there is no Redis
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            mine, yours = trained("uid-1").to_wire(), trained("uid-2").to_wire()
            assert (
                await client.post("/api/v1/sessions/", json=mine, headers=token)
            ).status_code == 201
            assert (await client.post("/api/v1/sessions/", json=yours)).status_code == 201
            for method, path, body in (
                ("POST", "/api/v1/sessions/", yours),
                ("PUT", "/api/v1/sessions/uid-2", yours),
                ("GET", "/api/v1/sessions/uid-2", None),
                ("POST", "/api/v1/blueprints/?session=uid-2", BLUEPRINT),
            ):
                answer = await client.request(method, path, json=body, headers=token)
                assert answer.status_code == 403, path
            listed = (await client.get("/api/v1/sessions/", headers=token)).json()
            assert [session["uid"] for session in listed["items"]] == ["uid-1"]
            assert (await client.get("/api/v1/sessions/uid-1", headers=token)).status_code == 200
            used = await client.post(
                "/api/v1/blueprints/?session=uid-1", json=BLUEPRINT, headers=token
            )
            assert used.status_code == 201
            everyone = (await client.get("/api/v1/sessions/", headers=bearer(Role.READER))).json()
            assert len(everyone["items"]) == 2

    asyncio.run(life())


def test_a_sweep_ends_what_is_gone_and_spares_what_lives(place, redis_server, redis_namespace):
    async def life() -> None:
        async with serving(settings(place, redis_server.url)) as client:
            issued = {uid: await made(client, uid, redis_namespace) for uid in ("uid-1", "uid-2")}
            for uid in issued:
                session = trained(uid, namespace=redis_namespace).to_wire()
                assert (await client.post("/api/v1/sessions/", json=session)).status_code == 201
                async with redis_of(redis_server, issued[uid]) as redis:
                    await redis.xadd(f"esper:{redis_namespace}:{uid}:packets", {"a": "b"})
            swept = {"namespace": redis_namespace, "liveUids": ["uid-2"]}
            answer = await client.post("/internal/sessions/sweep", json=swept)
            assert answer.json() == {"ended": ["uid-1"], "revoked": ["uid-1"]}
            again = await client.post("/internal/sessions/sweep", json=swept)
            assert again.json() == {"ended": [], "revoked": ["uid-1"]}
            statuses = [
                (
                    await client.get(
                        f"/api/v1/sessions/{uid}",
                        headers={"Authorization": f"Bearer {issued[uid]['hubToken']}"},
                    )
                ).status_code
                for uid in issued
            ]
            assert statuses == [401, 200]
            async with redis_of(redis_server, issued["uid-1"]) as redis:
                with pytest.raises(AuthenticationError):
                    await redis.ping()
            async with Redis.from_url(redis_server.url, decode_responses=True) as admin:
                left = await admin.keys(f"esper:{redis_namespace}:*")
                assert left == [f"esper:{redis_namespace}:uid-2:packets"]
            refused = await client.post(
                "/internal/sessions/uid-1/credentials", json={"namespace": redis_namespace}
            )
            assert refused.status_code == 409
            assert refused.json()["reason"] == "Revoked"

    asyncio.run(life())


def test_another_process_learns_of_a_revocation(place):
    config = settings(place, upkeep_seconds=0.05)

    async def life() -> None:
        async with serving(config) as one, serving(config) as two:
            issued = await made(one, "uid-1", "team-a")
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            assert (await two.get("/api/v1/sessions/", headers=token)).status_code == 200
            gone = await one.delete("/internal/sessions/uid-1/credentials")
            assert gone.status_code == 204
            assert (await one.get("/api/v1/sessions/", headers=token)).status_code == 401

            async def known() -> bool:
                return (await two.get("/api/v1/sessions/", headers=token)).status_code == 401

            await until(known)
            unknown = await one.delete("/internal/sessions/uid-9/credentials")
            assert unknown.status_code == 404

    asyncio.run(life())


def test_users_are_set_again_when_redis_returns(place, private_redis):
    config = settings(place, private_redis.url, upkeep_seconds=0.05)

    async def life() -> None:
        async with serving(config) as client:
            issued = await made(client, "uid-1", "team-a")
            namespaces = (await client.post("/internal/namespaces/team-a/credentials")).json()
            private_redis.kill()
            refused = await client.post(
                "/internal/sessions/uid-2/credentials", json={"namespace": "team-a"}
            )
            assert refused.status_code == 503
            ready = await client.get("/readyz")
            assert ready.status_code == 503
            assert "redis.url" in ready.json()["detail"]
            assert "letmein" not in ready.text + refused.text
            private_redis.start()

            async def back() -> bool:
                try:
                    for found in (issued, namespaces):
                        async with redis_of(private_redis, found) as redis:
                            await redis.ping()
                except (AuthenticationError, RedisAway):
                    return False
                return True

            await until(back)
            assert (await client.get("/readyz")).status_code == 200

    asyncio.run(life())


BAD = [("wrong-password", ConfigError), (None, BusUnavailable)]


@pytest.mark.parametrize(("password", "kind"), BAD)
def test_a_redis_that_refuses_or_is_away_is_told_without_the_password(redis_server, password, kind):
    port = redis_server.port if password else 9
    url = f"redis://default:{password or 'hidden-one'}@127.0.0.1:{port}/0"

    async def life() -> None:
        users = RedisUsers(url, timeout_seconds=1.0)
        try:
            with pytest.raises(kind) as caught:
                await users.apply([RedisUser("someone", "its password", "esper:x:*")])
            assert "redis.url" in str(caught.value)
            assert "wrong-password" not in str(caught.value)
            assert "hidden-one" not in str(caught.value)
        finally:
            await users.close()

    asyncio.run(life())


def test_passwords_are_shown_nowhere():
    user = RedisUser("someone", "its password", "esper:x:*")
    assert "its password" not in repr(user) + " ".join(user.rules())
    assert KEY not in repr(user)


BLUEPRINT = {
    "name": "gain",
    "hosts": ["Linear"],
    "graph": {
        "nodes": [
            {"op": "input", "id": "x"},
            {"op": "linear", "id": "y", "input": "x", "features": "out"},
        ],
        "output": "y",
    },
}
