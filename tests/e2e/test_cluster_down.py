"""`make cluster-down`, as the README has it: the machine is as it was."""

import os
import subprocess
from pathlib import Path

import psutil

from tests.e2e.clusters import SECONDS, module
from tests.readme import checkout, play
from tools.cluster.containers.kernel import NOTES, TUNED
from tools.cluster.containers.layout import STATE, layout
from tools.cluster.containers.source import SourceCluster

PLACES = ("/run", "/var/lib", "/var/log", "/opt", "/etc", "/usr/libexec", "/tmp")
KINDS = ("net", "mnt", "pid", "uts", "ipc")
OWN = ("containerd", "kube", "etcd", "coredns", "pause", "runc", "ctr")
POD = """
apiVersion: v1
kind: PersistentVolumeClaim
metadata: {name: data}
spec: {accessModes: [ReadWriteOnce], resources: {requests: {storage: 1Gi}}}
---
apiVersion: v1
kind: Pod
metadata: {name: waiting}
spec:
  containers:
  - name: main
    image: localhost/esper-pause:1
    imagePullPolicy: Never
    ports: [{containerPort: 80, hostPort: 8080}]
    volumeMounts: [{name: data, mountPath: /data}, {name: memory, mountPath: /memory}]
  volumes:
  - {name: data, persistentVolumeClaim: {claimName: data}}
  - {name: memory, emptyDir: {medium: Memory}}
"""


def lines(*command):
    return set(subprocess.run(command, capture_output=True, text=True).stdout.splitlines())


def machine():
    """All of the machine outside of the cluster's folder that it could leave something in."""
    return {
        "links": {line.split(": ")[1] for line in lines("ip", "-o", "link")},
        "addresses": lines("ip", "-o", "-brief", "address"),
        "routes": lines("ip", "route"),
        "named namespaces": lines("ip", "netns", "list"),
        "packet filter": lines("nft", "list", "tables"),
        "mounts": {line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()},
        "settings": {(name, Path("/proc/sys", name).read_text()) for name in TUNED},
        "forwarding": {Path("/proc/sys/net/ipv4/ip_forward").read_text()},
        "files": {
            str(path)
            for place in PLACES
            if Path(place).is_dir()
            for path in Path(place).iterdir()
            if path.name.startswith(OWN) or place != "/tmp"
        },
    }


def groups(cluster):
    """The control groups of a cluster."""
    trees = [tree for tree in Path("/sys/fs/cgroup").iterdir() if tree.is_dir()]
    found = [tree / cluster.cgroup.lstrip("/") for tree in trees]
    return {str(path) for path in found if path.exists()}


def processes(cluster, namespaces=frozenset()):
    """Each process of a cluster, or in one of these namespaces, with its namespaces."""
    found = {}
    for process in psutil.process_iter():
        try:
            of = Path("/proc", str(process.pid))
            own = {os.readlink(of / "ns" / kind) for kind in KINDS}
            known = " ".join(process.cmdline()) + (of / "cgroup").read_text()
        except (OSError, psutil.Error):
            continue
        if str(cluster.state) in known or cluster.cgroup in known or own & namespaces:
            found[process.pid] = own
    return found


def left(before):
    """What is there and was not, by kind."""
    now = machine()
    return {kind: found for kind in now if (found := now[kind] - before[kind])}


def test_nothing_is_left(tmp_path):
    cluster = SourceCluster(layout(tmp_path / "c"))
    state = cluster.layout.state
    before = machine()
    try:
        module("tools.cluster.containers", "up", "--way=source", state=state)
        cluster.add_node("esper-2")
        cluster.kubectl("apply", "-f", "-", given=POD)
        cluster.kubectl("wait", "pod/waiting", "--for=condition=Ready", f"--timeout={SECONDS:g}s")
        during = left(before)
        here = {os.readlink(f"/proc/self/ns/{kind}") for kind in KINDS}
        running = processes(cluster.layout)
        namespaces = frozenset().union(*running.values()) - here
        assert groups(cluster.layout)
        folder = checkout(tmp_path / "esper")
        (said,) = play("Its end", folder, **{STATE: str(state)}).values()
    finally:
        again = module("tools.cluster.containers", "down", state=state)
    assert f"nothing is left of it: {state}" in said
    # Of the control plane four, of each node three, of two pods three each, and two beside them.
    assert len(running) >= 16
    # Each node has five, each pod has at least those of processes and of mounts.
    assert len(namespaces) >= 14
    # Its network was seen from inside only.
    assert set(during) <= {"settings", "files"}
    assert during.get("files", set()) <= {str(NOTES)}
    assert not left(before)
    assert not groups(cluster.layout)
    assert not processes(cluster.layout, namespaces)
    assert not state.exists()
    assert "no cluster" in again


def test_a_folder_with_other_files_is_not_touched(tmp_path):
    (tmp_path / "mine").write_text("kept")
    for command in ("up", "down"):
        module("tools.cluster.containers", command, state=tmp_path, check=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
