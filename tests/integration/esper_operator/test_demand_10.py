"""Demand 10: who has nothing to do writes nothing."""

import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
SESSIONS_MADE, IDLE_SECONDS = 20, 15.0


def test_demand_10_idle_sessions_are_written_about_only_when_something_changes(
    world, operator, objects
):
    for number in range(SESSIONS_MADE):
        objects.create(SESSIONS, world.session(f"idle-{number}"))
    for number in range(SESSIONS_MADE):
        Workers(objects, f"idle-{number}").run()
    wait_for(
        lambda: all(
            objects.condition(f"idle-{number}", "WorkersReady").get("status") == "True"
            for number in range(SESSIONS_MADE)
        ),
        "not all run",
    )
    time.sleep(3.0)
    versions = [found["metadata"]["resourceVersion"] for found in objects.items(SESSIONS)]
    before = len(world.changes(objects.namespace))
    time.sleep(IDLE_SECONDS)
    assert len(world.changes(objects.namespace)) - before <= 0.1 * IDLE_SECONDS
    assert versions == [found["metadata"]["resourceVersion"] for found in objects.items(SESSIONS)]
