"""The control plane of the tests: real parts that can be killed, frozen and cut off."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.alive import alive
from tests.integration.pods import apply, conditions, find, pod, state, wait_for_phase, wait_for_pod
from tools.cluster import programs
from tools.cluster.control_plane import wait_for
from tools.cluster.kubelet import ProcessKubelet
from tools.servers.process import ServerError

pytestmark = pytest.mark.xdist_group("cluster")

ROOT = Path(__file__).parents[2]
SLEEP = "import time; time.sleep(600)"


def test_it_is_the_release_that_was_asked_for(control_plane):
    said = control_plane.kubectl("version", "-o", "json")
    assert said.count(f'"gitVersion": "v{programs.KUBERNETES}"') == 2


def test_everything_listens_on_the_loopback_alone(control_plane):
    for part in control_plane.parts:
        connections = psutil.Process(part.pid).net_connections()
        listening = {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}
        assert listening == {"127.0.0.1"}, part.name


def test_secrets_are_for_their_owner_alone(control_plane):
    for pattern in ("*.kubeconfig", "apiserver/tokens.csv", "apiserver/service-accounts.key"):
        found = list(control_plane.folder.glob(pattern))
        assert found
        assert not [path for path in found if path.stat().st_mode & 0o077]


def test_nobody_is_let_in_without_a_token(control_plane):
    with httpx.Client(verify=control_plane.api.context(), trust_env=False) as client:
        assert client.get(control_plane.api.url + "/api").status_code == 401


def test_a_service_account_may_do_what_its_role_says(control_plane, namespace):
    for words in (
        ["serviceaccount", "reader"],
        ["role", "reader", "--verb=get,list", "--resource=configmaps"],
        ["rolebinding", "reader", "--role=reader", f"--serviceaccount={namespace}:reader"],
    ):
        control_plane.kubectl("create", "-n", namespace, *words)
    config = control_plane.kubeconfig("reader", namespace)
    said = control_plane.kubectl("get", "configmaps", "-o", "name", config=config)
    assert said.split() == ["configmap/kube-root-ca.crt"]  # in the namespace of its own
    with pytest.raises(ServerError, match="cannot list resource"):
        control_plane.kubectl("get", "secrets", config=config)
    user = f"system:serviceaccount:{namespace}:reader"
    asked = [(e["verb"], e["objectRef"].get("resource")) for e in control_plane.requests(user)]
    assert ("list", "configmaps") in asked
    assert ("list", "secrets") in asked


def test_a_way_through_a_proxy_can_be_cut(control_plane, namespace):
    with control_plane.proxy() as proxy:
        config = control_plane.kubeconfig("default", namespace, through=proxy)
        words = ("auth", "whoami", "-o", "name", "--request-timeout=1s")
        assert control_plane.try_kubectl(*words, config=config).returncode == 0
        for cut in (proxy.refuse, proxy.hang):
            cut()
            assert control_plane.try_kubectl(*words, config=config).returncode != 0
            proxy.heal()
            assert control_plane.try_kubectl(*words, config=config).returncode == 0


def test_what_nobody_owns_any_more_is_collected(control_plane, namespace):
    apply(
        control_plane,
        namespace,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}},
    )
    owner = find(control_plane, namespace, "a", "configmaps")["metadata"]
    reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": "a", "uid": owner["uid"]}
    owned = {"name": "b", "ownerReferences": [reference]}
    apply(control_plane, namespace, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": owned})
    control_plane.kubectl("delete", "-n", namespace, "configmap", "a")
    wait_for(lambda: find(control_plane, namespace, "b", "configmaps") is None, "b stays")


def test_a_namespace_ends_with_all_that_is_in_it(control_plane):
    name = control_plane.create_namespace("test-ends")
    apply(control_plane, name, pod("one"))
    control_plane.delete_namespace(name, wait=True)


def test_a_quota_is_kept(control_plane, namespace):
    control_plane.kubectl("create", "-n", namespace, "quota", "none", "--hard=pods=0")
    wait_for(
        lambda: (
            find(control_plane, namespace, "none", "resourcequotas").get("status", {}).get("hard")
        ),
        "the quota has no status",
    )
    with pytest.raises(ServerError, match="exceeded quota"):
        apply(control_plane, namespace, pod("one"))


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_every_part_comes_back_with_what_it_knew(private_control_plane, private_namespace, how):
    plane, namespace = private_control_plane, private_namespace
    config = plane.kubeconfig("default", namespace)
    apply(plane, namespace, {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kept"}})
    for part in plane.parts:
        port, before = part.port, part.pid
        getattr(part, how)()
        assert not alive(before)
        part.start()
        assert (part.port, part.pid != before) == (port, True)
    wait_for(plane.api.answers, "the API server does not answer")
    assert find(plane, namespace, "kept", "configmaps")
    assert plane.try_kubectl("auth", "whoami", config=config).returncode == 0


def test_a_frozen_api_server_is_silent_and_goes_on(private_control_plane):
    plane = private_control_plane
    plane.api.freeze()
    with plane.client() as client, pytest.raises(httpx.TimeoutException):
        client.get("/api", timeout=0.5)
    plane.api.thaw()
    with plane.client() as client:
        assert client.get("/api").is_success


def test_a_node_that_freezes_is_missed_and_its_pods_are_not_ready(
    private_control_plane, private_kubelet, private_namespace, tmp_path
):
    plane, namespace = private_control_plane, private_namespace
    patient = [
        {"key": f"node.kubernetes.io/{key}", "operator": "Exists", "effect": "NoExecute"}
        for key in ("not-ready", "unreachable")
    ]
    hasty = [{**each, "tolerationSeconds": 1} for each in patient]
    here = {"nodeSelector": {"kubernetes.io/hostname": "node-1"}}
    apply(
        plane,
        namespace,
        pod("stays", SLEEP, tolerations=patient, **here),
        pod("goes", SLEEP, tolerations=hasty, terminationGracePeriodSeconds=1, **here),
    )
    pids = {name: private_kubelet.pid_of(namespace, name) for name in ("stays", "goes")}
    for name in pids:
        wait_for_phase(plane, namespace, name, "Running")

    def ready(there):
        return {c["type"]: c["status"] for c in there["status"]["conditions"]}["Ready"]

    # Where no node is left, the controllers take themselves for those that are cut off.
    with ProcessKubelet(tmp_path / "other", plane, node="node-2"):
        private_kubelet.freeze()
        wait_for(lambda: ready(plane.get("node", "node-1")) == "Unknown", "ready", seconds=60)
        wait_for_pod(plane, namespace, "stays", lambda there: ready(there) == "False")
        lost = wait_for_pod(
            plane, namespace, "goes", lambda there: "deletionTimestamp" in there["metadata"]
        )
        assert lost["status"]["phase"] == "Running"  # nobody is there to end it
        assert conditions(lost)["DisruptionTarget"] == "True"
        assert all(alive(pid) for pid in pids.values())
        private_kubelet.thaw()
        wait_for_pod(plane, namespace, "stays", lambda there: ready(there) == "True")
        wait_for(lambda: find(plane, namespace, "goes") is None, "goes stays", seconds=60)
        assert alive(pids["stays"])
        assert not alive(pids["goes"])


def test_a_node_that_fails_takes_its_containers_with_it_and_says_so_when_it_is_back(
    private_control_plane, private_kubelet, private_namespace
):
    plane, namespace = private_control_plane, private_namespace
    apply(plane, namespace, pod("never", SLEEP), pod("always", SLEEP, restartPolicy="Always"))
    pids = [private_kubelet.pid_of(namespace, name) for name in ("never", "always")]
    for name in ("never", "always"):
        wait_for_phase(plane, namespace, name, "Running")
    private_kubelet.kill()
    wait_for(lambda: not any(alive(pid) for pid in pids), "its containers go on")
    assert find(plane, namespace, "never")["status"]["phase"] == "Running"
    private_kubelet.start()
    failed = wait_for_phase(plane, namespace, "never", "Failed")
    assert state(failed)[1].items() >= {"exitCode": 137, "reason": "ContainerStatusUnknown"}.items()
    again = wait_for_pod(
        *(plane, namespace, "always"),
        lambda there: (
            there["status"]["containerStatuses"][0]["restartCount"] == 1
            and state(there)[0] == "running"
        ),
    )
    assert again["status"]["phase"] == "Running"


def test_a_node_that_stops_starts_nothing_again(
    private_control_plane, private_kubelet, private_namespace
):
    # What it ends would be started again by who looks after it: some of many in time to be missed.
    plane, namespace = private_control_plane, private_namespace
    names = [f"always-{number}" for number in range(6)]
    apply(plane, namespace, *(pod(name, SLEEP, restartPolicy="Always") for name in names))
    for name in names:
        wait_for_phase(plane, namespace, name, "Running")
    private_kubelet.stop()
    folder = str(private_kubelet.folder / "pods")
    left = [process.pid for process in psutil.process_iter() if folder in environment_of(process)]
    assert left == []


def environment_of(process):
    """All that the environment of a process says, as text."""
    try:
        return " ".join(process.environ().values())
    except psutil.Error:
        return ""


def test_everything_ends_with_its_owner_however_that_ends(tmp_path):
    code = f"""
import json, time
from pathlib import Path
from tests.integration.pods import apply, pod
from tools.cluster.control_plane import ControlPlane
from tools.cluster.kubelet import ProcessKubelet
folder = Path({str(tmp_path)!r})
plane = ControlPlane(folder / "plane").start()
kubelet = ProcessKubelet(folder / "kubelet", plane).start()
plane.create_namespace("lab")
apply(plane, "lab", pod("one", {SLEEP!r}))
pids = [part.pid for part in (*plane.parts, kubelet)] + [kubelet.pid_of("lab", "one")]
print(json.dumps(pids), flush=True)
time.sleep(600)
"""
    owner = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE)
    assert owner.stdout is not None
    pids = [int(word) for word in owner.stdout.readline().strip(b"[]\n").split(b",")]
    assert len(pids) == 5
    assert all(alive(pid) for pid in pids)
    os.kill(owner.pid, signal.SIGKILL)
    owner.wait()
    owner.stdout.close()
    wait_for(
        lambda: not any(alive(pid) for pid in pids), "something outlived its owner", seconds=60
    )


def test_it_is_up_in_seconds(tmp_path):
    from tools.cluster.control_plane import ControlPlane

    began = time.monotonic()
    with ControlPlane(tmp_path / "plane"):
        took = time.monotonic() - began
    # 5 s on two idle cores; tests beside it take their part.
    assert took < 60


def test_programs_of_kubebuilder_come_first(tmp_path, monkeypatch):
    (tmp_path / "etcd").write_text("")
    monkeypatch.setenv(programs.ASSETS, str(tmp_path))
    programs.cluster_program.cache_clear()
    assert programs.cluster_program("etcd") == tmp_path / "etcd"
    assert programs.cluster_program("kubectl").parent != tmp_path
    programs.cluster_program.cache_clear()
