"""Faults of pods in a cluster from source: a main process killed, a pod deleted at once.

A kill is SIGKILL to the process on its node, of which nobody but the node's runtime tells the
kubelet. A deletion has no grace: the API server forgets the pod before its node has ended it. Hub
and Redis are only killed: of a StatefulSet's pod that is deleted so a second one may write to the
same volume beside it, which Kubernetes leaves to whoever does that.
"""

from __future__ import annotations

import json
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tools import helm
from tools.cluster.containers.source import SourceCluster
from tools.cluster.programs import cluster_program
from tools.real_cluster import HUB, REDIS
from tools.servers.process import ServerError

KILL, DELETE = "kill", "delete"
WAYS = {
    "operator": (KILL, DELETE),
    "tamiyo": (KILL, DELETE),
    "urza": (KILL,),
    "redis": (KILL,),
    "worker": (KILL, DELETE),
    "compile": (KILL, DELETE),
}
"""Each part, and what can be done to it; of the operator's pods the one that leads is meant."""
LEASE = "esper-operator"
KILLED = 137
SEEN_SECONDS = 60.0
"""For the kubelet to tell that a container was killed."""
WATCH_SECONDS = 10
_CRASHES = 2
"""Faults of one compile Job: four would use up its own retries, which come back after minutes."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Fault:
    """A part, and what is done to it."""

    part: str
    way: str

    def __str__(self) -> str:
        return f"{self.way} {self.part}"


@dataclass(frozen=True)
class Pod:
    """A pod whose container runs."""

    namespace: str
    name: str
    uid: str
    node: str
    container: str
    job: str

    @classmethod
    def of(cls, found: Json) -> Pod | None:
        """Of the object; None where its container does not run, or is about to be ended."""
        statuses = found["status"].get("containerStatuses") or [{}]
        if "running" not in statuses[0].get("state", {}):
            return None
        meta = found["metadata"]
        if "deletionTimestamp" in meta:
            return None
        return cls(
            namespace=meta["namespace"],
            name=meta["name"],
            uid=meta["uid"],
            node=found["spec"]["nodeName"],
            container=statuses[0]["containerID"].partition("://")[2],
            job=meta["labels"].get("batch.kubernetes.io/job-name", ""),
        )


def course(number: int, chance: random.Random) -> list[Fault]:
    """So many faults: every part in one of its ways, then in the other, then any."""
    first = [Fault(part, chance.choice(ways)) for part, ways in WAYS.items()]
    second = [
        Fault(part, way)
        for part, ways in WAYS.items()
        for way in ways
        if Fault(part, way) not in first
    ]
    chance.shuffle(first)
    chance.shuffle(second)
    every = [Fault(part, way) for part, ways in WAYS.items() for way in ways]
    more = [chance.choice(every) for _ in range(number)]
    return [*first, *second, *more][:number]


class Faults:
    """Brings faults about.

    Args:
        cluster: one from source, with the chart in it.
        chance: where several pods can be hit, and when a compile pod is.
    """

    def __init__(self, cluster: SourceCluster, chance: random.Random) -> None:
        self._cluster = cluster
        self._chance = chance
        self._hit: list[str] = []
        self.seen: list[float] = []
        """Seconds from each kill until the kubelet had told of it."""

    def bring(self, fault: Fault, namespace: str, going: Callable[[], bool]) -> str | None:
        """Hit a pod of the part, once there is one; returns its name.

        Args:
            fault: what is to happen.
            namespace: that of the session.
            going: whether to go on waiting for a pod of it; then None is returned.

        Raises:
            ServerError: the kubelet does not tell of a container that was killed.
        """
        while going():
            pod = self._victim(fault.part, namespace)
            if pod is not None and self._hits(fault, pod):
                return pod.name
            time.sleep(0.2)
        return None

    def _victim(self, part: str, namespace: str) -> Pod | None:
        if part == "compile":
            return self._compile_pod(namespace)
        if part == "operator":
            found = self._of(helm.NAMESPACE, f"app.kubernetes.io/component={part}")
            lease = self._cluster.get("-n", helm.NAMESPACE, "lease", LEASE)
            holder = str(lease["spec"].get("holderIdentity") or "")
            return next((pod for pod in found if holder.startswith(f"{pod.name}-")), None)
        if part in ("urza", "redis"):
            name = {"urza": HUB, "redis": REDIS}[part]
            found = self._of(helm.NAMESPACE, f"app.kubernetes.io/component={part}")
            return next((pod for pod in found if pod.name.startswith(name)), None)
        found = self._of(namespace, f"esper.dev/role={part}")
        return self._chance.choice(found) if found else None

    def _of(self, namespace: str, labels: str) -> list[Pod]:
        found = self._cluster.get("-n", namespace, "pods", "-l", labels)["items"]
        return [pod for pod in map(Pod.of, found) if pod is not None]

    def _compile_pod(self, namespace: str) -> Pod | None:
        """One that runs: it lives for seconds, so it is watched for, and hit in their midst."""
        for found in self._watched(namespace, "esper.dev/role=compile"):
            pod = Pod.of(found)
            if pod is not None and self._hit.count(pod.job) < _CRASHES:
                time.sleep(self._chance.uniform(0.0, 3.0))
                return pod
        return None

    def _watched(self, namespace: str, labels: str) -> Iterator[Json]:
        """Pods as they are and as they change, for `WATCH_SECONDS`."""
        selector = labels.replace("=", "%3D")
        query = f"labelSelector={selector}&watch=true&timeoutSeconds={WATCH_SECONDS}"
        command = [
            *(str(cluster_program("kubectl")), f"--kubeconfig={self._cluster.layout.admin}"),
            *("get", "--raw", f"/api/v1/namespaces/{namespace}/pods?{query}"),
        ]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
            assert watching.stdout is not None
            try:
                for line in watching.stdout:
                    event = json.loads(line)
                    if event["type"] in ("ADDED", "MODIFIED"):
                        yield event["object"]
            finally:
                watching.kill()

    def _hits(self, fault: Fault, pod: Pod) -> bool:
        """Whether it came about: a pod may have ended before."""
        if fault.way == DELETE:
            hit = pod in map(Pod.of, self._called(pod))
            words = ("--grace-period=0", "--force", "--wait=false", "--ignore-not-found")
            self._cluster.kubectl("-n", pod.namespace, "delete", "pod", pod.name, *words)
        else:
            hit = self._cluster.node(pod.node).kill_container(pod.container)
            if hit:
                self._await_seen(pod)
        if hit and pod.job:
            self._hit.append(pod.job)
        return hit

    def _called(self, pod: Pod) -> list[Json]:
        """The pod of that name, if there is one now."""
        selector = f"--field-selector=metadata.name={pod.name}"
        found: list[Json] = self._cluster.get("-n", pod.namespace, "pods", selector)["items"]
        return found

    def _await_seen(self, pod: Pod) -> None:
        """Wait until the kubelet tells that the container was killed, or the pod is gone."""
        began = time.monotonic()
        while time.monotonic() < began + SEEN_SECONDS:
            if all(_tells(each, pod) for each in self._called(pod)):
                self.seen.append(round(time.monotonic() - began, 1))
                return
            time.sleep(0.2)
        raise ServerError(f"pod {pod.name}: nobody has noticed that its container was killed")


def _tells(found: Json, pod: Pod) -> bool:
    """Whether the object says that the pod's container has ended by SIGKILL, or is another pod."""
    if found["metadata"]["uid"] != pod.uid:
        return True
    states: Sequence[Json] = [
        status.get(when, {}).get("terminated", {})
        for status in found["status"].get("containerStatuses", ())
        for when in ("state", "lastState")
    ]
    return any(
        state.get("exitCode") == KILLED and state.get("containerID", "").endswith(pod.container)
        for state in states
    )
