"""One session on a cluster, seen through with kubectl, and the same one outside of it."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

import yaml

from esper.contracts.manifests import load_manifest
from esper.errors import BadInput
from esper.services.tolaria.checkpoint_manifest import LOGS
from tools import kubectl
from tools.chaos_checks import condition, differences, kernels_of, timeless, was_compiled
from tools.manifests import session_document
from tools.rank_worker import AGENT, RANK, Worker
from tools.servers.process import ServerError

SHOWN_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""Until all pods were seen at work: a short session has soon ended."""
SECONDS = 3600.0
GONE_SECONDS = 120.0
INDEX = "batch.kubernetes.io/job-completion-index"
"""Which worker a pod is of, also where it is not the first."""
COLUMNS = {
    "ts": "NAME STATE EPOCH METRIC PARAMS SEEDS FOSSILIZED WORKERS AGE",
    "seeds": "NAME SESSION LAYER STATE BLUEPRINT ALPHA HEALTH GAIN AGE",
    "bp": "NAME STATE BUILTIN PARAMS KERNELS AGE",
    "ck": "NAME BLUEPRINT LAYER READY BYTES PARAMS AGE",
}
"""What `kubectl get` shows of each kind."""


class DemoFailed(RuntimeError):  # noqa: N818
    """The demonstration could not go on; the message says why."""


@dataclass(frozen=True)
class DemoSession:
    """The session that is demonstrated.

    Attributes:
        manifest: its file.
        name: its own.
        pods: those that train.
        ranks: of all pods.
    """

    manifest: Path
    name: str
    pods: int
    ranks: int

    @classmethod
    def read(cls, manifest: Path) -> Self:
        """The one of a manifest.

        Raises:
            DemoFailed: it can't be read, or is refused.
        """
        try:
            session = load_manifest(manifest).session
        except BadInput as error:
            raise DemoFailed(str(error)) from error
        workers = session.spec.workers
        return cls(manifest, session.metadata.name, workers.replicas, workers.processes)

    def suspended(self, name: str) -> dict[str, Any]:
        """The same under another name, which does not begin, and fits any number of pods."""
        document = session_document(self.manifest)
        document["metadata"]["name"] = name
        document["spec"]["runPolicy"] = {"suspend": True}
        document["spec"].get("training", {}).pop("logicalShards", None)
        return document


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

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints; `given` is its standard input.

        Raises:
            ServerError: it ended with an error.
        """

    def forget(self, kernels: Sequence[str]) -> list[str]:
        """Have kernels made anew for the session; those that another one uses are left out.

        Raises:
            ServerError: the hub refuses, or does not answer.
        """

    def processes(self, pod: str) -> list[str]:
        """The command lines of all that runs in a pod.

        Raises:
            ServerError: nothing can be seen in it, as where it has just ended.
        """

    def mend(self) -> bool:
        """Start what has ended and does not come back by itself; whether anything had."""


class Demo:
    """Applies a session to a cluster that runs, waits for its end, and checks what can be seen."""

    def __init__(
        self,
        cluster: DemoCluster,
        session: DemoSession,
        say: Callable[[str], None],
        stop: threading.Event,
    ) -> None:
        """`say` shows a line; `stop` breaks the demonstration off."""
        self._cluster = cluster
        self._session = session
        self._name = session.name
        self._say = say
        self._stop = stop
        self._checks: dict[str, bool] = {}
        self._seconds: dict[str, float] = {}
        self._trained: dict[str, str] = {}
        self._anew: list[str] = []
        self._kernels: dict[str, int] = {}

    def run(self) -> dict[str, object]:
        """What was checked, by its command; `holds` says whether all of it does.

        Raises:
            DemoFailed: the session did not succeed, or the demonstration was stopped.
            ServerError: kubectl failed.
        """
        self._removed()
        with self._timed("outside"):
            self._trained_outside()
        self._forgotten()
        with self._timed("session"):
            self._kubectl("apply", "-f", str(self._session.manifest))
            session = self._followed()
        self._kubectl("wait", "--for=condition=Succeeded", "--timeout=10s", f"ts/{self._name}")
        self._listed()
        pods = self._session.pods
        self._checks[f"{pods} pods under torchrun"] = len(self._trained) == pods
        self._described()
        self._scaled()
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
        for name in (self._name, self._suspended):
            self._cluster.kubectl("delete", "ts", name, "--ignore-not-found")
        end = time.monotonic() + GONE_SECONDS
        while self._of_session("seeds") or self._of_session("pods"):
            if time.monotonic() > end or self._stop.wait(1.0):
                raise DemoFailed(f"an earlier {self._name} has not gone")

    def _trained_outside(self) -> None:
        """Train it without a cluster."""
        outside, ranks = self._outside, self._session.ranks
        self._say(f"the same session by `esper worker` with {ranks} ranks, no cluster")
        if (outside / "manifest.yaml").is_file():
            shutil.rmtree(outside)  # that of an earlier demonstration, which has ended
        log = outside.with_suffix(".log")
        with Worker(self._session.manifest, outside, ranks, log) as worker:
            if worker.wait() != 0:
                raise DemoFailed(f"outside of the cluster: {worker.log.read_text()[-1000:]}")

    def _forgotten(self) -> None:
        """Have the hub forget the kernels of its seeds, those that the run outside has told of.

        It keeps them, also for sessions that have ended: of this one nothing would be compiled.
        """
        kernels = kernels_of(self._outside)
        if not kernels:
            raise DemoFailed(f"{self._name}: no seed of it germinates; allowed: one that grows")
        self._anew = self._cluster.forget(kernels)
        if not self._anew:
            raise DemoFailed(f"{self._name}: others train with all of its kernels; await their end")
        self._say(f"{len(self._anew)} of {len(kernels)} kernels are to be compiled anew")

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
            if missing := len(self._trained) < self._session.pods:
                self._look()
            found = condition(session, "Succeeded")
            if found.get("status") == "True":
                self._told_of_pods()
                return session
            if found.get("status") == "False":
                raise DemoFailed(f"{self._name}: {found['reason']}: {found['message']}")
            pause = LOOK_SECONDS if missing else SHOWN_SECONDS
            if time.monotonic() > deadline or self._stop.wait(pause):
                raise DemoFailed(f"{self._name} has not ended")

    def _listed(self) -> None:
        for kind, columns in COLUMNS.items():
            within = self._cluster.catalogue if kind == "bp" else self._cluster.namespace
            text = self._kubectl("get", kind, within=within)
            self._checks[f"get {kind}"] = text.partition("\n")[0].split() == columns.split()
        self._checks["a kernel made by a compile Job"] = self._compiled()
        selected = f"--field-selector=spec.session={self._name},status.state=fossilized"
        seeds = self._kubectl("get", "seeds", selected, "-o", "name").split()
        counted = self._get("ts", self._name)["status"]["seeds"]["fossilized"]
        self._checks["get seeds --field-selector"] = 0 < len(seeds) == counted

    def _compiled(self) -> bool:
        """Whether a Job has compiled one of the kernels that were to be made anew."""
        found = self._get("ck")["items"]
        own = [kernel for kernel in found if kernel["metadata"]["name"] in self._anew]
        ready = [one for one in own if condition(one, "Ready").get("status") == "True"]
        made = [one for one in ready if was_compiled(one)]
        self._kernels = {"ready": len(ready), "compiledByJobs": len(made)}
        return bool(made)

    def _look(self) -> None:
        """See which workers' pods have torchrun and a rank of it at work."""
        for pod in self._of_session("pods"):
            meta = pod["metadata"]
            name, number = meta["name"], meta.get("annotations", {}).get(INDEX, "")
            trains = meta["labels"].get("esper.dev/role") == "worker"
            runs = pod["status"].get("phase") == "Running"
            if not trains or not runs or number in self._trained:
                continue
            try:
                found = self._cluster.processes(name)
            except ServerError:  # it has ended meanwhile, or is about to begin
                continue
            if all(any(part in words for words in found) for part in (AGENT, RANK)):
                self._trained[number] = name
                self._say(f"torchrun and a rank are at work in {name}")

    def _told_of_pods(self) -> None:
        if len(self._trained) < self._session.pods:
            self._say(
                f"torchrun was seen in {len(self._trained)} of {self._session.pods} pods: one that "
                f"trains for no more than {LOOK_SECONDS:g} s is too short to be watched"
            )

    def _described(self) -> None:
        text = self._kubectl("describe", "ts", self._name)
        self._checks["describe ts"] = "Events:" in text and "esper-operator" in text
        text = self._kubectl("explain", "ts.spec.growth")
        self._checks["explain ts.spec.growth"] = "parametersPercent" in text or "budget" in text

    def _scaled(self) -> None:
        """`kubectl scale` of a session that is suspended, which alone may be resized."""
        name, pods = self._suspended, self._session.pods + 1
        document = self._session.suspended(name)
        self._cluster.kubectl("apply", "-f", "-", given=yaml.safe_dump(document))
        self._kubectl("scale", f"ts/{name}", f"--replicas={pods}")
        scaled = self._get("ts", name)["spec"]["workers"]["replicas"]
        self._checks["scale"] = scaled == pods
        self._kubectl("delete", "ts", name)

    def _differing(self) -> list[str]:
        """Which files of the run differ from those of one outside of the cluster."""
        inside = self._cluster.folder / "inside"
        self._fetched(inside)
        if not timeless(inside / LOGS[0]):
            raise DemoFailed("the hub has no metrics of the session")
        return differences(self._outside, inside)

    def _fetched(self, directory: Path) -> None:
        """Fetch what the session has left, as a person would."""
        namespace, config = self._cluster.namespace, self._cluster.kubeconfig
        self._say(f"$ esper fetch {self._name} --output-dir={directory}")
        said = kubectl.fetch(self._name, directory, namespace=namespace, kubeconfig=config)
        self._say(said)

    @property
    def _outside(self) -> Path:
        """The run without a cluster."""
        return self._cluster.folder / "outside"

    @property
    def _suspended(self) -> str:
        """The session that is only resized."""
        return f"{self._name}-suspended"

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
