"""Jobs, Deployments and claims on a node of processes, whose pods real controllers make."""

from __future__ import annotations

import os
import signal
from collections import Counter

import pytest

from tests.integration.pods import (
    HEEDS,
    SERVES,
    apply,
    claim,
    find,
    pod,
    wait_for_phase,
    wait_for_pod,
    wait_for_words,
)
from tools.cluster.control_plane import wait_for

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.usefixtures("kubelet")]

MEETS = """
import os, socket, sys
index = int(os.environ["JOB_COMPLETION_INDEX"])
host, port = os.environ["MEETING"].split(":")
if index == 0:
    with socket.create_server(("", int(port))) as server:
        peer, _ = server.accept()
        peer.sendall(b"met")
        print(server.getsockname()[0])
else:
    import time
    while True:
        try:
            peer = socket.create_connection((host, int(port)), timeout=1)
            break
        except OSError:
            time.sleep(0.05)
    sys.exit(peer.recv(10) != b"met")
"""


def indexed_job(name, code=MEETS, **more):
    template = pod("x", code)["spec"]
    meeting = {"name": "MEETING", "value": f"{name}-0.{name}:29400"}
    template["containers"][0]["env"] = [meeting]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name},
        "spec": {
            "completionMode": "Indexed",
            "completions": 2,
            "parallelism": 2,
            "template": {
                "metadata": {"labels": {"job": name}},
                "spec": {**template, "subdomain": name},
            },
            **more,
        },
    }


def headless(name):
    spec = {"clusterIP": "None", "selector": {"job": name}, "publishNotReadyAddresses": True}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


def job_of(plane, namespace, name):
    return find(plane, namespace, name, "jobs", "apis/batch/v1")


def test_pods_of_jobs_meet_by_name_each_at_its_own_address(control_plane, namespace):
    names = ("a", "b")  # both at the same port
    for name in names:
        apply(control_plane, namespace, headless(name), indexed_job(name))
    for name in names:
        control_plane.kubectl(
            *("wait", "-n", namespace, f"job/{name}", "--for=condition=Complete", "--timeout=60s")
        )
        pods = control_plane.get("-n", namespace, "pods", "-l", f"job={name}")["items"]
        (first,) = [p for p in pods if p["spec"]["hostname"] == f"{name}-0"]
        said = control_plane.kubectl("logs", "-n", namespace, first["metadata"]["name"])
        assert said.split() == [first["status"]["podIP"]]


def test_a_job_takes_a_disruption_for_none_of_its_failures(control_plane, namespace):
    policy = {
        "rules": [
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            {
                "action": "FailJob",
                "onExitCodes": {"operator": "In", "values": [78]},
            },
        ]
    }
    job = indexed_job("a", HEEDS, podFailurePolicy=policy, backoffLimit=0)
    apply(control_plane, namespace, job)
    names = [f"a-{index}" for index in (0, 1)]

    def running():
        pods = control_plane.get("-n", namespace, "pods", "-l", "job=a")["items"]
        ready = [p for p in pods if p["status"]["phase"] == "Running"]
        return {p["spec"]["hostname"]: p["metadata"]["name"] for p in ready}

    before = wait_for(lambda: (r := running()).keys() >= set(names) and r, "not both run")
    wait_for_words(control_plane, namespace, before["a-0"], "ready")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": before["a-0"]}}
    with control_plane.client() as client:
        path = f"/api/v1/namespaces/{namespace}/pods/{before['a-0']}/eviction"
        assert client.post(path, json=eviction).is_success
    wait_for(
        lambda: running().get("a-0") not in (None, before["a-0"]),
        "no pod in its place",
        seconds=60,
    )
    status = job_of(control_plane, namespace, "a")["status"]
    assert not status.get("failed")
    control_plane.kubectl("delete", "-n", namespace, "job", "a")


def test_a_deployment_is_available_and_replaces_what_is_lost(control_plane, kubelet, namespace):
    container = {
        "ports": [{"containerPort": 8080}],
        "readinessProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1},
    }
    template = pod("x", SERVES, container=container)
    template["spec"]["restartPolicy"] = "Always"
    apply(
        control_plane,
        namespace,
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "web"},
            "spec": {
                "replicas": 2,
                "selector": {"matchLabels": {"app": "x"}},
                "template": {"metadata": {"labels": {"app": "x"}}, "spec": template["spec"]},
            },
        },
    )
    control_plane.kubectl("rollout", "status", "-n", namespace, "deployment/web", "--timeout=60s")
    (first, second) = kubelet.containers(namespace)
    assert first["address"] != second["address"]
    os.kill(first["pid"], signal.SIGKILL)
    wait_for_pod(
        *(control_plane, namespace, first["pod"]),
        lambda pod: pod["status"]["containerStatuses"][0]["restartCount"] == 1,
    )
    control_plane.kubectl("delete", "-n", namespace, "pod", second["pod"], "--now")
    control_plane.kubectl("rollout", "status", "-n", namespace, "deployment/web", "--timeout=60s")
    assert second["pod"] not in {each["pod"] for each in kubelet.containers(namespace)}
    control_plane.kubectl("delete", "-n", namespace, "deployment", "web")


def test_a_claim_is_waited_for_and_outlives_its_pods(control_plane, namespace):
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v", "subPath": "runs"}]}
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "disk"}}]
    apply(
        control_plane,
        namespace,
        pod("one", "open('/v/kept', 'w').write('x')", container=mount, volumes=volumes),
    )
    there = wait_for_pod(
        *(control_plane, namespace, "one"), lambda pod: pod["status"].get("conditions")
    )
    (condition,) = there["status"]["conditions"]
    why = '0/1 nodes are available: persistentvolumeclaim "disk" not found.'
    assert condition["message"] == why
    apply(control_plane, namespace, claim("disk"))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")
    control_plane.kubectl("delete", "-n", namespace, "pod", "one")
    apply(
        control_plane,
        namespace,
        pod("two", "print(open('/v/kept').read())", container=mount, volumes=volumes),
    )
    wait_for_phase(control_plane, namespace, "two", "Succeeded")


def test_a_log_is_followed_and_its_end_read_alone(control_plane, namespace):
    code = "import time; [print(n, flush=True) or time.sleep(0.2) for n in range(5)]"
    apply(control_plane, namespace, pod("one", code))
    wait_for_pod(
        control_plane, namespace, "one", lambda pod: pod["status"].get("phase") != "Pending"
    )
    assert control_plane.kubectl("logs", "-f", "-n", namespace, "one").split() == list("01234")
    assert control_plane.kubectl("logs", "--tail=2", "-n", namespace, "one").split() == list("34")


def test_a_token_of_the_service_account_is_mounted_where_asked_for(control_plane, namespace):
    mount = {"volumeMounts": [{"name": "t", "mountPath": "/token"}]}
    sources = [{"serviceAccountToken": {"path": "token"}}]
    code = "print(open('/token/token').read())"
    volumes = [{"name": "t", "projected": {"sources": sources}}]
    apply(control_plane, namespace, pod("one", code, container=mount, volumes=volumes))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")
    token = control_plane.kubectl("logs", "-n", namespace, "one").strip()
    with control_plane.client() as client:
        review = client.post(
            "/apis/authentication.k8s.io/v1/tokenreviews", json={"spec": {"token": token}}
        ).json()
    user = review["status"]["user"]["username"]
    assert user == f"system:serviceaccount:{namespace}:default"


def test_a_test_without_a_node_has_none_after_one_that_had(
    control_plane, kubelet, namespace, request
):
    apply(control_plane, namespace, pod("one", ""))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")
    request.getfixturevalue("no_kubelet")
    apply(control_plane, namespace, pod("two", ""))
    assert not kubelet.running
    two = find(control_plane, namespace, "two")
    assert (two["status"]["phase"], two["spec"].get("nodeName")) == ("Pending", None)
    kubelet.start()
    wait_for_phase(control_plane, namespace, "two", "Succeeded")


def test_a_pods_status_is_written_only_when_it_changes(control_plane, namespace):
    names = [f"pod-{number}" for number in range(4)]
    apply(control_plane, namespace, *(pod(name, "") for name in names))
    for name in names:
        wait_for_phase(control_plane, namespace, name, "Succeeded")
    written = Counter(
        request["objectRef"]["name"]
        for request in control_plane.requests("process-kubelet")
        if request["objectRef"].get("namespace") == namespace
        and request["objectRef"].get("subresource") == "status"
    )
    assert written.keys() == set(names)
    # Being made, running, ended; what changes while a write is under way is told with the next.
    assert max(written.values()) <= 3
