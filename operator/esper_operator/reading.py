"""What is read alike of all objects of the API server: metadata, labels, conditions."""

from __future__ import annotations

from collections.abc import Mapping
from sys import intern
from typing import Any

from esper_operator.times import seconds_of

Object = Mapping[str, Any]
"""An object as JSON, with the API's own names."""


def meta_of(data: Object) -> Object:
    """Its metadata."""
    found: Object = data["metadata"]
    return found


def label_of(data: Object, name: str) -> str:
    """A label of it; empty where it has none of that name."""
    return intern(str((meta_of(data).get("labels") or {}).get(name, "")))


def annotation_of(data: Object, name: str) -> str:
    """An annotation of it; empty where it has none of that name."""
    return str((meta_of(data).get("annotations") or {}).get(name, ""))


def moment_of(text: str) -> float:
    """The time in an annotation, which anybody may have written; 0 where it is none."""
    try:
        return seconds_of(text) or 0.0
    except ValueError:
        return 0.0


def number_of(text: str) -> int:
    """The number in a label or an annotation; 0 where it is none."""
    return int(text) if text.isdecimal() else 0


def holding_conditions(data: Object) -> dict[str, Object]:
    """The conditions of an object that hold, by type."""
    found = (data.get("status") or {}).get("conditions") or ()
    return {item["type"]: item for item in found if item.get("status") == "True"}
