"""The node itself: its heartbeat, the pods that it takes, and what tests ask of it.

`python -m tools.cluster.node.agent SETTINGS` is how `ProcessKubelet` starts it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import platform
import secrets
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tools.cluster.node import statuses
from tools.cluster.node.answering import Answering
from tools.cluster.node.api import STRATEGIC, Api, RefusedError
from tools.cluster.node.images import Image, Images
from tools.cluster.node.network import Addresses, Names
from tools.cluster.node.placing import refusal
from tools.cluster.node.pod import HOST_ADDRESS, NodeWorld, PodWorker
from tools.cluster.node.process import keep_node
from tools.cluster.programs import KUBERNETES

Object = dict[str, Any]

ARCHITECTURE = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
LEASE_SECONDS = 40
HEARTBEAT_SECONDS = 1.0
STATUS_SECONDS = 5.0
RETRY_SECONDS = 1.0
LEASES = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"

_log = logging.getLogger(__name__)


class Node:
    """A node of processes.

    Args:
        settings: what `ProcessKubelet` wrote: name, kubeconfig, folder, images, capacity, labels,
            own, links, backoff_seconds, port.
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.name: str = settings["name"]
        self.folder = Path(settings["folder"])
        self.port: int = settings["port"]
        self.api = Api(Path(settings["kubeconfig"]))
        self.workers: dict[str, PodWorker] = {}
        self._settings = settings
        self._mark = f"{self.name}-{secrets.token_hex(8)}"
        self._names = Names(self.folder / "names")
        self._addresses = Addresses()
        self._pods: dict[str, Object] = {}
        self._services: dict[str, Object] = {}
        self._events: asyncio.Queue[tuple[Object, str, str, str]] = asyncio.Queue()
        self._seen = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        server = self.api.url.removeprefix("https://")
        known = {
            pattern: Image(tuple(image["entrypoint"]), image["environment"])
            for pattern, image in settings["images"].items()
        }
        self._world = NodeWorld(
            api=self.api,
            folder=self.folder,
            links=Path(settings["links"]),
            names=self._names.path,
            images=Images(known),
            own=(self.folder, Path(settings["links"]), *map(Path, settings["own"])),
            mark=self._mark,
            backoff_seconds=settings["backoff_seconds"],
            variables={
                "KUBERNETES_SERVICE_HOST": server.rpartition(":")[0],
                "KUBERNETES_SERVICE_PORT": server.rpartition(":")[2],
            },
            event=lambda *said: self._events.put_nowait(said),
        )

    async def run(self, stop: asyncio.Event) -> None:
        """Be a node until `stop` is set; then its containers are ended."""
        keeper = keep_node(self._mark)
        try:
            await self._register()
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._beat()),
                    group.create_task(self._tell_status()),
                    group.create_task(self._tell_events()),
                    group.create_task(self._place_on()),
                    group.create_task(self.api.follow("/api/v1/services", self._service)),
                    group.create_task(self.api.follow("/api/v1/pods", self._pod)),
                    group.create_task(Answering(self).serve()),
                ]
                await stop.wait()
                for task in tasks:
                    task.cancel()
        finally:
            # First those who would start again what ends.
            for worker in self._tasks:
                worker.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if keeper.stdin is not None:
                keeper.stdin.close()  # without a word: it ends what is left
            await asyncio.to_thread(keeper.wait)
            await self.api.close()

    async def _register(self) -> None:
        labels = {
            "kubernetes.io/hostname": self.name,
            "kubernetes.io/os": "linux",
            "kubernetes.io/arch": ARCHITECTURE,
            **self._settings["labels"],
        }
        body = {"metadata": {"name": self.name, "labels": labels}}
        try:
            await self.api.ask("POST", "/api/v1/nodes", body)
        except RefusedError as refused:
            if refused.status != 409:
                raise
        await self._patch_status()
        await self._renew()

    async def _patch_status(self) -> None:
        time = statuses.now()
        capacity = {"pods": "500", **self._settings["capacity"]}
        machine = platform.uname()
        status = {
            "capacity": capacity,
            "allocatable": capacity,
            "addresses": [
                {"type": "InternalIP", "address": HOST_ADDRESS},
                {"type": "Hostname", "address": self.name},
            ],
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self.port}},
            "conditions": [
                {
                    "type": "Ready",
                    "status": "True",
                    "reason": "KubeletReady",
                    "message": "processes can be started",
                    "lastHeartbeatTime": time,
                }
            ],
            "nodeInfo": {
                "machineID": "",
                "systemUUID": "",
                "bootID": self._mark,
                "kernelVersion": machine.release,
                "osImage": machine.system,
                "containerRuntimeVersion": "process://1",
                "kubeletVersion": f"v{KUBERNETES}",
                "kubeProxyVersion": "",
                "operatingSystem": "linux",
                "architecture": ARCHITECTURE,
            },
        }
        await self.api.ask(
            "PATCH", f"/api/v1/nodes/{self.name}/status", {"status": status}, kind=STRATEGIC
        )

    async def _renew(self) -> None:
        time = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        spec = {
            "holderIdentity": self.name,
            "leaseDurationSeconds": LEASE_SECONDS,
            "renewTime": time,
        }
        try:
            await self.api.ask("PATCH", f"{LEASES}/{self.name}", {"spec": spec}, kind=STRATEGIC)
        except RefusedError as refused:
            if refused.status != 404:
                raise
            body = {"metadata": {"name": self.name}, "spec": spec}
            with contextlib.suppress(
                RefusedError
            ):  # the namespace is made a moment later than all else
                await self.api.ask("POST", LEASES, body)

    async def _beat(self) -> None:
        while True:
            await self._renew()
            await asyncio.sleep(HEARTBEAT_SECONDS)

    async def _tell_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            await self._patch_status()

    async def _tell_events(self) -> None:
        while True:
            pod, kind, reason, message = await self._events.get()
            meta, time = pod["metadata"], statuses.now()
            body = {
                "metadata": {"generateName": f"{meta['name']}.", "namespace": meta["namespace"]},
                "involvedObject": {
                    "apiVersion": "v1",
                    "kind": "Pod",
                    "name": meta["name"],
                    "namespace": meta["namespace"],
                    "uid": meta["uid"],
                },
                "type": kind,
                "reason": reason,
                "message": message,
                "source": {"component": "kubelet", "host": self.name},
                "firstTimestamp": time,
                "lastTimestamp": time,
                "count": 1,
            }
            with contextlib.suppress(RefusedError):  # a namespace that ends takes no more
                await self.api.ask("POST", f"/api/v1/namespaces/{meta['namespace']}/events", body)

    def _service(self, event: str, service: Object) -> None:
        uid = service["metadata"]["uid"]
        if event == "DELETED":
            self._services.pop(uid, None)
        else:
            self._services[uid] = service
        self._write_names()

    def _pod(self, event: str, pod: Object) -> None:
        uid = pod["metadata"]["uid"]
        worker = self.workers.get(uid)
        if event == "DELETED":
            self._pods.pop(uid, None)
            if worker is not None:
                worker.vanish()
        else:
            self._pods[uid] = pod
            if worker is not None:
                worker.update(pod)
            elif pod["spec"].get("nodeName") == self.name:
                self._begin(pod)
        self._write_names()
        self._seen.set()

    def _begin(self, pod: Object) -> None:
        address = pod.get("status", {}).get("podIP") or self._addresses.new()
        worker = PodWorker(pod, address, self._world)
        self.workers[worker.uid] = worker
        worker.update(pod)
        task = asyncio.create_task(worker.run())
        self._tasks.add(task)
        task.add_done_callback(lambda done: self._ended(worker, done))

    def _ended(self, worker: PodWorker, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self.workers.pop(worker.uid, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("%s: %r", worker.path, error, exc_info=error)

    def _write_names(self) -> None:
        self._names.write(self._services.values(), self._pods.values())

    async def _place_on(self) -> None:
        """Take the pods that wait for a node and may run here."""
        while True:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._seen.wait(), RETRY_SECONDS)
            self._seen.clear()
            waiting = [pod for pod in self._pods.values() if _waits_for_a_node(pod)]
            if waiting:
                node = await self.api.ask("GET", f"/api/v1/nodes/{self.name}")
                for pod in sorted(waiting, key=lambda pod: pod["metadata"]["creationTimestamp"]):
                    await self._place(pod, node)

    async def _place(self, pod: Object, node: Object) -> None:
        placed = [
            other
            for other in self._pods.values()
            if other["spec"].get("nodeName") == self.name
            and other.get("status", {}).get("phase") not in ("Succeeded", "Failed")
        ]
        meta = pod["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        try:
            reason = refusal(pod, node, placed)
            why = f"1 {reason}" if reason else await self._missing_claim(pod)
            if why is None:
                body = {
                    "apiVersion": "v1",
                    "kind": "Binding",
                    "metadata": {"name": meta["name"], "uid": meta["uid"]},
                    "target": {"kind": "Node", "name": self.name},
                }
                await self.api.ask("POST", f"{path}/binding", body)
                pod["spec"]["nodeName"] = self.name  # until the watch says so
                place = f"{meta['namespace']}/{meta['name']}"
                message = f"Successfully assigned {place} to {self.name}"
                self._world.event(pod, "Normal", "Scheduled", message)
            else:
                await self._refuse(pod, path, f"0/1 nodes are available: {why}.")
        except RefusedError as refused:
            _log.info("%s: %s", path, refused)  # it is gone, or another node has taken it

    async def _missing_claim(self, pod: Object) -> str | None:
        """Which claim of the pod does not exist; one that does counts as bound."""
        for volume in pod["spec"].get("volumes", ()):
            if "persistentVolumeClaim" in volume:
                name = volume["persistentVolumeClaim"]["claimName"]
                space = f"/api/v1/namespaces/{pod['metadata']['namespace']}"
                try:
                    await self.api.ask("GET", f"{space}/persistentvolumeclaims/{name}")
                except RefusedError as refused:
                    if refused.status == 404:
                        return f'persistentvolumeclaim "{name}" not found'
                    raise
        return None

    async def _refuse(self, pod: Object, path: str, message: str) -> None:
        known = pod.get("status", {}).get("conditions", ())
        if any(c["type"] == "PodScheduled" and c.get("message") == message for c in known):
            return
        condition = {
            "type": "PodScheduled",
            "status": "False",
            "reason": "Unschedulable",
            "message": message,
            "lastTransitionTime": statuses.now(),
        }
        patch = {
            "metadata": {"uid": pod["metadata"]["uid"]},
            "status": {"conditions": [condition]},
        }
        await self.api.ask("PATCH", f"{path}/status", patch, kind=STRATEGIC)
        self._world.event(pod, "Warning", "FailedScheduling", message)


def _waits_for_a_node(pod: Object) -> bool:
    return (
        not pod["spec"].get("nodeName")
        and "deletionTimestamp" not in pod["metadata"]
        and not pod["spec"].get("schedulingGates")
        and pod["spec"].get("schedulerName", "default-scheduler") == "default-scheduler"
    )


async def _main(settings: Mapping[str, Any]) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await Node(settings).run(stop)


if __name__ == "__main__":
    logging.basicConfig(level=os.environ.get("LOG_LEVEL", "INFO"), stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    asyncio.run(_main(json.loads(Path(sys.argv[1]).read_text())))
