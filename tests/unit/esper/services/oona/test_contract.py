"""What every bus does: the one in this process and the one over Redis pass the same tests."""

import asyncio
import contextlib
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.contracts.operational import HealthSignal
from esper.errors import BusUnavailable
from esper.services.oona_client import InProcessOona, Oona, Subscription
from tests.unit.esper.services.oona.messages import (
    EVENTS,
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

# A bus of its own for each example; the server behind it is the same.
SAME_SERVER = [HealthCheck.function_scoped_fixture]


@contextlib.asynccontextmanager
async def in_process():
    bus = InProcessOona()
    try:
        yield bus
    finally:
        await bus.close()


@pytest.fixture(params=["in-process", "redis_server", "redis_8_server"])
def opened(request):
    """Makes an empty bus, as a context manager."""
    if request.param == "in-process":
        return in_process
    server = request.getfixturevalue(request.param)
    server.start()
    return lambda: client_of(server, f"test-{uuid.uuid4().hex[:12]}")


def test_a_bus_fulfils_the_port(opened):
    async def life():
        async with opened() as made:
            bus: Oona = made
            subscription: Subscription = await bus.subscribe({READY}, "g")
            message = ready(1)
            await bus.publish(message)
            assert await subscription.receive() == message
            await bus.check()
            assert await bus.health()

    run(life())


@settings(deadline=None, max_examples=20, suppress_health_check=SAME_SERVER)
@given(kinds=st.lists(st.booleans(), max_size=20), at_once=st.booleans())
def test_a_group_gets_the_messages_of_a_topic_in_the_order_published(opened, kinds, at_once):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY, EVENTS}, "g")
            sent = [ready(i) if kind else event(i) for i, kind in enumerate(kinds)]
            if at_once:
                await bus.publish(*sent)
            else:
                for message in sent:
                    await bus.publish(message)
            came = await drained(subscription, len(sent))
            for topic in (READY, EVENTS):
                assert [m for m in came if m.topic is topic] == [
                    m for m in sent if m.topic is topic
                ]
            assert subscription.pending() == 0

    run(life())


@settings(deadline=None, max_examples=10, suppress_health_check=SAME_SERVER)
@given(groups=st.integers(1, 4), count=st.integers(0, 12))
def test_every_group_gets_every_message_once(opened, groups, count):
    async def life():
        async with opened() as bus:
            subscriptions = [await bus.subscribe({READY}, f"g{i}") for i in range(groups)]
            sent = [ready(i) for i in range(count)]
            await bus.publish(*sent)
            for subscription in subscriptions:
                assert await drained(subscription, count) == sent
            idle = await asyncio.gather(*[is_idle(s, 0.02) for s in subscriptions])
            assert all(idle)

    run(life())


@settings(deadline=None, max_examples=15, suppress_health_check=SAME_SERVER)
@given(turns=st.lists(st.integers(0, 2), max_size=20))
def test_receivers_that_take_one_at_a_time_share_their_group_in_order(opened, turns):
    async def life():
        async with opened() as bus:
            receivers = [await bus.subscribe({READY}, "g", prefetch=1) for _ in range(3)]
            sent = [ready(i) for i in range(len(turns))]
            await bus.publish(*sent)
            assert [await receivers[turn].receive() for turn in turns] == sent

    run(life())


def test_receivers_at_work_share_their_group_whatever_they_fetch(opened):
    async def life():
        async with opened() as bus:
            receivers = [await bus.subscribe({READY}, "g", prefetch=n) for n in (1, 3, 50)]
            came = []

            async def work(receiver):
                while True:
                    message = await receiver.receive()
                    await asyncio.sleep(0)
                    await receiver.acknowledge(message)
                    came.append(message)

            tasks = [asyncio.create_task(work(receiver)) for receiver in receivers]
            sent = [ready(i) for i in range(200)]
            await bus.publish(*sent)
            await until(lambda: len(came) == len(sent))
            for task in tasks:
                task.cancel()
            assert sorted(numbers(came)) == list(range(200))

    run(life())


@settings(deadline=None, max_examples=20, suppress_health_check=SAME_SERVER)
@given(
    steps=st.lists(st.sampled_from(["receive", "acknowledge", "restart"]), max_size=20),
    prefetch=st.sampled_from([1, 3, None]),
)
def test_no_message_is_lost_and_none_acknowledged_comes_again(opened, steps, prefetch):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g", prefetch=prefetch)
            waiting, held = [ready(i) for i in range(6)], []
            await bus.publish(*waiting)
            for step in steps:
                if step == "receive" and waiting:
                    held.append(await subscription.receive())
                    assert held[-1] == waiting.pop(0)
                elif step == "acknowledge" and held:
                    await subscription.acknowledge(held.pop())
                elif step == "restart":
                    await subscription.close()
                    subscription = await bus.subscribe({READY}, "g", prefetch=prefetch)
                    waiting = sorted(held + waiting, key=lambda m: int(m.payload["kernel"]))
                    held = []
                assert subscription.pending() == len(held)
            assert await drained(subscription, len(waiting)) == waiting

    run(life())


def test_messages_wait_for_a_group_that_has_subscribed_once(opened):
    async def life():
        async with opened() as bus:
            await bus.publish(ready(0))
            first = await bus.subscribe({READY}, "g")
            await first.close()
            await bus.publish(ready(1))
            second = await bus.subscribe({READY}, "g")
            assert numbers([await second.receive()]) == [1]
            assert await is_idle(second)

    run(life())


def test_a_receiver_gets_its_topics_only(opened):
    async def life():
        async with opened() as bus:
            events, readies = await bus.subscribe({EVENTS}, "g"), await bus.subscribe({READY}, "g")
            await bus.publish(ready(1), event(2))
            assert (await events.receive()).topic is EVENTS
            assert (await readies.receive()).topic is READY
            assert await is_idle(events)

    run(life())


def test_publishing_wakes_one_receiver_of_each_group(opened):
    async def life():
        async with opened() as bus:
            here = [await bus.subscribe({READY}, "here") for _ in range(2)]
            there = await bus.subscribe({READY}, "there")
            waiting = {asyncio.ensure_future(s.receive()) for s in (*here, there)}
            await asyncio.sleep(0.05)
            message = ready(1)
            await bus.publish(message)
            done, still = set(), waiting
            while len(done) < 2:
                now, still = await asyncio.wait(still, return_when=asyncio.FIRST_COMPLETED)
                done |= now
            assert [await one for one in done] == [message, message]
            await asyncio.wait(still, timeout=0.1)
            (second,) = still
            assert not second.done()
            await bus.publish(ready(2))
            assert numbers([await second]) == [2]

    run(life())


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_cancelled_receive_takes_no_message_along(opened, when):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            receiving = asyncio.ensure_future(subscription.receive())
            await asyncio.sleep(0.05)
            if when == "before":
                receiving.cancel()
            await bus.publish(ready(1))
            receiving.cancel()
            (came,) = await asyncio.gather(receiving, return_exceptions=True)
            if isinstance(came, asyncio.CancelledError):
                assert subscription.pending() == 0
                came = await subscription.receive()
            assert numbers([came]) == [1]
            assert subscription.pending() == 1

    run(life())


def test_closing_a_receiver_hands_its_messages_to_one_that_waits(opened):
    async def life():
        async with opened() as bus:
            first, second = [await bus.subscribe({READY}, "g", prefetch=5) for _ in range(2)]
            sent = [ready(i) for i in range(5)]
            await bus.publish(*sent)
            assert await first.receive() == sent[0]
            assert await first.receive() == sent[1]
            await first.acknowledge(sent[0])
            receiving = asyncio.ensure_future(drained(second, 4))
            await asyncio.sleep(0.05)
            await first.close()
            assert sorted(numbers(await receiving)) == [1, 2, 3, 4]

    run(life())


@pytest.mark.parametrize("what", ["bus", "subscription"])
def test_closing_wakes_whoever_waits(opened, what):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            receiving = asyncio.ensure_future(subscription.receive())
            await asyncio.sleep(0.05)
            await (bus if what == "bus" else subscription).close()
            with pytest.raises(BusUnavailable, match="closed"):
                await receiving

    run(life())


def test_a_closed_bus_refuses_work_and_says_so(opened):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(ready(1))
            message = await subscription.receive()
            await bus.close()
            await bus.close()
            assert not await bus.health()
            with pytest.raises(BusUnavailable, match="closed"):
                await bus.check()
            with pytest.raises(BusUnavailable, match="closed"):
                await bus.publish(ready(2))
            with pytest.raises(BusUnavailable, match="closed"):
                await bus.subscribe({READY}, "g")
            with pytest.raises(BusUnavailable, match="closed"):
                await anext(bus.history({READY}))
            with pytest.raises(BusUnavailable, match="closed"):
                await subscription.acknowledge(message)
            await subscription.close()

    run(life())


def test_a_closed_receiver_refuses_work(opened):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            await subscription.close()
            await subscription.close()
            with pytest.raises(BusUnavailable):
                await subscription.receive()
            with pytest.raises(BusUnavailable):
                await subscription.acknowledge(ready(1))
            assert await bus.health()

    run(life())


def test_a_message_published_twice_is_delivered_and_acknowledged_twice(opened):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            message = ready(1)
            await bus.publish(message)
            await bus.publish(message)
            assert [await subscription.receive(), await subscription.receive()] == [message] * 2
            await subscription.acknowledge(message)
            assert subscription.pending() == 1
            await subscription.acknowledge(message)
            await subscription.acknowledge(message)
            assert subscription.pending() == 0

    run(life())


def test_receivers_do_not_share_a_message_object(opened):
    async def life():
        async with opened() as bus:
            first, second = await bus.subscribe({READY}, "a"), await bus.subscribe({READY}, "b")
            await bus.publish(ready(1))
            (await first.receive()).payload["kernel"] = "another"
            assert numbers([await second.receive()]) == [1]

    run(life())


def test_what_is_not_finite_arrives(opened):
    signal = HealthSignal(
        session="s",
        epoch=1,
        layer="l",
        gradient_norm=float("nan"),
        gradient_variance=float("inf"),
        gradient_to_weight_ratio=float("-inf"),
        activation_rank=1.0,
        dead_fraction=0.0,
    )
    message = event(1).model_copy(update={"payload": signal.to_wire()})

    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({EVENTS}, "g")
            await bus.publish(message)
            return await subscription.receive()

    assert repr(HealthSignal.model_validate(run(life()).payload)) == repr(signal)


@settings(deadline=None, max_examples=10, suppress_health_check=SAME_SERVER)
@given(text=st.text(max_size=200))
def test_any_text_arrives(opened, text):
    message = event(1).model_copy(update={"payload": {"message": text}})

    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({EVENTS}, "g")
            await bus.publish(message)
            assert await subscription.receive() == message

    run(life())


def test_history_is_what_was_published_received_or_not(opened):
    async def life():
        async with opened() as bus:
            sent = [ready(0), ready(1), packet(2), event(3), packet(4)]
            for message in sent:
                await bus.publish(message)
                await asyncio.sleep(0.002)
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(last := ready(5))
            assert await drained(subscription, 1) == [last]
            topics = {READY, sent[2].topic}
            expected = [sent[0], sent[1], sent[2], sent[4], last]
            assert [m async for m in bus.history(topics)] == expected
            assert [m async for m in bus.history(topics, SCOPE)] == expected
            assert [m async for m in bus.history(topics, "another")] == []
            assert [m async for m in bus.history({EVENTS})] == [sent[3]]
            assert await is_idle(subscription)

    run(life())


def test_statistics_count_messages(opened):
    async def life():
        async with opened() as bus:
            subscription = await bus.subscribe({READY}, "g")
            await bus.publish(ready(1), ready(2), event(3))
            await drained(subscription, 2)
            found = bus.statistics()
            assert (found.published, found.received, found.buffered) == (3, 2, 0)
            assert (found.dropped, found.claimed, found.dead, found.trimmed) == (0, 0, 0, 0)

    run(life())


def test_publishing_nothing_is_no_error(opened):
    async def life():
        async with opened() as bus:
            await bus.publish()
            assert bus.statistics().published == 0

    run(life())
