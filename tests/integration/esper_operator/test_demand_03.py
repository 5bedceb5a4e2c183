"""Demand 3: every session ends with a reason, in bounded time."""

from datetime import UTC, datetime, timedelta

import pytest

from tools.cluster.control_plane import wait_for
from tools.operator_workers import JOBS, PODS, SESSIONS, Workers

pytestmark = pytest.mark.xdist_group("cluster")


def started(world, objects, name, **policy):
    spec = {"runPolicy": {"backoffLimit": 0, **policy}, "workers": {"replicas": 2}}
    objects.create(SESSIONS, world.session(name, spec=spec))
    return Workers(objects, name)


def hurry(objects, name, deadline="startupDeadlineSeconds"):
    """Its deadline is near: only now, since what the test says of its pods must come before."""
    objects.merge(f"{SESSIONS}/{name}", {"spec": {"runPolicy": {deadline: 1}}})


def skip_the_pause(objects, name):
    """The pause before its next attempt is over: the attempt was decided on long ago."""
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    objects.merge(f"{SESSIONS}/{name}/status", {"status": {"attemptTime": long_ago}})


def say(objects, pod, **status):
    objects.merge(f"{PODS}/{pod['metadata']['name']}/status", {"status": status})


def waiting(reason, message):
    state = {"waiting": {"reason": reason, "message": message}}
    fixed = {"ready": False, "restartCount": 0, "image": "i", "imageID": ""}
    return [{"name": "worker", "state": state, **fixed}]


def test_demand_03_an_image_that_cannot_be_pulled(world, operator, objects):
    workers = started(world, objects, "image")
    for pod in workers.appear():
        text = "manifest unknown"
        say(objects, pod, phase="Pending", containerStatuses=waiting("ErrImagePull", text))
    shown = wait_for(
        lambda: (
            (c := objects.condition("image", "WorkersReady")).get("reason") == "ImagePullFailed"
            and c
        ),
        "the image does not show",
    )
    assert "manifest unknown" in shown["message"]
    assert objects.condition("image")["status"] == "Unknown"
    hurry(objects, "image")
    assert objects.wait("image", "False")["reason"] == "ImagePullFailed"
    wait_for(lambda: not workers.jobs(), "the Job stays")


def test_demand_03_workers_that_find_no_node(world, operator, objects):
    workers = started(world, objects, "room")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    for pod in workers.appear():
        item = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable"}
        conditions = [{**item, "message": "0/3 nodes are free", "lastTransitionTime": now}]
        say(objects, pod, phase="Pending", conditions=conditions)
    hurry(objects, "room")
    found = objects.wait("room", "False")
    assert found["reason"] == "Unschedulable"
    assert "0/3 nodes are free" in found["message"]


def test_demand_03_workers_that_never_take_a_step(world, operator, objects):
    started(world, objects, "hangs").run()
    hurry(objects, "hangs")
    assert objects.wait("hangs", "False")["reason"] == "StartupDeadlineExceeded"


def test_demand_03_a_session_that_is_active_for_too_long(world, operator, objects):
    started(world, objects, "long").run()
    hurry(objects, "long", "activeDeadlineSeconds")
    assert objects.wait("long", "False")["reason"] == "ActiveDeadlineExceeded"


@pytest.mark.parametrize(("code", "text"), [(137, "exit code 137"), (1, "LossNotFinite")])
def test_demand_03_a_crash_loop_ends(world, operator, objects, code, text):
    workers = started(world, objects, "crash", backoffLimit=1)
    for attempt in (1, 2):
        pods = workers.run()
        message = "exit code 137" if code == 137 else "three times"
        workers.end(pods[1], code, reason="LossNotFinite", message=message)
        if attempt == 1:
            wait_for(
                lambda: objects.condition("crash")["reason"] == "Retrying", "it is not tried again"
            )
            skip_the_pause(objects, "crash")
    found = objects.wait("crash", "False", seconds=60)
    assert found["reason"] == "BackoffLimitExceeded"
    assert text in found["message"]
    status = objects.get(f"{SESSIONS}/crash")["status"]
    assert status["attempt"] == status["failedAttempts"] == 2
    assert [failure["exitCode"] for failure in status["failures"]] == [code, code]


def test_demand_03_a_quota_that_leaves_no_room_for_the_job(world, operator, objects):
    quota = {"metadata": {"name": "none"}, "spec": {"hard": {"count/jobs.batch": "0"}}}
    objects.create("/api/v1/resourcequotas", quota)
    wait_for(
        lambda: "hard" in objects.get("/api/v1/resourcequotas/none").get("status", {}),
        "the quota is not in force",
    )
    started(world, objects, "quota")
    wait_for(
        lambda: "exceeded quota" in objects.condition("quota").get("message", ""),
        "the quota does not show",
    )
    hurry(objects, "quota")
    assert objects.wait("quota", "False", seconds=60)["reason"] == "ChildRefused"
    assert objects.items(JOBS) == []


def test_demand_03_a_node_that_refuses_the_pods_is_told_and_not_asked_without_a_pause(
    world, operator, objects
):
    workers = started(world, objects, "refused")
    for attempt in (1, 2, 3):
        for pod in workers.appear():
            assert pod["metadata"]["labels"]["esper.dev/attempt"] == str(attempt)
            reason = {"reason": "UnexpectedAdmissionError", "message": "no such device"}
            say(objects, pod, phase="Failed", **reason)
        wait_for(
            lambda count=attempt: (
                objects.get(f"{SESSIONS}/refused")["status"].get("fruitlessAttempts") == count
            ),
            "the attempt does not count as one that came to nothing",
        )
    found = objects.condition("refused")
    assert (found["status"], found["reason"]) == ("Unknown", "Interrupted")
    assert "UnexpectedAdmissionError: no such device" in found["message"]
    wait_for(
        lambda: objects.condition("refused", "WorkersReady")["reason"] == "BackingOff",
        "there is no pause",
    )
    assert [job["metadata"]["name"].endswith("-3") for job in workers.jobs()] == [True]
