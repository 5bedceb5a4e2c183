"""Attempts: failures count and are followed after a pause, disruptions do not count."""

from __future__ import annotations

from typing import Any

import pytest

from esper.contracts.resources import Failure
from esper_operator.conditions import Kind
from esper_operator.plans import Plan
from esper_operator.times import datetime_of
from esper_operator.views import SessionView
from tests.unit.esper_operator.objects import (
    FAILED,
    NOW,
    applied,
    condition_of,
    decided,
    deleted,
    job,
    pod,
    running,
    session,
    snapshot,
    summary,
    written,
)


def after(pods: list[dict[str, Any]], **fields: Any) -> Plan:
    """The plan once the Job of attempt 1 has failed with those pods."""
    view = session()
    given: dict[str, Any] = {"conditions": FAILED, "replicas": max(1, len(pods))}
    return decided(
        session(status=running(view, **fields), workers={"replicas": max(1, len(pods))}),
        jobs=(job(view, **given),),
        pods=tuple(pod(view, index, **content) for index, content in enumerate(pods)),
    )


@pytest.mark.parametrize(
    ("pods", "failure"),
    [
        ([{"exit_code": 1}], "Error, exit code 1"),
        ([{"exit_code": 137, "why": "OOMKilled"}], "OOMKilled, exit code 137"),
        ([{"exit_code": 139}], "Error, exit code 139"),
        ([{"exit_code": 128, "why": "StartError", "said": "exec: esper"}], "StartError"),
        (
            [{"exit_code": 1, "said": '{"reason": "LossNotFinite", "message": "after 3"}'}],
            "LossNotFinite: after 3",
        ),
        (
            [
                {
                    "exit_code": 1,
                    "why": "OOMKilled",
                    "said": '{"reason": "RankCrashed", "message": "rank 0 was killed by SIGKILL"}',
                }
            ],
            "OOMKilled: RankCrashed: rank 0 was killed by SIGKILL",
        ),
        ([{"exit_code": 1, "said": "no JSON"}], "Error, exit code 1: no JSON"),
    ],
)
def test_a_failure_is_counted_told_and_followed(pods: Any, failure: str) -> None:
    plan = after(pods)
    status = written(plan)
    assert (status.attempt, status.failed_attempts, status.disruptions) == (2, 1, 0)
    assert failure in status.failures[-1].reason
    assert status.failures[-1].exit_code == pods[0]["exit_code"]
    assert summary(plan) == ("Unknown", "Retrying")
    assert failure in condition_of(plan, Kind.SUCCEEDED)[2]
    assert [notice.type for notice in plan.notices] == ["Warning"]
    # There is a pause first, in which the old Job stays for its log.
    assert applied(plan) == []
    assert deleted(plan) == []
    assert plan.again_in == pytest.approx(10)


@pytest.mark.parametrize(
    "pods",
    [
        [{"exit_code": 137, "disrupted": "PreemptionByScheduler"}],
        [{"exit_code": 143, "disrupted": "EvictionByEvictionAPI"}],
        [{"exit_code": 137, "deleting": True}],
        [{"status_reason": "Evicted"}],
        [{"status_reason": "UnexpectedAdmissionError"}],
        [{"exit_code": 75}],
        [],
    ],
)
def test_what_came_from_outside_uses_up_no_attempt(pods: Any) -> None:
    plan = after(pods)
    status = written(plan)
    assert (status.attempt, status.failed_attempts) == (2, 0)
    assert status.failures == ()
    assert summary(plan) == ("Unknown", "Interrupted")
    assert len(applied(plan)) == 1  # at once
    assert len(deleted(plan)) == 1


REFUSED = {"status_reason": "UnexpectedAdmissionError"}


def refused(before: int, **fields: Any) -> Plan:
    """The plan once a node has refused the pod of an attempt after so many that came to nothing."""
    return after([REFUSED], fruitless_attempts=before, **fields)


def test_what_a_node_says_of_a_pod_that_it_refuses_is_told() -> None:
    plan = refused(0)
    assert "-0-abcde: UnexpectedAdmissionError" in plan.notices[0].message
    assert "UnexpectedAdmissionError" in condition_of(plan, Kind.SUCCEEDED)[2]
    assert written(plan).fruitless_attempts == 1


@pytest.mark.parametrize(
    ("before", "pause"), [(0, 0), (1, 0), (2, 10), (3, 20), (4, 40), (7, 320), (8, 360)]
)
def test_attempts_in_a_row_that_come_to_nothing_are_followed_after_a_pause(
    before: int, pause: int
) -> None:
    plan = refused(before)
    assert summary(plan) == ("Unknown", "Interrupted")
    assert (applied(plan) == []) is (pause > 0)
    if pause:
        assert condition_of(plan, Kind.WORKERS_READY)[1] == "BackingOff"
        assert plan.again_in == pytest.approx(pause)
        due = decided(session(status=dict(plan.status or {})), now=NOW + pause)
        assert len(applied(due)) == 1


def test_ten_of_them_end_the_session() -> None:
    plan = refused(9)
    assert summary(plan) == ("False", "InterruptedTooOften")
    message = condition_of(plan, Kind.SUCCEEDED)[2]
    assert "UnexpectedAdmissionError" in message
    assert "10 attempts in a row" in message
    assert applied(plan) == []


def test_a_job_that_is_deleted_again_and_again_is_followed_after_a_pause_and_to_an_end() -> None:
    view = session()
    plan = decided(session(status=running(view, fruitless_attempts=2)))
    assert applied(plan) == []
    assert plan.again_in == pytest.approx(10)
    last = decided(session(status=running(view, fruitless_attempts=9)))
    assert summary(last) == ("False", "InterruptedTooOften")


def test_evictions_before_any_report_have_pauses_and_do_not_end_the_session() -> None:
    view = session()
    lost = tuple(pod(view, name=n, disrupted="Preemption", exit_code=137) for n in "abc")
    status = running(view, fruitless_attempts=40)
    plan = decided(session(status=status), jobs=(job(view),), pods=lost)
    assert summary(plan) == ("Unknown", "Interrupted")
    assert plan.again_in == pytest.approx(360)
    assert written(plan).fruitless_attempts == 41


@pytest.mark.parametrize(
    ("heartbeat", "told"), [(None, {"snapshot": snapshot()}), (datetime_of(NOW - 7), {})]
)
def test_a_report_ends_the_row(heartbeat: Any, told: dict[str, Any]) -> None:
    status = running(session(), fruitless_attempts=9, last_heartbeat_time=heartbeat)
    plan = decided(session(status=status), **told)
    assert written(plan).fruitless_attempts == 0
    assert len(applied(plan)) == 1


def test_one_failure_among_disruptions_counts() -> None:
    plan = after([{"exit_code": 137, "disrupted": "PreemptionByScheduler"}, {"exit_code": 1}])
    status = written(plan)
    assert (status.failed_attempts, status.disruptions) == (1, 1)
    assert status.failures[-1].pod.endswith("-1-abcde")


@pytest.mark.parametrize("code", [2, 78])
def test_bad_input_ends_the_session_at_once_with_the_workers_words(code: int) -> None:
    said = '{"reason": "EntryPointError", "message": "zoo:model: got no module zoo"}'
    plan = after([{"exit_code": 1}, {"exit_code": code, "said": said}])
    assert summary(plan) == ("False", "EntryPointError")
    message = "zoo:model: got no module zoo"
    assert condition_of(plan, Kind.SUCCEEDED)[2] == message
    assert written(plan).attempt == 1
    assert applied(plan) == []


@pytest.mark.parametrize("said", ["", "not JSON", '{"reason": "no constant", "message": "m"}'])
def test_bad_input_without_a_constant_has_a_reason_all_the_same(said: str) -> None:
    assert summary(after([{"exit_code": 78, "said": said}])) == ("False", "BadInput")


def test_a_job_that_failed_by_rule_is_bad_input_though_its_pods_are_gone() -> None:
    view = session()
    failed = {"Failed": ("PodFailurePolicy", "Container worker failed with exit code 78")}
    plan = decided(session(status=running(view)), jobs=(job(view, conditions=failed),))
    assert summary(plan) == ("False", "BadInput")
    assert "exit code 78" in condition_of(plan, Kind.SUCCEEDED)[2]


def test_pods_may_be_seen_later_than_the_jobs_failure() -> None:
    view = session()
    failed = job(view, conditions=FAILED, ended=NOW - 1)
    waiting = decided(session(status=running(view)), jobs=(failed,))
    assert written(waiting).attempt == 1
    assert waiting.again_in == pytest.approx(4)
    status = dict(waiting.status or {})
    seen = decided(
        session(status=status), jobs=(failed,), pods=(pod(view, exit_code=1),), now=NOW + 1
    )
    assert written(seen).failed_attempts == 1


@pytest.mark.parametrize(("limit", "before", "ends"), [(0, 0, True), (3, 2, False), (3, 3, True)])
def test_the_backoff_limit_bounds_the_attempts(limit: int, before: int, ends: bool) -> None:
    view = session()
    plan = decided(
        session(status=running(view, failed_attempts=before), runPolicy={"backoffLimit": limit}),
        jobs=(job(view, conditions=FAILED),),
        pods=(pod(view, exit_code=1),),
    )
    assert written(plan).failed_attempts == before + 1
    if ends:
        assert summary(plan) == ("False", "BackoffLimitExceeded")
        assert f"backoffLimit: {limit}" in condition_of(plan, Kind.SUCCEEDED)[2]
    else:
        assert summary(plan) == ("Unknown", "Retrying")


@pytest.mark.parametrize(
    ("failures", "pause"), [(1, 10), (2, 20), (3, 40), (6, 320), (7, 360), (900, 360)]
)
def test_the_pause_doubles_up_to_six_minutes(failures: int, pause: int) -> None:
    view = session(runPolicy={"backoffLimit": 1000})
    status = retrying(view, failures)
    due = decided(session(status=status, runPolicy={"backoffLimit": 1000}), now=NOW + pause)
    early = decided(session(status=status, runPolicy={"backoffLimit": 1000}), now=NOW + pause - 1)
    assert len(applied(due)) == 1
    assert applied(early) == []
    assert early.again_in == pytest.approx(1)
    assert early.status is None  # it says so already
    workers = next(c for c in status["conditions"] if c["type"] == "WorkersReady")
    assert workers["reason"] == "BackingOff"


def retrying(view: SessionView, failures: int) -> dict[str, Any]:
    plan = decided(
        session(
            status=running(view, failed_attempts=failures - 1),
            runPolicy={"backoffLimit": 1000},
        ),
        jobs=(job(view, conditions=FAILED),),
        pods=(pod(view, exit_code=1),),
    )
    return dict(plan.status or {})


def test_the_old_job_goes_when_the_new_one_is_made() -> None:
    view = session(runPolicy={"backoffLimit": 1000})
    old = job(view, conditions=FAILED)
    status = retrying(view, 1)
    plan = decided(
        session(status=status, runPolicy={"backoffLimit": 1000}), jobs=(old,), now=NOW + 10
    )
    assert deleted(plan) == [f"Job/{old.name}"]
    assert applied(plan) == [f"Job/{old.name[:-1]}2"]
    manifest = plan.apply[0]["spec"]["template"]["spec"]["containers"][0]
    assert {"name": "ESPER_TOLARIA__ATTEMPT", "value": "2"} in manifest["env"]
    assert manifest["args"][manifest["args"].index("--rendezvous-id") + 1] == f"{view.uid}-2"


def test_retrying_stays_the_state_until_the_workers_are_ready() -> None:
    view = session(runPolicy={"backoffLimit": 1000})
    status = retrying(view, 1)
    second = job(view, 2, created=NOW + 10)
    starting = decided(
        session(status=status, runPolicy={"backoffLimit": 1000}),
        jobs=(second,),
        pods=(pod(view, attempt=2),),
        now=NOW + 11,
    )
    assert summary(starting) == ("Unknown", "Retrying")
    ready = decided(
        session(status=dict(starting.status or {}), runPolicy={"backoffLimit": 1000}),
        jobs=(second,),
        pods=(pod(view, attempt=2, ready=True),),
        now=NOW + 12,
    )
    assert summary(ready) == ("Unknown", "Running")


def test_only_the_last_five_failures_are_kept() -> None:
    view = session()
    older = tuple(
        Failure(pod=f"old-{n}", exit_code=1, reason="x", time=datetime_of(NOW - 100))
        for n in range(5)
    )
    plan = decided(
        session(status=running(view, failures=older)),
        jobs=(job(view, conditions=FAILED),),
        pods=(pod(view, exit_code=9),),
    )
    failures = written(plan).failures
    assert len(failures) == 5
    assert (failures[0].pod, failures[-1].exit_code) == ("old-1", 9)


# -- disruptions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"disrupted": "PreemptionByScheduler"},
        {"disrupted": "DeletionByTaintManager", "deleting": True},
        {"exit_code": 75},
        {"deleting": True},
        {"status_reason": "NodeShutdown"},
    ],
)
def test_a_disruption_is_counted_once_and_the_job_goes_on(fields: dict[str, Any]) -> None:
    view = session()
    lost = pod(view, **fields)
    first = decided(session(status=running(view)), jobs=(job(view),), pods=(lost,))
    status = written(first)
    assert (status.attempt, status.disruptions, status.failed_attempts) == (1, 1, 0)
    assert status.interrupted_pods == (lost.name,)
    assert summary(first) == ("Unknown", "Interrupted")
    assert applied(first) == []
    again = decided(
        session(status=dict(first.status or {})), jobs=(job(view),), pods=(lost,), now=NOW + 5
    )
    gone = decided(session(status=dict(first.status or {})), jobs=(job(view),), now=NOW + 5)
    for plan in (again, gone):
        assert plan.status is None or written(plan).disruptions == 1


def test_a_new_job_follows_one_that_has_lost_several_pods() -> None:
    view = session()
    lost = tuple(pod(view, name=n, disrupted="Preemption", exit_code=137) for n in "abc")
    plan = decided(session(status=running(view)), jobs=(job(view),), pods=lost)
    status = written(plan)
    assert (status.attempt, status.disruptions, status.failed_attempts) == (2, 3, 0)
    assert status.interrupted_pods == ()
    assert deleted(plan) == [f"Job/{job(view).name}"]
    assert len(applied(plan)) == 1


def test_a_job_whose_pods_are_all_back_stays() -> None:
    view = session()
    lost = tuple(pod(view, name=n, disrupted="Preemption", exit_code=137) for n in "abc")
    back = pod(view, name="d", ready=True)
    plan = decided(session(status=running(view)), jobs=(job(view),), pods=(*lost, back))
    assert written(plan).attempt == 1
    assert written(plan).disruptions == 3
    assert summary(plan) == ("Unknown", "Running")


@pytest.mark.parametrize(("reported", "counted"), [(False, 1), (True, 0)])
def test_interruptions_that_nobody_asked_for_count_without_progress(
    reported: bool, counted: int
) -> None:
    view = session()
    lost = tuple(pod(view, name=n, exit_code=75) for n in "abc")
    told = snapshot() if reported else None
    plan = decided(session(status=running(view)), jobs=(job(view),), pods=lost, snapshot=told)
    assert written(plan).attempt == 2
    assert written(plan).failed_attempts == counted


def test_a_lost_job_is_followed_by_the_next_one() -> None:
    view = session()
    plan = decided(session(status=running(view)))
    status = written(plan)
    assert (status.attempt, status.failed_attempts, status.disruptions) == (2, 0, 1)
    assert applied(plan) == [f"Job/{str(running(view).job)[:-1]}2"]


def test_young_pods_may_be_seen_before_their_job() -> None:
    view = session()
    status = running(view, job=None)
    young = decided(session(status=status), pods=(pod(view, created=NOW - 1),))
    assert written(young).attempt == 1
    orphans = decided(session(status=status), pods=(pod(view, created=NOW - 60),))
    assert written(orphans).attempt == 2


def test_a_job_that_is_being_deleted_is_followed_at_once() -> None:
    view = session()
    plan = decided(session(status=running(view)), jobs=(job(view, deleting=True),))
    assert written(plan).attempt == 2
    assert deleted(plan) == []


def test_a_status_behind_the_jobs_catches_up_and_counts_their_failures() -> None:
    view = session()
    plan = decided(
        session(status=running(view)),
        jobs=(job(view, conditions=FAILED), job(view, 2)),
        pods=(pod(view, exit_code=1), pod(view, attempt=2, ready=True)),
    )
    status = written(plan)
    assert (status.attempt, status.failed_attempts) == (2, 1)
    assert applied(plan) == []
    assert summary(plan) == ("Unknown", "Running")


def test_a_session_may_succeed_in_any_attempt() -> None:
    view = session()
    done = {"Complete": ("", "")}
    plan = decided(
        session(status=running(view, attempt=4, failed_attempts=3)),
        jobs=(job(view, 4, conditions=done),),
    )
    assert summary(plan) == ("True", "Completed")


@pytest.mark.parametrize("other", [{"deleting": True}, {"exit_code": 75, "deleting": True}])
@pytest.mark.parametrize(("first", "lost"), [({"exit_code": 0}, 0), ({"ready": True}, 1)])
def test_a_worker_that_ends_because_the_first_is_done_is_not_interrupted(
    first: Any, lost: int, other: Any
) -> None:
    """The Job's own success may be heard of after the end of its pods."""
    view = session()
    plan = decided(
        session(status=running(view), workers={"replicas": 2}),
        jobs=(job(view, replicas=2),),
        pods=(pod(view, 0, **first), pod(view, 1, **other)),
    )
    assert written(plan).disruptions == lost
