"""Demand 4: preemption is not failure; work goes on from the newest checkpoint."""

from datetime import UTC, datetime

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_bus import Trainer
from tools.operator_workers import PODS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")


def status(objects):
    return objects.get(f"{SESSIONS}/spot")["status"]


def preempt(objects, pod):
    """What the control plane and a kubelet say of a pod that was preempted."""
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    ended = {"exitCode": 137, "reason": "Error", "startedAt": now, "finishedAt": now}
    fixed = {"name": "worker", "ready": False, "restartCount": 0, "image": "i", "imageID": ""}
    condition = {"type": "DisruptionTarget", "status": "True", "reason": "PreemptionByScheduler"}
    content = {
        "phase": "Failed",
        "conditions": [{**condition, "message": "for another", "lastTransitionTime": now}],
        "containerStatuses": [{**fixed, "state": {"terminated": ended}}],
    }
    objects.merge(f"{PODS}/{pod['metadata']['name']}/status", {"status": content})


def test_demand_04_preemptions_use_up_no_attempt(world, operator, objects):
    spec = {"workers": {"replicas": 2}, "runPolicy": {"backoffLimit": 0}}
    made = objects.create(SESSIONS, world.session("spot", spec=spec))
    workers = Workers(objects, "spot")
    pods = workers.run()
    trainer = Trainer(world.hub.redis.url, objects.namespace, made)
    checkpoint = {"name": "checkpoints/epoch-000007-a000001", "epoch": 7}
    trainer.stands(epoch=7, checkpoint=checkpoint)
    wait_for(
        lambda: objects.condition("spot", "Checkpointed").get("status") == "True",
        "the checkpoint does not show",
    )
    preempt(objects, pods[1])
    wait_for(lambda: status(objects)["disruptions"] == 1, "the preemption is not counted")
    assert objects.condition("spot")["reason"] == "Interrupted"
    # The Job itself replaces the pod.
    [again] = workers.run(1)
    assert again["metadata"]["labels"]["esper.dev/attempt"] == "1"
    wait_for(lambda: objects.condition("spot")["reason"] == "Running", "it does not go on")

    # The one that was preempted before may go with its Job as soon as the others are.
    for pod in workers.pods():
        if pod["status"]["phase"] == "Running":
            preempt(objects, pod)
    wait_for(lambda: status(objects)["attempt"] == 2, "no new Job follows")
    second = workers.run()
    assert {pod["metadata"]["labels"]["esper.dev/attempt"] for pod in second} == {"2"}
    found = status(objects)
    assert (found["disruptions"], found["failedAttempts"], found["failures"]) == (3, 0, [])
    assert found["checkpoint"]["name"] == checkpoint["name"]
    wait_for(lambda: len(workers.jobs()) == 1, "the old Job stays")
    workers.succeed()
    assert objects.wait("spot", "True")["reason"] == "Completed"


def test_demand_04_an_interrupted_worker_is_no_failure(world, operator, objects):
    spec = {"workers": {"replicas": 2}, "runPolicy": {"backoffLimit": 0}}
    objects.create(SESSIONS, world.session("spot", spec=spec))
    workers = Workers(objects, "spot")
    pods = workers.run()
    workers.end(pods[0], 75, reason="Interrupted", message="a checkpoint was written")
    wait_for(lambda: status(objects)["disruptions"] == 1, "it is not counted")
    workers.run(1)
    wait_for(lambda: objects.condition("spot")["reason"] == "Running", "it does not go on")
    assert status(objects)["failedAttempts"] == 0
