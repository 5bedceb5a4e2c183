"""What a cluster from source is made of: names, addresses, folders. Nothing here does anything."""

from __future__ import annotations

import hashlib
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

STATE = "ESPER_CLUSTER_STATE"
DEFAULT_STATE = Path("/var/tmp/esper-cluster")
KIND, SOURCE = "kind", "source"
NODES = 4
"""So many nodes have credentials; the first has the control plane too."""
DOMAIN = "cluster.local"
API_PORT = 6443
STORAGE_CLASS = "esper-hostpath"
PAUSE_IMAGE = "localhost/esper-pause:1"
DNS_IMAGE = "localhost/esper-coredns:1"

# 198.18.0.0/15 is for tests of networks (RFC 2544): nobody's machine is there.
_MACHINES = ipaddress.ip_network("198.18.0.0/24")
PODS = ipaddress.ip_network("10.244.0.0/16")
SERVICES = ipaddress.ip_network("10.96.0.0/16")
API_ADDRESS = str(SERVICES[1])
DNS_ADDRESS = str(SERVICES[10])
_LONGEST_SOCKET = 107
"""Longer paths of sockets the kernel refuses."""
_HIDDEN = ("/run", "/var/lib", "/var/log", "/proc", "/sys", "/dev")
"""A node has folders of its own there, so the cluster's can't be below them."""


class BadState(ValueError):  # noqa: N818
    """A folder that can't be a cluster's; the message says why."""


@dataclass(frozen=True)
class Node:
    """One node, by its number from 1 on: the name, the addresses and the folder of it."""

    number: int
    state: Path

    @property
    def name(self) -> str:
        """Its name in the cluster, and as a host."""
        return f"esper-{self.number}"

    @property
    def folder(self) -> Path:
        """Where all that it writes lies."""
        return self.state / self.name

    @property
    def address(self) -> str:
        """Its own."""
        return str(_MACHINES[self.number + 1])

    @property
    def pods(self) -> str:
        """The addresses of its pods."""
        return str(list(PODS.subnets(new_prefix=24))[self.number - 1])

    @property
    def socket(self) -> Path:
        """Where its containerd answers."""
        return self.folder / "containerd.sock"

    @property
    def account(self) -> str:
        """Who its kubelet is to the API server."""
        return f"system:node:{self.name}"


@dataclass(frozen=True)
class Layout:
    """A cluster over one folder."""

    state: Path

    @property
    def nodes(self) -> tuple[Node, ...]:
        """All that there can be."""
        return tuple(Node(number, self.state) for number in range(1, NODES + 1))

    @property
    def first(self) -> Node:
        """The node beside the control plane."""
        return self.nodes[0]

    @property
    def server(self) -> str:
        """The API server's URL for nodes."""
        return f"https://{self.first.address}:{API_PORT}"

    @property
    def pki(self) -> Path:
        """Certificates, keys and tokens."""
        return self.state / "pki"

    @property
    def admin(self) -> Path:
        """The kubeconfig of one who may do everything, for use on this machine."""
        return self.state / "admin.kubeconfig"

    @property
    def mark(self) -> Path:
        """Tells that the folder is a cluster's, and which way it was made."""
        return self.state / ".esper-cluster"

    @property
    def way(self) -> str | None:
        """Which way it was made, `KIND` or `SOURCE`; None where there is none."""
        return self.mark.read_text() or None if self.mark.exists() else None

    @property
    def volumes(self) -> Path:
        """Where the volumes of claims lie."""
        return self.state / "volumes"

    @property
    def images(self) -> Path:
        """Tells which of Esper's images its nodes have."""
        return self.state / "images.json"

    @property
    def cgroup(self) -> str:
        """The control group of all its pods; two clusters on a machine have two."""
        return f"/esper-{hashlib.sha256(str(self.state).encode()).hexdigest()[:8]}"

    def cgroup_of(self, node: Node) -> str:
        """The control group of a node's pods: a kubelet ends all that it does not know in its."""
        return f"{self.cgroup}/{node.name}"


def layout(state: Path | None = None) -> Layout:
    """The cluster of a folder; by default that of `ESPER_CLUSTER_STATE`, else `DEFAULT_STATE`.

    Raises:
        BadState: the folder can't be a cluster's.
    """
    path = (state or Path(os.environ.get(STATE) or DEFAULT_STATE)).resolve()
    chosen = Layout(path)
    if any(path.is_relative_to(hidden) for hidden in _HIDDEN) or path == Path("/"):
        hidden = ", ".join(_HIDDEN)
        raise BadState(f"{STATE}: got {path}; allowed: a folder not below {hidden}")
    longest = len(str(chosen.first.socket)) + len(".ttrpc")
    if longest > _LONGEST_SOCKET:
        most = _LONGEST_SOCKET - longest + len(str(path))
        raise BadState(f"{STATE}: got {path}; allowed: at most {most} characters")
    return chosen
