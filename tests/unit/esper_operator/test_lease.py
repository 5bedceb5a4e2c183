"""Election: one at a time, by what each can know; over a lease in memory, with the test's clock.

The same is shown against the real API server in tests/integration.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest

from esper.configs import OperatorConfig
from esper.errors import ConfigError
from esper_operator.errors import ApiConflict, ApiUnavailable, LeaseLost
from esper_operator.lease import Election, LeaseRecord, MemoryLeases, lasting_clock

CONFIG = OperatorConfig(lease_seconds=8, renew_seconds=5.0, retry_seconds=0.01)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def candidate(leases: MemoryLeases, name: str, clock: Clock) -> Election:
    return Election(leases, CONFIG, name, clock=clock)


async def soon(what: Awaitable[object]) -> None:
    await asyncio.wait_for(what, 2.0)


def run(body: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(body())  # type: ignore[arg-type]


def test_a_free_lease_is_taken_and_says_by_whom() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first = candidate(leases, "one", clock)
        assert first.remaining() == 0.0
        await soon(first.acquire())
        assert leases.record is not None
        assert (leases.record.holder, leases.record.seconds) == ("one", 8)
        assert first.remaining() == 8.0
        clock.now += 3.0
        assert first.remaining() == 5.0
        clock.now += 60.0
        assert first.remaining() == 0.0

    run(body)


def test_another_waits_for_the_whole_lease_from_when_it_saw_the_last_renewal() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first, second = candidate(leases, "one", clock), candidate(leases, "two", clock)
        await soon(first.acquire())
        clock.now += 6.0
        waiting = asyncio.create_task(second.acquire())
        await asyncio.sleep(0.1)
        clock.now += 7.9
        await asyncio.sleep(0.1)
        assert not waiting.done()
        assert first.remaining() == 0.0
        clock.now += 0.2
        await soon(waiting)
        assert leases.record is not None
        assert (leases.record.holder, leases.record.transitions) == ("two", 1)

    run(body)


def test_a_renewal_makes_the_other_wait_anew() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first, second = candidate(leases, "one", clock), candidate(leases, "two", clock)
        await soon(first.acquire())
        keeping = asyncio.create_task(first.keep())
        waiting = asyncio.create_task(second.acquire())
        for _ in range(8):
            clock.now += 3.0
            await asyncio.sleep(0.05)
        assert not waiting.done()
        assert first.remaining() > 4.0
        keeping.cancel()
        waiting.cancel()

    run(body)


def test_what_is_given_back_is_taken_at_once() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first, second = candidate(leases, "one", clock), candidate(leases, "two", clock)
        await soon(first.acquire())
        await first.release()
        assert first.remaining() == 0.0
        await soon(second.acquire())
        assert second.remaining() == 8.0

    run(body)


def test_a_holder_that_is_not_answered_ends_before_its_lease_does() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first = candidate(leases, "one", clock)
        await soon(first.acquire())
        leases.cut = True
        keeping = asyncio.create_task(first.keep())
        clock.now += 4.9
        await asyncio.sleep(0.05)
        assert not keeping.done()
        assert first.remaining() == pytest.approx(3.1)
        clock.now += 0.2
        with pytest.raises(LeaseLost, match=r"not renewed for 5\.1 s"):
            await soon(keeping)
        assert first.remaining() == 0.0

    run(body)


def test_a_holder_that_was_stopped_and_replaced_learns_it() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        first = candidate(leases, "one", clock)
        await soon(first.acquire())
        assert leases.record is not None
        await leases.write(replace(leases.record, holder="two"))
        with pytest.raises(LeaseLost, match="held by two"):
            await soon(first.keep())
        assert first.remaining() == 0.0

    run(body)


class LosesAnAnswer(MemoryLeases):
    """Does what it is asked, once without saying so."""

    def __init__(self) -> None:
        super().__init__()
        self.lose = False
        self.lost = asyncio.Event()

    async def write(self, record: LeaseRecord) -> LeaseRecord:
        written = await super().write(record)
        if self.lose:
            self.lose = False
            self.lost.set()
            raise ApiUnavailable("the lease: the answer was lost")
        return written


def test_a_renewal_whose_answer_was_lost_costs_nothing_and_extends_nothing() -> None:
    async def body() -> None:
        leases, clock = LosesAnAnswer(), Clock()
        first = candidate(leases, "one", clock)
        await soon(first.acquire())
        leases.lose = True
        clock.now += 2.0
        keeping = asyncio.create_task(first.keep())
        await asyncio.wait_for(leases.lost.wait(), 2.0)
        assert first.remaining() == 6.0
        await asyncio.sleep(0.1)
        assert not keeping.done()
        assert first.remaining() == 8.0
        keeping.cancel()

    run(body)


class Slow(MemoryLeases):
    """Time passes while a write is under way."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock

    async def write(self, record: LeaseRecord) -> LeaseRecord:
        self.clock.now += 1.5
        return await super().write(record)


def test_the_lease_begins_when_the_renewal_is_sent_not_when_it_is_answered() -> None:
    async def body() -> None:
        clock = Clock()
        first = candidate(Slow(clock), "one", clock)
        await soon(first.acquire())
        assert first.remaining() == 6.5

    run(body)


def test_of_two_that_find_it_free_one_has_it() -> None:
    async def body() -> None:
        leases, clock = MemoryLeases(), Clock()
        both = [candidate(leases, name, clock) for name in ("one", "two")]
        tasks = [asyncio.create_task(one.acquire()) for one in both]
        await asyncio.sleep(0.1)
        assert [task.done() for task in tasks].count(True) == 1
        assert [one.remaining() for one in both].count(0.0) == 1
        for task in tasks:
            task.cancel()

    run(body)


def test_a_write_of_a_version_that_is_gone_is_refused() -> None:
    async def body() -> None:
        leases = MemoryLeases()
        first = await leases.write(LeaseRecord(holder="one"))
        await leases.write(replace(first, holder="two"))
        with pytest.raises(ApiConflict):
            await leases.write(replace(first, holder="three"))
        with pytest.raises(ApiConflict):
            await leases.write(LeaseRecord(holder="four"))

    run(body)


@pytest.mark.parametrize("wrong", [{"renew_seconds": 7.5}, {"write_seconds": 8.0}])
def test_settings_with_which_the_holder_would_outlive_its_lease_are_refused(
    wrong: dict[str, float],
) -> None:
    config = OperatorConfig(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"operator\.renew_seconds"):
        Election(MemoryLeases(), config, "one")


def test_the_clock_goes_on() -> None:
    assert lasting_clock() <= lasting_clock()
