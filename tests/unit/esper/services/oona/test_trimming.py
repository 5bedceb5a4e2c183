"""What streams give up for want of room: what is dealt with first, the rest counted."""

import asyncio

import pytest

from esper.services.oona.streams import FIELD, stream_key
from tests.unit.esper.services.oona.messages import (
    EVENTS,
    PACKETS,
    READY,
    SCOPE,
    client_of,
    drained,
    event,
    is_idle,
    numbers,
    packet,
    ready,
    run,
    until,
)
from tools.servers.redis_server import RedisServer


@pytest.fixture
def server(redis_server):
    return redis_server.start()


def length_of(server, namespace, topic):
    with server.client() as client:
        return client.xlen(stream_key(namespace, SCOPE, topic))


def test_what_a_group_has_not_had_stays_until_the_cap(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, stream_length=100) as bus:
            subscription = await bus.subscribe({EVENTS}, "g")
            for start in range(0, 900, 50):
                await bus.publish(*[event(start + i) for i in range(50)])
            assert numbers(await drained(subscription, 900)) == list(range(900))
            for start in range(900, 1400, 50):
                await bus.publish(*[event(start + i) for i in range(50)])
                await drained(subscription, 50)
            await bus.publish(event(1400))
            await until(lambda: length_of(server, redis_namespace, EVENTS) <= 500)
            kept = numbers([m async for m in bus.history({EVENTS})])
            assert kept == list(range(1401 - len(kept), 1401))
            assert len(kept) >= 100
            assert bus.statistics().trimmed == 0

    run(life())


def test_what_is_pending_stays(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, stream_length=100) as bus:
            slow = await bus.subscribe({EVENTS}, "slow", prefetch=1)
            quick = await bus.subscribe({EVENTS}, "quick")
            await bus.publish(event(0))
            held = await slow.receive()
            for start in range(1, 601, 50):
                await bus.publish(*[event(start + i) for i in range(50)])
                await drained(quick, 50 + (start == 1))
            assert numbers([await anext(bus.history({EVENTS}))]) == [0]
            await slow.acknowledge(held)
            assert numbers(await drained(slow, 600)) == list(range(1, 601))

    run(life())


@pytest.mark.parametrize(("topic", "make", "cap"), [(EVENTS, event, 100), (PACKETS, packet, 20)])
@pytest.mark.parametrize("at_once", [True, False])
def test_what_goes_before_its_group_had_it_is_counted(
    server, redis_namespace, caplog, topic, make, cap, at_once
):
    async def life():
        async with client_of(server, redis_namespace, stream_length=10) as bus:
            subscription = await bus.subscribe({topic}, "g")
            if at_once:
                await bus.publish(*[make(i) for i in range(1000)])
            else:
                for start in range(0, 1000, 20):
                    await bus.publish(*[make(start + i) for i in range(20)])
            await until(lambda: length_of(server, redis_namespace, topic) <= cap + 250)
            await asyncio.sleep(0.1)
            kept = length_of(server, redis_namespace, topic)
            came = numbers(await drained(subscription, kept))
            assert came == list(range(1000 - kept, 1000))
            assert kept >= 10
            assert bus.statistics().trimmed == 1000 - kept
            assert await is_idle(subscription)

    run(life())
    assert "were trimmed away unread" in caplog.text


def test_a_user_who_may_not_see_groups_trims_all_the_same(tmp_path, redis_namespace):
    commands = "+xadd +xtrim +xlen +xgroup +xreadgroup +xack +xpending +xclaim +xrange +ping"
    acl = [f"session on >word ~esper:{redis_namespace}:* -@all {commands}"]

    async def life(server):
        url = f"redis://session:word@127.0.0.1:{server.port}/0"
        async with client_of(server, redis_namespace, stream_length=10, url=url) as bus:
            for start in range(0, 1000, 50):
                await bus.publish(*[ready(start + i) for i in range(50)])
            with server.client() as client:
                key = stream_key(redis_namespace, SCOPE, READY)
                await until(lambda: client.xlen(key) <= 300)

    with RedisServer(tmp_path, password="admin", acl=acl) as server:
        run(life(server))


def test_keys_that_are_no_streams_of_oonas_are_passed_over(server, redis_namespace, caplog):
    async def life():
        async with client_of(server, redis_namespace, None) as bus:
            with server.client() as client:
                client.set(stream_key(redis_namespace, "other", READY), "text")
                for scope in ("bad scope", "_", "a:b", "x" * 200):
                    text = ready(9).model_dump_json(by_alias=True)
                    client.xadd(stream_key(redis_namespace, scope, READY), {FIELD: text})
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(ready(1, "good"))
            assert numbers(await drained(subscription, 1)) == [1]
            with server.client() as client:
                client.set(stream_key(redis_namespace, "good", READY), "text")
                await asyncio.sleep(0.2)
            await bus.publish(ready(2, "better"))
            assert numbers(await drained(subscription, 1)) == [2]
            assert await is_idle(subscription, 0.2)
            assert numbers([m async for m in bus.history({READY})]) == [2]

    run(life())
    assert caplog.text.count(":other:kernels.ready is passed over") == 1
