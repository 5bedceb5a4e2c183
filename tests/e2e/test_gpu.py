"""Where pods go and what they get: GPUs that a node only says it has, and what a template says."""

import contextlib
import json
from datetime import datetime

import pytest

from tests.e2e.clusters import Pods, made_namespace, until
from tests.e2e.sessions import Session, short
from tools.images.recipes import RECIPES

NODE = "esper-1"
GPU = "nvidia.com/gpu"
FAILED_SECONDS = 30.0
ALONE = {"controller": {"policy": "none"}}
"""Without a Tamiyo, whose pod bears no taint."""
DATA = """
import json, os, torch
from torch.utils.data import TensorDataset

def stored(path):
    with open(path) as file:
        points = json.load(file)
    shared = os.statvfs("/dev/shm")
    size = shared.f_frsize * shared.f_blocks
    if size != 96 * 2**20:
        raise ValueError(f"/dev/shm has {size} bytes")
    inputs, classes = torch.tensor(points["inputs"]), torch.tensor(points["classes"])
    return {name: TensorDataset(inputs, classes) for name in ("train", "validation", "test")}
"""
WRITES = """
import json, random
classes = [n % 2 for n in range(64)]
inputs = [[random.gauss(c, 0.3), random.gauss(-c, 0.3)] for c in classes]
json.dump({"inputs": inputs, "classes": classes}, open("/data/points.json", "w"))
"""


def patch(cluster, operation):
    """Let the node say that it has two GPUs, or that it has none."""
    path = GPU.replace("/", "~1")
    changes = [
        {"op": operation, "path": f"/status/{part}/{path}"}
        | ({"value": "2"} if operation == "add" else {})
        for part in ("capacity", "allocatable")
    ]
    cluster.kubectl(
        *("patch", "node", NODE, "--subresource=status", "--type=json", "-p", json.dumps(changes))
    )


@pytest.fixture(scope="module")
def gpus(cluster):
    patch(cluster, "add")
    yield
    patch(cluster, "remove")


@pytest.fixture(scope="module")
def place(cluster, release):
    with made_namespace(cluster) as name:
        yield Pods(cluster, name)


def of_gpus(number, **workers):
    limits = {GPU: number}
    return {"processesPerWorker": number, "resources": {"limits": limits}, **workers}


def moment(text):
    return datetime.fromisoformat(text)


def test_gpus_are_limits_processes_and_shared_memory_and_one_that_is_not_there_is_said(place, gpus):
    two = Session(place, short("two", workers=of_gpus(2)))
    three = Session(place, short("three", workers=of_gpus(3)))
    # The scheduler's own words.
    waiting = until(
        lambda: (c := three.condition("WorkersReady")).get("reason") == "Unschedulable" and c
    )
    assert f"Insufficient {GPU}" in waiting["message"]
    assert three.condition("Succeeded")["status"] == "Unknown"
    assert three.workers()[0]["spec"].get("nodeName") is None
    place.kubectl("delete", "trainingsession", "three", "--wait=false")

    end = two.fails()
    assert end["reason"] == "AcceleratorMissing"
    assert f"limits[{GPU}]: got 2; allowed: at most 0" in end["message"]
    (pod,) = two.workers()
    assert pod["spec"]["nodeName"] == NODE
    (container,) = pod["spec"]["containers"]
    # Of a resource of that kind the API server makes a request of each limit.
    assert container["resources"]["limits"][GPU] == container["resources"]["requests"][GPU] == "2"
    assert container["args"][container["args"].index("--processes") + 1] == "2"
    # No GPU is there to launch them on; what would have been is known up to there.
    assert "not launched: 2 processes over cpu:gloo,cuda:nccl" in place.kubectl(
        "logs", pod["metadata"]["name"]
    )
    (memory,) = [v for v in pod["spec"]["volumes"] if v["name"] == "esper-shm"]
    assert memory["emptyDir"] == {"medium": "Memory", "sizeLimit": "1Gi"}
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    assert mounts["/dev/shm"] == "esper-shm"
    # Bad input stays bad: it is not tried again.
    assert two.status["attempt"] == 1
    (status,) = pod["status"]["containerStatuses"]
    began = moment(status["state"]["terminated"]["startedAt"])
    assert (moment(end["lastTransitionTime"]) - began).total_seconds() <= FAILED_SECONDS
    # The kubelet has not taken back what the node says.
    assert place.cluster.get("node", NODE)["status"]["allocatable"][GPU] == "2"


@contextlib.contextmanager
def tainted(cluster):
    """The node is of a pool, and takes nobody in who does not bear that."""
    cluster.kubectl("label", "node", NODE, "esper.dev/pool=own")
    cluster.kubectl("taint", "node", NODE, "esper.dev/own=yes:NoSchedule")
    try:
        yield
    finally:
        cluster.kubectl("taint", "node", NODE, "esper.dev/own=yes:NoSchedule-")
        cluster.kubectl("label", "node", NODE, "esper.dev/pool-")


def classes(name):
    """Of the cluster, not of a namespace: named as the test's namespace is."""
    return (
        {
            "apiVersion": "node.k8s.io/v1",
            "kind": "RuntimeClass",
            "metadata": {"name": name},
            "handler": "runc",
        },
        {
            "apiVersion": "scheduling.k8s.io/v1",
            "kind": "PriorityClass",
            "metadata": {"name": name},
            "value": 4711,
        },
    )


TEMPLATE = {
    "nodeSelector": {"esper.dev/pool": "own"},
    "tolerations": [
        {"key": "esper.dev/own", "operator": "Equal", "value": "yes", "effect": "NoSchedule"}
    ],
    "imagePullSecrets": [{"name": "pull"}],
    "sharedMemory": "96Mi",
    "terminationGracePeriodSeconds": 7,
    "env": [{"name": "PYTHONPATH", "value": "/code"}],
    "volumes": [
        {"name": "code", "configMap": {"name": "code"}},
        {"name": "points", "persistentVolumeClaim": {"claimName": "points", "readOnly": True}},
    ],
    "volumeMounts": [
        {"name": "code", "mountPath": "/code", "readOnly": True},
        {"name": "points", "mountPath": "/points", "readOnly": True},
    ],
}


def within(said, found):
    """Whether all that was said is found; the API server adds defaults."""
    if isinstance(said, dict):
        return all(key in found and within(value, found[key]) for key, value in said.items())
    return said == found


def test_all_that_a_template_says_reaches_a_pod_that_trains_on_data_of_a_claim(place):
    name = place.namespace
    template = {**TEMPLATE, "runtimeClassName": name, "priorityClassName": name}
    docker = {"auths": {"registry.example": {"auth": "dTpw"}}}
    place.apply(
        *classes(name),
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "pull"},
            "type": "kubernetes.io/dockerconfigjson",
            "stringData": {".dockerconfigjson": json.dumps(docker)},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": "code"},
            "data": {"points.py": DATA},
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "points"},
            "spec": {
                "storageClassName": "esper-hostpath",
                "accessModes": ["ReadWriteMany"],
                "resources": {"requests": {"storage": "1Mi"}},
            },
        },
    )
    python = ["python", "-c", WRITES]
    place.run("writes", RECIPES["control"].image(), python, claim="points")
    model = {"entrypoint": "esper.zoo.models:MLP"}
    manifest = short(
        "pooled",
        model=model | {"arguments": {"inputs": 2, "hidden": [4], "outputs": 2}},
        data={"entrypoint": "points:stored", "arguments": {"path": "/points/points.json"}},
        training={"epochs": 2, "batchSize": 8},
        growth=ALONE,
        workers={"replicas": 1, "podTemplate": template},
    )
    try:
        with tainted(place.cluster):
            bare = Session(place, short("bare", growth=ALONE))
            pooled = Session(place, manifest)
            turned_away = until(
                lambda: (c := bare.condition("WorkersReady")).get("reason") == "Unschedulable" and c
            )
            assert "untolerated taint" in turned_away["message"]
            place.kubectl("delete", "trainingsession", "bare", "--wait=false")
            status = pooled.succeeds()
    finally:
        place.kubectl("delete", "runtimeclass,priorityclass", name)
    assert status["epoch"] == 2
    (pod,) = pooled.workers()
    spec = pod["spec"]
    for field in ("nodeSelector", "runtimeClassName", "priorityClassName", "imagePullSecrets"):
        assert spec[field] == template[field], field
    assert spec["terminationGracePeriodSeconds"] == 7
    assert spec["priority"] == 4711
    assert spec["schedulerName"] == "default-scheduler"
    (container,) = spec["containers"]
    for field in ("tolerations", "volumes", "env", "volumeMounts"):
        there = spec.get(field) or container[field]
        for item in template[field]:
            assert any(within(item, found) for found in there), (field, item, there)
