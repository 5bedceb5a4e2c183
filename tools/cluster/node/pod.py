"""A pod's life on this node: volumes, containers, status, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.cluster.node import statuses
from tools.cluster.node.api import STRATEGIC, Api, RefusedError
from tools.cluster.node.container import RETRY_SECONDS, Container, Surroundings
from tools.cluster.node.environment import UnresolvedError
from tools.cluster.node.images import Images
from tools.cluster.node.network import network_environment
from tools.cluster.node.paths import PathMap
from tools.cluster.node.process import NODE_MARK
from tools.cluster.node.volumes import Volumes

Object = dict[str, Any]

HOST_ADDRESS = "127.0.0.1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NodeWorld:
    """What all pods of a node share."""

    api: Api
    folder: Path
    links: Path
    """A folder with a short path."""
    names: Path
    images: Images
    own: tuple[Path, ...]
    mark: str
    backoff_seconds: float
    variables: Mapping[str, str]
    event: Callable[[Object, str, str, str], None]
    """Tells an Event of a pod: pod, type, reason, message."""


class PodWorker:
    """Everything about one pod; `update` tells it what the API server says of the pod."""

    def __init__(self, pod: Object, address: str, world: NodeWorld) -> None:
        meta = pod["metadata"]
        self.uid: str = meta["uid"]
        self.pod = pod
        self.address = address
        self.folder = world.folder / "pods" / f"{meta['namespace']}_{meta['name']}_{meta['uid']}"
        self.path = f"/api/v1/namespaces/{meta['namespace']}/pods/{meta['name']}"
        self._world = world
        self._start_time = statuses.now()
        self._ending = asyncio.Event()
        self._dirty = asyncio.Event()
        self._writing = asyncio.Lock()
        self._written: Object | None = None
        self._version = 0
        self._over = False
        self._gone = False
        claims = world.folder / "claims" / meta["namespace"]
        known = {"hostIP": HOST_ADDRESS, "podIP": address}
        # What a container may ask for is known from the beginning.
        seen = {**pod, "status": {**pod.get("status", {}), **known}}
        self._volumes = Volumes(
            seen,
            self.folder / "volumes",
            world.links,
            claims,
            lookup=self._lookup,
            api=world.api,
        )
        hosts = [v["hostPath"]["path"] for v in pod["spec"].get("volumes", ()) if "hostPath" in v]
        around = Surroundings(
            pod=seen,
            folder=self.folder,
            images=world.images,
            volumes=self._volumes,
            lookup=self._lookup,
            variables={
                **world.variables,
                **network_environment(pod, address, world.names),
                NODE_MARK: world.mark,
                "HOSTNAME": pod["spec"].get("hostname") or meta["name"],
                "TMPDIR": str(self.folder / "tmp"),
            },
            own=(*world.own, *map(Path, hosts)),
            backoff_seconds=world.backoff_seconds,
            changed=self._dirty.set,
            event=lambda *said: world.event(self.pod, *said),
        )
        inits, mains = pod["spec"].get("initContainers", ()), pod["spec"]["containers"]
        waits = statuses.INITIALIZING if inits else statuses.CREATING
        self.inits = [Container(spec, around, waits=waits) for spec in inits]
        self.mains = [Container(spec, around, waits=waits) for spec in mains]
        self._around = around
        self._policy: str = pod["spec"].get("restartPolicy", "Always")

    @property
    def containers(self) -> tuple[Container, ...]:
        """All of them, in the order in which they begin."""
        return (*self.inits, *self.mains)

    def update(self, pod: Object) -> None:
        """Take in what the API server says."""
        self.pod = pod
        if "deletionTimestamp" in pod["metadata"]:
            self._ending.set()
        if not self._writing.locked():
            self._compare()

    def vanish(self) -> None:
        """The pod is gone without having ended here: end it at once."""
        self._gone = True
        self._ending.set()
        for container in self.containers:
            if container.process is not None:
                container.process.kill()

    async def run(self) -> None:
        """The whole life, from here to the pod's deletion."""
        writing = asyncio.create_task(self._write_on())
        try:
            if self._was_begun():
                self._lose()
            await self._until_the_end()
            if not self._gone:
                await self._delete()
            await asyncio.to_thread(self._volumes.remove)
        finally:
            writing.cancel()
            await asyncio.gather(writing, return_exceptions=True)

    async def _until_the_end(self) -> None:
        life = asyncio.create_task(self._live())
        ending = asyncio.create_task(self._ending.wait())
        try:
            await asyncio.wait({life, ending}, return_when=asyncio.FIRST_COMPLETED)
            if life.done() and (error := life.exception()) is not None:
                _log.error("%s: %r", self.path, error, exc_info=error)
            await ending
            stopped = not life.done()
            if stopped:
                await self._stop()
        finally:
            # Also where the node itself ends: a life that went on would start again what ends.
            life.cancel()
            ending.cancel()
            await asyncio.gather(life, ending, return_exceptions=True)
        if stopped:
            for container in self.containers:
                if container.view.done is None:
                    container.lose()
        self._over = True
        self._dirty.set()

    async def _live(self) -> None:
        """From the volumes to the last end of its containers; without limit where they go on."""
        if self._over:
            return
        (self.folder / "tmp").mkdir(parents=True, exist_ok=True)
        for container in self.containers:
            (self.folder / container.view.name).mkdir(exist_ok=True)
        self._dirty.set()
        await self._make_volumes()
        # One that is always started again is not, once it has done its work.
        restart_init = _never if self._policy == "Never" else _on_failure
        for container in self.inits:
            if await container.run(restart_init):
                break
        else:
            for container in self.mains:
                container.view.state = statuses.waiting(statuses.CREATING)
            restart = _RESTARTS[self._policy]
            await asyncio.gather(*(container.run(restart) for container in self.mains))
        self._over = True
        self._dirty.set()

    async def _make_volumes(self) -> None:
        while True:
            try:
                await self._volumes.make()
                break
            except UnresolvedError as missing:
                self._around.event("Warning", "FailedMount", f"MountVolume.SetUp failed: {missing}")
                await asyncio.sleep(RETRY_SECONDS)
        mounts: dict[str, Path] = {}
        for container in self.containers:
            mounts |= self._volumes.mounts(container.spec, {})
        paths = PathMap(mounts, self._around.own)
        for file in self._volumes.files():
            with contextlib.suppress(UnicodeDecodeError):
                text = file.read_text(encoding="utf-8")
                if (changed := paths.rewritten(text)) != text:
                    file.write_text(changed, encoding="utf-8")

    async def _stop(self) -> None:
        seconds = 0.0 if self._gone else self._grace_seconds()
        for container in self.containers:
            if container.process is not None and container.process.pid is not None:
                message = f"Stopping container {container.view.name}"
                self._around.event("Normal", "Killing", message)
        while True:
            await asyncio.gather(*(container.stop(seconds) for container in self.containers))
            if not any(container.at_work for container in self.containers):
                break
            await asyncio.sleep(0.005)

    def _grace_seconds(self) -> float:
        given = self.pod["metadata"].get("deletionGracePeriodSeconds")
        return self._around.grace_seconds if given is None else float(given)

    def _was_begun(self) -> bool:
        """Whether an earlier life of this node has begun it: its processes have ended with that."""
        status = self.pod.get("status", {})
        known = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
        return any(each.get("containerID") for each in known)

    def _lose(self) -> None:
        """Take over what was written of it; what ran is lost."""
        status = self.pod["status"]
        self._start_time = status.get("startTime", self._start_time)
        known = [*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())]
        by_name = {each["name"]: each for each in known}
        lost = False
        for container in self.containers:
            before = by_name.get(container.view.name, {})
            container.view.identity = before.get("containerID", "")
            container.view.restarts = before.get("restartCount", 0)
            container.view.state = before.get("state", container.view.state)
            if container.view.done is None:
                lost = True
                container.lose()
        finished = status.get("phase") in ("Succeeded", "Failed")
        if finished or self._policy == "Never" or not lost:
            self._over = True
        else:
            for container in self.containers:
                container.view.last = container.view.state
                container.view.state = statuses.waiting(statuses.CREATING)
                container.view.restarts += 1
        self._dirty.set()

    async def _lookup(self, kind: str, name: str) -> Object | None:
        namespace = self.pod["metadata"]["namespace"]
        try:
            return await self._world.api.ask("GET", f"/api/v1/namespaces/{namespace}/{kind}/{name}")
        except RefusedError as refusal:
            if refusal.status == 404:
                return None
            raise

    def status(self) -> Object:
        """What a kubelet would write now."""
        inits = [container.view for container in self.inits]
        mains = [container.view for container in self.mains]
        phase = statuses.phase_of(inits, mains, self._policy, over=self._is_over())
        generation = self.pod["metadata"].get("generation", 1)
        conditions = statuses.conditions_of(phase, inits, mains, generation)
        before = self.pod.get("status", {}).get("conditions", ())
        if self._written is not None:
            before = self._written["conditions"]
        return {
            "phase": phase,
            "observedGeneration": generation,
            "conditions": statuses.dated(conditions, before),
            "hostIP": HOST_ADDRESS,
            "hostIPs": [{"ip": HOST_ADDRESS}],
            "podIP": self.address,
            "podIPs": [{"ip": self.address}],
            "startTime": self._start_time,
            "initContainerStatuses": [view.status() for view in inits],
            "containerStatuses": [view.status() for view in mains],
        }

    async def _write_on(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._write()

    async def _write(self) -> None:
        async with self._writing:
            status = self.status()
            if status == self._written or self._gone:
                return
            self._written = status
            patch = {"metadata": {"uid": self.uid}, "status": status}
            path = f"{self.path}/status"
            try:
                found = await self._world.api.ask("PATCH", path, patch, kind=STRATEGIC)
                self._version = int(found["metadata"]["resourceVersion"])
                self._compare()
            except RefusedError as refusal:
                if refusal.status not in (404, 409):  # gone, or another of its name is there
                    _log.error("%s: %s", path, refusal)

    def _is_over(self) -> bool:
        """Whether none of its containers will be started any more."""
        failed = any(container.over and container.view.done for container in self.inits)
        return self._over or failed or all(container.over for container in self.mains)

    def _compare(self) -> None:
        """Write again where the pod, as it was after the last write, is not as that has it."""
        pod = self.pod
        if int(pod["metadata"]["resourceVersion"]) > self._version and self._differs(pod):
            self._written = None
            self._dirty.set()

    def _differs(self, pod: Object) -> bool:
        """Whether somebody else has written what only a node writes."""
        if self._written is None:
            return False
        status = pod.get("status", {})
        there = {c["type"]: c["status"] for c in status.get("conditions", ())}
        ours = {c["type"]: c["status"] for c in self._written["conditions"]}
        same = ours.items() <= there.items()
        return not same or status.get("phase") != self._written["phase"]

    async def _delete(self) -> None:
        """Write the last status, and let the API server forget the pod."""
        await self._write()
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "gracePeriodSeconds": 0,
            "preconditions": {"uid": self.uid},
        }
        with contextlib.suppress(RefusedError):
            await self._world.api.ask("DELETE", self.path, body)


def _always(_code: int) -> bool:
    return True


def _on_failure(code: int) -> bool:
    return code != 0


def _never(_code: int) -> bool:
    return False


_RESTARTS: Mapping[str, Callable[[int], bool]] = {
    "Always": _always,
    "OnFailure": _on_failure,
    "Never": _never,
}
