"""The command lines of a cluster's programs. Nothing here does anything."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tools.cluster.containers.layout import API_PORT, SERVICES, Layout, Node

ETCD = "http://127.0.0.1:2379"
NODE_GRACE_SECONDS = 25
"""After which a node that is not heard of is no longer ready."""
EVICTION_SECONDS = 30
"""After which its pods are deleted; Kubernetes' own is 300."""

Programs = Callable[[str], Path]
"""Where a program of a name lies."""


def etcd(cluster: Layout, programs: Programs) -> list[str]:
    """It waits for no disk: its data end with the machine, not with it."""
    return [
        str(programs("etcd")),
        f"--data-dir={cluster.state / 'etcd'}",
        "--unsafe-no-fsync",
        f"--listen-client-urls={ETCD}",
        f"--advertise-client-urls={ETCD}",
        "--listen-peer-urls=http://127.0.0.1:2380",
        "--quota-backend-bytes=2147483648",
        "--log-level=warn",
    ]


def apiserver(cluster: Layout, programs: Programs) -> list[str]:
    """With the rights and the admission of any cluster; users are known by tokens."""
    pki = cluster.pki
    return [
        str(programs("kube-apiserver")),
        f"--etcd-servers={ETCD}",
        "--bind-address=0.0.0.0",
        f"--secure-port={API_PORT}",
        f"--advertise-address={cluster.first.address}",
        f"--tls-cert-file={pki / 'apiserver.crt'}",
        f"--tls-private-key-file={pki / 'apiserver.key'}",
        f"--client-ca-file={pki / 'ca.crt'}",
        f"--token-auth-file={pki / 'tokens.csv'}",
        "--authorization-mode=Node,RBAC",
        "--enable-admission-plugins=NodeRestriction",
        f"--default-not-ready-toleration-seconds={EVICTION_SECONDS}",
        f"--default-unreachable-toleration-seconds={EVICTION_SECONDS}",
        "--allow-privileged",
        "--service-account-issuer=https://kubernetes.default.svc",
        f"--service-account-key-file={pki / 'service-accounts.key'}",
        f"--service-account-signing-key-file={pki / 'service-accounts.key'}",
        f"--service-cluster-ip-range={SERVICES}",
        f"--kubelet-client-certificate={pki / 'kubelet-client.crt'}",
        f"--kubelet-client-key={pki / 'kubelet-client.key'}",
        f"--kubelet-certificate-authority={pki / 'ca.crt'}",
        "--kubelet-preferred-address-types=InternalIP",
        "--profiling=false",
    ]


def controller_manager(cluster: Layout, programs: Programs) -> list[str]:
    """With all of its controllers."""
    return [
        str(programs("kube-controller-manager")),
        *_clients(cluster, "kube-controller-manager"),
        f"--service-account-private-key-file={cluster.pki / 'service-accounts.key'}",
        f"--root-ca-file={cluster.pki / 'ca.crt'}",
        f"--cluster-signing-cert-file={cluster.pki / 'ca.crt'}",
        f"--cluster-signing-key-file={cluster.pki / 'ca.key'}",
        "--use-service-account-credentials",
        "--node-monitor-period=2s",
        f"--node-monitor-grace-period={NODE_GRACE_SECONDS}s",
    ]


def scheduler(cluster: Layout, programs: Programs) -> list[str]:
    """As it comes."""
    return [str(programs("kube-scheduler")), *_clients(cluster, "kube-scheduler")]


def containerd(node: Node) -> list[str]:
    """Debian's."""
    return ["containerd", f"--config={node.folder / 'containerd.toml'}", "--log-level=warn"]


def kubelet(cluster: Layout, node: Node, programs: Programs) -> list[str]:
    """One that writes below its node's folder only."""
    return [
        str(programs("kubelet")),
        f"--config={node.folder / 'kubelet.yaml'}",
        f"--kubeconfig={cluster.pki / f'{node.name}.kubeconfig'}",
        f"--hostname-override={node.name}",
        f"--node-ip={node.address}",
        f"--root-dir={node.folder / 'kubelet'}",
    ]


def proxy(node: Node, programs: Programs) -> list[str]:
    """With nftables: nothing else needs a module of the kernel."""
    return [str(programs("kube-proxy")), f"--config={node.folder / 'kube-proxy.yaml'}"]


def network(first: Node) -> list[list[str]]:
    """What makes the network of the first node, on it.

    Nodes are joined by a bridge there, whose own address is the node's. A bridge without a cable
    is down, so it has one that ends on the same machine.
    """
    return [
        _words("ip link add nodes type bridge"),
        _words("ip link add anchor type veth peer name anchored"),
        _words("ip link set anchor master nodes"),
        *(_words(f"ip link set {link} up") for link in ("anchor", "anchored", "nodes")),
        _words(f"ip address add {first.address}/24 dev nodes"),
        # Addresses of Services are reached by way of a route, though nobody is at its end.
        _words("ip route add default dev nodes"),
    ]


def cable(first: Node, node: Node, process: int) -> tuple[list[list[str]], list[list[str]]]:
    """What joins a further node, which `process` keeps, to the first: on that one, then on it."""
    end = f"to-{node.name}"
    there = [
        _words(f"ip link add {end} type veth peer name eth0 netns {process}"),
        _words(f"ip link set {end} master nodes"),
        _words(f"ip link set {end} up"),
        _words(f"ip route replace {node.pods} via {node.address}"),
    ]
    here = [
        _words(f"ip address add {node.address}/24 dev eth0"),
        _words("ip link set eth0 up"),
        # The first node knows the way to all others.
        _words(f"ip route add default via {first.address}"),
    ]
    return there, here


def import_images(node: Node, *, archive: str = "-") -> list[str]:
    """Imports an OCI archive into a node's store; by default from the standard input."""
    return [*_ctr(node), "images", "import", "--snapshotter=overlayfs", archive]


def ingest(node: Node, digest: str, size: int) -> list[str]:
    """Puts content of a digest into a node's store, from the standard input."""
    expected = [f"--expected-digest={digest}", f"--expected-size={size}"]
    return [*_ctr(node), "content", "ingest", *expected, f"linked-{digest}"]


def keep(node: Node, digest: str, *, kept: bool = True) -> list[str]:
    """Has a node's store keep content though no image refers to it; not `kept`: no longer."""
    label = f"containerd.io/gc.root={'kept' if kept else ''}"
    return [*_ctr(node), "content", "label", digest, label]


def contents(node: Node) -> list[str]:
    """Lists the digests of all that a node's store holds."""
    return [*_ctr(node), "content", "ls", "--quiet"]


def list_images(node: Node) -> list[str]:
    """Lists a node's images: name, media type, digest, and more."""
    return [*_ctr(node), "images", "ls"]


def list_tasks(node: Node) -> list[str]:
    """Lists a node's containers with their main processes, by the ids that those have on it."""
    return [*_ctr(node), "tasks", "ls"]


def _ctr(node: Node) -> list[str]:
    return ["ctr", f"--address={node.socket}", "--namespace=k8s.io"]


def _clients(cluster: Layout, name: str) -> list[str]:
    config = cluster.pki / f"{name}.kubeconfig"
    return [
        f"--kubeconfig={config}",
        f"--authentication-kubeconfig={config}",
        f"--authorization-kubeconfig={config}",
        "--leader-elect=false",
        "--profiling=false",
    ]


def _words(text: str) -> list[str]:
    return text.split()
