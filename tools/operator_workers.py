"""What a kubelet says of workers, said by a test: pods run, succeed, fail, are evicted."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

from tools.cluster.control_plane import wait_for
from tools.operator_world import GROUP, Objects

SESSIONS = f"{GROUP}/trainingsessions"
BLUEPRINTS = f"{GROUP}/blueprints"
JOBS = "/apis/batch/v1/jobs"
PODS = "/api/v1/pods"
SERVICES = "/api/v1/services"
SECRETS = "/api/v1/secrets"
DEPLOYMENTS = "/apis/apps/v1/deployments"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def catalogued(name: str) -> dict[str, Any]:
    """The manifest of a Blueprint of the catalogue, which the hub learns of by its object."""
    return {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "Blueprint",
        "metadata": {"name": name},
        "spec": {"builtin": name},
    }


class Workers:
    """The pods of a session's workers, in the order of their index."""

    def __init__(self, objects: Objects, session: str) -> None:
        self._objects = objects
        self._session = session

    def jobs(self) -> list[dict[str, Any]]:
        """The Jobs of the session, those that are being deleted too."""
        return [job for job in self._objects.items(JOBS) if self._own(job)]

    def pods(self) -> list[dict[str, Any]]:
        """Those that are not being deleted."""
        own = [pod for pod in self._objects.items(PODS) if self._own(pod)]
        living = [pod for pod in own if "deletionTimestamp" not in pod["metadata"]]
        return sorted(living, key=lambda pod: pod["metadata"]["name"])

    def appear(self, count: int = 2) -> list[dict[str, Any]]:
        """Wait until there are so many that wait to run."""
        found: list[dict[str, Any]] = wait_for(
            lambda: (
                len(pods := [p for p in self.pods() if _phase(p) == "Pending"]) == count and pods
            ),
            f"{self._session} has no {count} pods that are pending",
        )
        return found

    def run(self, count: int = 2) -> list[dict[str, Any]]:
        """Say that they run and are ready."""
        pods = self.appear(count)
        for pod in pods:
            self._say(pod, "Running", {"running": {"startedAt": _now()}}, ready=True)
        return pods

    def succeed(self) -> None:
        """Say that they all ended well."""
        for pod in self.pods():
            self.end(pod, 0, reason="Done", message="trained")

    def end(self, pod: dict[str, Any], code: int, *, reason: str, message: str) -> None:
        """Say that one ended with that code and left that in its termination log."""
        told = json.dumps({"reason": reason, "message": message})
        ended = {
            "exitCode": code,
            "reason": "Completed" if code == 0 else "Error",
            "message": told,
            "startedAt": _now(),
            "finishedAt": _now(),
        }
        self._say(pod, "Succeeded" if code == 0 else "Failed", {"terminated": ended})

    def lose(self, pod: dict[str, Any], node: str) -> None:
        """Say that one runs on a node that does not answer, and has been evicted from it."""
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}}
        self._objects.create(f"{PODS}/{name}/binding", {**binding, "target": target})
        self._say(pod, "Running", {"running": {"startedAt": _now()}}, ready=True)
        condition = {"type": "DisruptionTarget", "status": "True", "lastTransitionTime": _now()}
        condition |= {"reason": "DeletionByTaintManager", "message": "its node does not answer"}
        self._objects.merge(f"{PODS}/{name}/status", {"status": {"conditions": [condition]}})
        self._objects.delete(f"{PODS}/{name}", grace_seconds=1)

    def _say(
        self, pod: dict[str, Any], phase: str, state: dict[str, Any], *, ready: bool = False
    ) -> None:
        name = pod["metadata"]["name"]
        status = {
            "phase": phase,
            "startTime": _now(),
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True" if ready else "False",
                    "lastTransitionTime": _now(),
                }
            ],
            "containerStatuses": [
                {
                    "name": "worker",
                    "ready": ready,
                    "restartCount": 0,
                    "image": "esper:latest",
                    "imageID": "",
                    "state": state,
                }
            ],
        }
        self._objects.merge(f"{PODS}/{name}/status", {"status": status})

    def _own(self, found: dict[str, Any]) -> bool:
        labels = found["metadata"].get("labels") or {}
        return bool(
            labels.get("esper.dev/session") == self._session
            and labels.get("esper.dev/role", "worker") == "worker"
        )


def _phase(pod: dict[str, Any]) -> str:
    return str(pod["status"].get("phase", ""))
