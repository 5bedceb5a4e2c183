"""The headless Service through which the workers of a session meet."""

from __future__ import annotations

from esper_operator.children import names
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.views import ROLE_LABEL, SESSION_LABEL, UID_LABEL, SessionView


def selector(session: SessionView) -> dict[str, str]:
    """The labels that the workers of a session have, and nothing else."""
    labels = labels_of(session, role="worker")
    return {key: labels[key] for key in (SESSION_LABEL, UID_LABEL, ROLE_LABEL)}


def manifest(session: SessionView) -> Json:
    """It publishes the addresses of pods that are not ready: they become so by meeting."""
    labels = labels_of(session, role="worker")
    spec = {
        "clusterIP": "None",
        "publishNotReadyAddresses": True,
        "selector": selector(session),
        "ports": [{"name": "rendezvous", "port": names.RENDEZVOUS_PORT, "protocol": "TCP"}],
    }
    return child(
        "v1",
        "Service",
        session.namespace,
        names.service(session.name),
        {"spec": spec},
        labels=labels,
        owners=(owner_of("TrainingSession", session),),
    )
