"""The NetworkPolicy of a session's workers: with each other alone, and where an installation says.

They run a user's code. Who meets them are their own: gloo and NCCL choose ports as they like.
"""

from __future__ import annotations

import json

from esper_operator.children import names
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.views import ROLE_LABEL, SESSION_LABEL, UID_LABEL, SessionView


def manifest(session: SessionView, egress: str) -> Json:
    """It; `egress` are rules as JSON: where all workers may connect to, as to hub and bus."""
    labels = labels_of(session, role="worker")
    own = {"matchLabels": {key: labels[key] for key in (SESSION_LABEL, UID_LABEL, ROLE_LABEL)}}
    spec = {
        "podSelector": own,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [{"from": [{"podSelector": own}]}],
        "egress": [{"to": [{"podSelector": own}]}, *json.loads(egress)],
    }
    return child(
        "networking.k8s.io/v1",
        "NetworkPolicy",
        session.namespace,
        names.network_policy(session.name),
        {"spec": spec},
        labels=labels,
        owners=(owner_of("TrainingSession", session),),
    )
