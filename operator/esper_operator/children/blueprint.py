"""The catalogue as Blueprint objects, so that people see with kubectl what may grow."""

from __future__ import annotations

from esper.contracts.blueprints import CATALOGUE
from esper.contracts.resources import API_VERSION
from esper_operator.children.objects import Json


def catalogue(namespace: str) -> list[Json]:
    """All of them; sessions know them also where there is no such object."""
    return [
        {
            "apiVersion": API_VERSION,
            "kind": "Blueprint",
            "metadata": {"name": entry.name, "namespace": namespace, "labels": dict(entry.labels)},
            "spec": {"builtin": entry.name, "description": entry.description},
        }
        for entry in CATALOGUE
    ]
