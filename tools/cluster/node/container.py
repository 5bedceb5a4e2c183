"""A container's life: image, environment, process, probes, end, and perhaps the same again."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tools.cluster.node import statuses
from tools.cluster.node.environment import Lookup, UnresolvedError, environment_of, expanded
from tools.cluster.node.images import Image, Images, is_image_name
from tools.cluster.node.paths import PathMap
from tools.cluster.node.probes import Probe
from tools.cluster.node.process import ContainerProcess
from tools.cluster.node.statuses import ContainerView
from tools.cluster.node.volumes import Volumes

Object = Mapping[str, Any]

TERMINATION_LOG = "/dev/termination-log"
LOST = "ContainerStatusUnknown"
LOST_MESSAGE = "The container could not be located when the pod was terminated"
RETRY_SECONDS = 1.0
MOST_BACKOFF_SECONDS = 300.0
STEADY_SECONDS = 600.0
"""A container that has run for so long begins its back-off anew."""
PROBES = ("startupProbe", "livenessProbe", "readinessProbe")


@dataclass(frozen=True)
class Surroundings:
    """What the containers of one pod share."""

    pod: Object
    folder: Path
    images: Images
    volumes: Volumes
    lookup: Lookup
    variables: Mapping[str, str]
    """Of the node, laid under those of the image."""
    own: tuple[Path, ...]
    """Folders of this machine that the pod may name."""
    backoff_seconds: float
    changed: Callable[[], None]
    """Called after each change that a status tells."""
    event: Callable[[str, str, str], None]
    """Tells an Event: type, reason, message."""

    @property
    def address(self) -> str:
        """The pod's."""
        return str(self.pod["status"]["podIP"])

    @property
    def grace_seconds(self) -> float:
        """How long a container of the pod may take to end."""
        return float(self.pod["spec"].get("terminationGracePeriodSeconds", 30))


class Container:
    """One container of a pod; `view` is what a status tells of it."""

    def __init__(self, spec: Object, around: Surroundings, *, waits: str) -> None:
        """`waits`: why it has not begun."""
        self.spec = spec
        self.view = ContainerView(spec["name"], spec["image"], statuses.waiting(waits))
        self.process: ContainerProcess | None = None
        self.at_work = False
        """From just before a process of it starts to the end of all that this has started."""
        self.over = False
        """Whether it has ended and is not started again."""
        self._around = around
        self._stopping = False
        self._restart: Callable[[int], bool] = lambda _code: True

    async def run(self, restart: Callable[[int], bool]) -> int:
        """Run it until it ends for good; returns its last exit code.

        `restart` says of an exit code whether it is started again.
        """
        delay = 0.0
        self._restart = restart
        while True:
            began = asyncio.get_running_loop().time()
            code = await self._once()
            if self._stopping or not restart(code):
                return code
            if asyncio.get_running_loop().time() - began > STEADY_SECONDS:
                delay = 0.0
            await self._back_off(delay)
            delay = min(max(delay * 2, self._around.backoff_seconds), MOST_BACKOFF_SECONDS)
            self.view.restarts += 1

    async def stop(self, seconds: float) -> None:
        """End it, and start it no more."""
        self._stopping = True
        if self.process is not None:
            await self.process.stop(seconds)

    def lose(self) -> None:
        """Nobody knows how it has ended."""
        self._ended(statuses.KILLED, since=statuses.now(), message=LOST_MESSAGE, reason=LOST)

    async def _once(self) -> int:
        image = await self._image()
        environment, paths = await self._environment(image)
        end = self._termination_log(environment, paths)
        since = statuses.now()
        self.view.identity = (
            f"process://{self._around.pod['metadata']['uid']}/{self.view.name}/{self.view.restarts}"
        )
        process = self.process = self._process(image, environment, paths)
        if self._stopping:
            return statuses.KILLED
        self.at_work = True
        try:
            await process.start()
        except OSError as error:
            message = f"failed to start {process.identity}: {error}"
            self._around.event("Warning", "Failed", f"Error: {message}")
            self._ended(statuses.NEVER_STARTED, since=since, message=message, reason="StartError")
            return statuses.NEVER_STARTED
        self._running(since)
        async with self._probed(process, paths):
            code = statuses.exit_code(await process.wait())
        message = statuses.termination_message(
            end.read_bytes() if end.is_file() else b"",
            _tail(process.log),
            policy=self.spec.get("terminationMessagePolicy", "File"),
            code=code,
        )
        reason = "OOMKilled" if process.out_of_memory else None
        self._ended(code, since=since, message=message, reason=reason)
        return code

    async def _image(self) -> Image:
        """The image, once this node has it: a person may mend a name that it never will have."""
        name = self.spec["image"]
        if not is_image_name(name):
            await self._wait_for_ever(
                "InvalidImageName", f'Failed to apply default image tag "{name}"'
            )
        delay = self._around.backoff_seconds
        while (image := self._around.images.find(name)) is None:
            if self.spec.get("imagePullPolicy") == "Never":
                await self._wait_for_ever(
                    "ErrImageNeverPull",
                    f'Container image "{name}" is not present with pull policy of Never',
                )
            self._waits("ErrImagePull", f'failed to pull and unpack image "{name}": not found')
            self._around.event("Warning", "Failed", f'Failed to pull image "{name}": not found')
            await asyncio.sleep(RETRY_SECONDS)
            self._waits("ImagePullBackOff", f'Back-off pulling image "{name}"')
            self._around.event("Normal", "BackOff", f'Back-off pulling image "{name}"')
            await asyncio.sleep(delay)
            delay = min(delay * 2, MOST_BACKOFF_SECONDS)
        return image

    async def _environment(self, image: Image) -> tuple[dict[str, str], PathMap]:
        around = self._around
        while True:
            try:
                values = await environment_of(
                    around.pod, self.spec, around.lookup, {**around.variables, **image.variables()}
                )
                break
            except UnresolvedError as missing:
                self._waits("CreateContainerConfigError", str(missing))
                self._around.event("Warning", "Failed", f"Error: {missing}")
                await asyncio.sleep(RETRY_SECONDS)
        mounts = around.volumes.mounts(self.spec, values)
        end = around.folder / self.view.name / "termination-log"
        path = self.spec.get("terminationMessagePath", TERMINATION_LOG)
        paths = PathMap({**mounts, path: end}, around.own)
        return {name: paths.rewritten(value) for name, value in values.items()}, paths

    def _termination_log(self, environment: Mapping[str, str], paths: PathMap) -> Path:
        end = paths.folder(self.spec.get("terminationMessagePath", TERMINATION_LOG))
        end.parent.mkdir(parents=True, exist_ok=True)
        end.write_bytes(b"")
        return end

    def _process(
        self, image: Image, environment: Mapping[str, str], paths: PathMap
    ) -> ContainerProcess:
        words = [paths.rewritten(expanded(w, environment)) for w in image.command(self.spec)]
        found = shutil.which(words[0], path=environment.get("PATH"))
        home = self._around.folder / self.view.name
        working = self.spec.get("workingDir")
        return ContainerProcess(
            self.view.identity,
            [found or words[0], *words[1:]],
            folder=paths.folder(working) if working else home,
            environment={"HOME": str(home), **environment},
            log=home / f"{self.view.restarts}.log",
        )

    @contextlib.asynccontextmanager
    async def _probed(self, process: ContainerProcess, paths: PathMap) -> AsyncIterator[None]:
        asking = asyncio.create_task(self._probe(process, paths))
        try:
            yield
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    async def _probe(self, process: ContainerProcess, paths: PathMap) -> None:
        """Ask whether it has started, and then whether it is alive and ready."""
        if "startupProbe" in self.spec:
            started = asyncio.Event()
            asking = asyncio.create_task(
                self._asked("startupProbe", process, paths, started.set).ask_on()
            )
            try:
                await started.wait()
            finally:
                asking.cancel()
        self.view.started = True
        self.view.ready = "readinessProbe" not in self.spec
        self._around.changed()
        async with asyncio.TaskGroup() as group:
            for name in ("livenessProbe", "readinessProbe"):
                if name in self.spec:
                    group.create_task(self._asked(name, process, paths).ask_on())

    def _asked(
        self,
        name: str,
        process: ContainerProcess,
        paths: PathMap,
        started: Callable[[], None] | None = None,
    ) -> Probe:
        kind = name.removesuffix("Probe")

        def told(good: bool, said: str) -> None:
            if not good:
                self._around.event("Warning", "Unhealthy", f"{kind.title()} probe failed: {said}")
            if kind == "readiness":
                self.view.ready = good
                self._around.changed()
            elif good and started is not None:
                started()
            elif not good and process.pid is not None:
                message = f"Container {self.view.name} failed {kind} probe, will be restarted"
                self._around.event("Normal", "Killing", message)
                self._kill_later(process)

        async def run(command: Sequence[str], seconds: float) -> int | None:
            return await process.run_beside([paths.rewritten(word) for word in command], seconds)

        return Probe(
            self.spec[name],
            address=self._around.address,
            ports={
                p["name"]: p["containerPort"] for p in self.spec.get("ports", ()) if "name" in p
            },
            run=run,
            told=told,
            first=kind == "liveness",
        )

    def _kill_later(self, process: ContainerProcess) -> None:
        self._killing = asyncio.create_task(process.stop(self._around.grace_seconds))

    def _running(self, since: str) -> None:
        self.view.state = statuses.running(since)
        self.view.ready = self.view.started = False
        if not any(name in self.spec for name in PROBES):
            self.view.ready = self.view.started = True
        self._around.event("Normal", "Started", f"Started container {self.view.name}")
        self._around.changed()

    def _ended(self, code: int, *, since: str, message: str, reason: str | None) -> None:
        self.at_work = False
        self.view.ready = self.view.started = False
        self.view.state = statuses.terminated(
            code, since=since, message=message, identity=self.view.identity, reason=reason
        )
        # Said with the end, so that one status tells both.
        self.over = self._stopping or not self._restart(code)
        self._around.changed()

    async def _back_off(self, delay: float) -> None:
        self.view.last = self.view.state
        if delay:
            pod = self._around.pod["metadata"]
            message = f"back-off {delay:g}s restarting failed container={self.view.name}"
            whole = f"{message} pod={pod['name']}_{pod['namespace']}({pod['uid']})"
            self._waits("CrashLoopBackOff", whole)
            self._around.event("Warning", "BackOff", whole)
            await asyncio.sleep(delay)

    async def _wait_for_ever(self, reason: str, message: str) -> None:
        self._waits(reason, message)
        self._around.event("Warning", "Failed", f"Error: {reason}: {message}")
        await asyncio.Event().wait()

    def _waits(self, reason: str, message: str) -> None:
        self.view.state = statuses.waiting(reason, message)
        self._around.changed()


def _tail(log: Path) -> bytes:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - statuses.LOG_BYTES))
        return file.read()
