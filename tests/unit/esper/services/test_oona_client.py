"""The in-process bus: order, groups, redelivery, closing."""

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.contracts.operational import HealthSignal, SessionEvent
from esper.errors import BusUnavailable
from esper.services.oona_client import InProcessOona, Oona, Subscription

T = TypeVar("T")
READY = TopicNames.KERNEL_READY
EVENTS = TopicNames.EVENTS


def ready(number: int) -> OonaMessage:
    payload = KernelReady(kernel=str(number), blueprint="noop")
    return OonaMessage.carrying(READY, payload, ComponentType.TEZZERET)


def event(number: int) -> OonaMessage:
    payload = SessionEvent(session="s", epoch=number, reason="Test", message="a message")
    return OonaMessage.carrying(EVENTS, payload, ComponentType.TOLARIA)


def run(work: Coroutine[object, object, T]) -> T:
    return asyncio.run(asyncio.wait_for(work, timeout=20))


async def drained(subscription: Subscription, count: int) -> list[OonaMessage]:
    messages = []
    for _ in range(count):
        message = await subscription.receive()
        await subscription.acknowledge(message)
        messages.append(message)
    return messages


async def is_idle(subscription: Subscription) -> bool:
    """Whether a receive would wait."""
    receiving = asyncio.ensure_future(subscription.receive())
    for _ in range(3):
        await asyncio.sleep(0)
    idle = not receiving.done()
    receiving.cancel()
    return idle


def test_the_in_process_bus_is_a_bus():
    async def life() -> None:
        bus: Oona = InProcessOona()
        subscription: Subscription = await bus.subscribe({READY}, "g")
        message = ready(1)
        await bus.publish(message)
        assert await subscription.receive() == message
        assert await bus.health()

    run(life())


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_a_group_gets_messages_of_all_its_topics_in_the_order_published(kinds):
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY, EVENTS}, "g")
        sent = [ready(i) if kind else event(i) for i, kind in enumerate(kinds)]
        for message in sent:
            await bus.publish(message)
        assert await drained(subscription, len(sent)) == sent
        assert await is_idle(subscription)

    run(life())


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(0, 20))
def test_every_group_gets_every_message_once(groups, count):
    async def life() -> None:
        bus = InProcessOona()
        subscriptions = [await bus.subscribe({READY}, f"g{i}") for i in range(groups)]
        sent = [ready(i) for i in range(count)]
        for message in sent:
            await bus.publish(message)
        for subscription in subscriptions:
            assert await drained(subscription, count) == sent
            assert await is_idle(subscription)

    run(life())


@settings(deadline=None)
@given(st.lists(st.integers(0, 2), max_size=30))
def test_the_receivers_of_one_group_share_its_messages(turns):
    async def life() -> None:
        bus = InProcessOona()
        subscriptions = [await bus.subscribe({READY}, "g") for _ in range(3)]
        sent = [ready(i) for i in range(len(turns))]
        for message in sent:
            await bus.publish(message)
        came = [await subscriptions[turn].receive() for turn in turns]
        assert came == sent

    run(life())


@settings(deadline=None)
@given(st.lists(st.sampled_from(["receive", "acknowledge", "restart"]), max_size=40))
def test_no_message_is_lost_and_none_acknowledged_comes_again(steps):
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        waiting = [ready(i) for i in range(6)]
        held: list[OonaMessage] = []
        for message in waiting:
            await bus.publish(message)
        for step in steps:
            if step == "receive" and waiting:
                held.append(await subscription.receive())
                assert held[-1] == waiting.pop(0)
            elif step == "acknowledge" and held:
                await subscription.acknowledge(held.pop())
            elif step == "restart":
                await subscription.close()
                subscription = await bus.subscribe({READY}, "g")
                waiting = sorted(held + waiting, key=lambda m: int(str(m.payload["kernel"])))
                held = []
            assert subscription.pending() == len(held)
        assert await drained(subscription, len(waiting)) == waiting

    run(life())


def test_messages_wait_for_a_group_that_has_subscribed_once():
    async def life() -> None:
        bus = InProcessOona()
        await bus.publish(ready(0))
        first = await bus.subscribe({READY}, "g")
        await first.close()
        await bus.publish(ready(1))
        second = await bus.subscribe({READY}, "g")
        message = await second.receive()
        assert message.payload["kernel"] == "1"
        assert await is_idle(second)

    run(life())


def test_a_receiver_gets_its_topics_only():
    async def life() -> None:
        bus = InProcessOona()
        events, readies = await bus.subscribe({EVENTS}, "g"), await bus.subscribe({READY}, "g")
        await bus.publish(ready(1))
        await bus.publish(event(2))
        assert (await events.receive()).topic is EVENTS
        assert (await readies.receive()).topic is READY
        assert await is_idle(events)

    run(life())


def test_publishing_wakes_one_receiver_of_each_group():
    async def life() -> None:
        bus = InProcessOona()
        here = [await bus.subscribe({READY}, "here") for _ in range(2)]
        there = await bus.subscribe({READY}, "there")
        waiting = [asyncio.ensure_future(s.receive()) for s in (*here, there)]
        await asyncio.sleep(0)
        message = ready(1)
        await bus.publish(message)
        done, still = await asyncio.wait(waiting, timeout=0.05)
        assert [await one for one in done] == [message, message]
        assert len(still) == 1
        assert waiting[0] in done
        (second,) = still
        await bus.publish(ready(2))
        assert (await second).payload["kernel"] == "2"

    run(life())


def test_a_cancelled_receive_takes_no_message_along():
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        receiving = asyncio.ensure_future(subscription.receive())
        await asyncio.sleep(0)
        await bus.publish(ready(1))
        receiving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await receiving
        assert subscription.pending() == 0
        assert (await subscription.receive()).payload["kernel"] == "1"

    run(life())


def test_closing_a_receiver_hands_its_message_to_one_that_waits():
    async def life() -> None:
        bus = InProcessOona()
        first, second = [await bus.subscribe({READY}, "g") for _ in range(2)]
        await bus.publish(ready(1))
        message = await first.receive()
        receiving = asyncio.ensure_future(second.receive())
        await asyncio.sleep(0)
        await first.close()
        assert await receiving == message

    run(life())


@pytest.mark.parametrize("what", ["bus", "subscription"])
def test_closing_wakes_whoever_waits(what):
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        receiving = asyncio.ensure_future(subscription.receive())
        await asyncio.sleep(0)
        await (bus if what == "bus" else subscription).close()
        with pytest.raises(BusUnavailable, match="closed"):
            await receiving

    run(life())


def test_a_closed_bus_refuses_work_and_says_so():
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        await bus.publish(ready(1))
        message = await subscription.receive()
        await bus.close()
        await bus.close()
        assert not await bus.health()
        with pytest.raises(BusUnavailable):
            await bus.publish(ready(2))
        with pytest.raises(BusUnavailable):
            await bus.subscribe({READY}, "g")
        with pytest.raises(BusUnavailable):
            await subscription.acknowledge(message)
        await subscription.close()

    run(life())


def test_a_closed_receiver_refuses_work():
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        await subscription.close()
        with pytest.raises(BusUnavailable):
            await subscription.receive()
        with pytest.raises(BusUnavailable):
            await subscription.acknowledge(ready(1))
        assert await bus.health()

    run(life())


def test_a_message_published_twice_is_delivered_and_acknowledged_twice():
    async def life() -> None:
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        message = ready(1)
        await bus.publish(message)
        await bus.publish(message)
        assert [await subscription.receive(), await subscription.receive()] == [message, message]
        await subscription.acknowledge(message)
        assert subscription.pending() == 1
        await subscription.acknowledge(message)
        await subscription.acknowledge(message)
        assert subscription.pending() == 0

    run(life())


def test_receivers_do_not_share_a_message_object():
    async def life() -> None:
        bus = InProcessOona()
        first, second = await bus.subscribe({READY}, "a"), await bus.subscribe({READY}, "b")
        await bus.publish(ready(1))
        (await first.receive()).payload["kernel"] = "another"
        assert (await second.receive()).payload["kernel"] == "1"

    run(life())


def test_what_is_not_finite_arrives():
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

    async def life() -> OonaMessage:
        bus = InProcessOona()
        subscription = await bus.subscribe({EVENTS}, "g")
        await bus.publish(message)
        return await subscription.receive()

    came = HealthSignal.model_validate(run(life()).payload)
    assert repr(came) == repr(signal)
