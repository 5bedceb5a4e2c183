"""What the programs of a cluster read: configuration files as text. Nothing here does anything."""

from __future__ import annotations

import json
from typing import Any

import yaml

from tools.cluster.containers.layout import (
    DNS_ADDRESS,
    DOMAIN,
    PAUSE_IMAGE,
    PODS,
    Layout,
    Node,
)

CNI_PLUGINS = "/usr/lib/cni"
"""Where Debian's containernetworking-plugins lie."""


def cni(node: Node) -> str:
    """The pods' network: a cable from each to its node, which routes.

    So every packet passes the node's packet filter, where Services are; on a bridge it does so
    only with a module of the kernel.
    """
    addresses = {
        "type": "host-local",
        "dataDir": str(node.folder / "addresses"),
        "ranges": [[{"subnet": node.pods}]],
        "routes": [{"dst": "0.0.0.0/0"}],
    }
    return json.dumps(
        {
            "cniVersion": "1.0.0",
            "name": "esper",
            "plugins": [
                {"type": "ptp", "ipam": addresses},
                {"type": "portmap", "capabilities": {"portMappings": True}},
            ],
        },
        indent=1,
    )


def containerd(node: Node) -> str:
    """That of a node's containerd."""
    cri = '[plugins."io.containerd.grpc.v1.cri"'
    return f"""\
version = 2
root = "{node.folder / "containerd"}"
state = "/run/containerd"

[grpc]
address = "{node.socket}"

[plugins."io.containerd.internal.v1.opt"]
path = "{node.folder / "opt"}"

{cri}]
sandbox_image = "{PAUSE_IMAGE}"
restrict_oom_score_adj = true
disable_apparmor = true

{cri}.cni]
bin_dir = "{CNI_PLUGINS}"
conf_dir = "{node.folder / "cni"}"

{cri}.containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
"""


def resolver() -> str:
    """Of what asks for names from the node itself."""
    return f"nameserver {DNS_ADDRESS}\n"


def kubelet(cluster: Layout, node: Node) -> str:
    """That of a node's kubelet."""
    return _yaml(
        {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(cluster.pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": cluster.cgroup_of(node),
            "failCgroupV1": False,
            "failSwapOn": False,
            "containerRuntimeEndpoint": f"unix://{node.socket}",
            "clusterDNS": [DNS_ADDRESS],
            "clusterDomain": DOMAIN,
            "resolvConf": str(node.folder / "resolv.conf"),
            "tlsCertFile": str(cluster.pki / f"{node.name}.crt"),
            "tlsPrivateKeyFile": str(cluster.pki / f"{node.name}.key"),
            "podLogsDir": str(node.folder / "pod-logs"),
            "volumePluginDir": str(node.folder / "volume-plugins"),
            # A lost node is noticed in seconds, see the controller manager's grace period.
            "nodeStatusUpdateFrequency": "5s",
            "nodeLeaseDurationSeconds": 20,
            # Images come from this machine only: one that is removed can't be pulled again.
            "imageGCHighThresholdPercent": 100,
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
            },
        }
    )


def proxy(cluster: Layout, node: Node) -> str:
    """That of a node's kube-proxy."""
    return _yaml(
        {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "mode": "nftables",
            "clientConnection": {"kubeconfig": str(cluster.pki / "kube-proxy.kubeconfig")},
            "clusterCIDR": str(PODS),
            "hostnameOverride": node.name,
            "bindAddress": node.address,
            # The kernel's table of connections is the whole machine's, not this namespace's.
            "conntrack": {"maxPerCore": 0, "min": 0},
        }
    )


def _yaml(document: dict[str, Any]) -> str:
    return yaml.safe_dump(document, sort_keys=False)
