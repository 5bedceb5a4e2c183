"""A service's ear: handled before acknowledged, under the trace, back again after a failure."""

import asyncio

import pytest

from esper.contracts.enums import ComponentType
from esper.contracts.messages import KernelReady, OonaMessage, TopicNames
from esper.errors import BusUnavailable, ConfigError
from esper.services import listening
from esper.services.listening import keep_listening, listen
from esper.services.oona_client import InProcessOona
from esper.utils.logging import current_trace_id

TOPICS = {TopicNames.KERNEL_READY}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(listening, "RECONNECT_SECONDS", 0.01)


def message(kernel="k"):
    payload = KernelReady(kernel=kernel, blueprint="b")
    return OonaMessage.carrying(TopicNames.KERNEL_READY, payload, ComponentType.TEZZERET)


def test_messages_are_handled_under_their_trace_and_acknowledged_afterwards():
    async def life():
        bus = InProcessOona()
        subscription = await bus.subscribe(TOPICS, "g")
        heard = []

        async def handle(came):
            assert subscription.pending() == 1
            heard.append((came.id, current_trace_id()))

        task = asyncio.create_task(listen(subscription, handle))
        messages = [message(), message()]
        await bus.publish(*messages)
        await asyncio.sleep(0.05)
        assert heard == [(one.id, one.trace_id) for one in messages]
        assert subscription.pending() == 0
        await bus.close()
        with pytest.raises(BusUnavailable):
            await task

    asyncio.run(life())


def test_one_whose_handling_breaks_off_comes_again():
    async def life():
        bus = InProcessOona()
        first = await bus.subscribe(TOPICS, "g")
        failing, heard = [True], []

        async def handle(came):
            if failing.pop() if failing else False:
                raise BusUnavailable("no answer goes out")
            heard.append(came.id)

        await bus.publish(one := message())
        await first.close()
        task = asyncio.create_task(keep_listening(lambda: bus.subscribe(TOPICS, "g"), handle))
        await asyncio.sleep(0.1)
        assert heard == [one.id]
        task.cancel()

    asyncio.run(life())


def test_wrong_credentials_end_it_at_first_and_are_waited_out_later(caplog):
    async def life():
        bus = InProcessOona()
        outcomes = [BusUnavailable("away"), None, ConfigError("redis.url", "x", "y"), None]
        heard = []

        async def subscribe():
            outcome = outcomes.pop(0)
            if outcome is not None:
                raise outcome
            return await bus.subscribe(TOPICS, "g")

        async def handle(came):
            heard.append(came.id)
            if len(heard) == 1:
                raise BusUnavailable("broken off")

        task = asyncio.create_task(keep_listening(subscribe, handle))
        await asyncio.sleep(0.05)
        await bus.publish(message())
        await asyncio.sleep(0.1)
        assert len(heard) == 2
        task.cancel()
        outcomes[:] = [ConfigError("redis.url", "x", "y")]
        with pytest.raises(ConfigError):
            await keep_listening(subscribe, handle)

    asyncio.run(life())
    assert "broken off" in caplog.text


def test_what_nobody_foresaw_is_a_failed_delivery(caplog):
    async def life():
        bus = InProcessOona()
        heard = []

        async def handle(came):
            heard.append(came.id)
            if len(heard) < 3:
                raise ValueError("unforeseen")

        task = asyncio.create_task(keep_listening(lambda: bus.subscribe(TOPICS, "g"), handle))
        await asyncio.sleep(0.05)
        await bus.publish(one := message())
        await asyncio.sleep(0.2)
        assert heard == [one.id] * 3
        assert not task.done()
        task.cancel()

    asyncio.run(life())
    assert "could not be handled" in caplog.text

    async def broken():
        raise ValueError("no bus was reached yet")

    with pytest.raises(ValueError, match="no bus"):
        asyncio.run(keep_listening(broken, broken))
