"""One session on a local cluster, seen through with kubectl, and the same one outside of it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import SecretStr

from esper.configs import HubConfig
from esper.services.tolaria.checkpoint_manifest import LOGS
from esper.services.urza.auth import Role
from esper.services.urza.http_objects import HubObjects
from tools.chaos_checks import timeless
from tools.chaos_ranks import MODEL, differences
from tools.local_cluster import LocalCluster
from tools.rank_worker import Worker

SHOWN_SECONDS = 5.0
SECONDS = 3600.0
RESULTS = "results"
COLUMNS = {
    "ts": "NAME STATE EPOCH METRIC PARAMS SEEDS FOSSILIZED WORKERS AGE",
    "seeds": "NAME SESSION LAYER STATE BLUEPRINT ALPHA HEALTH GAIN AGE",
    "bp": "NAME STATE BUILTIN PARAMS KERNELS AGE",
    "ck": "NAME BLUEPRINT LAYER READY BYTES PARAMS AGE",
}
"""What `kubectl get` shows of each kind."""


class DemoFailed(RuntimeError):  # noqa: N818
    """The demonstration could not go on; the message says why."""


class Demo:
    """Applies a session to a cluster that runs, waits for its end, and checks what can be seen."""

    def __init__(
        self,
        cluster: LocalCluster,
        manifest: Path,
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """`say` shows a line; `stop` breaks the demonstration off."""
        self._cluster = cluster
        self._manifest = manifest
        self._say = say
        self._stop = stop
        self._checks: dict[str, bool] = {}
        document = next(yaml.safe_load_all(manifest.read_text()))
        self._name = str(document["metadata"]["name"])
        self._ranks = int(document["spec"]["workers"]["replicas"])

    def run(self) -> dict[str, object]:
        """What was checked, by its command; `holds` says whether all of it does.

        Raises:
            DemoFailed: the session did not succeed, or the demonstration was stopped.
            ServerError: kubectl failed.
        """
        began = time.monotonic()
        self._kubectl("apply", "-f", str(self._manifest))
        session = self._followed()
        seconds = time.monotonic() - began
        self._kubectl("wait", "--for=condition=Succeeded", "--timeout=10s", f"ts/{self._name}")
        self._listed()
        self._described()
        self._scaled()
        self._say(f"the same session by `esper worker` with {self._ranks} ranks, no cluster")
        differing = self._differing(session["metadata"]["uid"])
        self._checks["equal to esper worker to the bit"] = not differing
        status = session["status"]
        return {
            "session": self._name,
            "seconds": round(seconds, 1),
            "epochs": status["epoch"],
            "attempts": status["attempt"],
            "fossilized": status["seeds"]["fossilized"],
            "metrics": status["metrics"],
            "checks": self._checks,
            "differing": differing,
            "holds": all(self._checks.values()),
        }

    def _followed(self) -> dict[str, Any]:
        """The session once it has succeeded; how it stands is shown meanwhile."""
        deadline, shown = time.monotonic() + SECONDS, ""
        while True:
            if self._cluster.mend():
                self._say("the operator had ended; it is started anew")
            session: dict[str, Any] = self._cluster.plane.get("ts", self._name)
            line = self._cluster.plane.kubectl("get", "ts", self._name, "--no-headers").strip()
            if line.rsplit(maxsplit=1)[0] != shown:  # without its age
                shown = line.rsplit(maxsplit=1)[0]
                self._say(line)
            found = condition(session, "Succeeded")
            if found.get("status") == "True":
                return session
            if found.get("status") == "False":
                raise DemoFailed(f"{self._name}: {found['reason']}: {found['message']}")
            if time.monotonic() > deadline or self._stop.wait(SHOWN_SECONDS):
                raise DemoFailed(f"{self._name} has not ended")

    def _listed(self) -> None:
        for kind, columns in COLUMNS.items():
            text = self._kubectl("get", kind)
            self._checks[f"get {kind}"] = text.splitlines()[0].split() == columns.split()
        plane = self._cluster.plane
        kernels = plane.get("ck")["items"]
        ready = [kernel for kernel in kernels if condition(kernel, "Ready").get("status") == "True"]
        jobs = {job["metadata"]["name"] for job in plane.get("jobs")["items"]}
        made = [k for k in ready if f"compile-{k['metadata']['name']}" in jobs]
        self._checks["a kernel made by a compile Job"] = bool(made)
        selected = f"--field-selector=spec.session={self._name},status.state=fossilized"
        seeds = self._kubectl("get", "seeds", selected, "-o", "name").split()
        counted = plane.get("ts", self._name)["status"]["seeds"]["fossilized"]
        self._checks["get seeds --field-selector"] = 0 < len(seeds) == counted

    def _described(self) -> None:
        text = self._kubectl("describe", "ts", self._name)
        self._checks["describe ts"] = "Events:" in text and "esper-operator" in text
        text = self._kubectl("explain", "ts.spec.growth")
        self._checks["explain ts.spec.growth"] = "parametersPercent" in text or "budget" in text

    def _scaled(self) -> None:
        """`kubectl scale` of a session that is suspended, which alone may be resized."""
        name = f"{self._name}-suspended"
        document = next(yaml.safe_load_all(self._manifest.read_text()))
        document["metadata"]["name"] = name
        document["spec"]["runPolicy"] = {"suspend": True}
        plane = self._cluster.plane
        plane.kubectl("apply", "-f", "-", given=yaml.safe_dump(document))
        self._kubectl("scale", f"ts/{name}", f"--replicas={self._ranks + 1}")
        scaled = plane.get("ts", name)["spec"]["workers"]["replicas"]
        self._checks["scale"] = scaled == self._ranks + 1
        self._kubectl("delete", "ts", name)

    def _differing(self, uid: str) -> list[str]:
        """Which files of the run differ from those of one outside of the cluster."""
        inside, outside = self._cluster.folder / "inside", self._cluster.folder / "outside"
        inside.mkdir()
        for name, content in asyncio.run(self._results(uid)).items():
            (inside / name).write_bytes(content)
        with Worker(self._manifest, outside, self._ranks, outside.with_suffix(".log")) as worker:
            if worker.wait() != 0:
                raise DemoFailed(f"outside of the cluster: {worker.log.read_text()[-1000:]}")
        if not timeless(inside / LOGS[0]):
            raise DemoFailed("the hub has no metrics of the session")
        return differences(outside, inside)

    async def _results(self, uid: str) -> dict[str, bytes]:
        token = SecretStr(self._cluster.stack.token(Role.ADMIN))
        hub = HubObjects(HubConfig(url=self._cluster.stack.urza.url, token=token), uid)
        found = {name: await hub.get(f"{RESULTS}/{name}") for name in (*LOGS, MODEL)}
        await hub.close()
        return {name: content for name, content in found.items() if content is not None}

    def _kubectl(self, *words: str) -> str:
        self._say(f"$ kubectl {' '.join(words)}")
        text = self._cluster.plane.kubectl(*words)
        self._say(text.rstrip())
        return text


def condition(found: dict[str, Any], kind: str) -> dict[str, Any]:
    """A condition of an object; empty where it has none of that kind."""
    conditions = found.get("status", {}).get("conditions", ())
    return next((item for item in conditions if item["type"] == kind), {})
