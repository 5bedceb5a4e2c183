"""Oona over a real Redis: scopes, taking over, dead letters, refusals."""

import asyncio
import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from esper.configs import RedisConfig
from esper.errors import BadInput, BusUnavailable, ConfigError
from esper.services.oona.streams import FIELD, stream_key
from esper.services.oona_client import OonaClient
from tests.unit.esper.services.oona.messages import (
    EVENTS,
    PACKETS,
    READY,
    SCOPE,
    client_of,
    config_of,
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

ROOT = Path(__file__).parents[5]


@pytest.fixture
def server(redis_server):
    return redis_server.start()


def raw(server, *words):
    """What Redis answers to a command, past the bus."""
    with server.client() as client:
        return client.execute_command(*words)


def num_connections(server):
    """How many connections there are beside the one that asks."""
    with server.client() as client:
        return len(client.client_list()) - 1


def dead_letters(server, namespace, scope=SCOPE, topic=READY):
    with server.client() as client:
        return [
            fields for _, fields in client.xrange(stream_key(namespace, scope, topic) + b":dead")
        ]


def test_sessions_do_not_hear_each_other(server, redis_namespace):
    async def life():
        async with (
            client_of(server, redis_namespace, "a") as first,
            client_of(server, redis_namespace, "b") as second,
        ):
            here, there = await first.subscribe({READY}, "g"), await second.subscribe({READY}, "g")
            await first.publish(ready(1, "a"))
            await second.publish(ready(2, ""))
            assert (await here.receive()).payload["kernel"] == "1"
            came = await there.receive()
            assert (came.payload["kernel"], came.scope) == ("2", "b")
            assert await is_idle(here)
            with pytest.raises(BadInput, match="scope: got a; allowed: b"):
                await second.publish(ready(3, "a"))
            with pytest.raises(BusUnavailable):
                await asyncio.wait_for(closed_receive(second, there), 5)

    async def closed_receive(bus, subscription):
        await bus.close()
        await subscription.receive()

    run(life())


def test_namespaces_do_not_hear_each_other(server, redis_namespace):
    async def life():
        async with (
            client_of(server, redis_namespace, None) as first,
            client_of(server, redis_namespace + "-b", None) as second,
        ):
            here, there = await first.subscribe({READY}, "g"), await second.subscribe({READY}, "g")
            await first.publish(ready(1, "a"))
            assert numbers([await here.receive()]) == [1]
            assert await is_idle(there, 0.3)

    run(life())


def test_over_all_scopes_old_and_new_streams_are_heard_from_their_beginning(
    server, redis_namespace
):
    async def life():
        async with (
            client_of(server, redis_namespace, "a") as session,
            client_of(server, redis_namespace, "b") as late,
            client_of(server, redis_namespace, None) as tamiyo,
        ):
            await session.publish(packet(1, "a"))
            subscription = await tamiyo.subscribe({PACKETS}, "tamiyo")
            first = await subscription.receive()
            assert (first.scope, numbers([first])) == ("a", [1])
            receiving = asyncio.ensure_future(drained(subscription, 3))
            await asyncio.sleep(0.1)
            await late.publish(packet(2, "b"), packet(3, "b"))
            await tamiyo.publish(packet(4, ""))
            came = await receiving
            assert sorted(numbers(came)) == [2, 3, 4]
            assert {m.scope for m in came} == {"b", ""}
            assert subscription.pending() == 1

    run(life())


def test_an_answer_goes_to_the_scope_of_its_question(server, redis_namespace):
    async def life():
        async with (
            client_of(server, redis_namespace, "a") as session,
            client_of(server, redis_namespace, "b") as other,
            client_of(server, redis_namespace, None) as forge,
        ):
            answers = await session.subscribe({READY}, "tolaria")
            elsewhere = await other.subscribe({READY}, "tolaria")
            questions = await forge.subscribe({EVENTS}, "forge")
            await session.publish(event(1, "a"))
            question = await questions.receive()
            await forge.publish(ready(1, question.scope))
            await questions.acknowledge(question)
            assert numbers([await answers.receive()]) == [1]
            assert await is_idle(elsewhere)

    run(life())


def test_streams_that_are_deleted_are_forgotten_and_found_again(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, None) as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(ready(1, "a"), ready(2, "b"))
            assert sorted(numbers(await drained(subscription, 2))) == [1, 2]
            raw(server, "DEL", stream_key(redis_namespace, "a", READY))
            await bus.publish(ready(3, "b"))
            assert numbers(await drained(subscription, 1)) == [3]
            await bus.publish(ready(4, "a"))
            assert numbers(await drained(subscription, 1)) == [4]

    run(life())


def test_a_session_survives_the_loss_of_its_streams(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            receiving = asyncio.ensure_future(drained(subscription, 1))
            await asyncio.sleep(0.05)
            raw(server, "DEL", stream_key(redis_namespace, SCOPE, READY))
            await bus.publish(ready(1))
            assert numbers(await receiving) == [1]

    run(life())


def test_the_messages_of_a_receiver_that_died_go_to_another(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, claim_idle_seconds=0.5) as bus:
            died = await bus.subscribe({READY}, "g", prefetch=3)
            sent = [ready(i) for i in range(4)]
            await bus.publish(*sent)
            assert await died.receive() == sent[0]
            for task in died._tasks:  # it neither works, waits nor says goodbye
                task.cancel()
            other = await bus.subscribe({READY}, "g")
            assert numbers(await drained(other, 1)) == [3]
            assert numbers(await drained(other, 3)) == [0, 1, 2]
            assert bus.statistics().claimed == 3

    run(life())


def test_a_message_that_is_worked_on_for_long_stays_with_its_receiver(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, claim_idle_seconds=1.0) as bus:
            slow = await bus.subscribe({READY}, "g", prefetch=2)
            await bus.publish(ready(1), ready(2))
            message = await slow.receive()
            other = await bus.subscribe({READY}, "g")
            assert await is_idle(other, 1.5)
            await slow.acknowledge(message)
            assert numbers(await drained(slow, 1)) == [2]
            assert bus.statistics().claimed == 0

    run(life())


def test_what_was_read_ahead_by_one_that_stopped_receiving_goes_to_others(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, claim_idle_seconds=0.3) as bus:
            idler = await bus.subscribe({READY}, "g", prefetch=3)
            await bus.publish(*[ready(i) for i in range(3)])
            assert numbers(await drained(idler, 1)) == [0]
            other = await bus.subscribe({READY}, "g")
            assert numbers(await drained(other, 2)) == [1, 2]
            assert await is_idle(idler, 0.5)
            await bus.publish(ready(3))
            done = [asyncio.ensure_future(s.receive()) for s in (idler, other)]
            (came,), _ = await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
            assert numbers([await came]) == [3]

    run(life())


def test_reading_ahead_for_nobody_is_no_delivery(server, redis_namespace):
    async def life():
        changes = {"claim_idle_seconds": 0.1, "max_deliveries": 2, "discovery_seconds": 0.02}
        async with client_of(server, redis_namespace, **changes) as bus:
            receiver = await bus.subscribe({READY}, "g", prefetch=10)
            await bus.publish(*[ready(i) for i in range(6)])
            for number in range(6):
                assert numbers(await drained(receiver, 1)) == [number]
                await asyncio.sleep(0.15)
            assert bus.statistics().dead == 0

    run(life())


def test_a_message_nobody_can_deal_with_is_set_aside(server, redis_namespace, caplog):
    caplog.set_level(logging.WARNING, "esper")

    async def life():
        changes = {"claim_idle_seconds": 0.1, "max_deliveries": 3}
        async with client_of(server, redis_namespace, **changes) as bus:
            poison = ready(1)
            for attempt in range(3):
                subscription = await bus.subscribe({READY}, "g")
                if attempt == 0:
                    await bus.publish(poison)
                assert await subscription.receive() == poison
                await subscription.close()
            last = await bus.subscribe({READY}, "g")
            await bus.publish(ready(2))
            assert numbers(await drained(last, 1)) == [2]
            assert await is_idle(last, 0.3)
            assert bus.statistics().dead == 1
            return poison

    poison = run(life())
    (letter,) = dead_letters(server, redis_namespace)
    assert json.loads(letter[FIELD.decode()])["id"] == poison.id
    assert (letter["deliveries"], letter["group"]) == ("3", "g")
    assert letter["reason"] == "delivered 3 times to g and never acknowledged"
    assert "is set aside: delivered 3 times" in caplog.text


def test_closing_before_a_message_was_handed_out_is_no_delivery(server, redis_namespace):
    async def life():
        changes = {"max_deliveries": 2}
        async with client_of(server, redis_namespace, **changes) as bus:
            first = await bus.subscribe({READY}, "g")
            await bus.publish(*[ready(i) for i in range(3)])
            await first.acknowledge(await first.receive())
            await first.close()
            for _ in range(3):
                subscription = await bus.subscribe({READY}, "g")
                held = await subscription.receive()
                await subscription.acknowledge(held)
                await bus.publish(held)
                await subscription.close()
            assert bus.statistics().dead == 0

    run(life())


@pytest.mark.parametrize("text", ["", "no JSON", "{}", "\0"])
def test_what_is_no_message_is_set_aside_at_once(server, redis_namespace, text):
    key = stream_key(redis_namespace, SCOPE, READY)

    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            raw(server, "XADD", key, "*", FIELD, text)
            await bus.publish(ready(1))
            assert numbers(await drained(subscription, 1)) == [1]
            await until(lambda: bus.statistics().dead == 1)
            assert numbers([m async for m in bus.history({READY})]) == [1]

    run(life())
    (letter,) = dead_letters(server, redis_namespace)
    assert letter["reason"].startswith("it holds no message: ")
    assert raw(server, "XPENDING", key, "g")["pending"] == 0


def test_streams_keep_about_as_many_messages_as_set(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, stream_length=10) as bus:
            await bus.publish(*[ready(i) for i in range(500)])
            await until(lambda: raw(server, "XLEN", key) <= 200)
            return [m async for m in bus.history({READY})]

    key = stream_key(redis_namespace, SCOPE, READY)
    kept = numbers(run(life()))
    assert 10 <= len(kept) <= 200
    assert kept == list(range(500 - len(kept), 500))


def test_a_held_message_that_is_trimmed_away_is_counted_once(server, redis_namespace):
    key = stream_key(redis_namespace, SCOPE, READY)

    async def life():
        async with client_of(server, redis_namespace) as bus:
            first = await bus.subscribe({READY}, "g")
            await bus.publish(ready(1))
            await first.receive()
            await first.close()
            raw(server, "XTRIM", key, "MAXLEN", 0)
            second = await bus.subscribe({READY}, "g")
            assert await is_idle(second, 0.3)
            return bus.statistics().trimmed

    assert run(life()) == 1
    assert raw(server, "XPENDING", key, "g")["pending"] == 0


def test_history_reads_many_pages_in_order(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, None) as bus:
            for start in range(0, 900, 100):
                scope = "ab"[start // 100 % 2]
                await bus.publish(*[ready(start + i, scope) for i in range(100)])
                await asyncio.sleep(0.002)
            everything = [m async for m in bus.history({READY, EVENTS})]
            one = [m async for m in bus.history({READY}, "a")]
            return everything, one

    everything, one = run(life())
    assert numbers(everything) == list(range(900))
    assert {m.scope for m in one} == {"a"}
    assert len(one) == 500


def test_acknowledgements_reach_redis_after_what_was_published(server, redis_namespace):
    key = stream_key(redis_namespace, SCOPE, READY)

    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(*[ready(i) for i in range(300)])
            await drained(subscription, 300)
            await subscription.close()

    run(life())
    assert raw(server, "XPENDING", key, "g")["pending"] == 0


def test_a_wrong_password_is_the_settings_fault_and_not_shown(server, redis_namespace):
    async def life():
        config = config_of(
            server, redis_namespace, url=f"redis://:s3cret@127.0.0.1:{server.port}/0"
        )
        bus = OonaClient(config, scope=SCOPE)
        failures = []
        for work in (
            lambda: bus.check(),
            lambda: bus.publish(ready(1)),
            lambda: bus.subscribe({READY}, "g"),
            lambda: anext(bus.history({READY})),
        ):
            with pytest.raises(ConfigError) as failure:
                await work()
            failures.append(failure.value)
        assert not await bus.health()
        await bus.close()
        return failures

    for failure in run(life()):
        assert failure.field == "redis.url"
        assert "***@127.0.0.1" in str(failure)
        assert "s3cret" not in str(failure)
        assert "s3cret" not in repr(failure.__cause__)


def test_a_user_without_the_right_is_the_settings_fault(tmp_path, redis_namespace):
    commands = "+xadd +xgroup +xreadgroup +xack +xpending +xclaim +xrange +ping"
    acl = [f"session on >word ~esper:{redis_namespace}:mine:* -@all {commands}"]

    async def life(server):
        url = f"redis://session:word@127.0.0.1:{server.port}/0"
        async with client_of(server, redis_namespace, "mine", url=url) as mine:
            subscription = await mine.subscribe({READY}, "g")
            await mine.publish(ready(1, "mine"))
            assert numbers(await drained(subscription, 1)) == [1]
            await subscription.close()
            assert numbers([m async for m in mine.history({READY})]) == [1]
        async with client_of(server, redis_namespace, "another", url=url) as other:
            with pytest.raises(ConfigError, match=r"redis\.url.*redis\.namespace"):
                await other.publish(ready(1, "another"))
            with pytest.raises(ConfigError, match=r"redis\.url"):
                await other.subscribe({READY}, "g")

    with RedisServer(tmp_path, password="admin", acl=acl) as server:
        run(life(server))


@pytest.mark.parametrize(
    ("url", "came"),
    [
        (None, "None"),
        ("redis://:s3cret@host:port", "***"),
        ("redis://:s3cret/word@host", "***"),
        ("redis://h/0?socket_timeout=x", "redis://h/0?***"),
        ("redis://h/0?unknown=s3cret", "redis://h/0?***"),
        ("redis://h/0?protocol=s3cret", "redis://h/0?***"),
        ("rediss://h/0?ssl_cert_reqs=s3cret", "rediss://h/0?***"),
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url, came):
    config = RedisConfig.model_construct(**RedisConfig().model_dump() | {"url": url})
    with pytest.raises(ConfigError, match=r"redis\.url") as failure:
        OonaClient(config, scope=None)
    assert came in str(failure.value)
    assert "s3cret" not in str(failure.value)


def test_a_stream_that_is_none_refuses_what_is_published(server, redis_namespace):
    raw(server, "SET", stream_key(redis_namespace, SCOPE, READY), "text")

    async def life():
        async with client_of(server, redis_namespace) as bus:
            with pytest.raises(BusUnavailable, match=r"refuses: .*WRONGTYPE"):
                await bus.publish(event(1), ready(1), event(2))
            with pytest.raises(BusUnavailable, match="WRONGTYPE"):
                await bus.subscribe({READY}, "g")
            assert numbers([m async for m in bus.history({EVENTS})]) == [1, 2]
            assert bus.statistics().buffered == 0

    run(life())


def test_many_publishers_and_receivers_share_a_small_pool(private_redis, redis_namespace):
    async def life():
        async with client_of(private_redis, redis_namespace, pool_size=2) as bus:
            receivers = [await bus.subscribe({READY}, f"g{i}") for i in range(12)]
            await asyncio.gather(*[bus.publish(ready(i)) for i in range(100)])
            came = await asyncio.gather(*[drained(receiver, 100) for receiver in receivers])
            assert all(sorted(numbers(messages)) == list(range(100)) for messages in came)
            assert num_connections(private_redis) <= 12 + 2

    run(life())


def test_a_closed_client_leaves_no_connection_and_no_task(private_redis, redis_namespace):
    async def life():
        async with client_of(private_redis, redis_namespace) as bus:
            await bus.subscribe({READY}, "g")
            subscription = await bus.subscribe({EVENTS}, "g")
            await bus.publish(event(1))
            await subscription.receive()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        return [task for task in left if (task.get_name() or "").startswith("oona")]

    async def settled():
        left = await life()
        await until(lambda: num_connections(private_redis) == 0)
        return left

    assert run(settled()) == []


def test_without_the_redis_library_the_client_says_what_to_install():
    code = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "redis":
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

sys.meta_path.insert(0, Blocked())
from esper.services import oona_client
oona_client.InProcessOona()
try:
    oona_client.Nothing
except AttributeError as error:
    print(error)
oona_client.OonaClient
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "no attribute 'Nothing'" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("esper.errors.ConfigError: redis.url: ")
    assert last.endswith("pip install 'esper[bus]'")
