"""One session from kubectl apply to its end."""

import pytest
import yaml

from tools.cluster.control_plane import wait_for
from tools.operator_workers import (
    DEPLOYMENTS,
    JOBS,
    SECRETS,
    SERVICES,
    SESSIONS,
    Workers,
)

pytestmark = pytest.mark.xdist_group("cluster")


def test_a_session_is_made_runs_and_succeeds(world, operator, objects):
    manifest = yaml.safe_dump(world.session("first"))
    world.plane.kubectl("apply", "-n", objects.namespace, "-f", "-", given=manifest)
    workers = Workers(objects, "first")
    workers.run()
    assert objects.get(f"{SERVICES}/first-workers")["spec"]["clusterIP"] == "None"
    files = {"esper.yaml", "hub-token", "session.yaml"}
    assert set(objects.get(f"{SECRETS}/first-esper")["data"]) == files
    wait_for(lambda: objects.get(f"{DEPLOYMENTS}/esper-tamiyo"), "there is no controller")
    [job] = workers.jobs()
    assert job["spec"]["completionMode"] == "Indexed"
    for child in (job, objects.get(f"{SERVICES}/first-workers")):
        [owner] = child["metadata"]["ownerReferences"]
        assert (owner["kind"], owner["name"]) == ("TrainingSession", "first")
    wait_for(
        lambda: objects.condition("first", "WorkersReady").get("status") == "True",
        "the workers are not ready",
    )
    assert objects.get(f"{SESSIONS}/first")["status"]["workers"] == 2
    workers.succeed()
    condition = objects.wait("first", "True")
    assert condition["observedGeneration"] == 1
    status = objects.get(f"{SESSIONS}/first")["status"]
    assert status["completionTime"]


def test_a_session_whose_input_is_wrong_fails_with_what_the_worker_said(world, operator, objects):
    objects.create(SESSIONS, world.session("wrong"))
    workers = Workers(objects, "wrong")
    pods = workers.run()
    said = "model.entrypoint: got nowhere:build; allowed: a module that can be imported"
    workers.end(pods[0], 78, reason="BadInput", message=said)
    condition = objects.wait("wrong", "False")
    assert said in condition["message"]
    assert objects.get(f"{SESSIONS}/wrong")["status"]["attempt"] == 1


def test_a_child_that_cannot_be_made_shows_as_reason_and_message(world, operator, objects):
    spec = {"workers": {"replicas": 2, "podTemplate": {"extra": {"noSuchField": 1}}}}
    objects.create(SESSIONS, world.session("refused", spec=spec))
    condition = wait_for(
        lambda: "noSuchField" in (c := objects.condition("refused")).get("message", "") and c,
        "the refusal does not show",
    )
    assert condition["reason"]
    assert objects.items(JOBS) == []


def test_pods_that_cannot_be_made_show_as_reason_and_message(world, operator, objects):
    quota = {
        "apiVersion": "v1",
        "kind": "ResourceQuota",
        "metadata": {"name": "none"},
        "spec": {"hard": {"pods": "0"}},
    }
    objects.create("/api/v1/resourcequotas", quota)
    objects.create(SESSIONS, world.session("many"))
    condition = wait_for(
        lambda: "exceeded quota" in (c := objects.condition("many")).get("message", "") and c,
        "the refusal does not show",
    )
    assert condition["status"] == "Unknown"
