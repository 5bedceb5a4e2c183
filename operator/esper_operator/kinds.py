"""Every kind of object that the operator reads or writes, and where the API server keeps it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from esper.contracts.resources import API_VERSION, KINDS

MANAGER = "esper-operator"
"""The field manager of everything that is applied, and the value of the label `managed-by`."""
MANAGED_LABEL = "app.kubernetes.io/managed-by"
MANAGED_BY = f"{MANAGED_LABEL}={MANAGER}"
"""Selects what the operator has made."""


@dataclass(frozen=True)
class Kind:
    """A namespaced kind of object.

    `name` is what manifests call it, `plural` what paths and RBAC rules call it.
    """

    name: str
    api_version: str
    plural: str

    @property
    def group(self) -> str:
        """The API group; the core group's is empty."""
        return self.api_version.rpartition("/")[0]

    def path(self, namespace: str | None, name: str | None = None, subresource: str = "") -> str:
        """Where its objects are; without a namespace those of all namespaces."""
        root = "/apis" if "/" in self.api_version else "/api"
        within = f"/namespaces/{namespace}" if namespace else ""
        one = f"/{name}" if name else ""
        part = f"/{subresource}" if subresource else ""
        return f"{root}/{self.api_version}{within}/{self.plural}{one}{part}"


_OWN = {of.__name__: Kind(of.__name__, API_VERSION, of.plural) for of in KINDS}

SESSION = _OWN["TrainingSession"]
SEED = _OWN["Seed"]
BLUEPRINT = _OWN["Blueprint"]
KERNEL = _OWN["CompiledKernel"]
JOB = Kind("Job", "batch/v1", "jobs")
POD = Kind("Pod", "v1", "pods")
DEPLOYMENT = Kind("Deployment", "apps/v1", "deployments")
SERVICE = Kind("Service", "v1", "services")
SECRET = Kind("Secret", "v1", "secrets")
NETWORK_POLICY = Kind("NetworkPolicy", "networking.k8s.io/v1", "networkpolicies")
EVENT = Kind("Event", "v1", "events")
LEASE = Kind("Lease", "coordination.k8s.io/v1", "leases")

BY_NAME: Mapping[str, Kind] = MappingProxyType(
    {
        kind.name: kind
        for kind in (
            *(SESSION, SEED, BLUEPRINT, KERNEL, JOB, POD),
            *(DEPLOYMENT, SERVICE, SECRET, NETWORK_POLICY, EVENT, LEASE),
        )
    }
)

WATCHED = (SESSION, BLUEPRINT, KERNEL, JOB, DEPLOYMENT, POD)
"""Those whose events come through kopf, whole."""
BY_METADATA = (SERVICE, SECRET, NETWORK_POLICY, SEED)
"""Those of which only metadata is read: their contents don't travel."""

MENDED = (DEPLOYMENT, SERVICE, SECRET, NETWORK_POLICY)
"""Those whose content anybody may change by mistake, and which are then applied again."""


def selecting(kind: Kind) -> dict[str, str]:
    """The selector with which objects of a kind are listed and watched."""
    return {} if kind in OWN else {"labelSelector": MANAGED_BY}


OWN = (SESSION, BLUEPRINT, KERNEL)
"""Those that people apply; of the rest only what the operator has made is read."""
