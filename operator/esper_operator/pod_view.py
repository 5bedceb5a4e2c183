"""What the decisions know of a pod: where it is, how it stands, and what ended it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from sys import intern

from esper_operator.reading import (
    Object,
    annotation_of,
    holding_conditions,
    label_of,
    meta_of,
    number_of,
)
from esper_operator.times import seconds_of
from esper_operator.views import (
    ATTEMPT_LABEL,
    CONTAINER,
    INDEX_ANNOTATION,
    ROLE_LABEL,
    SESSION_LABEL,
    UID_LABEL,
    Said,
)


@dataclass(frozen=True, slots=True)
class PodView:
    """A pod that the operator's Jobs have made."""

    namespace: str
    name: str
    uid: str
    created: float
    session: str = ""
    session_uid: str = ""
    role: str = ""
    attempt: int = 0
    job_uid: str = ""
    index: int = 0
    """Its completion index: which of the workers it is."""
    phase: str = "Pending"
    ready: bool = False
    deleting: bool = False
    node: str = ""
    unanswered: bool = False
    """Whether its node does not answer: then others than the node say that it is not ready."""
    waiting: Said | None = None
    """Why its container does not run yet."""
    unschedulable: str = ""
    """What the scheduler says, where it finds no node."""
    exit_code: int | None = None
    ended: Said | None = None
    """Why its container, or the pod as a whole, has ended: OOMKilled, Error, Evicted."""
    told: Said | None = None
    """What the worker left in its termination log."""
    disrupted: Said | None = None
    """The disruption that ended it from outside, or is about to."""
    finished: float | None = None
    deleted_by: float | None = None
    """When it is to have ended at the latest, where it is being deleted."""
    given_up: bool = False
    """Whether it is being deleted with no grace, without waiting for its node."""

    @classmethod
    def of(cls, data: Object) -> PodView:
        """Of the object."""
        meta, status = meta_of(data), data.get("status") or {}
        state = _container_state(status)
        waiting, ended = state.get("waiting"), state.get("terminated")
        holding = holding_conditions(data)
        exit_code = None if ended is None else ended.get("exitCode")
        return cls(
            namespace=intern(meta["namespace"]),
            name=meta["name"],
            uid=meta["uid"],
            created=seconds_of(meta.get("creationTimestamp")) or 0.0,
            session=label_of(data, SESSION_LABEL),
            session_uid=label_of(data, UID_LABEL),
            role=label_of(data, ROLE_LABEL),
            attempt=number_of(label_of(data, ATTEMPT_LABEL)),
            job_uid=_controller_uid(meta),
            index=number_of(annotation_of(data, INDEX_ANNOTATION)),
            phase=intern(str(status.get("phase") or "Pending")),
            ready="Ready" in holding,
            deleting=meta.get("deletionTimestamp") is not None,
            node=intern(str((data.get("spec") or {}).get("nodeName") or "")),
            unanswered=_is_unanswered(data, holding),
            waiting=None if waiting is None else Said.of(waiting),
            unschedulable=_unschedulable(status),
            exit_code=None if exit_code is None else int(exit_code),
            ended=_ended(status, ended),
            told=None if ended is None else _told(str(ended.get("message") or "")),
            disrupted=Said.of(holding["DisruptionTarget"])
            if "DisruptionTarget" in holding
            else None,
            finished=None if ended is None else seconds_of(ended.get("finishedAt")),
            deleted_by=seconds_of(meta.get("deletionTimestamp")),
            given_up=meta.get("deletionGracePeriodSeconds") == 0,
        )

    @property
    def over(self) -> bool:
        """Whether nothing of it runs any more."""
        return self.phase in {"Succeeded", "Failed"}

    @property
    def alive(self) -> bool:
        """Whether it works, or may come to work."""
        return not self.over and not self.deleting


def _container_state(status: Object) -> Object:
    for container in status.get("containerStatuses") or ():
        if container.get("name") == CONTAINER:
            found: Object = container.get("state") or {}
            return found
    return {}


def _is_unanswered(data: Object, holding: Mapping[str, Object]) -> bool:
    """Whether the node controller has marked a pod, of which its node said that all was well.

    A node says both of a pod's conditions at once; who asks for further ones can't be told.
    """
    running = (data.get("status") or {}).get("phase") == "Running"
    gated = bool((data.get("spec") or {}).get("readinessGates"))
    return running and not gated and "ContainersReady" in holding and "Ready" not in holding


def _controller_uid(meta: Object) -> str:
    owners = meta.get("ownerReferences") or ()
    return next((owner["uid"] for owner in owners if owner.get("controller")), "")


def _unschedulable(status: Object) -> str:
    for item in status.get("conditions") or ():
        if item.get("type") == "PodScheduled" and item.get("status") == "False":
            return str(item.get("message") or item.get("reason") or "")
    return ""


def _ended(status: Object, container: Object | None) -> Said | None:
    if container is not None:
        return Said.of(container)
    if status.get("phase") == "Failed":
        return Said.of(status)
    return None


def _told(text: str) -> Said | None:
    """What a worker said last, as JSON; what is none says nothing."""
    try:
        data = json.loads(text)
        return Said(intern(str(data["reason"])), str(data["message"]))
    except (ValueError, LookupError, TypeError):
        return None
