"""Redis loses its data, refuses for a while, has no room: what matters is neither lost nor hid."""

import asyncio
import logging
import shutil

import pytest

from esper.errors import BusUnavailable, ConfigError
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
def server(private_redis):
    return private_redis


def in_thread(work):
    return asyncio.get_running_loop().run_in_executor(None, work)


def lose_the_file(server, message, key):
    """Redis dies, its file is gone, and somebody publishes before this client looks again."""
    server.kill()
    shutil.rmtree(server.folder / "appendonlydir", ignore_errors=True)
    (server.folder / "appendonly.aof").unlink(missing_ok=True)
    server.start()
    with server.client() as client:
        client.xadd(key, {FIELD: message.model_dump_json(by_alias=True)})


def flush_and_publish(server, message, key):
    with server.client() as client, client.pipeline(transaction=True) as pipeline:
        pipeline.flushall()
        pipeline.xadd(key, {FIELD: message.model_dump_json(by_alias=True)})
        pipeline.execute()


@pytest.mark.parametrize("scope", [SCOPE, None])
@pytest.mark.parametrize("lose", [lose_the_file, flush_and_publish])
def test_what_comes_after_a_loss_of_all_data_is_heard(server, redis_namespace, scope, lose):
    key = stream_key(redis_namespace, SCOPE, READY)

    def commands():
        with server.client() as client:
            return client.info("stats")["total_commands_processed"]

    async def life():
        async with client_of(server, redis_namespace, scope) as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(ready(0))
            assert numbers(await drained(subscription, 1)) == [0]
            receiving = asyncio.ensure_future(drained(subscription, 2))
            await asyncio.sleep(0.1)
            await in_thread(lambda: lose(server, ready(1), key))
            await bus.publish(ready(2))
            assert numbers(await asyncio.wait_for(receiving, 10)) == [1, 2]
            before = commands()
            assert await is_idle(subscription, 0.5)
            assert commands() - before < 200

    run(life())


def refuse_writes(server):
    """Redis can't write its file any more: MISCONF, from the second save on."""
    gone = server.folder / "gone"
    gone.mkdir()
    with server.client() as client:
        client.config_set("dir", str(gone))
        gone.rmdir()
        client.config_set("save", "3600 1")
        client.config_set("appendonly", "no")
        client.bgsave()


def allow_writes(server):
    with server.client() as client:
        client.config_set("dir", str(server.folder))
        client.config_set("save", "")
        client.config_set("stop-writes-on-bgsave-error", "no")


def refuse_lonely(server):
    """NOREPLICAS: nobody is there to copy what is written."""
    with server.client() as client:
        client.config_set("min-replicas-to-write", 1)


def allow_lonely(server):
    with server.client() as client:
        client.config_set("min-replicas-to-write", 0)


@pytest.mark.parametrize(
    ("refuse", "allow", "why"),
    [(refuse_writes, allow_writes, "MISCONF"), (refuse_lonely, allow_lonely, "NOREPLICAS")],
)
@pytest.mark.parametrize("buffered", [True, False])
def test_what_redis_refuses_for_a_while_waits(
    server, redis_namespace, caplog, refuse, allow, why, buffered
):
    caplog.set_level(logging.WARNING, "esper")

    def refused(message):
        with server.client() as client:
            try:
                client.set("probe", 1)
            except Exception as error:
                return message in f"{type(error).__name__} {error}"
        return False

    async def life():
        async with client_of(server, redis_namespace, read_timeout_seconds=0.2) as bus:
            await bus.publish(event(0))
            if buffered:
                server.freeze()
                for number in range(1, 4):
                    await bus.publish(event(number))
                assert bus.statistics().buffered == 3
                server.thaw()
            refuse(server)
            await until(lambda: refused(why))
            for number in range(4, 7):
                await asyncio.wait_for(bus.publish(event(number)), 10)
            assert bus.statistics().buffered >= 3
            assert not await bus.health()
            with pytest.raises(BusUnavailable, match=why):
                await bus.check()
            await asyncio.sleep(0.3)
            allow(server)
            await until(lambda: bus.statistics().buffered == 0)
            await bus.check()
            assert bus.statistics().dropped == 0
            return [m async for m in bus.history({EVENTS})]

    kept = list(dict.fromkeys(numbers(run(life()))))
    assert kept == ([0, 1, 2, 3, 4, 5, 6] if buffered else [0, 4, 5, 6])
    assert "is lost" not in caplog.text


def test_what_was_promised_is_kept_also_from_a_refusal_for_good(server, redis_namespace, caplog):
    """Nobody waits for the answer any more, so nobody could be told of a message given up."""
    key = stream_key(redis_namespace, SCOPE, EVENTS)

    async def life():
        async with client_of(server, redis_namespace, read_timeout_seconds=0.2) as bus:
            await bus.check()
            with server.client() as client:
                client.set(key, "no stream")
            server.kill()
            for number in range(3):
                await bus.publish(event(number))
                await bus.publish(ready(number))
            await bus.publish(packet(1))
            await in_thread(server.start)
            await until(lambda: bus.statistics().buffered <= 3)
            await asyncio.sleep(0.3)
            with pytest.raises(BusUnavailable, match=r"3 messages wait to be sent: .*WRONGTYPE"):
                await bus.check()
            others = [m async for m in bus.history({READY, PACKETS})]
            with server.client() as client:
                client.delete(key)
            await until(lambda: bus.statistics().buffered == 0)
            return others, [m async for m in bus.history({EVENTS})], bus.statistics().dropped

    others, events, dropped = run(life())
    assert sorted(numbers(others)) == [0, 1, 1, 2]
    assert numbers(events) == [0, 1, 2]
    assert dropped == 0


def test_a_full_redis_does_not_take_messages_and_says_so(tmp_path, redis_namespace):
    def limit(server, text):
        with server.client() as client:
            client.config_set("maxmemory", text)

    async def life(server):
        async with client_of(server, redis_namespace, None) as bus:
            await bus.check()
            limit(server, "1")
            with pytest.raises(BusUnavailable, match=r"OutOfMemory.*see redis\.url"):
                await bus.check()
            assert not await bus.health()
            limit(server, "0")
            assert await bus.health()
        with server.client() as client:
            assert client.keys("*") == []

    with RedisServer(tmp_path, settings=["maxmemory-policy noeviction"]) as server:
        run(life(server))


READER = "-@all +ping +xreadgroup +xgroup +xack +xpending +xclaim +xrange +scan"


@pytest.mark.parametrize("rights", ["~* -@all +ping", f"~* {READER}", f"~other:* {READER} +xadd"])
@pytest.mark.parametrize("scope", [SCOPE, None])
def test_a_user_who_may_not_use_the_streams_is_refused(tmp_path, redis_namespace, rights, scope):
    async def life(server):
        url = f"redis://poor:s3cret@127.0.0.1:{server.port}/0"
        async with client_of(server, redis_namespace, scope, url=url) as bus:
            with pytest.raises(ConfigError, match=r"^redis\.url: ") as caught:
                await bus.check()
            assert "s3cret" not in str(caught.value)

    with RedisServer(tmp_path, password="admin", acl=[f"poor on >s3cret {rights}"]) as server:
        run(life(server))
