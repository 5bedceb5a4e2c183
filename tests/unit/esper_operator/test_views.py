"""What is read of the API server's objects."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from esper_operator.pod_view import PodView
from esper_operator.times import text_of
from esper_operator.views import (
    RENEW_ANNOTATION,
    BlueprintView,
    DeploymentView,
    JobView,
    KernelView,
    MetaView,
    Said,
    SessionView,
)
from tests.unit.esper_operator.objects import (
    NAMESPACE,
    NOW,
    UID,
    job_object,
    pod,
    pod_object,
    session,
    spec,
)


def test_a_session_is_read_with_its_spec_and_status() -> None:
    view = session(generation=4, status={"attempt": 2}, workers={"replicas": 3})
    assert (view.name, view.namespace, view.uid, view.generation) == ("digits", NAMESPACE, UID, 4)
    assert view.spec().workers.replicas == 3
    assert view.status() == {"attempt": 2}
    assert not view.deleting
    assert session(deleting=True).deleting


def test_equal_objects_are_equal_views() -> None:
    assert session(status={"a": 1, "b": 2}) == session(status={"b": 2, "a": 1})
    assert hash(session()) == hash(session())


@pytest.mark.parametrize(
    ("conditions", "complete", "failed"),
    [
        ({}, False, None),
        ({"SuccessCriteriaMet": ("SuccessPolicy", "")}, True, None),
        ({"Complete": ("CompletionsReached", "")}, True, None),
        ({"FailureTarget": ("PodFailurePolicy", "m")}, False, Said("PodFailurePolicy", "m")),
        ({"Failed": ("BackoffLimitExceeded", "m")}, False, Said("BackoffLimitExceeded", "m")),
        ({"Suspended": ("JobSuspended", "")}, False, None),
    ],
)
def test_a_jobs_end(conditions: Any, complete: bool, failed: Said | None) -> None:
    found = JobView.of(job_object(session(), 3, conditions=conditions, ended=NOW - 5))
    assert (found.complete, found.failed) == (complete, failed)
    assert found.ended is (complete or failed is not None)
    assert found.finished == (NOW - 5 if found.ended else None)
    assert (found.attempt, found.session, found.session_uid) == (3, "digits", UID)


def test_a_condition_that_does_not_hold_ends_no_job() -> None:
    data = job_object(session(), conditions={"Failed": ("x", "")})
    data["status"]["conditions"][0]["status"] = "False"
    assert JobView.of(data).failed is None


def test_a_suspended_job_has_not_started() -> None:
    found = JobView.of(job_object(session(), suspended=True))
    assert found.suspended
    assert found.started is None


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"phase": "Running", "ready": False, "node": "node-1", "exit_code": None}),
        ({"ready": True}, {"ready": True}),
        ({"waiting": ("ErrImagePull", "m")}, {"waiting": Said("ErrImagePull", "m")}),
        ({"unschedulable": "0/3"}, {"unschedulable": "0/3", "node": ""}),
        ({"exit_code": 0}, {"phase": "Succeeded", "exit_code": 0, "over": True, "alive": False}),
        (
            {"exit_code": 137, "why": "OOMKilled"},
            {"ended": Said("OOMKilled"), "finished": NOW - 6, "told": None},
        ),
        (
            {"exit_code": 78, "said": '{"reason": "R", "message": "m"}'},
            {"told": Said("R", "m")},
        ),
        ({"exit_code": 1, "said": '{"reason": "R"}'}, {"told": None}),
        ({"exit_code": 1, "said": "[1]"}, {"told": None}),
        (
            {"exit_code": 1, "said": "Traceback"},
            {"told": None, "ended": Said("Error", "Traceback")},
        ),
        ({"unanswered": True}, {"unanswered": True, "ready": False, "alive": True}),
        ({"unanswered": True, "exit_code": 1}, {"unanswered": False}),
        ({"unanswered": True, "ready": True}, {"unanswered": False}),
        ({"disrupted": "Preemption"}, {"disrupted": Said("Preemption")}),
        ({"deleting": True}, {"deleting": True, "alive": False, "over": False}),
        ({"status_reason": "Evicted"}, {"ended": Said("Evicted"), "exit_code": None, "over": True}),
        ({"attempt": 12}, {"attempt": 12, "job_uid": "job-12"}),
    ],
)
def test_a_pod(fields: dict[str, Any], expected: dict[str, Any]) -> None:
    found = pod(session(), 3, **fields)
    assert found.index == 3
    assert found.role == "worker"
    for name, value in expected.items():
        assert getattr(found, name) == value, name


def test_a_pod_that_others_have_a_say_in_is_not_known_to_be_unanswered() -> None:
    data = pod_object(session(), unanswered=True)
    assert PodView.of(data).unanswered
    data["spec"]["readinessGates"] = [{"conditionType": "example.org/gate"}]
    assert not PodView.of(data).unanswered


def test_only_the_workers_own_container_counts() -> None:
    data = pod_object(session(), exit_code=0)
    data["status"]["phase"] = "Running"
    data["status"]["containerStatuses"][0]["name"] = "proxy"
    assert PodView.of(data).exit_code is None


@pytest.mark.parametrize(
    ("conditions", "available", "failure"),
    [
        ([], False, None),
        ([("Available", "True", "")], True, None),
        ([("Available", "False", "")], False, None),
        ([("Progressing", "True", "NewReplicaSet")], False, None),
        ([("Progressing", "False", "ProgressDeadlineExceeded")], False, "ProgressDeadlineExceeded"),
        ([("ReplicaFailure", "True", "FailedCreate")], False, "FailedCreate"),
    ],
)
def test_a_controller(conditions: Any, available: bool, failure: str | None) -> None:
    status = {
        "conditions": [{"type": t, "status": s, "reason": r} for t, s, r in conditions],
    }
    metadata = {"name": "t", "namespace": NAMESPACE, "uid": "u"}
    found = DeploymentView.of({"metadata": metadata, "status": {**status, "readyReplicas": 1}})
    assert found.available is available
    none = DeploymentView.of({"metadata": metadata, "status": status})
    assert not none.available  # as one that was scaled to nothing
    assert (found.failure.reason if found.failure else None) == failure


def test_what_is_known_by_its_metadata() -> None:
    metadata = {
        "name": "s",
        "namespace": NAMESPACE,
        "uid": "u",
        "labels": {"esper.dev/session": "digits", "esper.dev/session-uid": UID},
        "annotations": {"esper.dev/digest": "d"},
        "deletionTimestamp": text_of(NOW),
    }
    found = MetaView.of({"kind": "Secret", "metadata": metadata})
    assert (found.kind, found.session, found.session_uid) == ("Secret", "digits", UID)
    assert (found.digest, found.deleting) == ("d", True)
    bare = MetaView.of({"metadata": {"name": "s", "namespace": NAMESPACE, "uid": "u"}})
    assert (bare.kind, bare.session, bare.digest) == ("", "", "")


def test_blueprints_and_kernels() -> None:
    metadata = {"name": "n", "namespace": NAMESPACE, "uid": "u", "labels": {"b": "2", "a": "1"}}
    blueprint = BlueprintView.of({"metadata": metadata, "spec": {"builtin": "affine"}})
    assert blueprint.labels == (("a", "1"), ("b", "2"))
    assert blueprint.spec().builtin == "affine"
    assert blueprint.status() == {}
    content = {"blueprint": "affine", "target": {}}
    kernel = KernelView.of({"metadata": metadata, "spec": content, "status": {"bytes": 3}})
    assert (kernel.blueprint, kernel.status()) == ("affine", {"bytes": 3})


def test_views_are_small() -> None:
    view = pod(session(), ready=True)
    assert not hasattr(view, "__dict__")
    own = sum(sys.getsizeof(getattr(view, name)) for name in ("name", "uid"))
    assert sys.getsizeof(view) + own < 1000
    whole = SessionView.of(
        {
            "metadata": {"name": "digits", "namespace": NAMESPACE, "uid": UID},
            "spec": spec(),
            "status": {},
        }
    )
    assert sys.getsizeof(whole) + len(whole.spec_text) < 4000


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(text_of(NOW), NOW), ("", 0.0), ("soon", 0.0), ("2027-99-01T00:00:00Z", 0.0)],
)
def test_a_renewal_that_is_no_time_is_due(text: str, seconds: float) -> None:
    annotations = {RENEW_ANNOTATION: text}
    metadata = {"name": "s", "namespace": NAMESPACE, "uid": "u", "annotations": annotations}
    assert MetaView.of({"kind": "Secret", "metadata": metadata}).renew_after == seconds
