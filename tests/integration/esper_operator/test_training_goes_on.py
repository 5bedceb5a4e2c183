"""Demands 4 and 5, by workers that really train: nothing is lost by an eviction or a suspension."""

import re

import pytest

from tests.integration.esper_operator.trained import SECONDS, spec
from tools.cluster.control_plane import wait_for
from tools.operator_workers import PODS, SESSIONS, Workers

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.usefixtures("kubelet"),
]
EPOCHS = 24
_SHOWN = re.compile(r"^epoch +(\d+)/", re.MULTILINE)


def status_of(objects, name):
    return (objects.get(f"{SESSIONS}/{name}") or {}).get("status", {})


def wait_for_checkpoint(objects, name, after=0):
    return wait_for(
        lambda: (
            (found := status_of(objects, name).get("checkpoint") or {}).get("epoch", 0) > after
            and found
        ),
        f"{name} has no checkpoint after epoch {after}",
        seconds=SECONDS,
    )


def first_epochs(kubelet, namespace):
    """The epochs at which the runs of rank 0 began, in order of their Jobs."""
    parts = re.split(r"^--- ", kubelet.logs(namespace), flags=re.MULTILINE)
    found = [(part.splitlines()[0], _SHOWN.search(part)) for part in parts if part]
    return [int(first[1]) for _, first in sorted(found, key=lambda each: each[0]) if first]


def test_demand_04_an_eviction_costs_no_failure_and_the_work_goes_on_from_its_checkpoint(
    world, patient_operator, objects, kubelet
):
    objects.create(SESSIONS, world.session("evicted", spec=spec(EPOCHS)))
    before = wait_for_checkpoint(objects, "evicted")
    victim = Workers(objects, "evicted").pods()[1]["metadata"]["name"]
    eviction = {
        "apiVersion": "policy/v1",
        "kind": "Eviction",
        "metadata": {"name": victim, "namespace": objects.namespace},
    }
    objects.create(f"{PODS}/{victim}/eviction", eviction)
    wait_for(
        lambda: status_of(objects, "evicted").get("disruptions", 0) > 0,
        "the eviction is not seen",
        seconds=SECONDS,
    )
    after = wait_for_checkpoint(objects, "evicted", after=before["epoch"])
    objects.wait("evicted", "True", seconds=SECONDS)
    status = status_of(objects, "evicted")
    assert (status["failedAttempts"], status["epoch"]) == (0, EPOCHS)
    assert after["name"]
    said = kubelet.logs(objects.namespace)
    assert "the ranks are launched again" in said
    # The other pod stays, and its ranks go on in it: from the checkpoint, not from the beginning.
    shown = [int(epoch) for epoch in _SHOWN.findall(said)]
    assert (shown.count(1), max(shown)) == (1, EPOCHS)


def test_demand_05_a_suspended_session_has_no_pod_and_goes_on_in_its_new_size(
    world, patient_operator, objects, kubelet
):
    objects.create(SESSIONS, world.session("resting", spec=spec(EPOCHS)))
    wait_for_checkpoint(objects, "resting")
    objects.merge(f"{SESSIONS}/resting", {"spec": {"runPolicy": {"suspend": True}}})
    workers = Workers(objects, "resting")
    wait_for(lambda: not workers.pods() and not workers.jobs(), "there are pods", seconds=SECONDS)
    assert objects.condition("resting", "Suspended")["status"] == "True"
    namespace = objects.namespace
    world.plane.kubectl("scale", "-n", namespace, "ts/resting", "--replicas=1")
    objects.merge(f"{SESSIONS}/resting", {"spec": {"runPolicy": {"suspend": False}}})
    [job] = wait_for(workers.jobs, "there is no Job", seconds=SECONDS)
    assert job["spec"]["completions"] == 1
    objects.wait("resting", "True", seconds=SECONDS)
    status = status_of(objects, "resting")
    assert (status["failedAttempts"], status["epoch"]) == (0, EPOCHS)
    assert min(first_epochs(kubelet, namespace)[1:]) > 1
