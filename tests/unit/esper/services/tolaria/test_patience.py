"""Waiting for services that are away: for ever, for a time, or not at all."""

import asyncio
import time

import pytest

from esper.errors import BusUnavailable, ConfigError, HubUnavailable, Interrupted, KernelError
from esper.services.tolaria import patience as module
from esper.services.tolaria.patience import BUS, HUB, IN_PROCESS, Patience, PatienceEnded


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(module, "PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)


def away(times, error=HubUnavailable):
    """Work that fails so many times and then answers."""
    left = [times]

    async def work():
        if left[0]:
            left[0] -= 1
            raise error("it is away") if error is not ConfigError else error("redis.url", "u", "v")
        return "an answer"

    return work


def outlasted(patience, work):
    return asyncio.run(patience.begin().outlast(work))


def test_in_one_process_nothing_is_waited_for():
    assert outlasted(IN_PROCESS, away(0)) == "an answer"
    with pytest.raises(HubUnavailable):
        outlasted(IN_PROCESS, away(1))


@pytest.mark.parametrize("error", [HubUnavailable, BusUnavailable])
def test_endless_patience_outlasts_what_is_away(error, caplog):
    assert outlasted(Patience(lasting=True), away(5, error)) == "an answer"
    assert len(caplog.records) == 1  # said once, not five times


def test_a_refusal_is_waited_out_only_where_the_service_has_accepted_this_process():
    patience = Patience(lasting=True)

    async def refused():
        raise ConfigError("redis.url", "u", "v")

    async def life():
        with pytest.raises(ConfigError):
            await patience.begin().outlast(refused)
        await patience.begin().outlast(away(0), by=HUB)
        with pytest.raises(ConfigError):
            await patience.begin().outlast(refused)  # the hub's word says nothing of the bus
        await patience.begin().outlast(away(0), by=BUS)
        assert await patience.begin().outlast(away(3, ConfigError)) == "an answer"

    asyncio.run(life())


def test_what_is_permanent_is_not_waited_for():
    with pytest.raises(KernelError):
        outlasted(Patience(lasting=True), away(1, KernelError))


def test_finite_patience_ends_and_says_what_was_in_the_way():
    started = time.monotonic()
    with pytest.raises(PatienceEnded, match=r"0.2 s, because it is away; .*patienceSeconds") as end:
        outlasted(Patience(lasting=True, seconds=0.2), away(10**6))
    assert isinstance(end.value.__cause__, HubUnavailable)
    assert 0.15 < time.monotonic() - started < 5


def test_work_that_hangs_is_cancelled_when_patience_ends():
    cancelled = []

    async def hang():
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(PatienceEnded):
        outlasted(Patience(lasting=True, seconds=0.1), hang)
    assert cancelled == [True]


@pytest.mark.parametrize("work", [away(10**6), lambda: asyncio.sleep(60)])
def test_a_request_to_stop_ends_any_waiting(work):
    asked = []
    patience = Patience(lasting=True, stopping=lambda: bool(asked))

    async def life():
        waiting = asyncio.create_task(patience.begin().outlast(work))
        await asyncio.sleep(0.05)
        asked.append(True)
        with pytest.raises(Interrupted):
            await asyncio.wait_for(waiting, timeout=60)

    asyncio.run(life())


def test_within_a_time_there_is_an_answer_or_none():
    async def life():
        wait = Patience(lasting=True).begin()
        assert await wait.within(away(0)(), 5) == "an answer"
        assert await wait.within(asyncio.sleep(60), 0.05) is None
        short = Patience(lasting=True, seconds=0.05).begin()
        with pytest.raises(PatienceEnded):
            await short.within(asyncio.sleep(60), 5)

    asyncio.run(life())


def test_some_things_are_waited_for_longer_than_a_boundary_waits():
    hurried = Patience(lasting=True, seconds=0.001)
    with pytest.raises(PatienceEnded, match=r"nothing for 0.001 s"):
        outlasted(hurried, away(5))
    assert asyncio.run(hurried.begin(at_least=30.0).outlast(away(5))) == "an answer"
    patient = Patience(lasting=True)
    assert asyncio.run(patient.begin(at_least=0.001).outlast(away(5))) == "an answer"
