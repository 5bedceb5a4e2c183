"""A cluster from source: every part is Kubernetes' own, nodes are namespaces of this machine.

Its network is seen from inside only; one port of the loopback leads to the API server.
"""

from __future__ import annotations

import contextlib
import shutil
import ssl
import sys
import time
import urllib.request
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from tools import kubectl
from tools.cluster.containers import commands
from tools.cluster.containers.archives import Image
from tools.cluster.containers.certificates import issue, make_authority
from tools.cluster.containers.daemons import Daemon
from tools.cluster.containers.kernel import remove_cgroup, restore_settings, save_settings
from tools.cluster.containers.layout import API_ADDRESS, API_PORT, Layout, Node
from tools.cluster.containers.manifests import DNS, DNS_NAMESPACE, manifests
from tools.cluster.containers.nodes import ClusterNode
from tools.cluster.containers.packages import NODE, install, require_root
from tools.cluster.credentials import (
    read_tokens,
    write_kubeconfig,
    write_signing_key,
    write_tokens,
)
from tools.cluster.programs import cluster_program
from tools.servers.process import HOST, PROBE_SECONDS, ServerError, free_port

ADMIN, PROVISIONER = "admin", "hostpath-provisioner"
READY_SECONDS = 120.0
_CONTROL_PLANE = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler")
PROGRAMS = (*_CONTROL_PLANE, "kubelet", "kube-proxy", "kubectl", "coredns", "pause")
_ROOT = Path(__file__).parents[3]

Say = Callable[[str], None]


class SourceCluster:
    """The cluster of a folder.

    Args:
        cluster: where it lies.
        say: shows a line of what happens.
    """

    def __init__(self, cluster: Layout, say: Say = lambda _: None) -> None:
        self.layout = cluster
        self._say = say

    @property
    def nodes(self) -> list[ClusterNode]:
        """All its nodes; what is lost of them is theirs to say."""
        every = (self.node(node) for node in self.layout.nodes)
        return [node for node in every if node.made]

    def node(self, node: Node | str) -> ClusterNode:
        """One of the nodes that it can have, by name too.

        Raises:
            ServerError: it can have none of that name.
        """
        if isinstance(node, str):
            names = {each.name: each for each in self.layout.nodes}
            if node not in names:
                raise ServerError(f"node: got {node}; allowed: {', '.join(names)}")
            node = names[node]
        return ClusterNode(self.layout, node, cluster_program)

    @property
    def running(self) -> bool:
        """Whether all of its control plane and of its first node runs."""
        daemons = [*(self._part(name) for name in _CONTROL_PLANE), *self._beside()]
        return self.node(self.layout.first).running and all(each.running for each in daemons)

    def up(self) -> bool:
        """Start what does not run; False where all of it did.

        Raises:
            ServerError: something can't be had; what runs goes on, for a look at its logs.
        """
        require_root()
        install(NODE, self._say)
        for name in PROGRAMS:
            cluster_program(name)
        first = self.node(self.layout.first)
        if self.running and self._answers():
            return False
        save_settings(self.layout.cgroup)
        self._credentials()
        first.prepare()
        if first.machine.start():
            for command in commands.network(first.node):
                first.machine.run(command)
            for daemon in self._beside():
                daemon.stop()  # they belong to an earlier machine
        self._start_control_plane(first)
        first.start()
        for node in self.nodes[1:]:
            self._start_further(node, ())
        self.kubectl("apply", "--server-side", "--force-conflicts", "-f", "-", given=manifests())
        self._start_provisioner()
        self._await_ready()
        return True

    def down(self) -> None:
        """End everything that it started, and remove what it wrote.

        Raises:
            ServerError: something is left that can't be removed.
        """
        require_root()
        for daemon in self._beside():
            daemon.kill()
        for node in reversed(self.layout.nodes):
            self.node(node).machine.stop()
        remove_cgroup(self.layout.cgroup)
        restore_settings(self.layout.cgroup)
        shutil.rmtree(self.layout.state)

    def add_node(
        self, name: str, images: Collection[str] | None = None, *, cordoned: bool = False
    ) -> None:
        """Join a further node, or bring back one that is lost.

        Args:
            name: one of those that the cluster can have.
            images: which images of the first it is given; None for all.
            cordoned: whether only pods are scheduled to it that tolerate that, from the beginning.

        Raises:
            ServerError: it can't be had.
        """
        node = self.node(name)
        if node.node == self.layout.first or not self.running:
            further = ", ".join(each.name for each in self.layout.nodes[1:])
            raise ServerError(f"node: got {name}; allowed: {further}, of a cluster that runs")
        node.prepare()
        self._start_further(node, images)
        self._await_node(name, cordoned=cordoned)

    def lose_node(self, name: str) -> None:
        """End all that runs on a further node at once, as if its power had failed."""
        self._further(name).machine.stop()

    def cut_node(self, name: str, *, joined: bool = False) -> None:
        """Take a further node's cable out, or with `joined` put it in again; its pods run on."""
        node = self._further(name)
        state = "up" if joined else "down"
        self.node(self.layout.first).machine.run(["ip", "link", "set", f"to-{name}", state])
        if joined:  # the kernel forgets routes over links that are down
            there, _ = commands.cable(self.layout.first, node.node, node.machine.pid)
            self.node(self.layout.first).machine.run(there[-1])

    def remove_node(self, name: str) -> None:
        """End a further node and forget it."""
        node = self._further(name)
        node.machine.stop()
        self.kubectl("delete", "node", name, "--ignore-not-found")
        remove_cgroup(self.layout.cgroup_of(node.node))
        shutil.rmtree(node.node.folder)

    def load(self, name: str, image: Image) -> int:
        """Import an image under a name into every node that runs.

        Returns:
            How many bytes of layers the first of them did not have.
        """
        first = self.node(self.layout.first)
        layers = first.import_image(name, image)
        for node in self.nodes:
            if node.node != first.node and node.running:
                try:
                    node.copy_images(first, [name])
                except ServerError:
                    if node.running:
                        raise  # else it was lost meanwhile, and goes without
        return sum(layer.size for layer in layers)

    def load_archive(self, archive: Path) -> None:
        """Import the images of an OCI archive into every node that runs."""
        for node in self.nodes:
            if node.running:
                with archive.open("rb") as content:
                    node.import_archive(content)

    def kubectl(self, *words: str, given: str | None = None) -> str:
        """What kubectl prints; `given` is its standard input.

        Raises:
            ServerError: it ended with an error, which the message tells.
        """
        return kubectl.run(*words, kubeconfig=self.layout.admin, given=given)

    def get(self, *words: str) -> Any:
        """What `kubectl get WORDS` finds, as an object."""
        return kubectl.get(*words, kubeconfig=self.layout.admin)

    @contextlib.contextmanager
    def _step(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._say(f"{what} ({time.monotonic() - began:.1f} s)")

    def _part(self, name: str) -> Daemon:
        return self.node(self.layout.first).machine.daemon(name)

    def _beside(self) -> tuple[Daemon, Daemon]:
        """What runs beside the nodes, on this machine: the forwarder and the provisioner."""
        folder = self.layout.state / "beside"
        return Daemon("forwarder", folder), Daemon("provisioner", folder)

    def _start_control_plane(self, first: ClusterNode) -> None:
        with self._step("the control plane answers"):
            etcd = commands.etcd(self.layout, cluster_program)
            first.machine.start_daemon("etcd", etcd)
            words = commands.apiserver(self.layout, cluster_program)
            api = first.machine.start_daemon("kube-apiserver", words)
            self._start_forwarder(first)
            api.await_(self._answers)
        for name, command in (
            ("kube-controller-manager", commands.controller_manager),
            ("kube-scheduler", commands.scheduler),
        ):
            first.machine.start_daemon(name, command(self.layout, cluster_program))

    def _start_forwarder(self, first: ClusterNode) -> None:
        forwarder, _ = self._beside()
        if not forwarder.running:
            forwarder.start(
                [
                    *_python("forwarder"),
                    *(f"--listen={self._port()}", f"--process={first.machine.pid}"),
                    f"--port={API_PORT}",
                ],
                environment=_environment(),
            )

    def _start_provisioner(self) -> None:
        _, provisioner = self._beside()
        if not provisioner.running:
            self.layout.volumes.mkdir(exist_ok=True)
            config = self.layout.pki / f"{PROVISIONER}.kubeconfig"
            provisioner.start(
                [
                    *_python("provisioner"),
                    *(f"--kubeconfig={config}", f"--root={self.layout.volumes}"),
                ],
                environment=_environment(),
            )

    def _start_further(self, node: ClusterNode, images: Collection[str] | None = None) -> None:
        first = self.node(self.layout.first)
        if node.machine.start():
            there, here = commands.cable(first.node, node.node, node.machine.pid)
            for command in there:
                first.machine.wire(command)
            for command in here:
                node.machine.wire(command)
        with self._step(f"{node.node.name} has its images"):
            node.start()
            node.copy_images(first, images)

    def _await_ready(self) -> None:
        self._await_node(self.layout.first.name)
        with self._step("names are answered"):
            self.kubectl(
                *("-n", DNS_NAMESPACE, "wait", f"deployment/{DNS}"),
                *("--for=condition=Available", f"--timeout={READY_SECONDS:g}s"),
            )

    def _await_node(self, name: str, *, cordoned: bool = False) -> None:
        with self._step(f"{name} is ready"):
            timeout = f"--timeout={READY_SECONDS:g}s"
            self.kubectl("wait", f"node/{name}", "--for=create", timeout)
            if cordoned:  # before it is ready nothing is scheduled to it
                self.kubectl("cordon", name)
            self.kubectl("wait", f"node/{name}", "--for=condition=Ready", timeout)

    def _further(self, name: str) -> ClusterNode:
        node = self.node(name)
        if node.node == self.layout.first or not node.made:
            further = ", ".join(each.node.name for each in self.nodes[1:])
            raise ServerError(f"node: got {name}; allowed: {further or 'none, add one first'}")
        return node

    def _port(self) -> int:
        """The port of the loopback, the same from the first start on."""
        path = self.layout.state / "port"
        if not path.exists():
            path.write_text(str(free_port()))
        return int(path.read_text())

    def _credentials(self) -> None:
        """Write certificates, tokens and kubeconfigs, where they are not there."""
        pki, first = self.layout.pki, self.layout.first
        tokens = pki / "tokens.csv"
        if not tokens.exists():
            make_authority(pki)
            addresses = (HOST, first.address, API_ADDRESS)
            names = ("localhost", first.name, "kubernetes", "kubernetes.default")
            called = [
                *(f"IP:{address}" for address in addresses),
                *(f"DNS:{name}" for name in (*names, "kubernetes.default.svc")),
            ]
            issue(pki, "apiserver", "/CN=kube-apiserver", called)
            issue(pki, "kubelet-client", "/O=system:masters/CN=kubelet-client", ["DNS:apiserver"])
            write_signing_key(pki / "service-accounts.key")
            write_tokens(tokens, _users(self.layout))
        known = read_tokens(tokens)
        beside = f"https://{HOST}:{self._port()}"
        for path, user, server in (
            (self.layout.admin, ADMIN, beside),
            (pki / f"{PROVISIONER}.kubeconfig", PROVISIONER, beside),
            *(
                (pki / f"{user.removeprefix('system:')}.kubeconfig", user, self.layout.server)
                for user in _COMPONENTS
            ),
            *(
                (pki / f"{node.name}.kubeconfig", node.account, self.layout.server)
                for node in self.layout.nodes
            ),
        ):
            write_kubeconfig(path, server=server, authority=pki / "ca.crt", token=known[user])

    def _answers(self) -> bool:
        token = read_tokens(self.layout.pki / "tokens.csv")[ADMIN]
        request = urllib.request.Request(
            f"https://{HOST}:{self._port()}/readyz", headers={"Authorization": f"Bearer {token}"}
        )
        context = ssl.create_default_context(cafile=str(self.layout.pki / "ca.crt"))
        try:
            with urllib.request.urlopen(request, timeout=PROBE_SECONDS, context=context) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


_COMPONENTS = {
    "system:kube-controller-manager": ("system:authenticated",),
    "system:kube-scheduler": ("system:authenticated",),
    "system:kube-proxy": ("system:authenticated",),
}
"""RBAC has a role for each by its name."""


def _users(cluster: Layout) -> dict[str, tuple[str, ...]]:
    return {
        ADMIN: ("system:masters",),
        PROVISIONER: ("system:masters",),
        **_COMPONENTS,
        **{node.account: ("system:nodes",) for node in cluster.nodes},
    }


def _python(module: str) -> list[str]:
    return [sys.executable, "-m", f"tools.cluster.containers.{module}"]


def _environment() -> dict[str, str]:
    return {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(_ROOT)}
