"""The queue: each key once, one at a time, failures later, first visits first."""

from __future__ import annotations

import asyncio

import pytest

from esper_operator.work import Key, WorkQueue, pause_after

A, B, C = (Key("TrainingSession", "default", name) for name in "abc")


def queue() -> WorkQueue:
    return WorkQueue(chance=lambda: 0.0)


async def taken(work: WorkQueue, within: float = 1.0) -> Key:
    return (await asyncio.wait_for(work.take(), within)).key


async def nothing(work: WorkQueue, within: float = 0.05) -> None:
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(work.take(), within)


def run(body: object) -> None:
    asyncio.run(body)  # type: ignore[arg-type]


def test_a_key_waits_once_however_often_it_comes() -> None:
    async def body() -> None:
        work = queue()
        for _ in range(5):
            work.add(A)
        work.add(B)
        assert work.depth() == 2
        assert [await taken(work), await taken(work)] == [A, B]
        await nothing(work)

    run(body())


def test_a_key_that_comes_while_it_is_worked_on_is_worked_on_once_more_afterwards() -> None:
    async def body() -> None:
        work = queue()
        work.add(A)
        await taken(work)
        work.add(A)
        work.add(A)
        await nothing(work)
        work.done(A)
        assert await taken(work) == A
        work.done(A)
        await nothing(work)

    run(body())


def test_first_visits_are_taken_before_what_was_seen_before() -> None:
    async def body() -> None:
        work = queue()
        for key in (A, B):
            work.add(key)
            work.done(await taken(work))
        work.add(A)
        work.add(B)
        work.add(C)
        assert [await taken(work) for _ in range(3)] == [C, A, B]

    run(body())


def test_many_first_visits_leave_every_third_turn_to_the_rest() -> None:
    async def body() -> None:
        work = queue()
        for key in (A, B):
            work.add(key)
            work.done(await taken(work))
        new = [Key("TrainingSession", "default", str(number)) for number in range(4)]
        for key in (A, B, *new):
            work.add(key)
        assert [await taken(work) for _ in range(6)] == [*new[:2], A, *new[2:], B]

    run(body())


def test_a_key_that_was_forgotten_has_its_first_visit_again() -> None:
    async def body() -> None:
        work = queue()
        work.add(A)
        work.done(await taken(work))
        work.forget(A)
        work.add(B)
        work.add(A)
        assert [await taken(work), await taken(work)] == [B, A]

    run(body())


def test_a_delayed_key_comes_at_its_time_and_only_the_last_delay_counts() -> None:
    async def body() -> None:
        work = queue()
        work.add_in(A, 0.05)
        work.add_in(A, 1.0)
        work.add_in(B, 10.0)
        work.add_in(B, 0.6)
        await nothing(work, 0.2)
        assert await taken(work, 5.0) == B
        assert await taken(work, 5.0) == A
        assert work.delayed() == 0

    run(body())


def test_many_events_within_a_moment_are_one_turn_at_its_end() -> None:
    async def body() -> None:
        work = queue()
        for _ in range(5):
            work.add_within(A, 0.1)
            await asyncio.sleep(0.03)
        assert await taken(work, 0.05) == A
        work.add_within(A, 0.05)
        work.done(A, again_in=60.0)
        work.add_within(A, 0.05)
        assert await taken(work) == A

    run(body())


def test_deadlines_that_are_put_off_again_and_again_take_no_room() -> None:
    async def body() -> None:
        work = queue()
        for number in range(1000):
            work.add_in(A, 3600.0 + number)
        assert len(work._heap) == 1

    run(body())


def test_being_due_now_replaces_being_due_later() -> None:
    async def body() -> None:
        work = queue()
        work.add_in(A, 0.05)
        work.add(A)
        assert await taken(work) == A
        work.done(A)
        await nothing(work, 0.1)

    run(body())


def test_work_that_broke_off_comes_again_later_and_events_do_not_hurry_it() -> None:
    async def body() -> None:
        work = queue()
        work.add(A)
        await taken(work)
        work.failed(A)
        work.add(A)
        await nothing(work, 0.3)
        work.add(A, anew=True)
        assert await taken(work) == A
        work.done(A)
        assert work.delayed() == 0

    run(body())


def test_pauses_double_up_to_a_minute() -> None:
    pauses = [pause_after(failures, 1.0) for failures in (1, 2, 3, 6, 7, 50)]
    assert pauses == [1.0, 2.0, 4.0, 32.0, 60.0, 60.0]
    assert pause_after(1, 0.0) == 0.75


def test_a_taker_that_goes_away_loses_no_key() -> None:
    async def body() -> None:
        work = queue()
        first, second = (asyncio.create_task(work.take()) for _ in range(2))
        await asyncio.sleep(0)
        work.add(A)
        first.cancel()
        assert (await asyncio.wait_for(second, 1.0)).key == A
        assert first.cancelled()

    run(body())


def test_a_turn_says_how_long_the_key_has_waited_since_it_was_first_due() -> None:
    async def body() -> None:
        work = queue()
        work.add(A)
        await asyncio.sleep(0.05)
        work.add(A)
        turn = await work.take()
        assert 0.05 <= turn.waited < 1.0
        work.add(A)
        await asyncio.sleep(0.05)
        work.done(A)
        assert (await work.take()).waited >= 0.05
        assert set(work.busy()) == {A}

    run(body())


def test_what_comes_while_a_key_is_worked_on_is_not_lost_though_it_may_wait() -> None:
    async def body() -> None:
        work = queue()
        work.add(A)
        assert await taken(work) == A
        work.add_within(A, 0.02)
        work.done(A)
        await nothing(work, 0.01)
        assert await taken(work) == A
        work.done(A)
        await nothing(work)

    run(body())
