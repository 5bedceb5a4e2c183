"""What is asked of rendered objects, and the installations that are looked at."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Object = dict[str, Any]

RELEASES = ("1.33", "1.34", "1.35", "1.36")
OTHERS = {"monitoring.coreos.com/v1"}
"""What Kubernetes' own schemas do not know."""

POSTGRES = {"existingSecret": "esper-postgres"}
BUCKET = {"bucket": "kernels", "endpointUrl": "http://minio.store:9000", "existingSecret": "s3"}
EXTERNAL = {
    "bundled": False,
    "external": {"url": "redis://redis.bus:6380/0", "existingSecret": "esper-redis-admin"},
}
PLACED = {
    "priorityClassName": "system-cluster-critical",
    "nodeSelector": {"pool": "system"},
    "tolerations": [{"key": "pool", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "podLabels": {"team": "a"},
    "podAnnotations": {"note": "b"},
}

INSTALLATIONS: dict[str, Object] = {
    "default": {},
    "namespaced": {"operator": {"namespaced": True}},
    "namespaces": {"operator": {"namespaced": True, "namespaces": ["team-a", "team-b"]}},
    "elsewhere": {
        "urza": {"replicas": 3, "database": POSTGRES, "storage": BUCKET},
        "redis": EXTERNAL,
        "credentials": {"existingSecret": "own"},
    },
    "own": {
        "operator": {"namespaced": True, "replicas": 1},
        "crds": {"install": False},
        "urza": {"replicas": 2, "database": POSTGRES, "storage": BUCKET},
        "redis": EXTERNAL,
    },
    "postgres": {"urza": {"database": POSTGRES}},
    "bucket": {"urza": {"storage": BUCKET}},
    "claims": {
        "urza": {"persistence": {"existingClaim": "one"}},
        "redis": {"persistence": {"existingClaim": "two"}},
    },
    "everything": {
        "fullnameOverride": "grown",
        "commonLabels": {"cost": "research"},
        "imagePullSecrets": [{"name": "pull"}, {"name": "pull-too"}],
        "images": {"runtime": {"repository": "r", "digest": f"sha256:{'0' * 64}"}},
        "operator": {
            "settings": {"operator": {"workers": 32}},
            "excludedNamespaces": ["team-own", "team-too"],
            **PLACED,
        },
        "urza": {
            "serviceAccountAnnotations": {"role": "s3"},
            "settings": {"urza": {"lease_seconds": 90}},
            **PLACED,
        },
        "redis": PLACED,
        "networkPolicy": {
            "apiServer": {"cidrs": ["10.0.0.0/8"], "ports": [6443]},
            "metricsFrom": [{"namespaceSelector": {"matchLabels": {"a": "monitoring"}}}],
            "hubFrom": [{"ipBlock": {"cidr": "10.1.0.0/16"}}],
            "hubEgress": [{"ports": [{"port": 1234}]}],
            "workerEgress": [{"to": [{"ipBlock": {"cidr": "10.2.0.0/16"}}]}],
        },
        "metrics": {"serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}}},
    },
    "little": {
        "crds": {"install": False},
        "catalogue": {"install": False},
        "rbac": {"aggregate": False},
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
    },
}


def of_kind(objects: list[Object], *kinds: str) -> list[Object]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: list[Object], kind: str, name: str) -> Object:
    (found,) = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    return found


def pods(objects: list[Object]) -> Iterator[tuple[str, Object, Object]]:
    """The name, labels and spec of every pod that the objects are or lead to."""
    for each in objects:
        pod = each if each["kind"] == "Pod" else each.get("spec", {}).get("template")
        if pod is not None and each["kind"] in {"Pod", "Deployment", "StatefulSet", "Job"}:
            yield each["metadata"]["name"], pod["metadata"]["labels"], pod["spec"]


def selects(selector: Object, labels: Object) -> bool:
    """Whether a label selector takes those labels."""
    operators = {"In": lambda at, values: at in values, "Exists": lambda at, _: at is not None}
    wanted = selector.get("matchLabels", {}).items() <= labels.items()
    return wanted and all(
        operators[rule["operator"]](labels.get(rule["key"]), rule.get("values"))
        for rule in selector.get("matchExpressions", ())
    )


def leaves(values: Any, at: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path of each value that is no mapping, or an empty one."""
    if isinstance(values, dict) and values:
        for name, inner in values.items():
            yield from leaves(inner, (*at, name))
    else:
        yield at
