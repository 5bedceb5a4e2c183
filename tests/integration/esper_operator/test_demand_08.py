"""Demand 8: what happens while a watch is cut is seen soon after, and silence is no death."""

import os
import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SERVICES, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
CUT_SECONDS = float(os.environ.get("TEST_CUT_SECONDS", "20"))
SEEN_SECONDS = 75.0


@pytest.fixture
def cut_off(alone, objects):
    """An operator whose watches can be cut while its lease and its writes go on."""
    # A lease that outlasts the cut: what is tried here is watching, not who leads.
    lease = {"lease_seconds": 600, "renew_seconds": 500.0}
    with (
        alone.plane.proxy() as proxy,
        alone.operator(through=proxy, resync_seconds=3600.0, **lease) as running,
    ):
        wait_for(lambda: running.leads, "the operator does not lead")
        objects.create(SESSIONS, alone.session("before"))
        Workers(objects, "before").run()
        yield running, proxy


@pytest.mark.parametrize("way", ["refuse", "hang"])
def test_demand_08_what_happened_during_a_cut_is_seen_after_it(alone, cut_off, objects, way):
    running, proxy = cut_off
    getattr(proxy, way)()
    objects.delete(f"{SERVICES}/before-workers")
    objects.create(SESSIONS, alone.session("during"))
    Workers(objects, "before").succeed()
    time.sleep(CUT_SECONDS)
    assert objects.condition("during") == {}
    proxy.heal()
    began = time.monotonic()
    objects.create(SESSIONS, alone.session("afterwards"))
    wait_for(
        lambda: (
            objects.condition("during")
            and objects.condition("afterwards")
            and objects.condition("before").get("status") == "True"
        ),
        "what happened during the cut is not seen",
        seconds=SEEN_SECONDS,
    )
    assert time.monotonic() - began < SEEN_SECONDS
    assert running.asked("/healthz")[0] == 200


def test_demand_08_a_quiet_watch_is_alive(alone, objects):
    with alone.operator(resync_seconds=1.0) as running:
        wait_for(lambda: running.leads, "the operator does not lead")
        time.sleep(6.0)
        assert running.asked("/healthz")[0] == 200
        ages = {
            labels["kind"]: value
            for name, labels, value in running.samples()
            if name == "esper_operator_watch_age_seconds"
        }
        assert set(ages) >= {"TrainingSession", "Job", "Pod", "Secret", "Seed"}
        assert max(ages.values()) < 6.0
