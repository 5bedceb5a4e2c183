"""Two pods of an Indexed Job really train a session together on the node of processes."""

from __future__ import annotations

import json

import pytest

from tests.integration.pods import apply, claim, find, state
from tests.integration.spirals import SESSION, SPIRALS

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.usefixtures("kubelet")]

NAME = "spirals"
PORT = 29400


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


def test_two_pods_train_one_session(control_plane, kubelet, namespace):
    apply(control_plane, namespace, *documents())
    done = control_plane.try_kubectl(
        *("wait", "-n", namespace, f"job/{NAME}", "--for=condition=Complete", "--timeout=110s")
    )
    assert done.returncode == 0, done.stderr + kubelet.logs(namespace)
    pods = control_plane.get("-n", namespace, "pods", "-l", f"session={NAME}")["items"]
    assert {state(pod)[1]["exitCode"] for pod in pods} == {0}
    assert [json.loads(state(pod)[1]["message"])["reason"] for pod in pods]
    (first,) = [pod for pod in pods if pod["spec"]["hostname"] == f"{NAME}-0"]
    said = control_plane.kubectl("logs", "-n", namespace, first["metadata"]["name"])
    result = json.loads(said.splitlines()[-1])
    assert result["epochs"] == 3
    assert find(control_plane, namespace, NAME, "jobs", "apis/batch/v1")["status"]["succeeded"] == 2
