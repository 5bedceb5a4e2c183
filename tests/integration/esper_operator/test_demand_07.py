"""Demand 7: of two operators one works; the other takes over within 15 s, whatever befalls it.

The leader is killed, stopped, and cut off, as a process; what was written, and when, is what the
API server's own audit log says.
"""

import time
from datetime import datetime

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SESSIONS
from tools.operator_world import ACCOUNT

pytestmark = pytest.mark.xdist_group("cluster")
TAKEOVER_SECONDS = 15.0


VALID_SECONDS = 8.0
CHANGES = {"create", "update", "patch", "delete"}


def at(event):
    return datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()


def changes(plane, operator):
    """What an operator has changed, by the audit log: its lease, and all else."""
    own = [
        event
        for event in plane.requests(ACCOUNT)
        if operator.agent in event.get("userAgent", "") and event["verb"] in CHANGES
    ]
    lease = [event for event in own if event["objectRef"]["resource"] == "leases"]
    return lease, [event for event in own if event not in lease]


def assert_no_write_after_validity(plane, old, new):
    """Nothing of the old leader's began when its lease was over, or another had it."""
    renewed, wrote = changes(plane, old)
    good = [at(event) for event in renewed if event["responseStatus"]["code"] < 300]
    taken = min(at(event) for event in changes(plane, new)[0] if event["verb"] == "update")
    assert good, "the old leader never held the lease"
    late = [event for event in wrote if at(event) > min(max(good) + VALID_SECONDS, taken)]
    assert late == []


def holder(world):
    return world.plane.get("lease", "esper-operator", "-n", "esper-system")["spec"][
        "holderIdentity"
    ]


@pytest.fixture
def two(alone):
    """A leader whose way to the API server can be cut, and one that waits."""
    with alone.plane.proxy() as proxy, alone.operator(through=proxy) as leader:
        wait_for(lambda: leader.leads, "the first does not lead")
        with alone.operator() as follower:
            time.sleep(2.0)
            assert not follower.leads
            yield leader, follower, proxy


def taken_over(follower, began):
    wait_for(lambda: follower.leads, "nobody takes over", seconds=TAKEOVER_SECONDS + 5)
    return time.monotonic() - began


def works(world, objects, name):
    began = time.monotonic()
    objects.create(SESSIONS, world.session(name))
    wait_for(lambda: objects.condition(name), f"nobody takes {name} up", seconds=10.0)
    return time.monotonic() - began


def test_demand_07_the_leader_is_killed(world, two, objects):
    leader, follower, _ = two
    leader.kill()
    assert taken_over(follower, time.monotonic()) < TAKEOVER_SECONDS
    works(world, objects, "after")
    assert_no_write_after_validity(world.plane, leader, follower)


def test_demand_07_the_leader_is_asked_to_stop_and_gives_the_lease_back(world, two, objects):
    leader, follower, _ = two
    began = time.monotonic()
    leader.stop()
    assert taken_over(follower, began) < 5.0
    works(world, objects, "after")


def test_demand_07_the_leader_is_frozen_and_writes_nothing_when_it_wakes(world, two, objects):
    leader, follower, _ = two
    before = holder(world)
    objects.create(SESSIONS, world.session("before"))
    leader.freeze()
    assert taken_over(follower, time.monotonic()) < TAKEOVER_SECONDS
    works(world, objects, "after")
    assert holder(world) != before
    # What it was about to do when it was stopped, and what it sees now, ends at the fence.
    objects.create(SESSIONS, world.session("meanwhile"))
    objects.wait("meanwhile", "Unknown")
    leader.thaw()
    wait_for(lambda: not leader.running, "the old leader goes on", seconds=10.0)
    assert_no_write_after_validity(world.plane, leader, follower)


def test_demand_07_the_leader_is_cut_off_and_ends_by_itself(world, two, objects):
    leader, follower, proxy = two
    proxy.hang()
    began = time.monotonic()
    assert taken_over(follower, began) < TAKEOVER_SECONDS
    wait_for(lambda: not leader.running, "the leader goes on", seconds=10.0)
    works(world, objects, "after")
    proxy.heal()
    time.sleep(1.0)
    assert_no_write_after_validity(world.plane, leader, follower)
