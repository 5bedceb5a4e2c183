"""Deployments of Tamiyo: one a namespace, and one for each session that asks for its own.

One replica each, replaced before it is taken away: two of them decide as one would.
"""

from __future__ import annotations

from esper_operator.children import names, pods
from esper_operator.children.connections import SETTINGS_FILE
from esper_operator.children.objects import Json, Named, child, labels_of, owner_of
from esper_operator.options import Options
from esper_operator.views import ROLE_LABEL, SessionView

HEALTH_PORT = 8080


def shared(namespace: str, options: Options) -> Json:
    """The controller of all sessions of a namespace that have none of their own."""
    return _deployment(namespace, names.TAMIYO, None, options)


def dedicated(session: SessionView, options: Options) -> Json:
    """The controller of one session; it goes away with it.

    Only the namespace's credentials may publish decisions, so it works with them.
    """
    return _deployment(session.namespace, names.tamiyo(session.name), session, options)


def _deployment(namespace: str, name: str, session: Named | None, options: Options) -> Json:
    labels = labels_of(session, role="tamiyo")
    selector = {"app.kubernetes.io/name": name, ROLE_LABEL: "tamiyo"}
    spec: Json = {
        "replicas": 1,
        "selector": {"matchLabels": selector},
        "strategy": {
            "type": "RollingUpdate",
            "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0},
        },
        "progressDeadlineSeconds": 600,
        "template": {
            "metadata": {"labels": {**dict(options.pod_labels), **labels, **selector}},
            "spec": _pod(session, options),
        },
    }
    return child(
        "apps/v1",
        "Deployment",
        namespace,
        name,
        {"spec": spec},
        labels=labels,
        owners=() if session is None else (owner_of("TrainingSession", session),),
    )


def _pod(session: Named | None, options: Options) -> Json:
    scope = [] if session is None else ["--session", session.uid]
    container: Json = {
        "image": options.image,
        "command": ["esper", "serve", "tamiyo"],
        "args": [
            *("--config", f"{pods.SETTINGS_FOLDER}/{SETTINGS_FILE}"),
            *("--set", "component.health_host=0.0.0.0"),
            *("--set", f"component.health_port={HEALTH_PORT}"),
            *scope,
        ],
        "env": pods.environment(),
        "ports": [{"name": "health", "containerPort": HEALTH_PORT, "protocol": "TCP"}],
        "livenessProbe": _probe("/healthz", period=10, failures=6),
        "readinessProbe": _probe("/readyz", period=5, failures=3),
        "resources": {
            "requests": dict(options.tamiyo_requests),
            "limits": dict(options.tamiyo_limits),
        },
        "volumeMounts": [pods.settings_mount(), *pods.temporary_mounts()],
    }
    volumes = [pods.settings_volume(names.TAMIYO), *pods.temporary_volumes()]
    pod = pods.pod_spec(container, volumes, options)
    pod["tolerations"] = pods.not_ready_tolerations()
    pod["terminationGracePeriodSeconds"] = 15
    return pod


def _probe(path: str, *, period: int, failures: int) -> Json:
    return {
        "httpGet": {"path": path, "port": "health"},
        "periodSeconds": period,
        "failureThreshold": failures,
        "timeoutSeconds": 2,
    }
