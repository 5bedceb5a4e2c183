"""What the bus of one process does beyond what every bus does."""

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from esper.services.oona.in_process import KEPT_MESSAGES
from esper.services.oona_client import InProcessOona
from tests.unit.esper.services.oona.messages import (
    EVENTS,
    READY,
    drained,
    event,
    numbers,
    ready,
    run,
)


@settings(deadline=None)
@given(st.lists(st.booleans(), max_size=30))
def test_the_order_holds_over_all_topics(kinds):
    async def life():
        bus = InProcessOona()
        subscription = await bus.subscribe({READY, EVENTS}, "g")
        sent = [ready(i) if kind else event(i) for i, kind in enumerate(kinds)]
        await bus.publish(*sent)
        assert await drained(subscription, len(sent)) == sent

    run(life())


def test_it_hears_every_scope():
    async def life():
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        sent = [ready(0, ""), ready(1, "a"), ready(2, "b")]
        await bus.publish(*sent)
        assert await drained(subscription, 3) == sent
        assert [m async for m in bus.history({READY}, "b")] == sent[2:]

    run(life())


def test_a_message_is_there_as_soon_as_it_is_published():
    async def life():
        bus = InProcessOona()
        subscription = await bus.subscribe({READY}, "g")
        receiving = asyncio.ensure_future(subscription.receive())
        await asyncio.sleep(0)
        await bus.publish(ready(1))
        await asyncio.sleep(0)
        assert receiving.done()

    run(life())


def test_history_is_bounded_for_each_topic():
    async def life():
        bus = InProcessOona()
        await bus.publish(event(7))
        await bus.publish(*[ready(i) for i in range(KEPT_MESSAGES + 5)])
        kept = [m async for m in bus.history({READY, EVENTS})]
        assert numbers(kept) == [7, *range(5, KEPT_MESSAGES + 5)]

    run(life())
