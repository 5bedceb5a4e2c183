"""What the operator may do: one table, from which roles are rendered, with a reason for each line.

A test asks the API server's audit log which verbs were really used: all of these, and no others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from esper.configs import OperatorConfig
from esper_operator.children import names
from esper_operator.kinds import (
    BLUEPRINT,
    DEPLOYMENT,
    EVENT,
    JOB,
    KERNEL,
    LEASE,
    NETWORK_POLICY,
    POD,
    SECRET,
    SEED,
    SERVICE,
    SESSION,
    Kind,
)

NAME = "esper-operator"


@dataclass(frozen=True)
class Grant:
    """Verbs on a kind, or on a part of it, and what they are for."""

    kind: Kind
    verbs: tuple[str, ...]
    reason: str
    subresource: str = ""
    names: tuple[str, ...] = ()
    """The only objects that they are granted on; none for all."""

    @property
    def resource(self) -> str:
        """What the API calls it."""
        return f"{self.kind.plural}/{self.subresource}" if self.subresource else self.kind.plural


_SEEN = ("list", "watch")
_MADE = ("create", "patch")

GRANTS = (
    Grant(SESSION, _SEEN, "what people ask for"),
    Grant(SESSION, ("delete",), "ttlSecondsAfterFinished has run out"),
    Grant(SESSION, ("patch",), "how a session stands", "status"),
    Grant(BLUEPRINT, _SEEN, "what may grow"),
    Grant(BLUEPRINT, _MADE, "the catalogue, in the namespaces of operator.catalogue"),
    Grant(BLUEPRINT, ("patch",), "how far a blueprint is", "status"),
    Grant(KERNEL, _SEEN, "what was compiled"),
    Grant(KERNEL, _MADE, "a session asks for a kernel that is not there"),
    Grant(KERNEL, ("patch",), "what came of a compilation", "status"),
    Grant(SEED, _SEEN, "which Seeds there are, their metadata alone"),
    Grant(SEED, _MADE, "a slot has left dormancy"),
    Grant(SEED, ("patch",), "how a seed stands", "status"),
    Grant(SEED, ("delete",), "a slot that reports left out makes room for another"),
    Grant(JOB, _SEEN, "how workers and compilations stand"),
    Grant(JOB, _MADE, "the workers of an attempt, or a compilation"),
    Grant(JOB, ("delete",), "a session was suspended, resized, or begins a new attempt"),
    Grant(POD, _SEEN, "why a worker does not start, and how it has ended"),
    Grant(POD, ("delete",), "a worker on a node that was lost"),
    Grant(DEPLOYMENT, _SEEN, "whether a controller runs"),
    Grant(DEPLOYMENT, _MADE, "a controller, of a session or of a namespace"),
    Grant(DEPLOYMENT, ("delete",), "no session needs the controller any more"),
    Grant(SERVICE, _SEEN, "whether it is there, its metadata alone"),
    Grant(SERVICE, _MADE, "the name under which workers meet"),
    Grant(SECRET, _SEEN, "whether it is there, its metadata alone"),
    Grant(SECRET, _MADE, "what opens the hub and the bus to a session"),
    Grant(
        SECRET,
        ("delete",),
        "no session of the namespace needs the Secret that they shared",
        names=(names.TAMIYO,),
    ),
    Grant(NETWORK_POLICY, _SEEN, "whether it is there, its metadata alone"),
    Grant(NETWORK_POLICY, _MADE, "whom a session's workers reach, with operator.worker_egress"),
    Grant(EVENT, _SEEN, "why no pods can be made of a Job"),
    Grant(EVENT, ("create",), "what `kubectl describe` tells"),
)
"""In each namespace that the operator serves."""


def lease_grants(name: str) -> tuple[Grant, ...]:
    """In the operator's own namespace, on the lease of that name."""
    return (
        Grant(LEASE, ("create",), "the first operator makes it"),
        Grant(LEASE, ("get", "update"), "which of several operators works", names=(name,)),
    )


def rendered(config: OperatorConfig, *, namespaced: bool) -> str:
    """The roles as YAML: for the whole cluster, or one for each of `operator.namespaces`."""
    return yaml.safe_dump_all(
        manifests(config, namespaced=namespaced), sort_keys=False, default_flow_style=None
    )


def manifests(config: OperatorConfig, *, namespaced: bool) -> list[dict[str, Any]]:
    """The roles and what binds them to the operator's service account."""
    own = config.lease_namespace
    account = {"kind": "ServiceAccount", "name": NAME, "namespace": own}
    served = [name for name in config.namespaces.split(",") if name]
    made = [{"apiVersion": "v1", "kind": "ServiceAccount", "metadata": _meta(own)}]
    made += _granted("Role", own, f"{NAME}-lease", _rules(lease_grants(config.lease_name)), account)
    if namespaced:
        for namespace in served:
            made += _granted("Role", namespace, NAME, _rules(GRANTS), account)
    else:
        made += _granted("ClusterRole", None, NAME, _rules(GRANTS), account)
    return made


def _granted(
    kind: str, namespace: str | None, name: str, rules: list[Any], account: Mapping[str, str]
) -> list[dict[str, Any]]:
    version = "rbac.authorization.k8s.io/v1"
    return [
        {"apiVersion": version, "kind": kind, "metadata": _meta(namespace, name), "rules": rules},
        {
            "apiVersion": version,
            "kind": f"{kind}Binding",
            "metadata": _meta(namespace, name),
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": name},
            "subjects": [dict(account)],
        },
    ]


def _meta(namespace: str | None, name: str = NAME) -> dict[str, Any]:
    labels = {"app.kubernetes.io/name": NAME, "app.kubernetes.io/part-of": "esper"}
    return {"name": name} | ({"namespace": namespace} if namespace else {}) | {"labels": labels}


def _rules(grants: Iterable[Grant]) -> list[dict[str, list[str]]]:
    verbs: dict[tuple[str, str, tuple[str, ...]], list[str]] = defaultdict(list)
    for grant in grants:
        verbs[grant.kind.group, grant.resource, grant.names] += grant.verbs
    return [
        {"apiGroups": [group], "resources": [resource]}
        | ({"resourceNames": list(names)} if names else {})
        | {"verbs": sorted(set(given))}
        for (group, resource, names), given in verbs.items()
    ]
