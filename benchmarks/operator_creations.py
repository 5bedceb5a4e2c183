"""How soon has each of many sessions, made at an even rate, its first summary condition?

A wait counts from the moment at which its session was due to be made, so that a creation that comes
late makes no wait shorter.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from typing import Any

from tools.operator_world import GROUP, Objects, OperatorWorld

RATE = 20.0
SESSIONS, QUICK_SESSIONS = 200, 60
LONGEST_SECONDS = 60.0
NAMESPACE = "creations"
PATH = f"{GROUP}/trainingsessions"


def measure_creations(world: OperatorWorld, count: int) -> dict[str, Any]:
    """Make so many sessions beside those that are there, and watch them."""
    world.plane.create_namespace(NAMESPACE)
    objects = Objects(world.plane, NAMESPACE)
    watching = objects.watch(PATH)
    due: dict[str, float] = {}
    seen: dict[str, float] = {}
    try:
        began = time.monotonic()
        for number in range(count):
            name, moment = f"created-{number:04}", began + number / RATE
            time.sleep(max(0.0, moment - time.monotonic()))
            objects.create(PATH, world.session(name))
            due[name] = moment
        seconds = time.monotonic() - began
        while len(seen) < count and time.monotonic() - began < seconds + LONGEST_SECONDS:
            time.sleep(0.05)
            for name, moment in acknowledged(watching.take()):
                seen.setdefault(name, moment)
    finally:
        watching.close()
        objects.close()
    waits = [seen.get(name, moment + LONGEST_SECONDS) - moment for name, moment in due.items()]
    return {
        "sessions": count,
        "createdPerSecond": round(count / max(seconds, count / RATE), 2),
        "firstConditionSeconds": {
            f"p{share * 100:g}": round(share_of(waits, share), 3) for share in (0.5, 0.9, 0.99, 1.0)
        },
    }


def acknowledged(heard: Iterable[tuple[float, dict[str, Any]]]) -> Iterable[tuple[str, float]]:
    """Sessions whose summary is Unknown for the generation that they are of, and when."""
    for moment, found in heard:
        meta = found["metadata"]
        for condition in found.get("status", {}).get("conditions", ()):
            current = condition.get("observedGeneration") == meta["generation"]
            if condition["type"] == "Succeeded" and condition["status"] == "Unknown" and current:
                yield meta["name"], moment


def share_of(values: Iterable[float], share: float) -> float:
    """The least value that so large a share of them does not exceed."""
    ordered = sorted(values)
    return ordered[max(1, math.ceil(share * len(ordered))) - 1]
