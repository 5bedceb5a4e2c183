"""Objects as the API server would give them, and what is observed of them."""

from __future__ import annotations

from typing import Any

from esper.contracts.base import canonical_json
from esper.contracts.operational import SessionSnapshot
from esper.contracts.resources import TrainingSession, TrainingSessionStatus
from esper.services.contracts import IssuedCredentials, KernelCredentials
from esper_operator.children import job as jobs
from esper_operator.children import names, secret, service
from esper_operator.children.objects import digest_in, labels_of
from esper_operator.conditions import Kind, found
from esper_operator.decisions import sessions
from esper_operator.observed import Observed
from esper_operator.options import Options
from esper_operator.plans import Plan
from esper_operator.pod_view import PodView
from esper_operator.times import datetime_of, text_of
from esper_operator.views import (
    CONTAINER,
    INDEX_ANNOTATION,
    BlueprintView,
    DeploymentView,
    JobView,
    KernelView,
    MetaView,
    SessionView,
)

NOW = 1_800_000_000.0
NAMESPACE = "team-a"
UID = "5c8f0d1e-0000-4000-8000-000000000001"
OPTIONS = Options(
    image="registry.example/esper:1",
    hub_url="http://urza:8000",
    redis_url="redis://redis:6379/0",
)
ISSUED = IssuedCredentials(
    uid=UID,
    namespace=NAMESPACE,
    hub_token="hub-token",
    redis_username="user",
    redis_password="p@ss/word",
    expires_at=datetime_of(NOW + 86_400),
)
KERNEL_ISSUED = KernelCredentials(
    kernel="5f" * 20, hub_token="kernel-token", expires_at=datetime_of(NOW + 86_400)
)


def spec(**sections: dict[str, Any]) -> dict[str, Any]:
    """A spec with its defaults, as the API server would store it; camelCase sections replace."""
    resource = TrainingSession.model_validate(
        {
            "apiVersion": "esper.dev/v1alpha1",
            "kind": "TrainingSession",
            "metadata": {"name": "digits"},
            "spec": {
                "model": {"entrypoint": "zoo:model"},
                "data": {"entrypoint": "zoo:data"},
                **sections,
            },
        }
    )
    found = resource.to_wire()["spec"]
    assert isinstance(found, dict)
    return found


def session(
    *,
    name: str = "digits",
    uid: str = UID,
    generation: int = 1,
    status: dict[str, Any] | TrainingSessionStatus | None = None,
    deleting: bool = False,
    raw_spec: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> SessionView:
    """A session whose spec has those sections."""
    if isinstance(status, TrainingSessionStatus):
        status = status.to_wire()
    metadata = {
        "name": name,
        "namespace": NAMESPACE,
        "uid": uid,
        "generation": generation,
        "creationTimestamp": text_of(NOW - 60),
    }
    if deleting:
        metadata["deletionTimestamp"] = text_of(NOW)
    return SessionView.of(
        {
            "metadata": metadata,
            "spec": raw_spec if raw_spec is not None else spec(**sections),
            "status": status or {},
        }
    )


def job_object(
    view: SessionView,
    attempt: int = 1,
    *,
    replicas: int = 1,
    created: float = NOW - 30,
    conditions: dict[str, tuple[str, str]] | None = None,
    ended: float = NOW - 5,
    suspended: bool = False,
    resumed: float | None = None,
    deleting: bool = False,
) -> dict[str, Any]:
    """A Job that the operator has made, with true conditions (reason, message) by type."""
    manifest = jobs.manifest(view, attempt, replicas, OPTIONS)
    metadata = {
        **manifest["metadata"],
        "uid": f"job-{attempt}",
        "creationTimestamp": text_of(created),
    }
    if deleting:
        metadata["deletionTimestamp"] = text_of(NOW)
    status: dict[str, Any] = {}
    if not suspended:
        status["startTime"] = text_of(created)
    status["conditions"] = [
        {
            "type": kind,
            "status": "True",
            "reason": reason,
            "message": message,
            "lastTransitionTime": text_of(ended),
        }
        for kind, (reason, message) in (conditions or {}).items()
    ]
    if suspended or resumed is not None:
        at = text_of(created if resumed is None else resumed)
        condition = {"type": "Suspended", "status": "True" if suspended else "False"}
        status["conditions"].append({**condition, "lastTransitionTime": at})
    content = {**manifest["spec"], "suspend": suspended}
    return {**manifest, "metadata": metadata, "spec": content, "status": status}


def job(view: SessionView, attempt: int = 1, **fields: Any) -> JobView:
    """The projection of it."""
    return JobView.of(job_object(view, attempt, **fields))


FAILED = {"Failed": ("BackoffLimitExceeded", "Job has reached the specified backoff limit")}
COMPLETE = {"SuccessCriteriaMet": ("SuccessPolicy", ""), "Complete": ("SuccessPolicy", "")}


def pod_object(
    view: SessionView,
    index: int = 0,
    *,
    attempt: int = 1,
    name: str = "",
    created: float = NOW - 30,
    phase: str = "Running",
    ready: bool = False,
    unanswered: bool = False,
    node: str = "node-1",
    waiting: tuple[str, str] | None = None,
    unschedulable: str = "",
    exit_code: int | None = None,
    why: str = "Error",
    said: str = "",
    disrupted: str = "",
    deleting: bool = False,
    status_reason: str = "",
) -> dict[str, Any]:
    """A pod of a Job of that attempt."""
    metadata: dict[str, Any] = {
        "name": name or f"{names.job(view.name, view.uid, attempt)}-{index}-abcde",
        "namespace": NAMESPACE,
        "uid": f"pod-{attempt}-{index}-{name}",
        "labels": labels_of(view, role="worker", attempt=attempt),
        "annotations": {INDEX_ANNOTATION: str(index)},
        "creationTimestamp": text_of(created),
        "ownerReferences": [{"uid": f"job-{attempt}", "controller": True, "kind": "Job"}],
    }
    if deleting:
        metadata["deletionTimestamp"] = text_of(NOW)
    conditions = []
    if ready:
        conditions.append({"type": "Ready", "status": "True"})
    if unanswered:  # as a node controller leaves what a kubelet has said
        conditions.append({"type": "ContainersReady", "status": "True"})
        conditions.append({"type": "Ready", "status": "False"})
    if disrupted:
        conditions.append({"type": "DisruptionTarget", "status": "True", "reason": disrupted})
    if unschedulable:
        item = {"type": "PodScheduled", "status": "False", "message": unschedulable}
        conditions.append({**item, "reason": "Unschedulable"})
        node = ""
    state: dict[str, Any] = {}
    if waiting is not None:
        state = {"waiting": {"reason": waiting[0], "message": waiting[1]}}
    if exit_code is not None:
        phase = "Succeeded" if exit_code == 0 else "Failed"
        ended = {"exitCode": exit_code, "reason": why, "message": said}
        state = {"terminated": {**ended, "finishedAt": text_of(NOW - 6)}}
    status: dict[str, Any] = {"phase": phase, "conditions": conditions}
    if state:
        status["containerStatuses"] = [{"name": CONTAINER, "state": state}]
    if status_reason:
        status |= {"phase": "Failed", "reason": status_reason}
    return {"metadata": metadata, "spec": {"nodeName": node} if node else {}, "status": status}


def pod(view: SessionView, index: int = 0, **fields: Any) -> PodView:
    """The projection of it."""
    return PodView.of(pod_object(view, index, **fields))


def meta(kind: str, view: SessionView, name: str, digest: str, **fields: Any) -> MetaView:
    """A Service, a Secret or a Seed of a session."""
    return MetaView(
        kind=kind,
        namespace=NAMESPACE,
        name=name,
        uid=f"{kind}-{name}",
        session=view.name,
        session_uid=view.uid,
        digest=digest,
        **fields,
    )


def made(view: SessionView) -> tuple[MetaView, ...]:
    """The Service and the Secret that a session needs before its Job."""
    manifest = service.manifest(view)
    return (
        meta("Service", view, manifest["metadata"]["name"], digest_in(manifest)),
        meta(
            "Secret",
            view,
            names.secret(view.name),
            secret.digest(view, OPTIONS),
            renew_after=NOW + 60 * 86_400,
            deletion_policy="Retain",
        ),
    )


def deployment(name: str, *, available: bool = True, **fields: Any) -> DeploymentView:
    """A controller."""
    return DeploymentView(NAMESPACE, name, f"deployment-{name}", available=available, **fields)


def snapshot(attempt: int = 1, time: float = NOW - 2, **fields: Any) -> SessionSnapshot:
    """A report of a session."""
    content = {"session": "digits", "sequence": int(time * 1000), "epochs": 10, **fields}
    return SessionSnapshot(attempt=attempt, time=datetime_of(time), **content)


def blueprint(content: dict[str, Any], **fields: Any) -> BlueprintView:
    """A Blueprint with that spec."""
    given = {"name": "mine", "uid": "blueprint-1", "generation": 1, "deleting": False}
    given |= {"labels": (), **fields}
    status = canonical_json(given.pop("status", {}))
    text = canonical_json(content)
    return BlueprintView(namespace=NAMESPACE, spec_text=text, status_text=status, **given)


def kernel(name: str, content: dict[str, Any], **fields: Any) -> KernelView:
    """A CompiledKernel with that spec."""
    given = {"uid": "kernel-1", "generation": 1, "deleting": False}
    given |= {"session": "digits", "session_uid": UID, **fields}
    status = canonical_json(given.pop("status", {}))
    text = canonical_json(content)
    return KernelView(
        namespace=NAMESPACE,
        name=name,
        blueprint=content["blueprint"],
        spec_text=text,
        status_text=status,
        **given,
    )


def observed(view: SessionView, **fields: Any) -> Observed:
    """What is observed of a session whose Service and Secret are there, and its clock is right."""
    given: dict[str, Any] = {"now": NOW, "metas": made(view), "hearing_since": NOW - 10_000}
    told = fields.get("snapshot")
    given["heard"] = None if told is None else told.time.timestamp()
    return Observed(session=view, **given | fields)


def decided(view: SessionView, **fields: Any) -> Plan:
    """The plan for it."""
    return sessions.decide(observed(view, **fields), OPTIONS)


def written(plan: Plan) -> TrainingSessionStatus:
    """The status that a plan writes, as the contract reads it."""
    assert plan.status is not None, plan
    return TrainingSessionStatus.model_validate(plan.status, by_alias=True, by_name=False)


def summary(plan: Plan) -> tuple[str, str]:
    """Status and reason of the summary condition that a plan writes."""
    condition = found(written(plan).conditions, Kind.SUCCEEDED)
    assert condition is not None
    return condition.status, condition.reason


def condition_of(plan: Plan, kind: Kind) -> tuple[str, str, str]:
    """Status, reason and message of a condition that a plan writes."""
    condition = found(written(plan).conditions, kind)
    assert condition is not None
    return condition.status, condition.reason, condition.message


def running(view: SessionView, attempt: int = 1, **fields: Any) -> TrainingSessionStatus:
    """The status of a session whose attempt's Job has been seen."""
    given: dict[str, Any] = {
        "observed_generation": view.generation,
        "attempt": attempt,
        "attempt_time": datetime_of(NOW - 40),
        "replicas": 1,
        "job": names.job(view.name, view.uid, attempt),
        "start_time": datetime_of(NOW - 40),
        "active_since": datetime_of(NOW - 40),
    }
    return TrainingSessionStatus(**given | fields)


def applied(plan: Plan) -> list[str]:
    """Kind and name of what a plan applies, in order."""
    return [f"{item['kind']}/{item['metadata']['name']}" for item in plan.apply]


def deleted(plan: Plan) -> list[str]:
    """Kind and name of what a plan deletes, in order."""
    return [f"{item.kind}/{item.name}" for item in plan.delete]


def rests(plan: Plan) -> bool:
    """Whether carrying a plan out makes no request."""
    return plan == Plan(again_in=plan.again_in)
