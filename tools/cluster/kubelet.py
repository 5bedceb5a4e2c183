"""A node for `ControlPlane` that runs every pod as processes of this machine.

It stands for a kubelet and, as far as `node.placing` says, for a scheduler. What a pod's commands,
environment, files, probes, restarts, ends and statuses are is as Kubernetes has it; what isolates
them is not: pods share this machine's files, processes and network, no limit of resources holds,
and no security context. What a container finds at its mount paths lies in a folder elsewhere:
these paths are replaced in its command, its environment and the texts of mounted Secrets and
ConfigMaps. A file that a program names by itself, such as the service account's token, is not
found. Also missing: hooks, sidecars that are init containers, `kubectl exec`, ports of services
that differ from the pods', updates of mounted files.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.cluster.control_plane import ControlPlane, wait_for
from tools.cluster.node.images import Image
from tools.servers.process import HOST, PROBE_SECONDS, ServerError, ServerProcess

SOURCES = Path(__file__).resolve().parents[2]
CAPACITY = {"cpu": "64", "memory": "256Gi"}
"""What the node says it has; nothing is measured or limited."""
IMAGES = {"esper:*": Image(environment={"OMP_NUM_THREADS": "1"})}


class ProcessKubelet(ServerProcess):
    """The node as a process; a context manager.

    Stopped or killed, it takes its containers with it, as a machine that fails. Frozen, it leaves
    them alone and is not heard of, as a machine that is cut off.

    Args:
        folder: its own; a pod may name files below it.
        plane: the control plane.
        node: the node's name.
        images: what may be pulled, by name or glob.
        capacity: resources that the node says it has.
        labels: of the node.
        own: further folders of this machine that pods may name.
        backoff_seconds: the first wait of a crash loop and of an image that isn't there; a
            kubelet's are 10.
    """

    name = "kubelet"

    def __init__(
        self,
        folder: Path,
        plane: ControlPlane,
        *,
        node: str = "node-1",
        images: Mapping[str, Image] = IMAGES,
        capacity: Mapping[str, str] = CAPACITY,
        labels: Mapping[str, str] | None = None,
        own: Sequence[Path] = (),
        backoff_seconds: float = 10.0,
    ) -> None:
        super().__init__(folder)
        self.node = node
        self._plane = plane
        # It goes with this object.
        self._links = tempfile.TemporaryDirectory(prefix="node-", ignore_cleanup_errors=True)
        self._settings = {
            "name": node,
            "folder": str(self.folder),
            "images": {
                name: {"entrypoint": image.entrypoint, "environment": dict(image.environment)}
                for name, image in images.items()
            },
            "capacity": dict(capacity),
            "labels": dict(labels or {}),
            "links": self._links.name,
            "own": [str(path) for path in (SOURCES, sys.prefix, *own)],
            "backoff_seconds": backoff_seconds,
        }

    def containers(self, namespace: str, pod: str | None = None) -> list[dict[str, Any]]:
        """Those at work: namespace, pod, container, pid of the first process, address, folder."""
        found: list[dict[str, Any]] = json.loads(self._asked("GET", "/containers"))
        return [
            each for each in found if each["namespace"] == namespace and pod in (None, each["pod"])
        ]

    def pid_of(self, namespace: str, pod: str) -> int:
        """The first process of a pod of one container, waited for."""
        found = wait_for(
            lambda: self.containers(namespace, pod), f"no container of {namespace}/{pod} runs"
        )
        return int(found[0]["pid"])

    def run_out_of_memory(self, namespace: str, pod: str, container: str) -> None:
        """End a container as the kernel ends one that is over its limit."""
        self._asked("POST", f"/oom/{namespace}/{pod}/{container}")

    def logs(self, namespace: str) -> str:
        """What all containers of a namespace have written, those of pods that are gone included."""
        parts = []
        for path in sorted((self.folder / "pods").glob(f"{namespace}_*/*/*.log")):
            parts.append(f"--- {path.parent.parent.name.split('_')[1]}/{path.parent.name}\n")
            parts.append(path.read_text(errors="replace"))
        return "".join(parts)

    def _prepare(self) -> None:
        pki = self._plane.api.certificate
        settings = {
            **self._settings,
            "kubeconfig": str(self._plane.node),
            "port": self.port,
            "certificate": str(pki),
            "key": str(pki.with_suffix(".key")),
        }
        (self.folder / "settings.json").write_text(json.dumps(settings))

    def _command(self) -> Sequence[str]:
        settings = self.folder / "settings.json"
        return [sys.executable, "-m", "tools.cluster.node.agent", str(settings)]

    def _environment(self) -> Mapping[str, str]:
        return {"PYTHONPATH": str(SOURCES)}

    def _answers(self) -> bool:
        try:
            return self._asked("GET", "/healthz") == "ok"
        except (OSError, ServerError):
            return False

    def _asked(self, method: str, path: str) -> str:
        request = urllib.request.Request(f"https://{HOST}:{self.port}{path}", method=method)
        try:
            with urllib.request.urlopen(
                request, timeout=PROBE_SECONDS * 5, context=self._plane.api.context()
            ) as answer:
                return str(answer.read().decode())
        except urllib.error.HTTPError as refused:
            raise ServerError(refused.read().decode()) from refused

    def freeze(self) -> None:
        """Let it do and say nothing; its containers go on."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)
