"""A child that a finalizer holds is waited for, and made again as soon as it has gone."""

import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import DEPLOYMENTS, SECRETS, SERVICES, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
HELD_SECONDS = 4.0
CHILDREN = (
    f"{SERVICES}/held-workers",
    f"{SECRETS}/held-esper",
    f"{SECRETS}/esper-tamiyo",
    f"{DEPLOYMENTS}/esper-tamiyo",
)


def test_children_that_a_finalizer_holds_cost_next_to_nothing(world, operator, objects):
    objects.create(SESSIONS, world.session("held"))
    Workers(objects, "held").run()
    before = {
        child: wait_for(lambda: objects.get(child), f"{child} is not made")["metadata"]["uid"]  # noqa: B023
        for child in CHILDREN
    }
    for child in CHILDREN:
        objects.merge(child, {"metadata": {"finalizers": ["esper.dev/held"]}})
        objects.delete(child)
    written = len(world.changes(objects.namespace))
    time.sleep(HELD_SECONDS)
    assert len(world.changes(objects.namespace)) - written <= 2 * len(CHILDREN)
    for child in CHILDREN:
        objects.merge(child, {"metadata": {"finalizers": []}})
    for child, uid in before.items():
        wait_for(
            lambda: (found := objects.get(child)) and found["metadata"]["uid"] != uid,  # noqa: B023
            f"{child} is not made again",
            seconds=10.0,
        )
    assert len(Workers(objects, "held").jobs()) == 1
