"""An operator of the whole cluster leaves the namespaces alone that others serve."""

import time
import uuid

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import JOBS, SECRETS, SESSIONS
from tools.operator_world import Objects

pytestmark = pytest.mark.xdist_group("cluster")


def test_it_neither_makes_nor_says_anything_there(alone, objects):
    other = alone.plane.create_namespace(f"test-{uuid.uuid4().hex[:12]}")
    elsewhere = Objects(alone.plane, other)
    for place in (objects, elsewhere):
        place.create(SESSIONS, alone.session("early"))
    # What it would miss by watching, it would find by comparing.
    with alone.operator(excluded_namespaces=other, resync_seconds=1, sweep_seconds=1) as operator:
        wait_for(lambda: operator.leads, "the operator does not lead")
        for place in (elsewhere, objects):
            place.create(SESSIONS, alone.session("late"))
        for name in ("early", "late"):
            objects.wait(name, "Unknown")
        wait_for(lambda: len(objects.items(JOBS)) == 2, "no Jobs are made")
        time.sleep(2.5)
        assert operator.asked("/readyz") == (200, "ready\n")
    for name in ("early", "late"):
        assert elsewhere.condition(name) == {}
    assert elsewhere.items(JOBS) == []
    assert elsewhere.items(SECRETS) == []
    elsewhere.close()
    alone.plane.delete_namespace(other)
