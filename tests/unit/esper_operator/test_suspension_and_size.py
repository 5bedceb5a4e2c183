"""Suspended, queued, resumed and resized sessions."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.conditions import Kind
from esper_operator.plans import Plan
from esper_operator.times import datetime_of
from tests.unit.esper_operator.objects import (
    COMPLETE,
    NOW,
    applied,
    condition_of,
    decided,
    deleted,
    deployment,
    job,
    pod,
    rests,
    running,
    session,
    snapshot,
    summary,
    written,
)

SUSPENDED = {"suspend": True}
QUEUE = {"queueName": "gpus"}


def test_suspending_deletes_the_job_and_stops_the_clock() -> None:
    view = session()
    plan = decided(
        session(status=running(view), runPolicy=SUSPENDED),
        jobs=(job(view),),
        pods=(pod(view, ready=True),),
    )
    assert summary(plan) == ("Unknown", "Suspended")
    assert condition_of(plan, Kind.SUSPENDED)[:2] == ("True", "SuspendRequested")
    assert deleted(plan) == [f"Job/{job(view).name}"]
    assert applied(plan) == []
    status = written(plan)
    assert status.active_since is None
    assert status.active_seconds == 40
    assert status.attempt == 1


def suspended(**fields: Any) -> Plan:
    view = session()
    status = running(view, **fields)
    return decided(session(status=status, runPolicy=SUSPENDED), jobs=(job(view),))


def test_a_suspended_session_comes_to_rest() -> None:
    plan = decided(session(status=dict(suspended().status or {}), runPolicy=SUSPENDED))
    assert rests(plan)
    assert plan.again_in is None


def test_a_session_may_begin_suspended() -> None:
    plan = decided(session(runPolicy=SUSPENDED), metas=())
    assert summary(plan) == ("Unknown", "Suspended")
    assert applied(plan) == []
    assert not plan.credentials
    resumed = decided(session(status=dict(plan.status or {})))
    assert written(resumed).attempt == 1
    assert len(applied(resumed)) == 1


def test_resuming_makes_another_job_that_counts_as_no_failure() -> None:
    status = dict(suspended(failed_attempts=1, disruptions=2).status or {})
    plan = decided(session(status=status), now=NOW + 500)
    record = written(plan)
    assert (record.attempt, record.failed_attempts, record.disruptions) == (2, 1, 2)
    assert len(applied(plan)) == 1
    assert record.active_since == datetime_of(NOW + 500)
    assert condition_of(plan, Kind.SUSPENDED)[:2] == ("False", "NotSuspended")
    assert [notice.reason for notice in plan.notices] == ["Resumed"]


def test_the_old_job_is_deleted_though_the_session_was_resumed_at_once() -> None:
    view = session()
    status = dict(suspended().status or {})
    plan = decided(session(status=status), jobs=(job(view),))
    assert deleted(plan) == [f"Job/{job(view).name}"]
    assert applied(plan) == [f"Job/{job(view).name[:-1]}2"]


def test_the_size_may_be_edited_while_suspended() -> None:
    status = dict(suspended().status or {})
    plan = decided(session(status=status, workers={"replicas": 3}, generation=4))
    assert written(plan).replicas == 3
    assert plan.apply[0]["spec"]["completions"] == plan.apply[0]["spec"]["parallelism"] == 3


def test_a_suspended_session_whose_job_was_done_has_succeeded() -> None:
    view = session()
    plan = decided(
        session(status=running(view), runPolicy=SUSPENDED),
        jobs=(job(view, conditions=COMPLETE),),
    )
    assert summary(plan) == ("True", "Completed")


def test_no_controller_of_its_own_stays_while_suspended() -> None:
    growth = {"controller": {"dedicated": True}}
    view = session(growth=growth)
    own = deployment("digits-tamiyo", session_uid=view.uid)
    status = running(view)
    plan = decided(session(status=status, growth=growth, runPolicy=SUSPENDED), tamiyo=own)
    assert deleted(plan) == ["Deployment/digits-tamiyo"]


# -- queues -----------------------------------------------------------------------------------


def test_in_a_queue_the_job_is_made_suspended_with_its_labels() -> None:
    policy = {**QUEUE, "queuePriorityClass": "high"}
    plan = decided(session(runPolicy=policy))
    manifest = plan.apply[0]
    assert manifest["spec"]["suspend"] is True
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert manifest["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"


def test_without_a_queue_nothing_is_said_of_suspend() -> None:
    manifest = decided(session()).apply[0]
    assert "suspend" not in manifest["spec"]
    assert not any("kueue" in label for label in manifest["metadata"]["labels"])


def test_time_in_a_queue_does_not_count() -> None:
    policy = {**QUEUE, "startupDeadlineSeconds": 10, "activeDeadlineSeconds": 10}
    view = session(runPolicy=policy)
    status = running(view, active_since=None, start_time=None)
    held = job(view, created=NOW - 5000, suspended=True)
    plan = decided(session(status=status, runPolicy=policy), jobs=(held,))
    assert summary(plan) == ("Unknown", "Queued")
    assert condition_of(plan, Kind.SUSPENDED)[:2] == ("True", "WaitingInQueue")
    assert "gpus" in condition_of(plan, Kind.SUCCEEDED)[2]
    assert applied(plan) == []
    assert plan.again_in == 60 * 86_400  # for its credentials alone
    assert written(plan).active_since is None


def test_a_queue_that_takes_its_room_back_fails_nothing_and_goes_on_later() -> None:
    view = session(runPolicy=QUEUE)
    leaving = tuple(pod(view, name=name, deleting=True) for name in "abc")
    plan = decided(
        session(status=running(view), runPolicy=QUEUE),
        jobs=(job(view, suspended=True),),
        pods=leaving,
    )
    status = written(plan)
    assert (status.attempt, status.failed_attempts, status.disruptions) == (1, 0, 3)
    assert deleted(plan) == []
    admitted = decided(
        session(status=dict(plan.status or {}), runPolicy=QUEUE),
        jobs=(job(view, created=NOW + 100),),
        pods=(pod(view, ready=True),),
        now=NOW + 101,
    )
    assert summary(admitted) == ("Unknown", "Running")
    assert written(admitted).active_since == datetime_of(NOW + 101)


# -- size -------------------------------------------------------------------------------------


def elastic(replicas: int, least: int | None = 1, **fields: Any) -> dict[str, Any]:
    workers = {"replicas": replicas}
    return workers | ({} if least is None else {"minReplicas": least}) | fields


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 2)])
def test_another_size_is_another_attempt_that_counts_as_no_failure(before: int, after: int) -> None:
    view = session(workers=elastic(before))
    status = running(view, replicas=before)
    plan = decided(
        session(status=status, workers=elastic(after), generation=2),
        jobs=(job(view, replicas=before),),
        pods=tuple(pod(view, index, ready=True) for index in range(before)),
    )
    record = written(plan)
    assert (record.attempt, record.failed_attempts, record.disruptions) == (2, 0, 0)
    assert record.replicas == after
    assert len(deleted(plan)) == 1
    # Its workers write a checkpoint first, from which the next ones go on.
    assert applied(plan) == []
    assert plan.again_in == pytest.approx(60)
    resized = session(status=dict(plan.status or {}), workers=elastic(after), generation=2)
    ending = tuple(pod(view, index, deleting=True) for index in range(before))
    assert applied(decided(resized, pods=ending, now=NOW + 59)) == []
    lost = decided(resized, pods=ending, now=NOW + 60)
    for plan in (lost, decided(resized, pods=(pod(view, exit_code=75),), now=NOW + 5)):
        (manifest,) = plan.apply
        assert manifest["spec"]["completions"] == after
        arguments = manifest["spec"]["template"]["spec"]["containers"][0]["args"]
        assert arguments[arguments.index("--nodes") + 1] == str(after)


def no_room(least: int | None, waited: float, placed: int = 2, **sections: Any) -> tuple[Any, Plan]:
    workers = elastic(4, least)
    view = session(workers=workers, **sections)
    status = running(view, replicas=4)
    pods = tuple(
        pod(view, n, created=NOW - waited)
        if n < placed
        else pod(view, n, created=NOW - waited, phase="Pending", unschedulable="0/2 nodes")
        for n in range(4)
    )
    return view, decided(
        session(workers=workers, status=status, **sections),
        jobs=(job(view, replicas=4),),
        pods=pods,
    )


@pytest.mark.parametrize(
    ("least", "waited", "placed", "size"),
    [
        (1, 119, 2, None),
        (1, 120, 2, 2),
        (2, 120, 3, 3),
        (3, 120, 2, None),
        (1, 120, 0, None),
        (None, 5000, 2, None),
    ],
)
def test_an_elastic_session_goes_on_with_those_that_found_room(
    least: int | None, waited: float, placed: int, size: int | None
) -> None:
    policy = {"startupDeadlineSeconds": 9000}
    _, plan = no_room(least, waited, placed, runPolicy=policy)
    record = written(plan)
    assert record.attempt == (1 if size is None else 2)
    assert record.replicas == (4 if size is None else size)
    assert record.failed_attempts == 0


def test_a_size_that_the_session_cannot_be_trained_with_is_passed_over() -> None:
    training = {"logicalShards": 8, "batchSize": 64}
    _, plan = no_room(1, 200, 3, training=training)
    assert written(plan).replicas == 2  # 3 does not divide 8


def test_a_session_that_has_shrunk_stays_so_until_its_spec_changes() -> None:
    _, shrunk = no_room(1, 200, 2)
    view = session(workers=elastic(4))
    status = dict(shrunk.status or {})
    small = job(view, 2, replicas=2)
    pods = tuple(pod(view, n, attempt=2, ready=True) for n in range(2))
    stays = decided(session(workers=elastic(4), status=status), jobs=(small,), pods=pods)
    assert written(stays).attempt == 2
    assert summary(stays) == ("Unknown", "Running")
    edited = session(workers=elastic(4), status=dict(stays.status or {}), generation=2)
    grows = decided(edited, jobs=(small,), pods=pods)
    assert written(grows).attempt == 3
    assert written(grows).replicas == 4


def test_figures_of_an_attempt_before_stay_in_the_status() -> None:
    status = dict(suspended().status or {})
    plan = decided(session(status=status), snapshot=snapshot(1, epoch=7))
    assert written(plan).epoch == 7
