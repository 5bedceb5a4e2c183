"""Demand 5: suspend leaves no pod and no requeue; size can be edited; resume goes on."""

import time

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import JOBS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")
QUIET_SECONDS = 3.0


def status(objects):
    return objects.get(f"{SESSIONS}/paused")["status"]


def suspend(objects, value):
    objects.merge(f"{SESSIONS}/paused", {"spec": {"runPolicy": {"suspend": value}}})


def is_quiet(objects):
    """Whether nothing of the session changes for a while."""
    before = objects.get(f"{SESSIONS}/paused")["metadata"]["resourceVersion"]
    time.sleep(QUIET_SECONDS)
    after = objects.get(f"{SESSIONS}/paused")["metadata"]["resourceVersion"]
    return before == after and objects.items(JOBS) == []


def test_demand_05_a_suspended_session_rests_and_goes_on_in_another_size(world, operator, objects):
    objects.create(SESSIONS, world.session("paused"))
    workers = Workers(objects, "paused")
    workers.run()
    wait_for(lambda: objects.condition("paused")["reason"] == "Running", "it does not run")
    suspend(objects, True)
    wait_for(lambda: not workers.jobs() and not workers.pods(), "pods or Job stay")
    wait_for(
        lambda: objects.condition("paused", "Suspended").get("status") == "True",
        "it is not said to be suspended",
    )
    assert objects.condition("paused")["reason"] == "Suspended"
    wait_for(lambda: is_quiet(objects), "it does not rest")
    world.plane.kubectl("scale", "ts/paused", "--replicas=3", "-n", objects.namespace)
    assert is_quiet(objects) or is_quiet(objects)  # but for the generation that was seen
    suspend(objects, False)
    again = workers.run(3)
    assert {pod["metadata"]["labels"]["esper.dev/attempt"] for pod in again} == {"2"}
    wait_for(lambda: objects.condition("paused")["reason"] == "Running", "it does not go on")
    found = status(objects)
    assert (found["workers"], found["failedAttempts"], found["disruptions"]) == (3, 0, 0)
    workers.succeed()
    objects.wait("paused", "True")


def test_demand_05_a_queue_alone_starts_and_stops_its_jobs(world, operator, objects):
    spec = {
        "workers": {"replicas": 2},
        "runPolicy": {"queueName": "gpus", "activeDeadlineSeconds": 60},
    }
    objects.create(SESSIONS, world.session("paused", spec=spec))
    workers = Workers(objects, "paused")
    wait_for(lambda: objects.condition("paused").get("reason") == "Queued", "it is not queued")
    [job] = workers.jobs()
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert workers.pods() == []
    assert "activeSince" not in status(objects)
    path = f"{JOBS}/{job['metadata']['name']}"
    objects.merge(path, {"spec": {"suspend": False}})
    workers.run()
    wait_for(lambda: objects.condition("paused")["reason"] == "Running", "it does not run")
    assert "activeSince" in status(objects)
    objects.merge(path, {"spec": {"suspend": True}})
    wait_for(lambda: objects.condition("paused")["reason"] == "Queued", "it is not queued again")
    assert objects.get(path)["spec"]["suspend"] is True
    assert status(objects)["attempt"] == 1
    assert status(objects)["failedAttempts"] == 0
    suspend(objects, True)
    wait_for(lambda: not workers.jobs(), "a queue could start it again")


def test_demand_05_a_job_that_a_queue_has_preempted_goes_on_when_it_is_admitted_again(
    world, operator, objects
):
    spec = {"workers": {"replicas": 3}, "runPolicy": {"queueName": "gpus"}}
    objects.create(SESSIONS, world.session("paused", spec=spec))
    workers = Workers(objects, "paused")
    [job] = wait_for(workers.jobs, "there is no Job")
    path = f"{JOBS}/{job['metadata']['name']}"
    objects.merge(path, {"spec": {"suspend": False}})
    workers.run(3)
    wait_for(lambda: objects.condition("paused")["reason"] == "Running", "it does not run")
    objects.merge(path, {"spec": {"suspend": True}})
    wait_for(lambda: not workers.pods(), "the workers stay")
    wait_for(lambda: objects.condition("paused")["reason"] == "Queued", "it is not queued again")
    time.sleep(1)  # so that what is admitted later is later by the API server's seconds
    objects.merge(path, {"spec": {"suspend": False}})
    workers.run(3)
    wait_for(lambda: objects.condition("paused")["reason"] == "Running", "it does not go on")
    time.sleep(QUIET_SECONDS)
    assert [found["metadata"]["uid"] for found in workers.jobs()] == [job["metadata"]["uid"]]
    found = status(objects)
    assert (found["attempt"], found["disruptions"], found["failedAttempts"]) == (1, 0, 0)
