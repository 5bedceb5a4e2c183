"""One session on a cluster, seen through with kubectl, and the same one outside of it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import yaml

from esper.services.tolaria.checkpoint_manifest import LOGS
from tools.chaos_checks import condition, differences, timeless
from tools.cluster.programs import cluster_program
from tools.rank_worker import AGENT, RANK, Worker

SHOWN_SECONDS = 5.0
SECONDS = 3600.0
GONE_SECONDS = 120.0
COLUMNS = {
    "ts": "NAME STATE EPOCH METRIC PARAMS SEEDS FOSSILIZED WORKERS AGE",
    "seeds": "NAME SESSION LAYER STATE BLUEPRINT ALPHA HEALTH GAIN AGE",
    "bp": "NAME STATE BUILTIN PARAMS KERNELS AGE",
    "ck": "NAME BLUEPRINT LAYER READY BYTES PARAMS AGE",
}
"""What `kubectl get` shows of each kind."""


class DemoFailed(RuntimeError):  # noqa: N818
    """The demonstration could not go on; the message says why."""


class DemoCluster(Protocol):
    """A cluster with Esper in it, as the demonstration uses it."""

    @property
    def folder(self) -> Path:
        """Where what is fetched from it goes."""

    @property
    def kubeconfig(self) -> Path:
        """Of one who may do all that the demonstration does."""

    @property
    def namespace(self) -> str | None:
        """Where the session goes; None for the one that kubectl takes by itself."""

    @property
    def catalogue(self) -> str | None:
        """Where the catalogue's Blueprints are; None as for `namespace`."""

    @property
    def used(self) -> bool:
        """Whether sessions have trained there before, so that the hub may have all kernels."""

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints; `given` is its standard input.

        Raises:
            ServerError: it ended with an error.
        """

    def processes(self, pod: str) -> list[str]:
        """The command lines of all that runs in a pod."""

    def mend(self) -> bool:
        """Start what has ended and does not come back by itself; whether anything had."""


class Demo:
    """Applies a session to a cluster that runs, waits for its end, and checks what can be seen."""

    def __init__(
        self,
        cluster: DemoCluster,
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
        self._seconds: dict[str, float] = {}
        self._trained: set[str] = set()
        self._kernels: dict[str, int] = {}
        document = next(yaml.safe_load_all(manifest.read_text()))
        self._name = str(document["metadata"]["name"])
        self._ranks = int(document["spec"]["workers"]["replicas"])

    def run(self) -> dict[str, object]:
        """What was checked, by its command; `holds` says whether all of it does.

        Raises:
            DemoFailed: the session did not succeed, or the demonstration was stopped.
            ServerError: kubectl failed.
        """
        self._removed()
        with self._timed("session"):
            self._kubectl("apply", "-f", str(self._manifest))
            session = self._followed()
        self._kubectl("wait", "--for=condition=Succeeded", "--timeout=10s", f"ts/{self._name}")
        self._listed()
        self._checks[f"{self._ranks} pods under torchrun"] = len(self._trained) == self._ranks
        self._described()
        self._scaled()
        with self._timed("outside"):
            differing = self._differing()
        self._checks["equal to esper worker to the bit"] = not differing
        status = session["status"]
        return {
            "session": self._name,
            "seconds": self._seconds,
            "epochs": status["epoch"],
            "attempts": status["attempt"],
            "fossilized": status["seeds"]["fossilized"],
            "kernels": self._kernels,
            "metrics": status["metrics"],
            "checks": self._checks,
            "differing": differing,
            "holds": all(self._checks.values()),
        }

    def _removed(self) -> None:
        """Take away what an earlier demonstration has left, the Seeds and pods of it too."""
        self._cluster.kubectl("delete", "ts", self._name, "--ignore-not-found")
        end = time.monotonic() + GONE_SECONDS
        while self._of_session("seeds") or self._of_session("pods"):
            if time.monotonic() > end or self._stop.wait(1.0):
                raise DemoFailed(f"an earlier {self._name} has not gone")

    def _followed(self) -> dict[str, Any]:
        """The session once it has succeeded; how it stands is shown meanwhile."""
        deadline, shown = time.monotonic() + SECONDS, ""
        while True:
            if self._cluster.mend():
                self._say("the operator had ended; it is started anew")
            session: dict[str, Any] = self._get("ts", self._name)
            line = self._cluster.kubectl("get", "ts", self._name, "--no-headers").strip()
            if line.rsplit(maxsplit=1)[0] != shown:  # without its age
                shown = line.rsplit(maxsplit=1)[0]
                self._say(line)
            if session.get("status", {}).get("epoch", 0) > 0 and not self._trained:
                self._look()
            found = condition(session, "Succeeded")
            if found.get("status") == "True":
                return session
            if found.get("status") == "False":
                raise DemoFailed(f"{self._name}: {found['reason']}: {found['message']}")
            if time.monotonic() > deadline or self._stop.wait(SHOWN_SECONDS):
                raise DemoFailed(f"{self._name} has not ended")

    def _listed(self) -> None:
        for kind, columns in COLUMNS.items():
            within = self._cluster.catalogue if kind == "bp" else self._cluster.namespace
            text = self._kubectl("get", kind, within=within)
            if text or kind != "ck":  # whose check is `_compiled`
                self._checks[f"get {kind}"] = text.partition("\n")[0].split() == columns.split()
        self._checks["a kernel made by a compile Job"] = self._compiled()
        selected = f"--field-selector=spec.session={self._name},status.state=fossilized"
        seeds = self._kubectl("get", "seeds", selected, "-o", "name").split()
        counted = self._get("ts", self._name)["status"]["seeds"]["fossilized"]
        self._checks["get seeds --field-selector"] = 0 < len(seeds) == counted

    def _compiled(self) -> bool:
        """Whether a kernel that is ready was compiled by a Job.

        A session asks only for kernels that the hub does not have: where one like it has trained
        before it may have needed none.
        """
        said = [condition(kernel, "Ready") for kernel in self._get("ck")["items"]]
        ready = [one for one in said if one.get("status") == "True"]
        made = [one for one in ready if one.get("message", "").startswith("Job ")]
        self._kernels = {"ready": len(ready), "compiledByJobs": len(made)}
        if not said:
            self._say("no kernel had to be compiled: the hub has those of an earlier session")
        return bool(made) or (self._cluster.used and not said)

    def _look(self) -> None:
        """See which worker pods have torchrun and a rank of it at work."""
        for pod in self._of_session("pods"):
            name = pod["metadata"]["name"]
            if pod["metadata"]["labels"].get("esper.dev/role") == "worker":
                found = self._cluster.processes(name)
                if all(any(part in words for words in found) for part in (AGENT, RANK)):
                    self._trained.add(name)
        self._say(f"torchrun and a rank are at work in {', '.join(sorted(self._trained))}")

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
        self._cluster.kubectl("apply", "-f", "-", given=yaml.safe_dump(document))
        self._kubectl("scale", f"ts/{name}", f"--replicas={self._ranks + 1}")
        scaled = self._get("ts", name)["spec"]["workers"]["replicas"]
        self._checks["scale"] = scaled == self._ranks + 1
        self._kubectl("delete", "ts", name)

    def _differing(self) -> list[str]:
        """Which files of the run differ from those of one outside of the cluster."""
        inside, outside = self._cluster.folder / "inside", self._cluster.folder / "outside"
        self._fetched(inside)
        self._say(f"the same session by `esper worker` with {self._ranks} ranks, no cluster")
        if (outside / "manifest.yaml").is_file():
            shutil.rmtree(outside)  # that of an earlier demonstration, which has ended
        with Worker(self._manifest, outside, self._ranks, outside.with_suffix(".log")) as worker:
            if worker.wait() != 0:
                raise DemoFailed(f"outside of the cluster: {worker.log.read_text()[-1000:]}")
        if not timeless(inside / LOGS[0]):
            raise DemoFailed("the hub has no metrics of the session")
        return differences(outside, inside)

    def _fetched(self, directory: Path) -> None:
        """Fetch what the session has left, as a person would."""
        words = ["esper", "fetch", self._name, f"--output-dir={directory}", "--overwrite"]
        if self._cluster.namespace is not None:
            words.append(f"--namespace={self._cluster.namespace}")
        self._say(f"$ {' '.join(words)}")
        own = {"KUBECONFIG": str(self._cluster.kubeconfig)}
        path = f"{cluster_program('kubectl').parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [sys.executable, "-m", *words],
            env=os.environ | own | {"PATH": path},
            capture_output=True,
            text=True,
        )
        self._say((done.stdout + done.stderr).rstrip())
        if done.returncode:
            raise DemoFailed(f"esper fetch {self._name} ended with {done.returncode}")

    def _of_session(self, kind: str) -> list[dict[str, Any]]:
        """The objects of a kind that belong to the session."""
        found = self._get(kind, f"--selector=esper.dev/session={self._name}")["items"]
        return list(found)

    def _get(self, *words: str) -> Any:
        return json.loads(self._cluster.kubectl("get", *words, "-o", "json"))

    def _kubectl(self, *words: str, within: str | None = None) -> str:
        """Show a command and what it prints; `within` is a namespace other than the session's."""
        namespace = within or self._cluster.namespace
        named = [] if namespace is None else ["-n", namespace]
        self._say(f"$ kubectl {' '.join([*named, *words])}")
        text = self._cluster.kubectl(*words, *named)
        self._say(text.rstrip())
        return text

    @contextmanager
    def _timed(self, step: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[step] = round(time.monotonic() - began, 1)
