"""What every cluster from source is given: a DNS server, a default class of volumes."""

from __future__ import annotations

from typing import Any

import yaml

from tools.cluster.containers.layout import DNS_ADDRESS, DNS_IMAGE, DOMAIN, STORAGE_CLASS
from tools.cluster.containers.provisioning import PROVISIONER

DNS = "coredns"
DNS_NAMESPACE = "kube-system"
_COREFILE = f"""\
.:53 {{
  errors
  health {{
    lameduck 2s
  }}
  ready
  kubernetes {DOMAIN} in-addr.arpa ip6.arpa {{
    pods insecure
    ttl 5
  }}
  cache 5
  loadbalance
}}
"""
"""It knows the cluster's names only: there is no way out of the cluster's network."""


def manifests() -> str:
    """All of it, for `kubectl apply`."""
    labels = {"k8s-app": "kube-dns"}
    documents: list[dict[str, Any]] = [
        _object("v1", "ServiceAccount", DNS),
        _object(
            *("rbac.authorization.k8s.io/v1", "ClusterRole", "system:coredns"),
            rules=[
                {
                    "apiGroups": [""],
                    "resources": ["endpoints", "services", "pods", "namespaces"],
                    "verbs": ["list", "watch"],
                },
                {
                    "apiGroups": ["discovery.k8s.io"],
                    "resources": ["endpointslices"],
                    "verbs": ["list", "watch"],
                },
            ],
        ),
        _object(
            *("rbac.authorization.k8s.io/v1", "ClusterRoleBinding", "system:coredns"),
            roleRef={
                "apiGroup": "rbac.authorization.k8s.io",
                "kind": "ClusterRole",
                "name": "system:coredns",
            },
            subjects=[{"kind": "ServiceAccount", "name": DNS, "namespace": DNS_NAMESPACE}],
        ),
        _object("v1", "ConfigMap", DNS, data={"Corefile": _COREFILE}),
        _object(
            *("apps/v1", "Deployment", DNS),
            spec={
                "selector": {"matchLabels": labels},
                "template": {"metadata": {"labels": labels}, "spec": _dns_pod()},
            },
        ),
        _object(
            *("v1", "Service", "kube-dns"),
            spec={
                "clusterIP": DNS_ADDRESS,
                "selector": labels,
                "ports": [
                    {"name": "dns", "port": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
                ],
            },
        ),
        {
            "apiVersion": "storage.k8s.io/v1",
            "kind": "StorageClass",
            "metadata": {
                "name": STORAGE_CLASS,
                "annotations": {"storageclass.kubernetes.io/is-default-class": "true"},
            },
            "provisioner": PROVISIONER,
            "reclaimPolicy": "Delete",
            "volumeBindingMode": "Immediate",
        },
    ]
    return yaml.safe_dump_all(documents, sort_keys=False)


def _dns_pod() -> dict[str, Any]:
    return {
        "serviceAccountName": DNS,
        "dnsPolicy": "Default",
        "priorityClassName": "system-cluster-critical",
        # With the node of the control plane everything is lost; on a further one it would be too.
        "nodeSelector": {"kubernetes.io/hostname": "esper-1"},
        "containers": [
            {
                "name": DNS,
                "image": DNS_IMAGE,
                "imagePullPolicy": "Never",
                "args": ["-conf", "/etc/coredns/Corefile"],
                "ports": [
                    {"name": "dns", "containerPort": 53, "protocol": "UDP"},
                    {"name": "dns-tcp", "containerPort": 53, "protocol": "TCP"},
                ],
                "readinessProbe": {"httpGet": {"path": "/ready", "port": 8181}, "periodSeconds": 1},
                "livenessProbe": {"httpGet": {"path": "/health", "port": 8080}},
                "resources": {"requests": {"cpu": "50m", "memory": "50Mi"}},
                "securityContext": {
                    "allowPrivilegeEscalation": False,
                    "readOnlyRootFilesystem": True,
                    "capabilities": {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]},
                },
                "volumeMounts": [{"name": "config", "mountPath": "/etc/coredns"}],
            }
        ],
        "volumes": [{"name": "config", "configMap": {"name": DNS}}],
    }


def _object(version: str, kind: str, name: str, **content: Any) -> dict[str, Any]:
    metadata = {"name": name}
    if not kind.startswith("ClusterRole"):
        metadata["namespace"] = DNS_NAMESPACE
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **content}
