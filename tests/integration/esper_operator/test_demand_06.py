"""Demand 6: time to live, namespaces deleted without an operator, and what lies outside."""

import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import JOBS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
GONE_SECONDS = 60.0


def test_demand_06_a_finished_session_goes_when_its_time_is_over_and_does_not_come_back(
    world, operator, objects
):
    spec = {"runPolicy": {"ttlSecondsAfterFinished": 2}}
    objects.create(SESSIONS, world.session("brief", spec=spec))
    workers = Workers(objects, "brief")
    workers.run()
    workers.succeed()
    objects.wait("brief", "True")
    wait_for(lambda: objects.get(f"{SESSIONS}/brief") is None, "the session stays")
    wait_for(lambda: not objects.items(JOBS), "its Job stays")
    time.sleep(3.0)
    assert objects.items(JOBS) == []


def test_demand_06_a_namespace_goes_without_an_operator_and_its_rest_is_swept_later(alone, objects):
    # Half of what pods have to end is what a namespace waits before it looks at them again.
    with alone.operator(stop_seconds=1) as first:
        wait_for(lambda: first.leads, "the operator does not lead")
        for name in ("waits", "runs", "ended"):
            objects.create(SESSIONS, alone.session(name))
        for name in ("runs", "ended"):
            Workers(objects, name).run()
        Workers(objects, "ended").succeed()
        objects.wait("ended", "True")
        first.kill()
    uids = {found["metadata"]["uid"] for found in objects.items(SESSIONS)}
    assert objects.namespace in alone.hub.namespaces()
    alone.plane.delete_namespace(objects.namespace)
    began = time.monotonic()
    wait_for(
        lambda: alone.plane.try_kubectl("get", "namespace", objects.namespace).returncode,
        "the namespace stays",
        seconds=GONE_SECONDS,
    )
    assert time.monotonic() - began < GONE_SECONDS
    assert len(uids) == 3
    with alone.operator():
        wait_for(
            lambda: objects.namespace not in alone.hub.namespaces(),
            "what the sessions have left is not swept",
        )
