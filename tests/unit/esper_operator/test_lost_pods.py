"""Pods of nodes that are lost: they are forgotten, and another attempt goes on."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.conditions import Kind
from esper_operator.decisions.lost import MARGIN_SECONDS
from esper_operator.plans import Deletion, Plan
from esper_operator.pod_view import PodView
from esper_operator.times import text_of
from tests.unit.esper_operator.objects import (
    COMPLETE,
    NOW,
    applied,
    condition_of,
    decided,
    deleted,
    job,
    pod,
    pod_object,
    running,
    session,
    snapshot,
    summary,
    written,
)

WORKERS = {"replicas": 2}
TAINTED = "DeletionByTaintManager"
LATE = NOW - MARGIN_SECONDS


def leaving(
    by: float = LATE, *, index: int = 1, grace: int = 60, disrupted: str = TAINTED, **fields: Any
) -> PodView:
    """A pod that is to have ended by then."""
    content = pod_object(session(), index, ready=True, disrupted=disrupted, **fields)
    content["metadata"] |= {"deletionTimestamp": text_of(by), "deletionGracePeriodSeconds": grace}
    return PodView.of(content)


def after(*pods: PodView, **fields: Any) -> Plan:
    """The plan of a session of two workers, one of which is ready."""
    view = session()
    given = {"jobs": (job(view, replicas=2),), "snapshot": snapshot()} | fields
    status = running(view, replicas=2)
    return decided(
        session(status=status, workers=WORKERS), pods=(pod(view, ready=True), *pods), **given
    )


def forced(plan: Plan) -> list[str]:
    return [item.name for item in plan.delete if item.kind == "Pod" and item.grace_seconds == 0]


def test_a_node_that_does_not_answer_is_said_before_its_pod_is_evicted() -> None:
    silent = pod(session(), 1, unanswered=True)
    plan = after(silent)
    told = f"pod {silent.name}: node node-1 does not answer"
    assert condition_of(plan, Kind.WORKERS_READY) == ("False", "NodeNotReady", told)
    assert condition_of(plan, Kind.SUCCEEDED) == ("Unknown", "Interrupted", told)
    assert [notice.reason for notice in plan.notices] == ["Interrupted"]
    status = written(plan)
    # It may come back as it was.
    assert (status.attempt, status.disruptions, status.failed_attempts) == (1, 0, 0)
    assert (deleted(plan), applied(plan)) == ([], [])


def test_a_lost_pod_is_deleted_without_grace_and_another_attempt_goes_on() -> None:
    lost = leaving()
    plan = after(lost)
    assert Deletion("v1", "Pod", lost.namespace, lost.name, lost.uid, grace_seconds=0) in (
        plan.delete
    )
    assert f"Job/{job(session()).name}" in deleted(plan)
    assert applied(plan) == [f"Job/{job(session()).name[:-1]}2"]
    status = written(plan)
    assert (status.attempt, status.failed_attempts, status.disruptions) == (2, 0, 1)
    assert summary(plan) == ("Unknown", "Interrupted")
    assert [notice.reason for notice in plan.notices] == ["Disrupted"]
    assert f"pod {lost.name} on node node-1" in plan.notices[0].message


@pytest.mark.parametrize(
    ("one", "why"),
    [
        (leaving(LATE + 1), "its node may be slow"),
        (leaving(disrupted=""), "somebody has deleted it, and its node may be as patient"),
        (pod(session(), 1, ready=True, disrupted=TAINTED), "it is about to be deleted"),
        (leaving(exit_code=137), "it has ended, and is held by a finalizer"),
    ],
)
def test_what_may_still_end_by_itself_is_waited_for(one: PodView, why: str) -> None:
    plan = after(one)
    assert forced(plan) == [], why
    assert written(plan).attempt == 1


def test_it_is_looked_at_again_when_the_pod_will_be_lost() -> None:
    assert after(leaving(LATE + 12)).again_in == pytest.approx(12)


def test_one_that_was_given_up_is_not_deleted_again() -> None:
    assert forced(after(leaving(grace=0))) == []


def test_lost_pods_of_an_attempt_before_are_deleted_and_begin_none() -> None:
    view = session()
    status = running(view, attempt=2, replicas=2)
    plan = decided(
        session(status=status, workers=WORKERS),
        jobs=(job(view, 2, replicas=2),),
        pods=(leaving(), *(pod(view, index, attempt=2, ready=True) for index in range(2))),
    )
    assert forced(plan) == [leaving().name]
    assert written(plan).attempt == 2


def test_a_job_that_a_queue_holds_back_stays_though_a_pod_of_it_is_lost() -> None:
    view = session()
    plan = after(leaving(), jobs=(job(view, replicas=2, suspended=True),))
    assert forced(plan) == [leaving().name]
    assert written(plan).attempt == 1


def test_a_suspended_session_leaves_no_lost_pod() -> None:
    view = session(runPolicy={"suspend": True})
    plan = decided(
        session(status=running(view), runPolicy={"suspend": True}), pods=(leaving(LATE + 5),)
    )
    assert forced(plan) == []
    assert plan.again_in == pytest.approx(5)
    late = decided(session(status=running(view), runPolicy={"suspend": True}), pods=(leaving(),))
    assert forced(late) == [leaving().name]


def test_a_session_that_has_ended_leaves_no_lost_pod() -> None:
    view = session()
    ending = decided(
        session(status=running(view)), jobs=(job(view, conditions=COMPLETE),), pods=(leaving(),)
    )
    assert summary(ending) == ("True", "Completed")
    assert forced(ending) == [leaving().name]
    ended = decided(session(status=dict(ending.status or {})), pods=(leaving(LATE + 7),))
    assert forced(ended) == []
    assert ended.again_in == pytest.approx(7)
