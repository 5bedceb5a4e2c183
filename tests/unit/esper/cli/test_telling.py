"""How a session stands, told over a bus: what is news, how often, and what a refusal costs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

from esper.cli.telling import AGAIN_SECONDS, HEARTBEAT_SECONDS, Teller, telling
from esper.configs import EsperConfig, RedisConfig
from esper.contracts.enums import SessionOutcome
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import SessionSnapshot
from esper.errors import BusUnavailable
from esper.services.oona_client import InProcessOona
from tests.unit.esper.services.oona.messages import client_of, config_of
from tests.unit.esper.services.tolaria.test_reporting import report_of

STATUS = TopicNames.STATUS


class Clock:
    """Seconds that go on when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class RefusingBus(InProcessOona):
    """A bus that refuses the next `refusals` messages."""

    refusals = 0

    async def publish(self, *messages: OonaMessage) -> None:
        if self.refusals:
            self.refusals -= 1
            raise BusUnavailable("no room")
        await super().publish(*messages)


async def told(bus: InProcessOona) -> list[SessionSnapshot]:
    found = []
    async for message in bus.history({STATUS}):
        assert message.scope == "uid"
        snapshot = message.open()
        assert isinstance(snapshot, SessionSnapshot)
        found.append(snapshot)
    return found


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


def test_what_is_new_is_told_once() -> None:
    async def life() -> None:
        bus, report = InProcessOona(), report_of()
        teller = Teller(report, bus, "uid", clock=Clock())
        await teller.look()
        assert await told(bus) == [], "training has not begun"
        for message in ("a", "b"):
            report.event(1, "Changed", message)
        assert not teller.up_to_date
        for _ in range(3):
            await teller.look()
        assert teller.up_to_date
        (snapshot,) = await told(bus)
        assert snapshot.message == "Changed: b"

    run(life())


def test_a_session_that_gets_on_is_told_now_and_then_and_one_that_stands_still_is_not() -> None:
    async def life() -> None:
        bus, clock, steps = InProcessOona(), Clock(), [0]
        report = report_of()
        teller = Teller(report, bus, "uid", clock=clock)
        report.begun(lambda: steps[0])
        await teller.look()
        for seconds, step, number in (
            (HEARTBEAT_SECONDS - 1, 5, 1),
            (HEARTBEAT_SECONDS, 5, 2),
            (2 * HEARTBEAT_SECONDS - 1, 9, 2),
            (2 * HEARTBEAT_SECONDS, 9, 3),
            (9 * HEARTBEAT_SECONDS, 9, 3),  # it stands still
            (9 * HEARTBEAT_SECONDS + 1, 10, 4),
        ):
            clock.now, steps[0] = seconds, step
            await teller.look()
            found = await told(bus)
            assert len(found) == number, seconds
        assert [one.sequence for one in found] == sorted({one.sequence for one in found})

    run(life())


def test_a_bus_that_refuses_is_tried_again_later_with_what_is_new_then() -> None:
    async def life() -> None:
        bus, clock, report = RefusingBus(), Clock(), report_of()
        teller = Teller(report, bus, "uid", clock=clock)
        bus.refusals = 1
        report.event(1, "Changed", "a")
        await teller.look()
        report.event(1, "Changed", "b")
        clock.now = AGAIN_SECONDS / 2
        await teller.look()
        assert await told(bus) == []
        clock.now = AGAIN_SECONDS
        await teller.look()
        assert [snapshot.message for snapshot in await told(bus)] == ["Changed: b"]

    run(life())


def test_the_end_is_told_before_the_thread_ends(redis_server: Any, redis_namespace: str) -> None:
    server = redis_server.start()
    report = report_of()
    settings = EsperConfig(redis=config_of(server, redis_namespace))
    with telling(report, settings, "uid"):
        report.begun(lambda: 1)
        report.finish(SessionOutcome.SUCCEEDED, "done", test=0.75)

    async def life() -> None:
        async with client_of(server, redis_namespace, "uid") as bus:
            found = [message.open() async for message in bus.history({STATUS})]
        assert isinstance(found[-1], SessionSnapshot)
        assert found[-1].outcome is SessionOutcome.SUCCEEDED
        assert found[-1].metrics == {"test": "0.75"}

    run(life())


def test_a_bus_that_is_away_holds_up_the_end_of_a_session_that_broke_off_for_seconds() -> None:
    report = report_of()
    settings = EsperConfig.load({"redis.url": "redis://127.0.0.1:9/0"})
    since = time.monotonic()
    with telling(report, settings, "uid"):
        report.begun(lambda: 1)
        report.finish(SessionOutcome.INTERRUPTED, "asked to stop")
    assert time.monotonic() - since < 5


def test_nor_does_one_that_hangs(private_redis: Any, redis_namespace: str) -> None:
    report = report_of()
    settings = EsperConfig(redis=RedisConfig(url=private_redis.url, namespace=redis_namespace))
    with telling(report, settings, "uid"):
        report.begun(lambda: 1)
        private_redis.freeze()
        report.event(1, "Changed", "a")
        time.sleep(1)  # it is being told
        since = time.monotonic()
        report.finish(SessionOutcome.FAILED, "so")
    assert time.monotonic() - since < 5
    private_redis.thaw()
