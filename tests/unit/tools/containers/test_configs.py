"""The files that a cluster's programs read, and their command lines."""

import json
import tomllib
from pathlib import Path

import pytest
import yaml

from tools.cluster.containers import commands, configs
from tools.cluster.containers.layout import (
    DNS_ADDRESS,
    DNS_IMAGE,
    PAUSE_IMAGE,
    STORAGE_CLASS,
    layout,
)
from tools.cluster.containers.manifests import manifests
from tools.cluster.containers.provisioning import PROVISIONER

CLUSTER = layout(Path("/var/tmp/one"))
FIRST, SECOND = CLUSTER.nodes[:2]


def program(name):
    return Path("/programs") / name


def options(command):
    return dict(word.removeprefix("--").split("=", 1) for word in command if "=" in word)


def test_each_node_gives_its_pods_addresses_of_its_own():
    networks = [json.loads(configs.cni(node)) for node in (FIRST, SECOND)]
    wires = [network["plugins"][0] for network in networks]
    assert [wire["type"] for wire in wires] == ["ptp", "ptp"]
    subnets = [wire["ipam"]["ranges"][0][0]["subnet"] for wire in wires]
    assert subnets == ["10.244.0.0/24", "10.244.1.0/24"]
    assert wires[0]["ipam"]["dataDir"] != wires[1]["ipam"]["dataDir"]


def test_containerd_writes_below_its_node_and_knows_the_sandbox_image():
    config = tomllib.loads(configs.containerd(SECOND))
    assert Path(config["root"]).parent == SECOND.folder
    assert config["grpc"]["address"] == str(SECOND.socket)
    cri = config["plugins"]["io.containerd.grpc.v1.cri"]
    assert cri["sandbox_image"] == PAUSE_IMAGE
    assert cri["containerd"]["runtimes"]["runc"]["runtime_type"] == "io.containerd.runc.v2"


def test_a_kubelet_writes_below_its_node_and_ends_nothing_of_another():
    found = [yaml.safe_load(configs.kubelet(CLUSTER, node)) for node in (FIRST, SECOND)]
    assert found[0]["cgroupRoot"] != found[1]["cgroupRoot"]
    for config, node in zip(found, (FIRST, SECOND), strict=True):
        for key in ("resolvConf", "podLogsDir", "volumePluginDir"):
            assert Path(config[key]).is_relative_to(node.folder)
        assert config["containerRuntimeEndpoint"] == f"unix://{node.socket}"
        assert config["clusterDNS"] == [DNS_ADDRESS]
        assert config["authentication"]["anonymous"] == {"enabled": False}
    assert configs.resolver() == f"nameserver {DNS_ADDRESS}\n"


def test_a_lost_node_is_noticed_after_several_missed_signs_of_life():
    config = yaml.safe_load(configs.kubelet(CLUSTER, FIRST))
    # A kubelet renews its lease four times in its duration.
    assert config["nodeLeaseDurationSeconds"] / 4 * 3 < commands.NODE_GRACE_SECONDS
    given = options(commands.controller_manager(CLUSTER, program))
    assert given["node-monitor-grace-period"] == f"{commands.NODE_GRACE_SECONDS}s"


def test_a_proxy_leaves_the_whole_machines_settings_alone():
    config = yaml.safe_load(configs.proxy(CLUSTER, SECOND))
    assert config["mode"] == "nftables"
    assert config["conntrack"] == {"maxPerCore": 0, "min": 0}
    assert config["hostnameOverride"] == SECOND.name


@pytest.mark.parametrize(
    ("command", "name"),
    [
        (commands.etcd(CLUSTER, program), "etcd"),
        (commands.apiserver(CLUSTER, program), "kube-apiserver"),
        (commands.controller_manager(CLUSTER, program), "kube-controller-manager"),
        (commands.scheduler(CLUSTER, program), "kube-scheduler"),
        (commands.kubelet(CLUSTER, SECOND, program), "kubelet"),
        (commands.proxy(SECOND, program), "kube-proxy"),
    ],
)
def test_every_program_is_ours_and_writes_below_the_clusters_folder(command, name):
    assert command[0] == f"/programs/{name}"
    paths = [value for value in options(command).values() if value.startswith("/")]
    assert paths
    assert all(Path(path).is_relative_to(CLUSTER.state) for path in paths)


def test_rights_are_checked_and_nobody_is_let_in_without_a_name():
    given = options(commands.apiserver(CLUSTER, program))
    assert given["authorization-mode"] == "Node,RBAC"
    assert "NodeRestriction" in given["enable-admission-plugins"]
    assert given["kubelet-certificate-authority"].endswith("ca.crt")


def test_a_cable_joins_two_nodes_both_ways():
    there, here = commands.cable(FIRST, SECOND, 4711)
    assert there[0][-2:] == ["netns", "4711"]
    assert there[-1] == ["ip", "route", "replace", "10.244.1.0/24", "via", "198.18.0.3"]
    assert here[-1] == ["ip", "route", "add", "default", "via", "198.18.0.2"]
    assert all(len(word) <= 15 for command in there for word in command if word.startswith("to-"))


def test_what_every_cluster_is_given():
    documents = {d["kind"]: d for d in yaml.safe_load_all(manifests())}
    storage = documents["StorageClass"]
    assert (storage["metadata"]["name"], storage["provisioner"]) == (STORAGE_CLASS, PROVISIONER)
    assert list(storage["metadata"]["annotations"].values()) == ["true"]
    assert documents["Service"]["spec"]["clusterIP"] == DNS_ADDRESS
    pod = documents["Deployment"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["image"] == DNS_IMAGE
    assert "kubernetes cluster.local" in documents["ConfigMap"]["data"]["Corefile"]
