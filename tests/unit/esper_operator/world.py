"""A small cluster in memory: what the API server, the Job controller and nodes make of plans.

Objects are the API's own JSON, so that the projections are tried too. A plan is carried out one
write at a time, and may be cut off after any of them, as by a crash. What the operator sees of
pods can lag behind what it sees of Jobs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from esper.contracts.operational import SessionSnapshot
from esper.contracts.resources import TrainingSessionStatus
from esper_operator.children import names, secret
from esper_operator.decisions import sessions
from esper_operator.observed import Observed
from esper_operator.plans import Plan
from esper_operator.pod_view import PodView
from esper_operator.times import text_of
from esper_operator.views import (
    ATTEMPT_LABEL,
    CONTAINER,
    INDEX_ANNOTATION,
    JobView,
    MetaView,
    Said,
    SessionView,
)
from tests.unit.esper_operator.objects import (
    ISSUED,
    NAMESPACE,
    NOW,
    OPTIONS,
    UID,
    rests,
    snapshot,
    spec,
)

JOB_BACKOFF = 10.0
STEP_SECONDS = 5.0

Object = dict[str, Any]


class Crash(Exception):  # noqa: N818 - of the operator, as it happens
    """The operator has ended between two writes."""


@dataclass
class World:
    """One session and all that is made for it."""

    sections: dict[str, Any] = field(default_factory=dict)
    now: float = NOW
    behaviour: str = "trains"
    """What pods do once they run: trains, hangs, fails, bad-input; or what keeps them from it:
    no-node, no-image, refuses."""
    hub_answers: bool = True
    refuse_jobs: str = ""
    """Reason with which Jobs are refused."""
    writes_left: int | None = None
    """Writes until a crash."""
    pods_unseen: bool = False
    """Whether the watch of pods is cut."""

    def __post_init__(self) -> None:
        """Apply the session."""
        self.session: Object | None = {
            "metadata": {
                "name": "digits",
                "namespace": NAMESPACE,
                "uid": UID,
                "generation": 1,
                "creationTimestamp": text_of(self.now),
            },
            "spec": spec(**self.sections),
            "status": {},
        }
        self.children: dict[tuple[str, str], Object] = {}
        self.pods: dict[str, Object] = {}
        self.trained: dict[str, float] = {}
        self.snapshot: SessionSnapshot | None = None
        self.heard: float | None = None
        self.refusals: dict[str, Said] = {}
        self.made_jobs: list[str] = []
        self.last_seen_pods: list[Object] = []
        self.statuses: list[TrainingSessionStatus] = []
        self.num_writes = 0
        self._uids = 0
        self._sequence = 0

    # -- the operator -------------------------------------------------------------------------

    def decide(self) -> Plan:
        """The plan for what there is now."""
        assert self.session is not None
        jobs = [item for (kind, _), item in self.children.items() if kind == "Job"]
        metas = [item for (kind, _), item in self.children.items() if kind in {"Service", "Secret"}]
        return sessions.decide(
            Observed(
                session=SessionView.of(self.session),
                now=self.now,
                jobs=tuple(map(JobView.of, jobs)),
                pods=tuple(map(PodView.of, self._seen_pods())),
                metas=tuple(map(MetaView.of, metas)),
                snapshot=self.snapshot,
                heard=self.heard,
                refusals=dict(self.refusals),
                hearing_since=NOW - 1e6,
            ),
            OPTIONS,
        )

    def _seen_pods(self) -> list[Object]:
        if not self.pods_unseen:
            self.last_seen_pods = copy.deepcopy(list(self.pods.values()))
        return self.last_seen_pods

    def carry_out(self, plan: Plan) -> None:
        """Each write of a plan in its order.

        Raises:
            Crash: no writes are left.
        """
        if plan.status is not None and self.session is not None:
            self._write()
            self.session = {**self.session, "status": copy.deepcopy(dict(plan.status))}
            self._check_status()
        for deletion in plan.delete:
            self._write()
            if deletion.grace_seconds == 0:
                self._give_up(deletion.name, deletion.uid)
            else:
                self.delete(deletion.kind, deletion.name, deletion.uid)
        if plan.credentials:
            self._give_credentials()
        for manifest in plan.apply:
            self._write()
            self._apply(dict(manifest))

    def settle(self, most: int = 60) -> Plan:
        """Decide and write until there is nothing to write; the last plan.

        Raises:
            AssertionError: it does not come to rest.
        """
        for _ in range(most):
            if self.session is None:
                return Plan()
            plan = self.decide()
            if plan.credentials and not self.hub_answers and self.refusals and not plan.apply:
                return plan
            if rests(plan):
                return plan
            before = self._state()
            self.carry_out(plan)
            if before == self._state():
                return plan  # what is refused stays refused
        raise AssertionError(f"it does not come to rest: {plan}")

    def _state(self) -> str:
        return repr((self.session, sorted(self.children), self.pods, self.refusals))

    def _write(self) -> None:
        if self.writes_left is not None:
            if self.writes_left == 0:
                raise Crash
            self.writes_left -= 1
        self.num_writes += 1

    def _give_credentials(self) -> None:
        name = names.secret("digits")
        if not self.hub_answers:
            self.refusals[f"Secret/{name}"] = Said("HubUnavailable", "it does not answer")
            return
        self._write()
        assert self.session is not None
        self.refusals.pop(f"Secret/{name}", None)
        self._apply(secret.manifest(SessionView.of(self.session), ISSUED, OPTIONS, self.now))

    def _apply(self, manifest: Object) -> None:
        if self.session is None:
            return  # its owner is gone: the garbage collector has it again at once
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        if kind == "Job" and self.refuse_jobs:
            self.refusals[f"Job/{name}"] = Said(self.refuse_jobs, "as the test wants it")
            return
        self.refusals.pop(f"{kind}/{name}", None)
        there = self.children.get((kind, name))
        if there is not None and kind == "Job":
            kept = {k: v for k, v in there["spec"].items() if k != "suspend"}
            wanted = {k: v for k, v in manifest["spec"].items() if k != "suspend"}
            assert kept == wanted, "a Job was changed"
            return
        if kind == "Job":
            assert name not in self.made_jobs, f"{name} was made twice"
            self.made_jobs.append(name)
        self._uids += 1
        stamped = {
            **copy.deepcopy(manifest["metadata"]),
            "uid": there["metadata"]["uid"] if there else f"uid-{self._uids}",
            "creationTimestamp": text_of(self.now),
        }
        self.children[kind, name] = {**copy.deepcopy(manifest), "metadata": stamped, "status": {}}

    def delete(self, kind: str, name: str, uid: str | None = None) -> None:
        """An object is deleted, and with it what it owns; pods end in their own time."""
        if kind == "TrainingSession":
            assert self.session is not None
            assert uid == self.session["metadata"]["uid"]
            self.session = None
            for child_kind, child in list(self.children):
                self.delete(child_kind, child)
            return
        there = self.children.get((kind, name))
        if there is None or uid not in (None, there["metadata"]["uid"]):
            return
        del self.children[kind, name]
        if kind == "Job":
            for pod in self.pods_of(there):
                pod["metadata"]["deletionTimestamp"] = text_of(self.now)

    def _give_up(self, name: str, uid: str) -> None:
        """A pod is deleted without grace: it goes once its Job does not hold it any more."""
        pod = self.pods.get(name)
        assert pod is not None
        assert uid == pod["metadata"]["uid"]
        assert pod["metadata"].get("deletionGracePeriodSeconds") != 0, "it was given up before"
        pod["metadata"]["deletionGracePeriodSeconds"] = 0

    def _check_status(self) -> None:
        assert self.session is not None
        status = TrainingSessionStatus.model_validate(
            self.session["status"], by_alias=True, by_name=False
        )
        if self.statuses:
            last = self.statuses[-1]
            assert status.attempt >= last.attempt
            assert status.disruptions >= last.disruptions
            assert status.failed_attempts >= last.failed_attempts
            assert status.active_seconds >= last.active_seconds
            if _ended(last):
                assert _end(status) == _end(last), "a session has left its end"
        self.statuses.append(status)

    # -- the cluster --------------------------------------------------------------------------

    def jobs(self) -> list[Object]:
        """The Jobs that there are."""
        return [item for (kind, _), item in self.children.items() if kind == "Job"]

    def pods_of(self, job: Object) -> list[Object]:
        """The pods of one."""
        uid = job["metadata"]["uid"]
        return [p for p in self.pods.values() if p["metadata"]["ownerReferences"][0]["uid"] == uid]

    def step(self, seconds: float = STEP_SECONDS) -> None:
        """Time passes, and every controller but the operator does its work."""
        self.now += seconds
        for job in self.jobs():
            self.control(job)
        for pod in list(self.pods.values()):
            self._run(pod)

    def alive(self) -> list[Object]:
        """The pods that may still do something."""
        over = ("Succeeded", "Failed")
        return [pod for pod in self.pods.values() if pod["status"]["phase"] not in over]

    def control(self, job: Object) -> None:
        """What the Job controller does."""
        content, status = job["spec"], job["status"]
        if status.get("conditions"):
            return
        if content.get("suspend"):
            status.pop("startTime", None)
            for pod in self.pods_of(job):
                pod["metadata"].setdefault("deletionTimestamp", text_of(self.now))
            return
        status.setdefault("startTime", text_of(self.now))
        failed = 0.0
        for pod in self.pods_of(job):
            action = _action(content, pod)
            if action == "done" and pod["metadata"]["annotations"][INDEX_ANNOTATION] == "0":
                self._conclude(job, "SuccessCriteriaMet", "Complete", "SuccessPolicy", "")
                return
            if action == "FailJob":
                code = _exit_code(pod)
                text = f"Container worker failed with exit code {code}"
                self._conclude(job, "FailureTarget", "Failed", "PodFailurePolicy", text)
                return
            if action == "count":
                self._conclude(job, "FailureTarget", "Failed", "BackoffLimitExceeded", "")
                return
            failed += action == "Ignore"
        delay = JOB_BACKOFF * 2 ** min(failed - 1, 6) if failed else 0.0
        for index in range(content["completions"]):
            mine = [p for p in self.pods_of(job) if _index(p) == index]
            if any(p["status"]["phase"] not in ("Failed",) for p in mine):
                continue
            last = max((p["ended"] for p in mine), default=None)
            if last is None or self.now >= last + delay:
                self._make_pod(job, index)

    def _conclude(self, job: Object, first: str, second: str, reason: str, message: str) -> None:
        said = {"status": "True", "reason": reason, "message": message}
        at = {"lastTransitionTime": text_of(self.now)}
        job["status"]["conditions"] = [{"type": kind, **said, **at} for kind in (first, second)]
        for pod in self.pods_of(job):
            if pod["status"]["phase"] not in ("Succeeded", "Failed"):
                pod["metadata"].setdefault("deletionTimestamp", text_of(self.now))

    def _make_pod(self, job: Object, index: int) -> None:
        self._uids += 1
        meta = job["metadata"]
        name = f"{meta['name']}-{index}-{self._uids}"
        self.pods[name] = {
            "metadata": {
                "name": name,
                "namespace": NAMESPACE,
                "uid": f"pod-{self._uids}",
                "labels": dict(job["spec"]["template"]["metadata"]["labels"]),
                "annotations": {INDEX_ANNOTATION: str(index)},
                "creationTimestamp": text_of(self.now),
                "ownerReferences": [{"uid": meta["uid"], "controller": True}],
            },
            "spec": {},
            "status": {"phase": "Pending", "conditions": []},
        }

    def _run(self, pod: Object) -> None:
        """What a node does with a pod, by what the test wants of it."""
        status, meta = pod["status"], pod["metadata"]
        owner = meta["ownerReferences"][0]["uid"]
        owned = any(job["metadata"]["uid"] == owner for job in self.jobs())
        if pod.get("lost"):
            if not owned and meta.get("deletionGracePeriodSeconds") == 0:
                del self.pods[meta["name"]]
            return
        if status["phase"] in ("Succeeded", "Failed"):
            if "deletionTimestamp" in meta or not owned:
                del self.pods[meta["name"]]
            return
        if "deletionTimestamp" in meta:
            self.end(pod, 75 if status["phase"] == "Running" else None)
            return
        if self.behaviour == "no-node":
            item = {"type": "PodScheduled", "status": "False", "message": "0/3 nodes"}
            status["conditions"] = [item]
            return
        pod["spec"]["nodeName"] = "node-1"
        if self.behaviour == "no-image":
            waiting = {"waiting": {"reason": "ErrImagePull", "message": "not found"}}
            status["containerStatuses"] = [{"name": CONTAINER, "state": waiting}]
            return
        if self.behaviour == "refuses":
            self.end(pod, None)
            return
        if status["phase"] == "Pending":
            status["phase"] = "Running"
            status["conditions"] = [{"type": "Ready", "status": "True"}]
            return
        self._work(pod)

    def _work(self, pod: Object) -> None:
        if self.behaviour == "fails":
            self.end(pod, 1)
        elif self.behaviour == "bad-input":
            self.end(pod, 78, '{"reason": "EntryPointError", "message": "zoo:model"}')
        elif self.behaviour == "interrupts":
            self.end(pod, 75)
        elif self.behaviour == "trains":
            attempt = int(pod["metadata"]["labels"][ATTEMPT_LABEL])
            done = self.trained.get("session", 0.0) + 1
            self.trained["session"] = done
            self.report(attempt)
            if done >= 6 and _index(pod) == 0:
                self.end(pod, 0)

    def report(self, attempt: int) -> None:
        """The worker of an attempt tells how it stands."""
        self._sequence += 1
        epoch = int(self.trained.get("session", 0.0))
        told = {"epoch": epoch, "sequence": self._sequence}
        newer = self.snapshot is None or attempt >= self.snapshot.attempt
        if newer:
            self.snapshot = snapshot(attempt, time=self.now, **told)
            self.heard = self.now

    def end(self, pod: Object, code: int | None, said: str = "") -> None:
        """A pod ends with that exit code; without one it never ran."""
        status = pod["status"]
        status["phase"] = "Succeeded" if code == 0 else "Failed"
        status["conditions"] = [c for c in status["conditions"] if c["type"] != "Ready"]
        pod["ended"] = self.now
        if code is not None:
            ended = {"exitCode": code, "reason": "Error", "message": said}
            state = {"terminated": {**ended, "finishedAt": text_of(self.now)}}
            status["containerStatuses"] = [{"name": CONTAINER, "state": state}]

    def disrupt(self, pod: Object) -> None:
        """A node is drained, or a pod preempted."""
        item = {"type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI"}
        pod["status"]["conditions"].append(item)
        pod["metadata"]["deletionTimestamp"] = text_of(self.now)

    def lose(self, pod: Object) -> None:
        """A pod's node does not answer any more; it is evicted, and nobody ends it."""
        pod["lost"] = True
        self.disrupt(pod)

    def edit(self, change: Callable[[Object], None]) -> None:
        """A person edits the session's spec."""
        assert self.session is not None
        content = copy.deepcopy(self.session["spec"])
        change(content)
        if content != self.session["spec"]:
            meta = self.session["metadata"]
            meta = {**meta, "generation": meta["generation"] + 1}
            self.session = {**self.session, "metadata": meta, "spec": content}


def _ended(status: TrainingSessionStatus) -> bool:
    return any(c.type == "Succeeded" and c.status != "Unknown" for c in status.conditions)


def _end(status: TrainingSessionStatus) -> tuple[str, str] | None:
    found = (c for c in status.conditions if c.type == "Succeeded")
    return next(((c.status, c.reason) for c in found), None)


def _index(pod: Object) -> int:
    return int(pod["metadata"]["annotations"][INDEX_ANNOTATION])


def _exit_code(pod: Object) -> int | None:
    for item in pod["status"].get("containerStatuses", ()):
        if "terminated" in item["state"]:
            return int(item["state"]["terminated"]["exitCode"])
    return None


def _action(content: Object, pod: Object) -> str:
    """What the Job's own rules make of a pod."""
    if pod["status"]["phase"] == "Succeeded":
        return "done"
    if pod["status"]["phase"] != "Failed":
        return ""
    holding = {c["type"] for c in pod["status"]["conditions"] if c["status"] == "True"}
    for rule in content["podFailurePolicy"]["rules"]:
        conditions = {c["type"] for c in rule.get("onPodConditions", ())}
        codes = rule.get("onExitCodes", {}).get("values", ())
        if conditions & holding or _exit_code(pod) in codes:
            return str(rule["action"])
    return "count"
