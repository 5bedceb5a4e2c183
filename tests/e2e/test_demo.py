"""`make cluster-demo` on the tests' cluster: the session trains, grows, and is as without one."""

import json

from tests.e2e.clusters import module
from tools.real_demo import NAMESPACE

STEPS = {"programs", "cluster", "images", "install", "demo", "all"}


def test_it_ends_with_what_was_seen(cluster, demonstration):
    said, folder = demonstration.result()
    told = json.loads(said.splitlines()[-1])
    assert told["holds"], told
    assert told["differing"] == []
    assert told["fossilized"] > 0
    assert told["kernels"]["ready"] == told["kernels"]["compiledByJobs"] > 0
    assert (told["way"], told["namespace"]) == ("source", NAMESPACE)
    assert told["checks"].keys() >= {
        "2 pods under torchrun",
        "a kernel made by a compile Job",
        "equal to esper worker to the bit",
    }
    assert told["steps"].keys() == STEPS
    table = said.partition(f"$ kubectl -n {NAMESPACE} get seeds\n")[2].splitlines()
    assert table[0].split()[:4] == ["NAME", "SESSION", "LAYER", "STATE"]
    assert any("fossilized" in line for line in table)
    for line in (f"export KUBECONFIG={cluster.layout.admin} ", "make cluster-down"):
        assert line in said
    fetched = folder / "runs" / "cluster-demo" / "inside"
    assert {"grown.py", "model.safetensors", "report.html"} <= {p.name for p in fetched.iterdir()}


def test_install_takes_the_cluster_that_is_there(cluster, release, monkeypatch):
    monkeypatch.delenv("KUBECONFIG")
    said = module("tools.install", state=cluster.layout.state)
    assert f"KUBECONFIG is not set: into the cluster of {cluster.layout.state}" in said
    assert "/readyz ready" in said
