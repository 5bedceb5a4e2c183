"""The words of a kubelet: states of containers, conditions and phase of a pod. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

Object = dict[str, Any]

MESSAGE_BYTES = 4096
LOG_BYTES = 2048
LOG_LINES = 80
KILLED = 137
NEVER_STARTED = 128

CREATING = "ContainerCreating"
INITIALIZING = "PodInitializing"


def now() -> str:
    """The time as the API server writes it, in whole seconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def waiting(reason: str, message: str = "") -> Object:
    """The state of a container that is not there yet."""
    return {"waiting": {"reason": reason, **({"message": message} if message else {})}}


def running(since: str) -> Object:
    """The state of a container at work."""
    return {"running": {"startedAt": since}}


def terminated(
    code: int, *, since: str, message: str = "", identity: str = "", reason: str | None = None
) -> Object:
    """The state of a container that has ended, by its exit code as a container runtime gives it."""
    said = reason or ("Completed" if code == 0 else "Error")
    state = {"exitCode": code, "reason": said, "startedAt": since, "finishedAt": now()}
    if message:
        state["message"] = message
    if identity:
        state["containerID"] = identity
    return {"terminated": state}


def exit_code(returned: int) -> int:
    """The exit code of a process that ended with `returned`, minus a signal where one ended it."""
    return returned if returned >= 0 else 128 - returned


def termination_message(written: bytes, log: bytes, *, policy: str, code: int) -> str:
    """What a container said last: in its file, or where the policy says so at its log's end."""
    if not written and policy == "FallbackToLogsOnError" and code:
        lines = log[-LOG_BYTES:].splitlines(keepends=True)
        written = b"".join(lines[-LOG_LINES:])
    return written[:MESSAGE_BYTES].decode(errors="replace")


@dataclass
class ContainerView:
    """What a status tells of one container."""

    name: str
    image: str
    state: Object = field(default_factory=lambda: waiting(CREATING))
    last: Object = field(default_factory=dict)
    restarts: int = 0
    ready: bool = False
    started: bool = False
    identity: str = ""

    def status(self) -> Object:
        """A v1.ContainerStatus."""
        return {
            "name": self.name,
            "image": self.image,
            "imageID": f"process://{self.image}" if self.identity else "",
            "containerID": self.identity,
            "state": self.state,
            "lastState": self.last,
            "restartCount": self.restarts,
            "ready": self.ready,
            "started": self.started,
        }

    @property
    def done(self) -> int | None:
        """Its exit code, once it has ended."""
        ended = self.state.get("terminated")
        return None if ended is None else int(ended["exitCode"])


def phase_of(
    inits: Sequence[ContainerView], mains: Sequence[ContainerView], policy: str, *, over: bool
) -> str:
    """The phase of a pod; `over`: none of its containers will be started any more."""
    if over:
        codes = [view.done for view in (*inits, *mains)]
        return "Succeeded" if all(code == 0 for code in codes) else "Failed"
    begun = [view for view in mains if "waiting" not in view.state or view.last]
    return "Running" if len(begun) == len(mains) and mains else "Pending"


def conditions_of(
    phase: str,
    inits: Sequence[ContainerView],
    mains: Sequence[ContainerView],
    generation: int,
) -> list[Object]:
    """The conditions that a kubelet writes, without their times."""
    unready = [view.name for view in mains if not view.ready]
    waiting_inits = [view.name for view in inits if view.done != 0]
    over = {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(phase)
    begun = any(view.identity for view in (*inits, *mains))
    found = [
        _condition("PodReadyToStartContainers", begun and over is None),
        _condition("Initialized", not waiting_inits, over if phase == "Succeeded" else None),
    ]
    if waiting_inits:
        found[1] |= {
            "reason": over or "ContainersNotInitialized",
            "message": f"containers with incomplete status: [{' '.join(waiting_inits)}]",
        }
    for name in ("ContainersReady", "Ready"):
        condition = _condition(name, not unready and over is None, over)
        if unready and over is None:
            condition |= {
                "reason": "ContainersNotReady",
                "message": f"containers with unready status: [{' '.join(unready)}]",
            }
        found.append(condition)
    for condition in found:
        condition["observedGeneration"] = generation
    return found


def dated(conditions: Sequence[Object], before: Sequence[Mapping[str, Any]]) -> list[Object]:
    """Conditions with the time at which each last changed its status."""
    known = {condition["type"]: condition for condition in before}
    time = now()
    found = []
    for condition in conditions:
        old = known.get(condition["type"])
        same = old is not None and old["status"] == condition["status"]
        found.append(
            {**condition, "lastTransitionTime": old["lastTransitionTime"] if same and old else time}
        )
    return found


def _condition(kind: str, holds: bool, reason: str | None = None) -> Object:
    # A strategic merge keeps what isn't written, so that what no longer holds is written as null.
    return {
        "type": kind,
        "status": "True" if holds else "False",
        "reason": reason,
        "message": None,
        "lastProbeTime": None,
    }
