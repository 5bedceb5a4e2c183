"""Two pods of an Indexed Job really train a session together on the node of processes."""

from __future__ import annotations

import json

import pytest

from tests.integration.pods import apply, claim, find, state
from tests.integration.spirals import SESSION, SPIRALS
from tools.cluster.control_plane import wait_for

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.usefixtures("kubelet")]

NAME = "spirals"
PORT = 29400
SECONDS = 400.0  # a minute on two idle cores


def documents():
    session = json.loads(json.dumps(SESSION))
    session["spec"]["training"]["epochs"] = 3
    session["spec"]["workers"] = {"replicas": 2}
    files = {"session.yaml": json.dumps(session), "spirals.py": SPIRALS}
    worker = {
        "name": "worker",
        "image": "esper:test",
        "args": [
            *("worker", "/etc/esper/session.yaml", "--output-dir", "/runs/out", "--json"),
            *("--nodes=2", "--node-rank=$(JOB_COMPLETION_INDEX)"),
            *(f"--rendezvous={NAME}-0.{NAME}:{PORT}", "--rendezvous-id=one"),
            "--termination-log=/dev/termination-log",
        ],
        "ports": [{"containerPort": PORT}],
        "volumeMounts": [
            {"name": "session", "mountPath": "/etc/esper"},
            {"name": "runs", "mountPath": "/runs"},
        ],
    }
    labels = {"session": NAME}
    pod = {
        "restartPolicy": "Never",
        "subdomain": NAME,
        "automountServiceAccountToken": False,
        "containers": [worker],
        "volumes": [
            {"name": "session", "configMap": {"name": NAME}},
            {"name": "runs", "persistentVolumeClaim": {"claimName": "runs"}},
        ],
    }
    job = {
        "completionMode": "Indexed",
        "completions": 2,
        "parallelism": 2,
        "backoffLimit": 0,
        "template": {"metadata": {"labels": labels}, "spec": pod},
    }
    service = {"clusterIP": "None", "selector": labels, "publishNotReadyAddresses": True}
    return [
        claim("runs"),
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": NAME}, "data": files},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": NAME}, "spec": service},
        {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": NAME}, "spec": job},
    ]


def ended(plane, namespace):
    """The condition that ends the job, or None."""
    status = find(plane, namespace, NAME, "jobs", "apis/batch/v1").get("status", {})
    kinds = {c["type"] for c in status.get("conditions", ()) if c["status"] == "True"}
    return next(iter(kinds & {"Complete", "Failed"}), None)


def test_two_pods_train_one_session(control_plane, kubelet, namespace):
    apply(control_plane, namespace, *documents())
    end = wait_for(lambda: ended(control_plane, namespace), "the job goes on", seconds=SECONDS)
    assert end == "Complete", kubelet.logs(namespace)
    pods = control_plane.get("-n", namespace, "pods", "-l", f"session={NAME}")["items"]
    assert {state(pod)[1]["exitCode"] for pod in pods} == {0}
    assert [json.loads(state(pod)[1]["message"])["reason"] for pod in pods]
    (first,) = [pod for pod in pods if pod["spec"]["hostname"] == f"{NAME}-0"]
    said = control_plane.kubectl("logs", "-n", namespace, first["metadata"]["name"])
    result = json.loads(said.splitlines()[-1])
    assert result["epochs"] == 3
    assert find(control_plane, namespace, NAME, "jobs", "apis/batch/v1")["status"]["succeeded"] == 2
