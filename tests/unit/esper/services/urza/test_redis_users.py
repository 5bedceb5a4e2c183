"""Users in Redis: what each may do, on both releases, and how long they are there."""

from __future__ import annotations

import asyncio
from typing import Any
from urllib.parse import quote
from uuid import uuid4

import pytest
from redis.exceptions import NoPermissionError

from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import BusUnavailable, ConfigError
from esper.services.oona_client import OonaClient
from esper.services.urza.redis_users import RedisUser, RedisUsers
from tests.unit.esper.services.oona.messages import config_of, ready
from tests.unit.esper.services.urza.issuing import made, redis_of, until
from tests.unit.esper.services.urza.serving import KEY, serving, settings
from tools.servers.redis_server import RedisServer

OWN = "esper:{}:uid-1:{}"
PUBLISHED = (
    TopicNames.PACKETS,
    TopicNames.TRANSITIONS,
    TopicNames.EVENTS,
    TopicNames.STATUS,
    TopicNames.KERNEL_REQUESTED,
)
RECEIVED = (TopicNames.DECISIONS, TopicNames.KERNEL_READY)


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


async def refused(*commands: Any) -> None:
    for command in commands:
        with pytest.raises(NoPermissionError):
            await command


def test_a_sessions_user_reaches_its_own_streams_alone(place, any_redis, redis_namespace):
    own = OWN.format(redis_namespace, RECEIVED[0])
    foreign = f"esper:{redis_namespace}:uid-2:{PUBLISHED[0]}"

    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            issued = await made(client, "uid-1", redis_namespace)
            async with any_redis.async_client() as admin, redis_of(any_redis, issued) as redis:
                for topic in PUBLISHED:
                    await redis.xadd(OWN.format(redis_namespace, topic), {"a": "b"})
                await redis.xgroup_create(own, "readers", id="0", mkstream=True)
                key = await admin.xadd(own, {"a": "b"})
                read = await redis.xreadgroup("readers", "me", {own: ">"})
                assert read[0][1][0][0] == key
                assert await redis.xack(own, "readers", key) == 1
                assert await redis.xlen(own) == 1
                await refused(
                    redis.xadd(foreign, {"a": "b"}),
                    redis.xrange(foreign),
                    redis.xadd(f"esper:other:uid-1:{PUBLISHED[0]}", {"a": "b"}),
                    redis.set(own, "x"),
                    redis.delete(own),
                    redis.keys("*"),
                    redis.execute_command("SCAN", "0"),
                    redis.config_get("*"),
                    redis.acl_list(),
                    redis.eval("return 1", 0),
                    redis.publish("channel", "x"),
                    redis.flushall(),
                )

    asyncio.run(life())


def test_from_redis_7_on_a_session_writes_and_reads_what_tolaria_does(
    place, redis_8_server, redis_namespace
):
    def key(topic: str) -> str:
        return OWN.format(redis_namespace, topic)

    async def life() -> None:
        async with serving(settings(place, redis_8_server.url)) as client:
            issued = await made(client, "uid-1", redis_namespace)
            async with redis_of(redis_8_server, issued) as redis:
                for topic in PUBLISHED:
                    at = key(topic)
                    await redis.xadd(at, {"a": "b"}, maxlen=10)
                    await redis.xtrim(at, maxlen=10)  # whoever adds keeps the stream short
                    await refused(
                        redis.xrange(at),
                        redis.xgroup_create(at, "g"),
                        redis.xreadgroup("g", "me", {at: ">"}),
                    )
                for topic in RECEIVED:
                    at = key(topic)
                    await redis.xgroup_create(at, "g", mkstream=True)
                    await refused(
                        redis.xadd(at, {"a": "forged"}),
                        redis.xtrim(at, maxlen=0),
                        redis.xgroup_destroy(at, "g"),
                        redis.xgroup_setid(at, "g", "0"),
                        redis.xdel(at, "1-1"),
                        redis.xrange(f"{at}:dead"),
                    )
                    await redis.xadd(f"{at}:dead", {"a": "b"})
                await refused(redis.xadd(key(TopicNames.BLUEPRINT_SUBMITTED), {"a": "b"}))

    asyncio.run(life())


def test_a_namespaces_user_reaches_its_sessions(place, any_redis, redis_namespace):
    def key(topic: str, namespace: str = redis_namespace) -> str:
        return f"esper:{namespace}:uid-9:{topic}"

    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            path = f"/internal/namespaces/{redis_namespace}/credentials"
            issued = (await client.post(path)).json()
            assert "uid" not in issued
            assert (await client.post(path)).json() == issued
            async with redis_of(any_redis, issued) as redis:
                at = key(TopicNames.DECISIONS)
                await redis.xadd(at, {"a": "b"})
                found = [name async for name in redis.scan_iter(match=f"esper:{redis_namespace}:*")]
                assert found == [at]
                await redis.xgroup_create(key(TopicNames.PACKETS), "g", mkstream=True)
                await refused(redis.xadd(key(TopicNames.DECISIONS, "other"), {"a": "b"}))
                if any_redis.release >= 7:
                    await refused(
                        redis.xrange(at),
                        redis.xadd(key(TopicNames.PACKETS), {"a": "b"}),
                        redis.xadd(key(TopicNames.KERNEL_READY), {"a": "b"}),
                    )
            token = {"Authorization": f"Bearer {issued['hubToken']}"}
            assert (await client.get("/api/v1/sessions/", headers=token)).status_code == 200
            put = await client.post("/api/v1/blueprints/", json={}, headers=token)
            assert put.status_code == 403

    asyncio.run(life())


def test_the_operators_user_hears_every_namespace_and_tells_what_is_ready(
    place, any_redis, redis_namespace
):
    heard = (
        TopicNames.STATUS,
        TopicNames.TRANSITIONS,
        TopicNames.EVENTS,
        TopicNames.KERNEL_REQUESTED,
    )
    path = "/internal/operator/credentials"

    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            answer = await client.post(path)
            assert answer.headers["Cache-Control"] == "no-store"
            issued = answer.json()
            assert (await client.post(path)).json() == issued
            async with redis_of(any_redis, issued) as redis, any_redis.async_client() as admin:
                for namespace in (redis_namespace, f"{redis_namespace}-b"):
                    for topic in heard:
                        at = f"esper:{namespace}:uid-1:{topic}"
                        key = await admin.xadd(at, {"a": "b"})
                        await redis.xgroup_create(at, "operator", id="0")
                        (read,) = await redis.xreadgroup("operator", "me", {at: ">"})
                        assert read[1][0][0] == key
                        await redis.xadd(f"{at}:dead", {"a": "b"})
                    await redis.xadd(
                        f"esper:{namespace}:uid-1:{TopicNames.KERNEL_READY}", {"a": ""}
                    )
                found = [name async for name in redis.scan_iter(match=f"esper:{redis_namespace}*")]
                assert len(found) == 2 * (2 * len(heard) + 1)
                await refused(redis.xadd("other:a:b:sessions.status", {"a": "b"}), redis.acl_list())
                if any_redis.release >= 7:
                    decisions = f"esper:{redis_namespace}:uid-1:{TopicNames.DECISIONS}"
                    await refused(
                        redis.xadd(f"esper:{redis_namespace}:uid-1:{heard[0]}", {"a": "forged"}),
                        redis.xadd(decisions, {"a": "forged"}),
                        redis.xgroup_create(decisions, "g", mkstream=True),
                    )
            # The bus is all that they open.
            assert issued.keys() == {"redisUsername", "redisPassword"}

    asyncio.run(life())


def message(topic: TopicNames) -> OonaMessage:
    values = ready(1, "uid-1").model_dump()
    return OonaMessage.model_validate({**values, "id": uuid4().hex, "topic": topic})


def test_the_bus_works_with_the_credentials_alone(place, any_redis, redis_namespace):
    def bus(issued: dict[str, Any], scope: str | None) -> OonaClient:
        user = quote(issued["redisUsername"], safe="")
        url = f"redis://{user}:{issued['redisPassword']}@127.0.0.1:{any_redis.port}/0"
        return OonaClient(config_of(any_redis, redis_namespace, url=url), scope=scope)

    async def sent(sender: OonaClient, receiver: Any, topic: TopicNames) -> None:
        told = message(topic)
        await sender.publish(told)
        came = await asyncio.wait_for(receiver.receive(), 30)
        assert (came.id, came.scope, came.topic) == (told.id, "uid-1", topic)
        await receiver.acknowledge(came)

    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            mine = bus(await made(client, "uid-1", redis_namespace), "uid-1")
            path = f"/internal/namespaces/{redis_namespace}/credentials"
            tamiyos = bus((await client.post(path)).json(), None)
            forge = OonaClient(config_of(any_redis, redis_namespace), scope=None)
            try:
                own = await mine.subscribe(set(RECEIVED), "tolaria")
                packets = await tamiyos.subscribe({TopicNames.PACKETS}, "tamiyo")
                everything = await forge.subscribe(set(TopicNames), "forge")
                await sent(mine, packets, TopicNames.PACKETS)
                await sent(tamiyos, own, TopicNames.DECISIONS)
                await sent(forge, own, TopicNames.KERNEL_READY)
                for topic in PUBLISHED[1:]:
                    await mine.publish(message(topic))
                told = {(await everything.receive()).topic for _ in range(7)}
                assert told == {*PUBLISHED, *RECEIVED}
                assert await mine.health()
                assert await tamiyos.health()
                kept = [came.topic async for came in mine.history(RECEIVED)]
                assert sorted(kept) == sorted(RECEIVED)
                assert len([came async for came in tamiyos.history({TopicNames.PACKETS})]) == 1
            finally:
                await mine.close()
                await tamiyos.close()
                await forge.close()

    asyncio.run(life())


def test_the_operator_hears_over_the_bus_with_its_credentials_alone(
    place, any_redis, redis_namespace
):
    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            issued = (await client.post("/internal/operator/credentials")).json()
            url = (
                f"redis://{issued['redisUsername']}:{issued['redisPassword']}"
                f"@127.0.0.1:{any_redis.port}/0"
            )
            config = config_of(any_redis, "none", url=url, claim_idle_seconds=0.3)
            session = await made(client, "uid-1", redis_namespace)
            user = quote(session["redisUsername"], safe="")
            own = f"redis://{user}:{session['redisPassword']}@127.0.0.1:{any_redis.port}/0"
            mine = OonaClient(config_of(any_redis, redis_namespace, url=own), scope="uid-1")
            buses = [OonaClient(config, scope=None, everywhere=True) for _ in range(2)]
            try:
                ready = await mine.subscribe({TopicNames.KERNEL_READY}, "tolaria")
                group = f"operator-{redis_namespace}"
                topics = {TopicNames.STATUS, TopicNames.KERNEL_REQUESTED}
                left = await buses[0].subscribe(topics, group)
                told = message(TopicNames.STATUS)
                await mine.publish(told)

                async def mine_of(heard: Any) -> OonaMessage:
                    while True:  # this Redis has other tests' namespaces, too
                        came = await asyncio.wait_for(heard.receive(), 30)
                        if came.id == told.id:
                            return came
                        await heard.acknowledge(came)

                came = await mine_of(left)
                assert came.scope == "uid-1"
                await left.close()  # a leader that ends; the next one takes over
                taken = await buses[1].subscribe(topics, group)
                again = await mine_of(taken)
                await taken.acknowledge(again)
                answer = message(TopicNames.KERNEL_READY)
                await buses[1].publish(answer, namespace=redis_namespace)
                assert (await asyncio.wait_for(ready.receive(), 30)).id == answer.id
                await buses[1].check()
            finally:
                for bus in (mine, *buses):
                    await bus.close()

    asyncio.run(life())


def test_what_can_not_be_read_or_was_left_behind_is_dealt_with(place, any_redis, redis_namespace):
    """Taking over, giving back and dead letters need no more than the users may do."""
    at = OWN.format(redis_namespace, TopicNames.DECISIONS)

    async def life() -> None:
        async with serving(settings(place, any_redis.url)) as client:
            issued = await made(client, "uid-1", redis_namespace)
            user = quote(issued["redisUsername"], safe="")
            url = f"redis://{user}:{issued['redisPassword']}@127.0.0.1:{any_redis.port}/0"
            config = config_of(any_redis, redis_namespace, url=url, claim_idle_seconds=0.2)
            first, second = (OonaClient(config, scope="uid-1") for _ in range(2))
            try:
                left = await first.subscribe({TopicNames.DECISIONS}, "tolaria")
                async with any_redis.async_client() as admin:
                    await admin.xadd(at, {"message": "no message"})
                    good = message(TopicNames.DECISIONS)
                    await admin.xadd(at, {"message": good.model_dump_json(by_alias=True)})
                    assert (await asyncio.wait_for(left.receive(), 30)).id == good.id
                    await left.close()
                    taken = await second.subscribe({TopicNames.DECISIONS}, "tolaria")
                    came = await asyncio.wait_for(taken.receive(), 30)
                    assert came.id == good.id
                    await taken.acknowledge(came)

                    async def dead() -> bool:
                        return bool(await admin.xlen(f"{at}:dead") == 1)

                    await until(dead)
            finally:
                await first.close()
                await second.close()

    asyncio.run(life())


def test_a_redis_that_is_back_answers_although_all_connections_had_ended(private_redis):
    async def life() -> None:
        users = RedisUsers(private_redis.url)
        try:
            first = set(await asyncio.gather(*(users.run() for _ in range(4))))
            private_redis.kill()
            private_redis.start()
            with pytest.raises(BusUnavailable):
                await users.run()
            again = set(await asyncio.gather(*(users.run() for _ in range(4))))
            assert len(again) == 1
            assert not again & first
        finally:
            await users.close()

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
                await users.apply([RedisUser("someone", "its password", "esper:x:y")])
            assert "redis.url" in str(caught.value)
            assert "wrong-password" not in str(caught.value)
            assert "hidden-one" not in str(caught.value)
        finally:
            await users.close()

    asyncio.run(life())


def test_a_user_that_may_make_no_users_is_a_hub_that_is_not_ready(place, tmp_path):
    async def life(server: RedisServer) -> None:
        url = f"redis://looker:s3cret@127.0.0.1:{server.port}/0"
        async with serving(settings(place, url)) as client:
            answer = await client.get("/readyz")
            assert answer.status_code == 503
            assert answer.json()["detail"].startswith("redis.url: got ")
            assert "s3cret" not in answer.text
        async with serving(settings(place, server.url)) as client:
            assert (await client.get("/readyz")).status_code == 200

    with RedisServer(tmp_path, password="admin", acl=["looker on >s3cret -@all +info +ping"]) as on:
        asyncio.run(life(on))


@pytest.mark.parametrize(
    "url", ["redis://h:p/0", "redis://h/0?unknown=s3cret", "rediss://h/0?ssl_cert_reqs=s3cret"]
)
def test_an_address_that_cannot_be_used_is_refused(url):
    with pytest.raises(ConfigError, match=r"redis\.url") as caught:
        RedisUsers(url)
    assert "s3cret" not in str(caught.value)


def test_passwords_are_shown_nowhere():
    user = RedisUser("someone", "its password", "esper:x:y")
    assert "its password" not in repr(user) + " ".join([*user.rules(6), *user.rules(8)])
    assert KEY not in repr(user)
