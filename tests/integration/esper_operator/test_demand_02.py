"""Demand 2: up to 20 creations a second, each with its first condition soon.

Within 2 s on a machine of its own; here other tests have its cores too.
"""

import time
from datetime import datetime

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SESSIONS

pytestmark = pytest.mark.xdist_group("cluster")
CREATIONS, RATE = 60, 20.0
FIRST_SECONDS = 10.0


def test_demand_02_each_of_many_creations_is_acknowledged_soon(world, operator, objects):
    seen, made = {}, {}
    watching = objects.watch(SESSIONS)
    began = time.monotonic()
    for number in range(CREATIONS):
        name = f"many-{number}"
        objects.create(SESSIONS, world.session(name))
        made[name] = time.monotonic()
        time.sleep(max(0.0, began + (number + 1) / RATE - time.monotonic()))

    def all_seen():
        for moment, found in watching.take():
            name = found["metadata"]["name"]
            for condition in found.get("status", {}).get("conditions", ()):
                if condition["type"] == "Succeeded":
                    assert condition["observedGeneration"] == 1
                    seen.setdefault(name, (moment, condition["status"]))
        return len(seen) == CREATIONS

    wait_for(all_seen, "not every session has a condition")
    watching.close()
    assert {status for _, status in seen.values()} == {"Unknown"}
    waits = sorted(seen[name][0] - made[name] for name in made)
    assert waits[int(0.99 * CREATIONS)] <= FIRST_SECONDS, waits[-5:]


def test_demand_02_a_condition_says_when_it_last_changed(world, operator, objects):
    objects.create(SESSIONS, world.session("once"))
    condition = objects.wait("once", "Unknown")
    assert datetime.fromisoformat(condition["lastTransitionTime"]).tzinfo is not None
