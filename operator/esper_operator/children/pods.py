"""What every pod that the operator makes is like: restricted, and with what Esper needs to write.

Of a session's pod template, fields that the operator owns are merged with the session's, and
`extra`, passed on as it is, comes in last; neither can weaken what is said here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic.alias_generators import to_camel

from esper.contracts.resources import PodTemplate
from esper_operator.children.objects import Json
from esper_operator.options import Options
from esper_operator.views import CONTAINER

SETTINGS_FOLDER = "/etc/esper"
TEMPORARY_FOLDER = "/tmp"
TERMINATION_LOG = "/dev/termination-log"
"""Kubernetes' own; commands are told of it, so that they need not guess that they are in a pod."""
NOT_READY_SECONDS = 60
"""How long a pod stays on a node that does not answer."""

_USER = 65_532
"""Any but root; images need not know it."""
_UNREACHABLE = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")

_KEPT_SECURITY = {"runAsUser", "runAsGroup", "fsGroup", "fsGroupChangePolicy", "supplementalGroups"}
"""What `extra.securityContext` may say: who the pod is, as long as that is not root."""
_OWNED = {
    *("containers", "initContainers", "ephemeralContainers", "volumes", "restartPolicy"),
    *("hostNetwork", "hostPID", "hostIPC", "hostname", "subdomain", "nodeName", "os"),
    *("serviceAccount", "serviceAccountName", "automountServiceAccountToken"),
    *("enableServiceLinks", "shareProcessNamespace", "setHostnameAsFQDN", "hostnameOverride"),
}
"""Fields of a pod's spec that are the operator's alone."""
_FIELDS = {to_camel(name) for name in PodTemplate.model_fields}


def container_security() -> Json:
    """A container's security context under the restricted Pod Security Standard."""
    return {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "privileged": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def pod_security() -> Json:
    """A pod's security context under the restricted Pod Security Standard."""
    return {
        "runAsNonRoot": True,
        "runAsUser": _USER,
        "runAsGroup": _USER,
        "fsGroup": _USER,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def environment() -> list[Json]:
    """Where everything that a process leaves beside its work goes: the root is read-only."""
    places = {
        "HOME": TEMPORARY_FOLDER,
        "TMPDIR": TEMPORARY_FOLDER,
        "TORCHINDUCTOR_CACHE_DIR": f"{TEMPORARY_FOLDER}/inductor",
        "XDG_CACHE_HOME": f"{TEMPORARY_FOLDER}/cache",
    }
    return [{"name": name, "value": value} for name, value in places.items()]


def settings_volume(secret: str) -> Json:
    """The Secret with a pod's settings, readable by its group."""
    return {"name": "esper-settings", "secret": {"secretName": secret, "defaultMode": 0o440}}


def settings_mount() -> Json:
    """Where the settings are."""
    return {"name": "esper-settings", "mountPath": SETTINGS_FOLDER, "readOnly": True}


def temporary_volumes(shared_memory: str | None = None) -> list[Json]:
    """Room to write, and shared memory for the loaders and NCCL where it is asked for."""
    volumes: list[Json] = [{"name": "esper-tmp", "emptyDir": {}}]
    if shared_memory is not None:
        memory = {"medium": "Memory", "sizeLimit": shared_memory}
        volumes.append({"name": "esper-shm", "emptyDir": memory})
    return volumes


def temporary_mounts(*, shared_memory: bool = False) -> list[Json]:
    """Where they are."""
    mounts: list[Json] = [{"name": "esper-tmp", "mountPath": TEMPORARY_FOLDER}]
    return [*mounts, *([{"name": "esper-shm", "mountPath": "/dev/shm"}] * shared_memory)]


def not_ready_tolerations() -> list[Json]:
    """So that a lost node's pod is given up after a minute, not after five."""
    return [
        {
            "key": key,
            "operator": "Exists",
            "effect": "NoExecute",
            "tolerationSeconds": NOT_READY_SECONDS,
        }
        for key in _UNREACHABLE
    ]


def pod_spec(
    container: Mapping[str, Any], volumes: Sequence[Mapping[str, Any]], options: Options
) -> Json:
    """A pod of one container; `container` lacks its name and what all of them share."""
    spec: Json = {
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "containers": [
            {
                "name": CONTAINER,
                "imagePullPolicy": options.image_pull_policy,
                "securityContext": container_security(),
                "terminationMessagePolicy": "FallbackToLogsOnError",
                **container,
            }
        ],
        "volumes": list(volumes),
    }
    if options.image_pull_secrets:
        spec["imagePullSecrets"] = [{"name": name} for name in options.image_pull_secrets]
    return spec


def with_template(spec: Json, template: PodTemplate) -> Json:
    """`spec` with what a session's pod template adds; nothing of `spec` is weakened or renamed."""
    merged = dict(spec)
    container = dict(spec["containers"][0])
    added = {
        "env": template.env,
        "envFrom": template.env_from,
        "volumeMounts": template.volume_mounts,
    }
    for name, items in added.items():
        if items:
            container[name] = [*container.get(name, ()), *(item.to_wire() for item in items)]
    merged["containers"] = [container]
    merged["volumes"] = [*spec["volumes"], *(volume.to_wire() for volume in template.volumes)]
    merged["tolerations"] = [
        *(t for t in not_ready_tolerations() if not _tolerated(t, template.tolerations)),
        *template.tolerations,
    ]
    optional = {
        "nodeSelector": template.node_selector,
        "affinity": template.affinity,
        "runtimeClassName": template.runtime_class_name,
        "priorityClassName": template.priority_class_name,
        "terminationGracePeriodSeconds": template.termination_grace_period_seconds,
    }
    merged |= {name: value for name, value in optional.items() if value not in (None, {})}
    pull = [*spec.get("imagePullSecrets", ()), *template.image_pull_secrets]
    if pull:
        merged["imagePullSecrets"] = pull
    return _with_extra(merged, template.extra or {})


def refused_extra(template: PodTemplate) -> str | None:
    """What of `extra` is the operator's, or has another place, as a message; None if nothing."""
    extra = template.extra or {}
    place = "spec.workers.podTemplate.extra"
    owned = sorted(_OWNED.intersection(extra))
    if owned:
        return f"{place}.{owned[0]}: got a value; allowed: none, the operator sets this field"
    elsewhere = sorted(_FIELDS.intersection(extra))
    if elsewhere:
        field = f"spec.workers.podTemplate.{elsewhere[0]}"
        return f"{place}.{elsewhere[0]}: got a value; allowed: none, {field} says it"
    security = extra.get("securityContext", {})
    if not isinstance(security, Mapping):
        return f"{place}.securityContext: got {type(security).__name__}; allowed: a mapping"
    beyond = sorted(set(security) - _KEPT_SECURITY)
    if beyond:
        allowed = ", ".join(sorted(_KEPT_SECURITY))
        return f"{place}.securityContext: got {beyond[0]}; allowed: {allowed}"
    if security.get("runAsUser") == 0:
        return f"{place}.securityContext.runAsUser: got 0; allowed: any user but root"
    return None


def _tolerated(toleration: Json, own: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the session says itself how long it bears that taint."""
    return any(item.get("key") == toleration["key"] for item in own)


def _with_extra(spec: Json, extra: Mapping[str, Any]) -> Json:
    """`extra` beside what is there: it adds to who the pod is."""
    merged = {**extra, **spec}
    security = extra.get("securityContext")
    if isinstance(security, Mapping):
        own = {k: v for k, v in security.items() if k in _KEPT_SECURITY}
        merged["securityContext"] = {**spec["securityContext"], **own}
    return merged
