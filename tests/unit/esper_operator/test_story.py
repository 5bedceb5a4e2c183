"""Events: one for each turn of a session's status, and none for a status that is as it was."""

from __future__ import annotations

from typing import Any

import pytest

from esper.contracts.enums import SessionOutcome
from esper.contracts.resources import SeedCounts, TrainingSessionStatus
from esper_operator.conditions import Reason
from esper_operator.decisions.story import MAX_NAMED
from esper_operator.plans import Notice, Plan
from esper_operator.times import datetime_of
from esper_operator.views import SessionView
from tests.unit.esper_operator.objects import (
    COMPLETE,
    NOW,
    decided,
    job,
    pod,
    running,
    session,
    snapshot,
    written,
)
from tests.unit.esper_operator.world import World

SUSPENDED = {"runPolicy": {"suspend": True}}


def reasons(plan: Plan) -> list[str]:
    return [notice.reason for notice in plan.notices]


def visited(status: TrainingSessionStatus, *pods: dict[str, Any], **fields: Any) -> Plan:
    """The plan for a session with that status, whose attempt's Job has those pods."""
    view = session(status=status)
    found = tuple(
        pod(view, index, attempt=status.attempt, **given) for index, given in enumerate(pods)
    )
    return decided(view, jobs=(job(view, status.attempt),), pods=found, **fields)


def test_nothing_is_told_before_workers_run() -> None:
    status: TrainingSessionStatus | None = None
    view = session()
    for fields in ({"metas": ()}, {}, {"jobs": (job(view),)}):
        plan = decided(session(status=status), **fields)
        assert plan.notices == ()
        status = written(plan) if plan.status is not None else status
    assert status is not None
    assert visited(status, {"phase": "Pending"}).notices == ()


def test_that_workers_run_is_told_once() -> None:
    starting = running(session())
    plan = visited(starting, {"ready": True})
    (notice,) = plan.notices
    assert (notice.type, notice.reason) == ("Normal", Reason.RUNNING)
    assert notice.message == f"attempt 1: Job {starting.job}: 1 of 1 workers are ready"
    assert visited(written(plan), {"ready": True}).notices == ()


def test_a_story_is_told_in_its_order_and_each_part_once() -> None:
    """A whole life, each state looked at several times."""
    world = World()
    told: list[Notice] = []
    for _ in range(60):
        if world.session is None:
            break
        plan = world.decide()
        told += plan.notices
        world.carry_out(plan)
        if plan.status is None:
            world.step()
    assert [notice.reason for notice in told] == ["Running", "Completed"]


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"unschedulable": "0/3 nodes are available", "phase": "Pending"}, "Unschedulable"),
        ({"waiting": ("ErrImagePull", "not found"), "phase": "Pending"}, "ImagePullFailed"),
        ({"waiting": ("CreateContainerError", "no"), "phase": "Pending"}, "ContainerRefused"),
    ],
)
def test_what_stands_in_the_way_is_told_once(fields: dict[str, Any], reason: str) -> None:
    plan = visited(running(session()), fields)
    assert reasons(plan) == [reason]
    assert plan.notices[0].type == "Warning"
    assert plan.notices[0].message.startswith("attempt 1: pod digits-")
    assert visited(written(plan), fields).notices == ()


def test_workers_that_were_ended_from_outside_and_come_back_are_told_anew() -> None:
    first = written(visited(running(session()), {"ready": True}))
    plan = visited(first, {"disrupted": "EvictionByEvictionAPI", "deleting": True})
    assert reasons(plan) == ["Interrupted"]
    back = visited(written(plan), {"ready": True})
    (notice,) = back.notices
    # Else the API server would have it already, and nobody would be told.
    assert notice.message.startswith("attempt 1: Job ")
    assert "after 1 disruptions" in notice.message


def suspended(view: SessionView, **fields: Any) -> Plan:
    return decided(view, jobs=(job(view),), pods=(pod(view, ready=True),), **fields)


def test_a_suspension_is_told_and_its_end() -> None:
    first = written(visited(running(session()), {"ready": True}))
    plan = suspended(session(status=first, **SUSPENDED))
    assert reasons(plan) == ["Suspended"]
    assert plan.notices[0].message == "attempt 1: its workers are ended"
    ending = written(plan)
    assert decided(session(status=ending, **SUSPENDED)).notices == ()
    assert reasons(decided(session(status=ending))) == ["Resumed"]


def test_a_session_that_is_made_suspended_has_nothing_to_tell() -> None:
    assert decided(session(**SUSPENDED)).notices == ()


def a_seed(slot: int, state: str, time: float = NOW) -> dict[str, Any]:
    step = {"time": datetime_of(time), "epoch": 3, "previous": "grafting", "current": state}
    given = {"layer": "blocks.0", "slot": slot, "state": state, "blueprint": "low-rank"}
    return {**given, "transitions": (step,)}


def reported(*seeds: dict[str, Any], **fields: Any) -> Any:
    counts = {state: sum(s["state"] == state for s in seeds) for state in ("fossilized", "culled")}
    return snapshot(epoch=3, seeds=seeds, seed_counts=SeedCounts(**counts), **fields)


def test_seeds_that_became_fossils_or_were_culled_are_named() -> None:
    first = written(visited(running(session()), {"ready": True}))
    told = reported(a_seed(1, "fossilized"), a_seed(2, "culled"), a_seed(3, "training"))
    plan = visited(first, {"ready": True}, snapshot=told)
    assert [(notice.reason, notice.message, notice.background) for notice in plan.notices] == [
        ("SeedFossilized", "epoch 3: blocks.0 slot 1 (low-rank); 1 fossilized in all", True),
        ("SeedCulled", "epoch 3: blocks.0 slot 2 (low-rank); 1 culled in all", True),
    ]
    later = reported(*(a_seed(n, "fossilized", NOW - 60 + n) for n in range(1, 3)))
    again = visited(written(plan), {"ready": True}, snapshot=later)
    assert [notice.message for notice in again.notices] == [
        "epoch 3: blocks.0 slot 2 (low-rank); 2 fossilized in all"
    ]
    assert visited(written(again), {"ready": True}, snapshot=later).notices == ()


def test_one_event_tells_of_many_seeds() -> None:
    first = written(visited(running(session()), {"ready": True}))
    many = reported(*(a_seed(slot, "culled") for slot in range(MAX_NAMED + 4)))
    (notice,) = visited(first, {"ready": True}, snapshot=many).notices
    assert notice.message.count("slot") == MAX_NAMED
    assert notice.message.endswith(f" and 4 more; {MAX_NAMED + 4} culled in all")


def test_the_last_seeds_are_told_before_the_end() -> None:
    first = written(visited(running(session()), {"ready": True}))
    view = session(status=first)
    done = reported(a_seed(1, "fossilized"), outcome=SessionOutcome.SUCCEEDED)
    plan = decided(view, jobs=(job(view, conditions=COMPLETE),), snapshot=done)
    assert reasons(plan) == ["SeedFossilized", "Completed"]
