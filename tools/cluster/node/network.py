"""Addresses and names of pods on the loopback.

Each pod has an address of its own within 127.0.0.0/8. A small library, preloaded into a pod's
processes, binds their listeners to it and looks names up in a file that the node keeps: see
`pod_network.c`. Programs that are linked statically go without it.
"""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tools.servers.go_programs import built_once
from tools.servers.process import ServerError

Object = Mapping[str, Any]

SOURCE = Path(__file__).with_name("pod_network.c")
DOMAIN = "svc.cluster.local"
_PORT = r":(\d{2,5})(?!\d)"


@cache
def network_library() -> Path:
    """The library that is preloaded; the first call on a machine compiles it.

    Raises:
        ServerError: there is no C compiler, or it failed.
    """
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()[:12]
    return built_once(f"pod-network-{digest}.so", _build)


def _build(library: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise ServerError("cc: none; install a C compiler such as gcc")
    words = [compiler, "-shared", "-fPIC", "-O2", "-Wall", "-o", str(library), str(SOURCE), "-ldl"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise ServerError(f"{SOURCE.name} can't be compiled: {done.stderr.strip()[-500:]}")


class Addresses:
    """Addresses of the loopback, each given once; where they begin is left to chance."""

    def __init__(self) -> None:
        self._next = secrets.randbelow(2**23) + 2**22

    def new(self) -> str:
        """One that this node has not given to another pod."""
        self._next += 1
        if self._next % 256 in (0, 255):  # some programs take these for broadcasts
            return self.new()
        return ".".join(["127", *(str(self._next >> shift & 255) for shift in (16, 8, 0))])


class Names:
    """What the cluster's DNS would say, as a file of lines "ADDRESS NAME".

    A service's name stands for the pods that it selects and that are ready, or all of them where it
    says so, in any order; with a cluster address or without: ports are those of the pods. A pod
    that names the service as its subdomain has a name below it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written: str | None = None

    def write(self, services: Iterable[Object], pods: Iterable[Object]) -> None:
        """Write the file anew if it says something else."""
        reachable = [pod for pod in pods if pod.get("status", {}).get("podIP")]
        lines = []
        for service in services:
            lines += _names_of(service, reachable)
        text = "".join(f"{line}\n" for line in sorted(lines))
        if text != self._written:
            draft = self.path.with_suffix(".new")
            draft.write_text(text)
            os.replace(draft, self.path)
            self._written = text


def _names_of(service: Object, pods: Iterable[Object]) -> list[str]:
    name, namespace = service["metadata"]["name"], service["metadata"]["namespace"]
    selector = service["spec"].get("selector") or {}
    whole = f"{name}.{namespace}.{DOMAIN}"
    lines = []
    for pod in pods:
        meta, spec = pod["metadata"], pod["spec"]
        labels = meta.get("labels", {})
        if meta["namespace"] != namespace or not selector or not selector.items() <= labels.items():
            continue
        if not (service["spec"].get("publishNotReadyAddresses") or _is_ready(pod)):
            continue
        address = pod["status"]["podIP"]
        lines.append(f"{address} {whole}")
        if spec.get("subdomain") == name and spec.get("hostname"):
            lines.append(f"{address} {spec['hostname']}.{whole}")
    return lines


def _is_ready(pod: Object) -> bool:
    conditions = pod["status"].get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def ports_of(pod: Object) -> set[int]:
    """The ports on which a pod listens: those it declares, and those after its own name."""
    spec = pod["spec"]
    containers = [*spec.get("initContainers", ()), *spec["containers"]]
    found = {port["containerPort"] for each in containers for port in each.get("ports", ())}
    if spec.get("hostname") and spec.get("subdomain"):
        own = re.escape(f"{spec['hostname']}.{spec['subdomain']}")
        texts = [text for each in containers for text in _texts(each)]
        for text in texts:
            found |= {int(port) for port in re.findall(rf"{own}[A-Za-z0-9.-]*{_PORT}", text)}
    return found


def _texts(container: Object) -> list[str]:
    values = [variable.get("value", "") for variable in container.get("env", ())]
    return [*container.get("command", ()), *container.get("args", ()), *values]


def network_environment(pod: Object, address: str, names: Path) -> dict[str, str]:
    """What the preloaded library reads."""
    ports = sorted(ports_of(pod))
    return {
        "LD_PRELOAD": str(network_library()),
        "POD_NETWORK_ADDRESS": address,
        "POD_NETWORK_NAMESPACE": pod["metadata"]["namespace"],
        "POD_NETWORK_NAMES": str(names),
        "POD_NETWORK_PORTS": f",{','.join(map(str, ports))}," if ports else "",
    }
