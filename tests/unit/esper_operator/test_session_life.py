"""A session's way from its creation to its end, visit by visit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper.contracts.resources import TrainingSessionStatus
from esper_operator.children import network_policy
from esper_operator.children.objects import digest_in
from esper_operator.conditions import Kind, Reason
from esper_operator.decisions import sessions
from esper_operator.observed import Observed
from esper_operator.plans import Plan
from esper_operator.views import Said
from tests.unit.esper_operator.objects import (
    COMPLETE,
    NOW,
    OPTIONS,
    applied,
    condition_of,
    decided,
    deleted,
    deployment,
    job,
    made,
    meta,
    observed,
    pod,
    rests,
    running,
    session,
    snapshot,
    spec,
    summary,
    written,
)


def test_the_first_visit_says_created_for_this_generation_with_every_condition() -> None:
    view = session(generation=3)
    plan = decided(view, metas=())
    status = written(plan)
    assert summary(plan) == ("Unknown", "Created")
    assert status.observed_generation == 3
    assert [item.type for item in status.conditions] == [
        "Succeeded",
        "Suspended",
        "WorkersReady",
        "ControllerReady",
        "Checkpointed",
    ]
    assert {item.observed_generation for item in status.conditions} == {3}
    assert status.attempt == 1


def test_the_service_and_the_credentials_come_before_the_job() -> None:
    view = session()
    first = decided(view, metas=())
    assert applied(first) == ["Service/digits-workers"]
    assert first.credentials
    second = decided(session(status=dict(first.status or {})))
    assert applied(second) == [f"Job/{running(view).job}"]
    assert not second.credentials


def test_credentials_are_renewed_in_time_and_no_worker_is_disturbed() -> None:
    view = session()
    status = written(decided(session(status=running(view)), jobs=(job(view),), pods=(pod(view),)))
    service_meta, secret_meta = made(view)

    def visited(left: float) -> Plan:
        kept = replace(secret_meta, renew_after=NOW + left)
        going = {"jobs": (job(view),), "pods": (pod(view),), "metas": (service_meta, kept)}
        return decided(session(status=status), **going)

    assert not visited(1).credentials
    assert visited(1).again_in == 1
    for due in (0, -86_400):
        assert visited(due) == replace(visited(1), credentials=True, again_in=visited(due).again_in)


def test_the_attempt_is_in_the_status_before_its_job_is_made() -> None:
    plan = decided(session())
    assert written(plan).attempt == 1
    assert [item["metadata"]["labels"]["esper.dev/attempt"] for item in plan.apply] == ["1"]


def test_a_job_that_is_there_is_never_applied_again() -> None:
    view = session()
    with_status = session(status=running(view))
    plan = decided(with_status, jobs=(job(view),), pods=(pod(view),))
    assert plan.apply == ()
    assert plan.delete == ()


@pytest.mark.parametrize(
    ("pods", "reason", "workers"),
    [
        ([], "Starting", 0),
        ([{"phase": "Pending"}], "Starting", 0),
        ([{"ready": False}], "Starting", 0),
        ([{"ready": True}], "Running", 1),
    ],
)
def test_the_state_follows_the_workers(
    pods: list[dict[str, Any]], reason: str, workers: int
) -> None:
    view = session()
    plan = decided(
        session(status=running(view)),
        jobs=(job(view),),
        pods=tuple(pod(view, index, **fields) for index, fields in enumerate(pods)),
    )
    assert summary(plan) == ("Unknown", reason)
    assert written(plan).workers == workers


@pytest.mark.parametrize("conditions", [COMPLETE, {"SuccessCriteriaMet": ("SuccessPolicy", "")}])
def test_a_session_whose_job_is_done_has_succeeded(
    conditions: dict[str, tuple[str, str]],
) -> None:
    view = session()
    plan = decided(session(status=running(view)), jobs=(job(view, conditions=conditions),))
    assert summary(plan) == ("True", "Completed")
    status = written(plan)
    assert status.completion_time is not None
    assert status.completion_time.timestamp() == NOW - 5
    assert status.active_since is None
    assert status.active_seconds == 40
    assert deleted(plan) == []
    assert [notice.reason for notice in plan.notices] == ["Completed"]


def finished(reason: str = "Completed", **fields: Any) -> TrainingSessionStatus:
    view = session()
    done = job(view, conditions=COMPLETE)
    plan = decided(session(status=running(view)), jobs=(done,))
    return written(plan).model_copy(update=fields)


def test_what_is_finished_stays_so_and_is_never_made_anew() -> None:
    view = session(status=finished())
    plan = decided(view, metas=(), jobs=())
    assert plan == Plan()


@pytest.mark.parametrize(("passed", "gone"), [(99, False), (100, True), (5000, True)])
def test_a_finished_session_goes_after_its_ttl(passed: int, gone: bool) -> None:
    policy = {"ttlSecondsAfterFinished": 100}
    view = session(status=finished(), runPolicy=policy)
    plan = sessions.decide(Observed(session=view, now=NOW - 5 + passed, metas=()), OPTIONS)
    assert deleted(plan) == (["TrainingSession/digits"] if gone else [])
    assert plan.apply == ()
    if gone:
        assert plan.delete[0].uid == view.uid
    else:
        assert plan.again_in == pytest.approx(100 - passed)


def test_without_a_ttl_it_stays_and_is_never_looked_at() -> None:
    plan = decided(session(status=finished()), now=NOW + 1e9)
    assert plan.again_in is None
    assert plan.delete == ()


def test_the_last_report_may_come_after_the_end() -> None:
    last = snapshot(epoch=10, metrics={"test": "0.97"}, time=NOW + 1, outcome="Succeeded")
    plan = decided(session(status=finished()), snapshot=last)
    assert written(plan).metrics == {"test": "0.97"}
    assert summary(plan) == ("True", "Completed")


@pytest.mark.parametrize("manager", ["kueue.x-k8s.io/multikueue", "somebody"])
def test_another_controllers_session_is_left_alone(manager: str) -> None:
    view = session(runPolicy={"managedBy": manager, "suspend": True})
    assert decided(view, jobs=(job(view),), metas=()) == Plan()


def test_a_session_that_names_this_operator_is_ours() -> None:
    assert applied(decided(session(runPolicy={"managedBy": "esper.dev/operator"})))


def test_a_session_that_is_being_deleted_gets_nothing() -> None:
    view = session(deleting=True)
    assert decided(view, metas=()) == Plan()


def test_jobs_and_pods_of_a_session_that_had_the_name_before_are_not_its_own() -> None:
    old = session(uid="5c8f0d1e-0000-4000-8000-00000000dead")
    plan = decided(session(), jobs=(job(old, 7),), pods=(pod(old, attempt=7),))
    assert written(plan).attempt == 1
    assert deleted(plan) == []
    assert applied(plan) != [f"Job/{job(old).name}"]


@pytest.mark.parametrize(
    ("section", "content", "field"),
    [
        ("training", {"epochs": "many"}, "spec.training.epochs: got the text"),
        (
            "workers",
            {"resources": {"requests": {"cpu": -1}}},
            "spec.workers.resources.requests.cpu: got -1; allowed: a quantity",
        ),
    ],
)
def test_a_spec_that_the_contract_refuses_ends_the_session_with_the_field(
    section: str, content: dict[str, Any], field: str
) -> None:
    broken = spec()
    broken[section] |= content
    view = session(raw_spec=broken)
    plan = decided_raw(view)
    assert summary(plan) == ("False", "InvalidSpec")
    assert condition_of(plan, Kind.SUCCEEDED)[2].startswith(field)
    assert written(plan).observed_generation == 1
    again = session(raw_spec=broken, status=dict(plan.status or {}))
    assert decided_raw(again) == Plan()


def decided_raw(view: Any) -> Plan:
    return sessions.decide(Observed(session=view, now=NOW, jobs=()), OPTIONS)


@pytest.mark.parametrize(
    ("extra", "field"),
    [
        ({"initContainers": []}, "initContainers"),
        ({"hostNetwork": True}, "hostNetwork"),
        ({"securityContext": {"runAsNonRoot": False}}, "runAsNonRoot"),
        ({"securityContext": {"runAsUser": 0}}, "runAsUser"),
        ({"securityContext": []}, "securityContext"),
        ({"automountServiceAccountToken": True}, "automountServiceAccountToken"),
        ({"serviceAccountName": "admin"}, "serviceAccountName"),
        ({"nodeSelector": {"pool": "gpu"}}, "nodeSelector"),
        ({"terminationGracePeriodSeconds": 5}, "terminationGracePeriodSeconds"),
        ({"serviceAccount": "admin"}, "serviceAccount"),
        ({"volumes": [{"name": "host", "hostPath": {"path": "/"}}]}, "volumes"),
    ],
)
def test_a_template_that_would_weaken_the_pod_ends_the_session(
    extra: dict[str, Any], field: str
) -> None:
    plan = decided(session(workers={"podTemplate": {"extra": extra}}))
    assert summary(plan) == ("False", "InvalidSpec")
    assert field in condition_of(plan, Kind.SUCCEEDED)[2]
    assert plan.apply == ()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (Said("AlreadyExists", "it exists and is not ours"), "ChildRefused"),
        (Said("HubUnavailable", "no answer"), "CredentialsMissing"),
    ],
)
def test_a_secret_of_somebody_elses_is_told_from_a_hub_that_gives_none(
    said: Said, reason: str
) -> None:
    plan = decided(session(), metas=(), refusals={"Secret/digits-esper": said})
    assert condition_of(plan, Kind.WORKERS_READY)[1] == reason
    assert said.message in condition_of(plan, Kind.WORKERS_READY)[2]


def test_a_status_that_cannot_be_read_begins_anew_and_catches_up_with_the_jobs() -> None:
    view = session(status={"attempt": "many", "conditions": 3})
    plan = decided(view, jobs=(job(session(), 4),))
    assert written(plan).attempt == 4
    assert plan.apply == ()


def test_fields_of_another_version_are_left_out_of_the_status() -> None:
    status = {**running(session()).to_wire(), "inventedLater": 1}
    plan = decided(session(status=status), jobs=(job(session()),))
    assert "inventedLater" not in (plan.status or {})
    assert written(plan).attempt == 1


def test_nothing_is_written_where_nothing_has_changed() -> None:
    view = session()
    objects = {"jobs": (job(view),), "pods": (pod(view, ready=True),), "snapshot": snapshot()}
    first = decided(session(status=running(view)), **objects)
    second = decided(session(status=dict(first.status or {})), **objects, now=NOW + 1)
    assert rests(second)
    assert second.again_in is not None


def test_a_session_whose_first_worker_has_ended_well_still_runs() -> None:
    view = session(workers={"replicas": 2})
    pods = (pod(view, exit_code=0), pod(view, 1, ready=True))
    plan = decided(
        session(status=running(view), workers={"replicas": 2}), jobs=(job(view),), pods=pods
    )
    summary = {item.type: item for item in written(plan).conditions}["Succeeded"]
    assert (summary.status, summary.reason) == ("Unknown", Reason.RUNNING)


def test_conditions_keep_the_time_of_their_transition() -> None:
    view = session()
    starting = decided(session(status=running(view)), jobs=(job(view),), pods=(pod(view),))
    before = {item.type: item for item in written(starting).conditions}
    ready = decided(
        session(status=dict(starting.status or {})),
        jobs=(job(view),),
        pods=(pod(view, ready=True),),
        now=NOW + 60,
    )
    after = {item.type: item for item in written(ready).conditions}
    assert after["Succeeded"].reason == Reason.RUNNING
    assert after["Succeeded"].last_transition_time == before["Succeeded"].last_transition_time
    passed = after["WorkersReady"].last_transition_time.timestamp() - NOW
    assert passed == 60


def test_a_checkpoint_is_named_in_the_status() -> None:
    view = session()
    told = snapshot(checkpoint={"name": "checkpoints/epoch-000004", "epoch": 4})
    plan = decided(session(status=running(view)), jobs=(job(view),), snapshot=told)
    assert written(plan).checkpoint is not None
    name = "checkpoints/epoch-000004"
    assert condition_of(plan, Kind.CHECKPOINTED) == ("True", "CheckpointWritten", name)


@pytest.mark.parametrize(
    ("policy", "tamiyo", "refusals", "status", "reason"),
    [
        ("none", None, {}, "False", "ControllerStarting"),
        ("heuristic", None, {}, "False", "ControllerStarting"),
        ("heuristic", {"available": True}, {}, "True", "ControllerAvailable"),
        ("heuristic", {"available": False}, {}, "False", "ControllerStarting"),
    ],
)
def test_the_controller_shows(
    policy: str, tamiyo: dict[str, Any] | None, refusals: Any, status: str, reason: str
) -> None:
    view = session(growth={"controller": {"policy": policy}})
    there = None if tamiyo is None else deployment("esper-tamiyo", **tamiyo)
    plan = decided(view, tamiyo=there, refusals=refusals)
    assert condition_of(plan, Kind.CONTROLLER_READY)[:2] == (status, reason)


def test_a_controller_of_its_own_is_made_with_the_session_and_goes_with_its_end() -> None:
    growth = {"controller": {"dedicated": True}}
    view = session(growth=growth)
    assert "Deployment/digits-controller" in applied(decided(view))
    own = deployment("digits-controller", session_uid=view.uid)
    ended = decided(
        session(growth=growth, status=running(view)),
        jobs=(job(view, conditions=COMPLETE),),
        tamiyo=own,
        metas=made(view),
    )
    assert deleted(ended) == ["Deployment/digits-controller"]


def test_a_controller_of_its_own_goes_when_nobody_asks_for_it_any_more() -> None:
    view = session()
    own = deployment("digits-controller", session_uid=view.uid)
    plan = decided(session(status=running(view)), jobs=(job(view),), tamiyo=own)
    assert deleted(plan) == ["Deployment/digits-controller"]
    assert condition_of(plan, Kind.CONTROLLER_READY)[1] == "ControllerStarting"


def test_the_shared_controller_does_not_stand_for_one_of_its_own() -> None:
    view = session(growth={"controller": {"dedicated": True}})
    plan = decided(view, tamiyo=deployment("esper-tamiyo"))
    assert condition_of(plan, Kind.CONTROLLER_READY)[:2] == ("False", "ControllerStarting")
    assert "Deployment/digits-controller" in applied(plan)


def test_the_shared_controller_is_not_the_sessions_to_delete() -> None:
    view = session()
    ended = decided(
        session(status=running(view)),
        jobs=(job(view, conditions=COMPLETE),),
        tamiyo=deployment("esper-tamiyo"),
    )
    assert deleted(ended) == []


def test_an_operator_of_a_later_release_restarts_no_pod() -> None:
    view = session()
    objects = {"jobs": (job(view),), "pods": (pod(view, ready=True),), "snapshot": snapshot()}
    seen = observed(session(status=running(view)), **objects)
    later = replace(OPTIONS, image="registry.example/esper:2", grace_seconds=90, log_level="info")
    plan = sessions.decide(seen, later)
    assert applied(plan) == []
    assert deleted(plan) == []
    assert plan.credentials  # the settings file is another one; pods read theirs once
    assert written(plan).attempt == 1


@pytest.mark.parametrize(("kind", "name"), [("Service", "digits-workers"), ("Secret", "")])
def test_a_child_that_was_deleted_is_made_anew_and_its_job_goes_on(kind: str, name: str) -> None:
    view = session()
    left = tuple(meta for meta in made(view) if meta.kind != kind)
    plan = decided(
        session(status=running(view)),
        jobs=(job(view),),
        pods=(pod(view, ready=True),),
        metas=left,
    )
    assert applied(plan) == ([f"{kind}/{name}"] if name else [])
    assert plan.credentials is (kind == "Secret")
    assert deleted(plan) == []
    assert written(plan).attempt == 1


def test_workers_have_a_network_policy_where_the_installation_says_whom_they_reach() -> None:
    view = session()
    told = replace(OPTIONS, worker_egress='[{"ports": [{"port": 6379}]}]')
    policy = network_policy.manifest(view, told.worker_egress or "")
    given = {"jobs": (job(view),), "pods": (pod(view, ready=True),)}
    running_view = session(status=running(view))

    first = sessions.decide(observed(session(), metas=()), told)
    assert applied(sessions.decide(observed(running_view, **given), OPTIONS)) == []
    assert applied(sessions.decide(observed(running_view, **given), told)) == [
        "NetworkPolicy/digits-workers"
    ]
    there = meta("NetworkPolicy", view, policy["metadata"]["name"], digest_in(policy))
    metas = (*made(view), there)
    assert applied(sessions.decide(observed(running_view, metas=metas, **given), told)) == []
    leaving = (*made(view), replace(there, deleting=True))
    assert applied(sessions.decide(observed(running_view, metas=leaving, **given), told)) == []
    kinds = [manifest["kind"] for manifest in first.apply]
    assert kinds == ["Service", "NetworkPolicy"]  # and no Job before


def test_no_job_begins_without_the_network_policy_that_is_wanted() -> None:
    told = replace(OPTIONS, worker_egress="[]")
    view = session(status=running(session()))
    policy = network_policy.manifest(view, "[]")
    name = f"NetworkPolicy/{policy['metadata']['name']}"
    for reason in ("Forbidden", "Invalid"):
        plan = sessions.decide(observed(view, refusals={name: Said(reason, "no")}), told)
        _, why, message = condition_of(plan, Kind.WORKERS_READY)
        assert (why, name in message) == (Reason.CHILD_REFUSED, True)
        assert condition_of(plan, Kind.SUCCEEDED)[0] == "Unknown"
    there = meta("NetworkPolicy", view, policy["metadata"]["name"], digest_in(policy))
    metas = (*made(view), replace(there, deleting=True))
    plan = sessions.decide(observed(view, metas=metas), told)
    assert applied(plan) == []
    assert "is being deleted" in condition_of(plan, Kind.WORKERS_READY)[2]
