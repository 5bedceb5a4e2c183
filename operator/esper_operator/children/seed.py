"""Seed objects: one for each slot of a session that has left dormancy."""

from __future__ import annotations

from esper.contracts.operational import SeedSnapshot
from esper.contracts.resources import API_VERSION
from esper_operator.children import names
from esper_operator.children.objects import Json, child, labels_of, owner_of
from esper_operator.views import SessionView


def manifest(session: SessionView, seed: SeedSnapshot) -> Json:
    """The object without its status; its spec never changes."""
    spec = {"session": session.name, "layer": seed.layer, "slot": seed.slot}
    return child(
        API_VERSION,
        "Seed",
        session.namespace,
        names.seed(session.name, seed.layer, seed.slot),
        {"spec": spec},
        labels=labels_of(session),
        owners=(owner_of("TrainingSession", session),),
    )


def status(session: SessionView, seed: SeedSnapshot, content: Json) -> Json:
    """The object's status, to be applied by itself."""
    return {
        "apiVersion": API_VERSION,
        "kind": "Seed",
        "metadata": {
            "name": names.seed(session.name, seed.layer, seed.slot),
            "namespace": session.namespace,
        },
        "status": content,
    }
