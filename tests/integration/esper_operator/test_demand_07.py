"""Demand 7: of two operators one works; the other takes over within 15 s, whatever befalls it.

The leader is killed, stopped, and cut off, as a process; what was written, and when, is what the
API server's own audit log says. All of it happens at once, to a pair of operators each, which have
a lease, an account and a namespace of their own.
"""

import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import SESSIONS
from tools.operator_world import CHANGES, Objects, allow

pytestmark = pytest.mark.xdist_group("cluster")
TAKEOVER_SECONDS = 15.0
VALID_SECONDS = 8.0


class Pair:
    """A leader whose way to the API server can be cut, and one that waits."""

    def __init__(self, world, objects, proxy):
        self.world, self.objects, self.proxy = world, objects, proxy
        own = objects.namespace
        self.account = f"system:serviceaccount:{own}:esper-operator"
        served = {"namespaces": own, "lease_namespace": own}
        through = world.plane.kubeconfig("esper-operator", own, through=proxy)
        self.leader = world.operator(kubeconfig=through, **served)
        straight = world.plane.kubeconfig("esper-operator", own)
        self.follower = world.operator(kubeconfig=straight, **served)

    def changes(self, operator):
        """What an operator has changed, by the audit log: its lease, and all else."""
        own = [
            event
            for event in self.world.plane.requests(self.account)
            if operator.agent in event.get("userAgent", "") and event["verb"] in CHANGES
        ]
        lease = [event for event in own if event["objectRef"]["resource"] == "leases"]
        return lease, [event for event in own if event not in lease]

    def lease(self):
        """When the leader held the lease for the last time, and when the follower took it."""
        held = [at(e) for e in self.changes(self.leader)[0] if e["responseStatus"]["code"] < 300]
        assert held, "the old leader never held the lease"
        return max(held), min(at(e) for e in self.changes(self.follower)[0] if is_update(e))

    def wrote_nothing_late(self):
        """Nothing of the old leader's began when its lease was over, or another had it."""
        held, taken = self.lease()
        _, wrote = self.changes(self.leader)
        assert [event for event in wrote if at(event) > min(held + VALID_SECONDS, taken)] == []

    def holder(self):
        lease = self.world.plane.get("lease", "esper-operator", "-n", self.objects.namespace)
        return lease["spec"]["holderIdentity"]

    def is_taken_over(self):
        began = time.monotonic()
        wait_for(lambda: self.follower.leads, "nobody takes over", seconds=TAKEOVER_SECONDS + 5)
        assert time.monotonic() - began < TAKEOVER_SECONDS

    def works(self, name):
        self.objects.create(SESSIONS, self.world.session(name))
        condition = self.objects.condition
        wait_for(lambda: condition(name), f"nobody takes {name} up", seconds=10.0)


def at(event):
    return datetime.fromisoformat(event["requestReceivedTimestamp"]).timestamp()


def is_update(event):
    return event["verb"] == "update"


@contextmanager
def two(world):
    """A pair at work."""
    own = world.plane.create_namespace(f"pair-{uuid.uuid4().hex[:8]}")
    allow(world.plane, own=own, namespaces=own)
    objects = Objects(world.plane, own)
    with world.plane.proxy() as proxy:
        pair = Pair(world, objects, proxy)
        with pair.leader:
            wait_for(lambda: pair.leader.leads, "the first does not lead")
            with pair.follower:
                time.sleep(2.0)
                assert not pair.follower.leads
                yield pair
    objects.close()
    world.plane.delete_namespace(own)


def killed(pair):
    pair.leader.kill()
    pair.is_taken_over()
    pair.works("after")
    pair.wrote_nothing_late()


def stopped(pair):
    pair.leader.stop()
    pair.is_taken_over()
    pair.works("after")
    given_back, taken = pair.lease()
    assert taken - given_back < VALID_SECONDS


def frozen(pair):
    before = pair.holder()
    pair.objects.create(SESSIONS, pair.world.session("before"))
    pair.leader.freeze()
    pair.is_taken_over()
    pair.works("after")
    assert pair.holder() != before
    # What it was about to do when it was stopped, and what it sees now, ends at the fence.
    pair.works("meanwhile")
    pair.leader.thaw()
    wait_for(lambda: not pair.leader.running, "the old leader goes on", seconds=10.0)
    pair.wrote_nothing_late()


def cut_off(pair):
    pair.proxy.hang()
    pair.is_taken_over()
    wait_for(lambda: not pair.leader.running, "the leader goes on", seconds=10.0)
    pair.works("after")
    pair.proxy.heal()
    time.sleep(1.0)
    pair.wrote_nothing_late()


@pytest.fixture(scope="module")
def befalling(world, shared_operator):
    """What becomes of the pairs, by what befalls their leaders."""
    shared_operator.stop()

    def befall(what):
        with two(world) as pair:
            what(pair)

    everything = (killed, stopped, frozen, cut_off)
    with ThreadPoolExecutor(len(everything)) as at_once:
        yield {what: at_once.submit(befall, what) for what in everything}


def test_demand_07_the_leader_is_killed(befalling):
    befalling[killed].result()


def test_demand_07_the_leader_is_asked_to_stop_and_gives_the_lease_back(befalling):
    befalling[stopped].result()


def test_demand_07_the_leader_is_frozen_and_writes_nothing_when_it_wakes(befalling):
    befalling[frozen].result()


def test_demand_07_the_leader_is_cut_off_and_ends_by_itself(befalling):
    befalling[cut_off].result()
