"""Deadlines: what bounds a session, and what does not count."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.conditions import Kind
from esper_operator.plans import Plan
from esper_operator.times import datetime_of
from esper_operator.views import Said
from tests.unit.esper_operator.objects import (
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

POLICY = {"startupDeadlineSeconds": 100, "progressDeadlineSeconds": 300, "backoffLimit": 1}


def after(
    seconds: float,
    pods: list[dict[str, Any]],
    *,
    policy: dict[str, Any] | None = None,
    status: dict[str, Any] | None = None,
    **fields: Any,
) -> Plan:
    """The plan so many seconds after the Job was made."""
    run_policy = POLICY | (policy or {})
    view = session(runPolicy=run_policy)
    record = running(view, **(status or {}))
    return decided(
        session(runPolicy=run_policy, status=record),
        jobs=(job(view, created=NOW - seconds),),
        pods=tuple(pod(view, index, **content) for index, content in enumerate(pods)),
        **fields,
    )


PULL = {"phase": "Pending", "waiting": ("ErrImagePull", "manifest unknown")}


@pytest.mark.parametrize(
    ("pods", "reason"),
    [
        ([PULL], "ImagePullFailed"),
        ([{"waiting": ("ImagePullBackOff", "")}], "ImagePullFailed"),
        ([{"waiting": ("InvalidImageName", "")}], "ImagePullFailed"),
        ([{"waiting": ("CreateContainerConfigError", "secret")}], "ContainerRefused"),
        ([{"phase": "Pending", "unschedulable": "0/3 nodes"}], "Unschedulable"),
        ([{"phase": "Pending", "waiting": ("ContainerCreating", "")}], "StartupDeadlineExceeded"),
        ([], "StartupDeadlineExceeded"),
        ([{"ready": True}], "StartupDeadlineExceeded"),
    ],
)
def test_what_does_not_start_ends_with_what_stood_in_the_way(
    pods: list[dict[str, Any]], reason: str
) -> None:
    early = after(99, pods)
    assert summary(early)[0] == "Unknown"
    assert early.again_in == pytest.approx(1)
    late = after(100, pods)
    assert summary(late) == ("False", reason)
    assert "startupDeadlineSeconds" in condition_of(late, Kind.SUCCEEDED)[2]
    assert [name.split("/")[0] for name in deleted(late)] == ["Job"]
    assert applied(late) == []


def test_an_image_that_is_not_there_shows_at_once() -> None:
    plan = after(3, [PULL])
    status, reason, message = condition_of(plan, Kind.WORKERS_READY)
    assert (status, reason) == ("False", "ImagePullFailed")
    assert "ErrImagePull: manifest unknown" in message
    assert "manifest unknown" in condition_of(plan, Kind.SUCCEEDED)[2]


def test_a_pull_that_is_backed_off_keeps_the_message_of_the_pull() -> None:
    view = session(runPolicy=POLICY)
    first = after(3, [PULL])
    again = decided(
        session(runPolicy=POLICY, status=dict(first.status or {})),
        jobs=(job(view, created=NOW - 3),),
        pods=(pod(view, waiting=("ImagePullBackOff", "Back-off pulling image")),),
    )
    assert again.status is None


def test_pods_that_the_api_server_refuses_show_with_its_words() -> None:
    view = session(runPolicy=POLICY)
    name = str(running(view).job)
    said = {f"Pod/{name}": Said("FailedCreate", "exceeded quota: gpus")}
    early = after(3, [], refusals=said)
    assert condition_of(early, Kind.WORKERS_READY)[1] == "PodsRefused"
    late = after(100, [], refusals=said)
    assert summary(late) == ("False", "PodsRefused")
    assert "exceeded quota" in condition_of(late, Kind.SUCCEEDED)[2]


def test_nobody_is_listened_for_longer_than_the_deadline_itself() -> None:
    short = {"startupDeadlineSeconds": 10}
    early = after(5000, [{"ready": True}], policy=short, hearing_since=NOW - 9)
    assert early.again_in == pytest.approx(1)
    late = after(5000, [{"ready": True}], policy=short, hearing_since=NOW - 10)
    assert summary(late)[0] == "False"


def test_without_the_bus_workers_that_are_ready_are_not_given_up() -> None:
    assert summary(after(5000, [{"ready": True}], hearing_since=None))[0] == "Unknown"
    heard = after(5000, [{"ready": True}], hearing_since=NOW - 59)
    assert heard.again_in == pytest.approx(1)
    assert summary(after(5000, [{"ready": True}], hearing_since=NOW - 60))[0] == "False"
    # Workers that do not come up are seen without it.
    assert summary(after(5000, [PULL], hearing_since=None))[0] == "False"


@pytest.mark.parametrize(("reported", "failed"), [(299, False), (300, True), (4000, True)])
def test_without_progress_an_attempt_fails(reported: float, failed: bool) -> None:
    told = snapshot(time=NOW - reported)
    plan = after(5000, [{"ready": True}], snapshot=told, status={"attempt_time": None})
    status = written(plan)
    assert status.failed_attempts == int(failed)
    assert status.attempt == 1 + int(failed)
    if failed:
        assert summary(plan) == ("Unknown", "Retrying")
        assert deleted(plan) == [f"Job/{running(session()).job}"]
        assert "progressDeadlineSeconds" in plan.notices[0].message
    else:
        assert plan.again_in == pytest.approx(1)


def test_the_last_attempt_without_progress_ends_the_session() -> None:
    told = snapshot(time=NOW - 300)
    plan = after(5000, [{"ready": True}], snapshot=told, status={"failed_attempts": 1})
    assert summary(plan) == ("False", "ProgressDeadlineExceeded")


def test_progress_cannot_be_missed_where_nobody_hears() -> None:
    told = snapshot(time=NOW - 4000)
    plan = after(5000, [{"ready": True}], snapshot=told, hearing_since=None)
    assert written(plan).failed_attempts == 0
    back = after(5000, [{"ready": True}], snapshot=told, hearing_since=NOW - 59)
    assert written(back).failed_attempts == 0
    assert back.again_in == pytest.approx(1)
    listened = after(5000, [{"ready": True}], snapshot=told, hearing_since=NOW - 60)
    assert written(listened).failed_attempts == 1


def test_a_reconnection_gives_no_more_time_than_to_be_heard() -> None:
    status = {"attempt_time": datetime_of(NOW - 5000), "last_heartbeat_time": datetime_of(NOW - 40)}
    status["report_sequence"] = 7
    for sequence in (7, 6):  # what is read again may be older than what was heard before
        again = snapshot(time=NOW - 40, sequence=sequence)
        heard = {"snapshot": again, "heard": NOW - 1, "hearing_since": NOW - 1}
        plan = after(5000, [{"ready": True}], status=status, **heard)
        assert plan.again_in == pytest.approx(260)


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 86_400.0])
@pytest.mark.parametrize(("heard", "failed"), [(299, False), (300, True)])
def test_workers_clocks_decide_nothing(skew: float, heard: float, failed: bool) -> None:
    told = snapshot(time=NOW - heard + skew)
    status = {"attempt_time": datetime_of(NOW - 5000)}
    plan = after(5000, [{"ready": True}], snapshot=told, heard=NOW - heard, status=status)
    assert written(plan).failed_attempts == int(failed)


def test_after_a_restart_a_session_that_hangs_is_found_out_once_it_was_listened_for() -> None:
    status = {
        "attempt_time": datetime_of(NOW - 50_000),
        "active_since": datetime_of(NOW - 50_000),
        "last_heartbeat_time": datetime_of(NOW - 36_000),
    }
    early = after(50_000, [{"ready": True}], hearing_since=NOW - 10, status=status)
    assert summary(early)[0] == "Unknown"
    assert early.again_in == pytest.approx(50)
    late = after(50_000, [{"ready": True}], hearing_since=NOW - 60, status=status)
    assert summary(late) == ("False", "ProgressDeadlineExceeded")


def test_a_report_of_the_attempt_before_is_no_sign_of_this_one() -> None:
    view = session(runPolicy=POLICY)
    status = running(view, attempt=2, last_heartbeat_time=datetime_of(NOW - 3000))
    plan = decided(
        session(runPolicy=POLICY, status=status),
        jobs=(job(view, 2, created=NOW - 100),),
        pods=(pod(view, attempt=2, ready=True),),
        snapshot=snapshot(1, time=NOW - 1),
    )
    assert summary(plan) == ("False", "StartupDeadlineExceeded")


def test_after_a_restart_of_the_operator_the_status_says_that_it_has_started() -> None:
    status = {"last_heartbeat_time": datetime_of(NOW - 20)}
    plan = after(5000, [{"ready": True}], status=status)
    assert summary(plan) == ("Unknown", "Running")


def test_one_that_has_trained_waits_for_room_as_long_as_for_progress() -> None:
    no_room = [{"phase": "Pending", "unschedulable": "0/3 nodes"}]
    trained = {"attempt": 1, "last_heartbeat_time": datetime_of(NOW - 9000)}
    waiting = after(299, no_room, status=trained)
    assert summary(waiting)[0] == "Unknown"
    assert summary(after(300, no_room, status=trained)) == ("False", "Unschedulable")


@pytest.mark.parametrize(("spent", "since", "ended"), [(0, 99, 0), (0, 100, 1), (60, 40, 1)])
def test_the_active_deadline_counts_what_was_active(spent: int, since: int, ended: int) -> None:
    status = {"active_seconds": spent, "active_since": datetime_of(NOW - since)}
    plan = after(
        10,
        [{"ready": True}],
        policy={"activeDeadlineSeconds": 100},
        status=status,
        snapshot=snapshot(),
    )
    if ended:
        assert summary(plan) == ("False", "ActiveDeadlineExceeded")
        assert written(plan).active_seconds == 100
    else:
        assert summary(plan)[0] == "Unknown"
        assert plan.again_in == pytest.approx(1)


@pytest.mark.parametrize(("reason", "permanent"), [("Invalid", True), ("Forbidden", False)])
def test_a_child_that_is_refused_shows_and_ends_the_session_in_time(
    reason: str, permanent: bool
) -> None:
    view = session(runPolicy=POLICY)
    name = str(running(view).job)
    said = {f"Job/{name}": Said(reason, "spec.template.spec.schedulerName: Invalid value")}
    status = running(view, job=None, attempt_time=datetime_of(NOW - 50))
    early = decided(session(runPolicy=POLICY, status=status), refusals=said)
    if permanent:
        assert summary(early) == ("False", "ChildRefused")
        assert applied(early) == []
    else:
        assert summary(early)[0] == "Unknown"
        assert condition_of(early, Kind.WORKERS_READY)[1] == "ChildRefused"
        late = decided(session(runPolicy=POLICY, status=status), refusals=said, now=NOW + 60)
        assert summary(late) == ("False", "ChildRefused")
    assert "schedulerName" in condition_of(early, Kind.SUCCEEDED)[2]


def test_a_field_that_no_pod_has_is_refused_for_good() -> None:
    view = session()
    text = "failed to create typed patch object (...): .spec.template.spec.x: field not declared"
    said = {f"Job/{running(view).job}": Said("InternalError", text)}
    plan = decided(session(status=running(view, job=None)), refusals=said)
    assert summary(plan) == ("False", "ChildRefused")


def test_a_hub_that_does_not_answer_shows_and_ends_the_session_in_time() -> None:
    view = session(runPolicy=POLICY)
    said = {"Secret/digits-esper": Said("HubUnavailable", "urza: no answer")}
    status = running(view, job=None, active_since=datetime_of(NOW - 10), attempt_time=None)
    early = decided(session(runPolicy=POLICY, status=status), refusals=said, metas=())
    assert condition_of(early, Kind.WORKERS_READY)[1] == "CredentialsMissing"
    assert "urza: no answer" in condition_of(early, Kind.SUCCEEDED)[2]
    assert early.credentials
    late = decided(
        session(runPolicy=POLICY, status=dict(early.status or {})),
        refusals=said,
        metas=(),
        now=NOW + 5000,
    )
    assert summary(late) == ("False", "CredentialsMissing")


@pytest.mark.parametrize(
    ("since", "told", "ended"),
    [(599, 5000, False), (600, 5000, True), (5000, 599, False), (5000, 600, True)],
)
def test_disruptions_without_any_progress_end_some_time(
    since: float, told: float, ended: bool
) -> None:
    view = session(runPolicy=POLICY)
    status = running(
        view,
        attempt=40,
        attempt_time=datetime_of(NOW - 3),
        active_since=datetime_of(NOW - since),
        last_heartbeat_time=datetime_of(NOW - told),
        disruptions=99,
    )
    plan = decided(session(runPolicy=POLICY, status=status), jobs=(job(view, 40, created=NOW - 2),))
    assert (summary(plan) == ("False", "ProgressDeadlineExceeded")) is ended
    if ended:
        assert "40 attempts" in condition_of(plan, Kind.SUCCEEDED)[2]
    assert written(plan).failed_attempts == 0
