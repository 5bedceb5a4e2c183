"""Redis killed, frozen and restarted while messages are published and received."""

import asyncio
import logging
import random

import pytest

from esper.errors import BusUnavailable, ConfigError
from tests.unit.esper.services.oona.messages import (
    EVENTS,
    PACKETS,
    READY,
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


async def strike(server, fault):
    """One fault from its beginning to its end, about half a second."""
    if fault == "kill":
        server.kill()
        await asyncio.sleep(0.3)
        await in_thread(server.start)
    elif fault == "freeze":
        server.freeze()
        await asyncio.sleep(1.5)  # more than redis.read_timeout_seconds here
        server.thaw()
    else:
        await in_thread(server.restart)


@pytest.mark.parametrize("fault", ["kill", "freeze", "restart"])
def test_no_message_is_lost_and_the_order_holds_through_a_fault(server, redis_namespace, fault):
    async def life():
        async with (
            client_of(server, redis_namespace) as sender,
            client_of(server, redis_namespace, None) as receiver,
        ):
            subscription = await receiver.subscribe({READY}, "g")
            came = []

            async def receive():
                while True:
                    message = await subscription.receive()
                    came.append(message)
                    await subscription.acknowledge(message)

            async def publish():
                for number in range(300):
                    await sender.publish(ready(number))
                    await asyncio.sleep(0.003)

            receiving = asyncio.create_task(receive())
            publishing = asyncio.create_task(publish())
            await asyncio.sleep(0.2)
            await strike(server, fault)
            await publishing
            await until(lambda: {m.payload["kernel"] for m in came} >= set(map(str, range(300))))
            receiving.cancel()
            assert sender.statistics().dropped == 0
            assert sender.statistics().buffered == 0
            return numbers(came)

    found = run(life())
    firsts = list(dict.fromkeys(found))
    assert firsts == list(range(300))
    assert len(found) - len(firsts) <= 250, "more came twice than was on its way"


@pytest.mark.parametrize("seed", range(2))
def test_a_pipeline_of_receivers_survives_faults_at_random(server, redis_namespace, seed):
    """Each question is answered before it is acknowledged: no question is left, no answer lost."""

    async def life():
        chance = random.Random(seed)
        async with (
            client_of(server, redis_namespace) as session,
            client_of(server, redis_namespace, None, claim_idle_seconds=0.5) as first,
            client_of(server, redis_namespace, None, claim_idle_seconds=0.5) as second,
        ):
            answers = await session.subscribe({EVENTS}, "tolaria")

            async def work(bus):
                subscription = await bus.subscribe({READY}, "workers", prefetch=3)
                while True:
                    question = await subscription.receive()
                    (number,) = numbers([question])
                    await asyncio.sleep(0.001)
                    await bus.publish(event(number, question.scope))
                    await subscription.acknowledge(question)

            answered = set()

            async def listen():
                while True:
                    (answer,) = await drained(answers, 1)
                    answered.update(numbers([answer]))

            async def ask():
                for number in range(200):
                    await session.publish(ready(number))
                    await asyncio.sleep(0.005)

            tasks = [asyncio.create_task(t) for t in (work(first), work(second), listen())]
            asking = asyncio.create_task(ask())
            for _ in range(3):
                await asyncio.sleep(chance.uniform(0.05, 0.3))
                await strike(server, chance.choice(["kill", "restart", "freeze"]))
            await asking
            await until(lambda: answered == set(range(200)))
            for task in tasks:
                task.cancel()

    run(life())


def test_receiving_waits_while_redis_is_away(server, redis_namespace, caplog):
    caplog.set_level(logging.WARNING, "esper")

    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            receiving = asyncio.ensure_future(subscription.receive())
            await asyncio.sleep(0.1)
            server.kill()
            await until(lambda: "no messages are received" in caplog.text)
            assert not receiving.done()
            await in_thread(server.start)
            await bus.publish(ready(1))
            assert numbers([await receiving]) == [1]

    run(life())


def test_an_answer_that_never_came_is_asked_for_again(server, redis_namespace):
    """Redis has noted the messages as delivered, the connection broke before they arrived."""

    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            group = subscription._group
            await bus.publish(ready(1), ready(2))
            (lost,) = await bus._connections.execute(group.reading(10, 10))
            assert len(lost[0][1]) == 2
            receiving = asyncio.ensure_future(drained(subscription, 2))
            await asyncio.sleep(0.1)
            assert not receiving.done()
            server.kill()
            await in_thread(server.start)
            assert numbers(await receiving) == [1, 2]
            assert bus.statistics().claimed == 0

    run(life())


def test_what_was_acknowledged_before_a_fault_does_not_come_again(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(*[ready(i) for i in range(4)])
            assert numbers(await drained(subscription, 2)) == [0, 1]
            server.kill()
            assert numbers(await drained(subscription, 2)) == [2, 3]
            await in_thread(server.start)
            assert await is_idle(subscription, 0.5)
            await subscription.close()
            again = await bus.subscribe({READY}, "g")
            assert await is_idle(again, 0.3)

    run(life())


def test_publishing_goes_on_in_the_buffer_and_arrives_in_order(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, buffer_messages=50) as bus:
            await bus.publish(event(0))
            server.kill()
            for number in range(1, 41):
                await asyncio.wait_for(bus.publish(event(number)), 10)
            assert bus.statistics().buffered == 40
            assert not await bus.health()
            await in_thread(server.start)
            await until(lambda: bus.statistics().buffered == 0)
            assert await bus.health()
            return [m async for m in bus.history({EVENTS})], bus.statistics()

    kept, found = run(life())
    assert numbers(kept) == list(range(41))
    assert (found.published, found.dropped) == (41, 0)
    assert found.retried >= 1


def test_without_room_the_oldest_telemetry_goes_and_nothing_else(server, redis_namespace, caplog):
    caplog.set_level(logging.WARNING, "esper")

    async def life():
        async with client_of(server, redis_namespace, buffer_messages=6) as bus:
            await bus.check()
            server.kill()
            sent = [packet(0), event(1), packet(2), event(3), packet(4), event(5)]
            for message in sent:
                await bus.publish(message)
            await bus.publish(event(6))  # for packet 0
            await bus.publish(packet(7))  # for packet 2
            await bus.publish(event(8))  # for packet 4
            await bus.publish(event(9))  # for packet 7
            assert bus.statistics().dropped == 4
            await bus.publish(packet(10))  # no telemetry is older: itself
            assert (bus.statistics().dropped, bus.statistics().buffered) == (5, 6)
            waiting = asyncio.ensure_future(bus.publish(event(11)))
            await asyncio.sleep(0.3)
            assert not waiting.done()
            await in_thread(server.start)
            await waiting
            await until(lambda: bus.statistics().buffered == 0)
            return [m async for m in bus.history({EVENTS, PACKETS})], bus.statistics().dropped

    kept, dropped = run(life())
    assert numbers(kept) == [1, 3, 5, 6, 8, 9, 11]
    assert dropped == 5
    assert "4 packets of telemetry dropped" in caplog.text


def test_a_burst_while_redis_answers_drops_nothing(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, buffer_messages=10) as bus:
            await asyncio.gather(*[bus.publish(packet(i)) for i in range(300)])
            assert (bus.statistics().dropped, bus.statistics().buffered) == (0, 0)
            return [m async for m in bus.history({PACKETS})]

    assert sorted(numbers(run(life()))) == list(range(300))


def test_a_publish_that_is_given_up_is_still_sent(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, attempts=20) as bus:
            await bus.check()
            server.freeze()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(bus.publish(event(1)), 0.2)
            server.thaw()
            await bus.publish(event(2))
            return [m async for m in bus.history({EVENTS})]

    assert list(dict.fromkeys(numbers(run(life())))) == [1, 2]


def test_closing_while_redis_is_away_ends_and_says_what_is_lost(server, redis_namespace, caplog):
    async def life():
        async with client_of(server, redis_namespace) as bus:
            subscription = await bus.subscribe({READY}, "g")
            receiving = asyncio.ensure_future(subscription.receive())
            server.kill()
            await bus.publish(event(1), packet(2))
            await asyncio.wait_for(bus.close(), 20)
            with pytest.raises(BusUnavailable, match="closed"):
                await receiving
            assert (bus.statistics().dropped, bus.statistics().buffered) == (2, 0)

    run(life())
    assert "closed with 2 messages that Redis did not take" in caplog.text


def test_a_closing_bus_sends_what_it_still_can(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, read_timeout_seconds=5.0) as bus:
            await bus.check()
            server.kill()
            await bus.publish(event(1))
            closing = asyncio.ensure_future(bus.close())
            await in_thread(server.start)
            await closing
            assert bus.statistics().dropped == 0
        async with client_of(server, redis_namespace) as bus:
            return [m async for m in bus.history({EVENTS})]

    assert numbers(run(life())) == [1]


def test_what_needs_an_answer_gives_up_after_its_attempts(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace) as bus:
            server.kill()
            for work in (
                lambda: bus.subscribe({READY}, "g"),
                lambda: anext(bus.history({READY})),
                lambda: bus.check(),
            ):
                with pytest.raises(BusUnavailable, match=r"does not answer: .*see redis\.url"):
                    await work()

    run(life())


def test_a_frozen_redis_counts_as_away(server, redis_namespace):
    async def life():
        async with client_of(server, redis_namespace, read_timeout_seconds=0.2) as bus:
            await bus.check()
            server.freeze()
            assert not await bus.health()
            with pytest.raises(BusUnavailable, match="Timeout"):
                await bus.check()
            server.thaw()
            assert await bus.health()

    run(life())


def test_a_user_that_redis_forgot_is_waited_for_once_it_was_let_in(tmp_path, redis_namespace):
    """Users made at run time are gone when Redis is started anew, until the hub makes them."""
    rule = ("ACL", "SETUSER", "session", "on", ">word", "~*", "+@all")

    def make(server):
        with server.client() as client:
            client.execute_command(*rule)

    async def life(server):
        url = f"redis://session:word@127.0.0.1:{server.port}/0"
        async with client_of(server, redis_namespace, url=url) as stranger:
            with pytest.raises(ConfigError):
                await stranger.check()
        make(server)
        async with client_of(server, redis_namespace, url=url) as bus:
            subscription = await bus.subscribe({EVENTS}, "g")
            receiving = asyncio.ensure_future(subscription.receive())
            server.kill()
            await in_thread(server.start)
            await bus.publish(event(1))
            with pytest.raises(BusUnavailable, match="does not answer"):
                await bus.check()
            assert not receiving.done()
            make(server)
            assert numbers([await receiving]) == [1]

    with RedisServer(tmp_path, password="admin") as server:
        run(life(server))


def test_a_redis_without_memory_is_waited_for(tmp_path, redis_namespace):
    def limit(server, text):
        with server.client() as client:
            client.config_set("maxmemory", text)

    async def life(server):
        async with client_of(server, redis_namespace) as bus:
            await bus.publish(event(1))
            limit(server, "1")
            for number in range(2, 6):
                await asyncio.wait_for(bus.publish(event(number)), 10)
            assert bus.statistics().buffered == 4
            limit(server, "0")
            await until(lambda: bus.statistics().buffered == 0)
            return [m async for m in bus.history({EVENTS})]

    with RedisServer(tmp_path, settings=["maxmemory-policy noeviction"]) as server:
        assert numbers(run(life(server))) == [1, 2, 3, 4, 5]
