"""`make cluster`: Services, names, volumes, further nodes, faults of nodes."""

import os
import subprocess

import pytest

from tests.e2e.clusters import SOON, failed, module, until
from tools.cluster.containers import nodes
from tools.cluster.containers.archives import Image, program_image, reachable
from tools.cluster.containers.layout import STORAGE_CLASS
from tools.cluster.containers.machines import run

SERVE = ["redis-server", "--save", "", "--protected-mode", "no", "--dir", "/tmp"]
WAIT = ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.2; done"]
SECOND = "esper-2"
CTR = ("ctr", "--namespace=k8s.io")
BESIDE = pytest.mark.usefixtures("loading")
"""All images are loaded meanwhile, which takes longer than the test."""


@pytest.fixture(scope="module")
def second_node(cluster, redis, loading):
    """It takes only pods that ask for it: others would go away with it."""
    cluster.add_node(SECOND, [redis], cordoned=True)
    yield SECOND
    cluster.remove_node(SECOND)


def claim(name, *, mode="ReadWriteOnce", **spec):
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolumeClaim",
        "metadata": {"name": name},
        "spec": {
            "accessModes": [mode],
            "resources": {"requests": {"storage": "1Gi"}},
            **spec,
        },
    }


def service(name, port=6379):
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {"selector": {"app": name}, "ports": [{"port": port}]},
    }


def ready(cluster, node):
    """The status of a node's condition Ready."""
    conditions = cluster.get("node", node)["status"]["conditions"]
    return next(each["status"] for each in conditions if each["type"] == "Ready")


def test_a_second_make_cluster_finds_it_up(cluster):
    said = module("tools.cluster.containers", "up", state=cluster.layout.state)
    assert "it was up" in said
    (line,) = [line for line in said.splitlines() if line.startswith("export KUBECONFIG=")]
    asked = subprocess.run(
        ["bash", "-c", f"{line}; kubectl get nodes -o name"], capture_output=True, text=True
    )
    assert asked.stdout.split() == ["node/esper-1"], asked.stderr


def test_what_has_ended_is_started_again(cluster):
    first = cluster.node("esper-1").machine
    for name in ("kube-scheduler", "kube-proxy", "kubelet"):
        first.daemon(name).kill()
    cluster._beside()[0].kill()
    assert not cluster.running
    assert "it is up" in module("tools.cluster.containers", "up", state=cluster.layout.state)
    assert cluster.running


@BESIDE
def test_pods_find_each_other_by_name(pods, redis):
    pods.apply(service("redis"))
    pods.start("redis", redis, SERVE, labels={"app": "redis"})
    pods.running("redis")
    pods.start("asking", redis, WAIT)
    pods.running("asking")
    for name in ("redis", f"redis.{pods.namespace}.svc.cluster.local"):
        until(lambda n=name: not failed(pods.execute, "asking", "redis-cli", "-h", n, "ping"))
        assert pods.execute("asking", "redis-cli", "-h", name, "ping").strip() == "PONG"
    # A Service leads back to the pod that asks, too.
    assert pods.execute("redis", "redis-cli", "-h", "redis", "ping").strip() == "PONG"


@BESIDE
def test_pods_reach_the_api_server_and_nothing_beyond_the_cluster(pods, redis):
    pods.start("asking", redis, WAIT)
    pods.running("asking")
    pods.execute("asking", "bash", "-c", "echo > /dev/tcp/kubernetes.default.svc/443")
    assert failed(pods.execute, "asking", "getent", "hosts", "example.org")


@BESIDE
def test_a_claim_gets_a_volume_that_outlives_pods_and_goes_with_the_claim(pods, redis):
    cluster = pods.cluster
    pods.apply(claim("data"))
    write = ["sh", "-c", "echo kept > /data/file"]
    pods.run("writing", redis, write, claim="data")
    assert pods.run("reading", redis, ["cat", "/data/file"], claim="data").strip() == "kept"
    bound = cluster.get("-n", pods.namespace, "pvc", "data")
    assert bound["spec"]["storageClassName"] == STORAGE_CLASS
    name = bound["spec"]["volumeName"]
    folder = cluster.layout.volumes / name
    assert (folder / "file").read_text() == "kept\n"
    pods.kubectl("delete", "pod", "writing", "reading")
    pods.kubectl("delete", "pvc", "data")
    until(lambda: not folder.exists())
    until(lambda: failed(cluster.get, "pv", name))


def test_claims_of_many_nodes_are_served_and_of_devices_are_not(pods):
    pods.apply(claim("many", mode="ReadWriteMany"), claim("device", volumeMode="Block"))
    found = ("-n", pods.namespace, "pvc")
    until(lambda: pods.cluster.get(*found, "many")["status"]["phase"] == "Bound")
    assert pods.cluster.get(*found, "device")["status"]["phase"] == "Pending"


def test_a_second_node_runs_pods_which_reach_those_of_the_first(pods, redis, second_node):
    pods.apply(service("redis"), claim("shared", mode="ReadWriteMany"))
    pods.start("redis", redis, SERVE, labels={"app": "redis"}, node="esper-1")
    pods.running("redis")
    pods.start("asking", redis, WAIT, node=second_node)
    pods.running("asking")
    until(lambda: not failed(pods.execute, "asking", "redis-cli", "-h", "redis", "ping"))
    pods.run("writing", redis, ["sh", "-c", "echo one > /data/f"], node="esper-1", claim="shared")
    said = pods.run("reading", redis, ["cat", "/data/f"], node=second_node, claim="shared")
    assert said.strip() == "one"
    assert pods.get("reading")["spec"]["nodeName"] == second_node


def test_a_node_takes_an_image_though_its_content_is_collected_meanwhile(
    cluster, second_node, tmp_path, monkeypatch
):
    first, second = cluster.node("esper-1"), cluster.node(second_node)
    program, image, other = tmp_path / "program", "localhost/linked:1", "localhost/other:1"
    program.write_bytes(os.urandom(1000))  # nobody has it
    first.import_image(image, program_image(program))
    *_, last = reachable(first.image(image), first.blob)
    to_go, os_link = [other], os.link

    def link(path, own):
        if path == first.blob(last.digest) and to_go:
            second.import_image(other, Image(b"{}", ()))
            # At once with all content that no image refers to.
            run([*CTR, f"--address={second.node.socket}", "images", "rm", "--sync", to_go.pop()])
        os_link(path, own)

    monkeypatch.setattr(nodes.os, "link", link)
    second.copy_images(first, [image])
    assert not to_go
    assert second.image(image) == first.image(image)


def test_a_node_that_is_lost_is_noticed_and_comes_back(pods, redis, second_node):
    cluster = pods.cluster
    pods.start("waiting", redis, WAIT, node=second_node, tolerations=SOON)
    pods.running("waiting")
    cluster.lose_node(second_node)
    until(lambda: ready(cluster, second_node) == "Unknown")
    # Its pod is asked to go; nobody is there to say that it has.
    until(lambda: "deletionTimestamp" in pods.get("waiting")["metadata"])
    cluster.add_node(second_node, ())
    until(lambda: failed(pods.get, "waiting"))
    pods.run("again", redis, ["true"], node=second_node)


def test_a_node_that_is_cut_off_runs_on_and_is_heard_of_again(pods, redis, second_node):
    cluster = pods.cluster
    pods.start("waiting", redis, WAIT, node=second_node)
    pods.running("waiting")
    cluster.cut_node(second_node)
    until(lambda: ready(cluster, second_node) == "Unknown")
    assert cluster.node(second_node).running
    cluster.cut_node(second_node, joined=True)
    until(lambda: ready(cluster, second_node) == "True")
    assert pods.execute("waiting", "echo", "here").strip() == "here"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("esper-1", r"node: got esper-1; allowed: "),
        ("other", r"node: got other; allowed: esper-1, esper-2, esper-3, esper-4"),
        ("esper-4", r"node: got esper-4; allowed: "),
    ],
)
def test_only_a_further_node_can_be_lost(cluster, name, told):
    said = module(
        "tools.cluster.containers", "node", "lose", name, state=cluster.layout.state, check=False
    )
    assert f"error: {told}" in said
