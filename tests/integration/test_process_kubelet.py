"""Pods on a node of processes: what runs, what is written of it, and how it ends."""

from __future__ import annotations

import base64
import json
import os

import pytest

from tests.alive import alive
from tests.integration.pods import (
    HEEDS,
    SERVES,
    apply,
    conditions,
    find,
    pod,
    state,
    wait_for_end,
    wait_for_phase,
    wait_for_pod,
    wait_for_words,
    wait_until_gone,
    waits,
)
from tools.cluster.control_plane import wait_for

pytestmark = [pytest.mark.xdist_group("cluster"), pytest.mark.usefixtures("kubelet")]

SLEEP = "import time; time.sleep(600)"
HEEDLESS = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('ready', flush=True)
time.sleep(600)
"""


def secret(name, **entries):
    data = {key: base64.b64encode(value.encode()).decode() for key, value in entries.items()}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": data}


def config_map(name, **entries):
    metadata = {"name": name}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": entries}


def test_a_pod_has_its_environment_and_its_files_and_leaves_its_last_words(
    control_plane, namespace
):
    code = """
import json, os, pathlib
found = {k: os.environ.get(k) for k in ('PLAIN', 'JOINED', 'TOKEN', 'LEVEL', 'NODE', 'IP', 'CPUS')}
found['files'] = {str(p.relative_to(os.environ['SETTINGS'])): p.read_text()
                  for p in sorted(pathlib.Path(os.environ['SETTINGS']).rglob('*')) if p.is_file()}
scratch = pathlib.Path('/scratch/a'); scratch.write_text('kept')
found['scratch'] = scratch.read_text()
print(json.dumps(found))
open('/dev/termination-log', 'w').write('{"reason": "Done"}')
"""
    sources = [
        {"secret": {"name": "keys", "items": [{"key": "token", "path": "secret/token"}]}},
        {"configMap": {"name": "settings"}},
        {"downwardAPI": {"items": [{"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
    ]
    apply(
        control_plane,
        namespace,
        secret("keys", token="abc"),
        config_map("settings", level="info", place="read /etc/esper/secret/token"),
        pod(
            "one",
            code,
            container={
                "env": [
                    {"name": "PLAIN", "value": "a"},
                    {"name": "JOINED", "value": "$(PLAIN)b"},
                    {"name": "SETTINGS", "value": "/etc/esper"},
                    {
                        "name": "TOKEN",
                        "valueFrom": {"secretKeyRef": {"name": "keys", "key": "token"}},
                    },
                    {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
                    {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
                    {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
                ],
                "envFrom": [{"configMapRef": {"name": "settings"}, "prefix": "X_"}],
                "resources": {"limits": {"cpu": "1500m"}},
                "volumeMounts": [
                    {"name": "settings", "mountPath": "/etc/esper"},
                    {"name": "scratch", "mountPath": "/scratch"},
                ],
            },
            volumes=[
                {"name": "settings", "projected": {"sources": sources}},
                {"name": "scratch", "emptyDir": {}},
            ],
        ),
    )
    done = wait_for_phase(control_plane, namespace, "one", "Succeeded")
    found = json.loads(control_plane.kubectl("logs", "-n", namespace, "one"))
    assert (found["PLAIN"], found["JOINED"], found["TOKEN"]) == ("a", "ab", "abc")
    assert (found["NODE"], found["CPUS"], found["scratch"]) == ("node-1", "2", "kept")
    assert found["IP"] == done["status"]["podIP"]
    place = found["files"].pop("place")
    assert found["files"] == {"level": "info", "name": "one", "secret/token": "abc"}
    # A path in a mounted text is rewritten too, so that who reads it finds the file.
    assert place.startswith("read ")
    assert place.endswith("/settings/secret/token")
    kind, said = state(done)
    assert kind == "terminated"
    assert (said["exitCode"], said["reason"], said["message"]) == (
        0,
        "Completed",
        '{"reason": "Done"}',
    )
    assert said["startedAt"] <= said["finishedAt"]


def test_a_pod_that_runs_is_told_as_a_kubelet_tells_it(control_plane, namespace):
    apply(control_plane, namespace, pod("one", SLEEP))
    there = wait_for_phase(control_plane, namespace, "one", "Running")
    status = there["status"]
    assert conditions(there) == {
        "PodScheduled": "True",
        "PodReadyToStartContainers": "True",
        "Initialized": "True",
        "ContainersReady": "True",
        "Ready": "True",
    }
    assert status["hostIP"] == "127.0.0.1"
    assert status["podIP"].startswith("127.")
    assert status["startTime"]
    (container,) = status["containerStatuses"]
    assert container["ready"]
    assert container["started"]
    assert container["restartCount"] == 0
    assert container["state"]["running"]["startedAt"]
    assert there["spec"]["nodeName"] == "node-1"
    events = control_plane.get("-n", namespace, "events")["items"]
    assert {"Scheduled", "Started"} <= {event["reason"] for event in events}
    node = control_plane.get("node", "node-1")
    ready = {c["type"]: c["status"] for c in node["status"]["conditions"]}["Ready"]
    assert ready == "True"
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--now")


def test_the_end_of_a_log_stands_in_for_last_words(control_plane, namespace):
    fallback = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    apply(
        control_plane,
        namespace,
        pod("one", "print('why'); raise SystemExit(3)", container=fallback),
        pod("two", "print('why'); raise SystemExit(3)"),
        pod("three", "import os; os.kill(os.getpid(), 11)"),
    )
    ends = [
        state(wait_for_phase(control_plane, namespace, name, "Failed"))[1]
        for name in ("one", "two", "three")
    ]
    assert [(end["exitCode"], end["reason"], end.get("message")) for end in ends] == [
        (3, "Error", "why\n"),
        (3, "Error", None),
        (139, "Error", None),
    ]


def test_an_image_that_is_not_there_is_waited_for(control_plane, namespace):
    other = {"image": "registry.example/none:1"}
    apply(control_plane, namespace, pod("one", container=other))
    wait_for_pod(control_plane, namespace, "one", waits("ErrImagePull"))
    there = wait_for_pod(control_plane, namespace, "one", waits("ImagePullBackOff"))
    assert there["status"]["phase"] == "Pending"
    assert conditions(there)["ContainersReady"] == "False"
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--now")
    never = {"image": "other:1", "imagePullPolicy": "Never"}
    apply(
        control_plane,
        namespace,
        pod("two", container=never),
        pod("three", container={"image": "Not A Name"}),
    )
    wait_for_pod(control_plane, namespace, "two", waits("ErrImageNeverPull"))
    wait_for_pod(control_plane, namespace, "three", waits("InvalidImageName"))
    for name in ("two", "three"):
        control_plane.kubectl("delete", "-n", namespace, "pod", name, "--now")
        wait_until_gone(control_plane, namespace, name)


def test_what_an_environment_lacks_is_named_and_waited_for(control_plane, namespace):
    key = {"name": "late", "key": "token"}
    env = [{"name": "TOKEN", "valueFrom": {"secretKeyRef": key}}]
    apply(control_plane, namespace, pod("one", "", container={"env": env}))
    there = wait_for_pod(control_plane, namespace, "one", waits("CreateContainerConfigError"))
    assert state(there)[1]["message"] == 'secret "late" not found'
    apply(control_plane, namespace, secret("late", token="x"))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")


def test_what_a_volume_lacks_is_an_event_and_waited_for(control_plane, namespace):
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    code = "print(open('/v/token').read())"
    volumes = [{"name": "v", "secret": {"secretName": "late"}}]
    apply(control_plane, namespace, pod("one", code, container=mount, volumes=volumes))

    def told():
        events = control_plane.get("-n", namespace, "events")["items"]
        return [e for e in events if e["reason"] == "FailedMount"]

    wait_for(told, "no FailedMount")
    assert state(find(control_plane, namespace, "one"))[1]["reason"] == "ContainerCreating"
    apply(control_plane, namespace, secret("late", token="x"))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")


def test_a_command_that_is_not_there_cannot_start(control_plane, namespace):
    apply(control_plane, namespace, pod("one", container={"command": ["no-such-program"]}))
    ended = wait_for_phase(control_plane, namespace, "one", "Failed")
    kind, said = state(ended)
    assert (kind, said["exitCode"], said["reason"]) == ("terminated", 128, "StartError")
    assert "no-such-program" in said["message"]


def test_without_a_command_the_image_runs_its_own(control_plane, namespace):
    apply(control_plane, namespace, pod("one", container={"command": None, "args": ["--help"]}))
    wait_for_phase(control_plane, namespace, "one", "Succeeded")
    assert "usage: esper" in control_plane.kubectl("logs", "-n", namespace, "one")


def test_a_crash_loop_backs_off(control_plane, namespace):
    apply(control_plane, namespace, pod("one", "raise SystemExit(4)", restartPolicy="Always"))
    there = wait_for_pod(control_plane, namespace, "one", waits("CrashLoopBackOff"))
    (container,) = there["status"]["containerStatuses"]
    assert container["lastState"]["terminated"]["exitCode"] == 4
    assert container["restartCount"] >= 1
    assert there["status"]["phase"] == "Running"
    assert conditions(there)["Ready"] == "False"
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--now")
    wait_until_gone(control_plane, namespace, "one")


def test_init_containers_run_first_and_in_order(control_plane, namespace):
    def step(name, code):
        mount = [{"name": "v", "mountPath": "/v"}]
        command = ["python", "-c", code]
        return {"name": name, "image": "esper:test", "command": command, "volumeMounts": mount}

    inits = [
        step("first", "open('/v/steps', 'a').write('first ')"),
        step("second", "open('/v/steps', 'a').write('second ')"),
    ]
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    volumes = [{"name": "v", "emptyDir": {}}]
    code = "print(open('/v/steps').read())"
    fails = [step("first", "raise SystemExit(2)"), inits[1]]
    apply(
        control_plane,
        namespace,
        pod("one", code, container=mount, volumes=volumes, initContainers=inits),
        pod("two", code, container=mount, volumes=volumes, initContainers=fails),
    )
    wait_for_phase(control_plane, namespace, "one", "Succeeded")
    assert control_plane.kubectl("logs", "-c", "main", "-n", namespace, "one").split() == [
        "first",
        "second",
    ]
    failed = wait_for_phase(control_plane, namespace, "two", "Failed")
    assert state(failed) == ("waiting", {"reason": "PodInitializing"})
    assert conditions(failed)["Initialized"] == "False"


def test_out_of_memory(control_plane, kubelet, namespace):
    apply(control_plane, namespace, pod("one", SLEEP))
    pid = kubelet.pid_of(namespace, "one")
    kubelet.run_out_of_memory(namespace, "one", "main")
    ended = wait_for_phase(control_plane, namespace, "one", "Failed")
    assert state(ended)[1].items() >= {"exitCode": 137, "reason": "OOMKilled"}.items()
    assert not alive(pid)


def test_a_pod_that_is_deleted_is_asked_first(control_plane, kubelet, namespace):
    apply(control_plane, namespace, pod("one", HEEDS, terminationGracePeriodSeconds=60))
    wait_for_words(control_plane, namespace, "one", "ready")
    pid = kubelet.pid_of(namespace, "one")
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--wait=false")
    wait_until_gone(control_plane, namespace, "one")
    assert not alive(pid)
    written = [
        request
        for request in control_plane.requests("process-kubelet")
        if request["objectRef"].get("namespace") == namespace and request["verb"] == "delete"
    ]
    assert len(written) == 1


def test_a_pod_that_does_not_heed_is_killed_with_all_that_it_has_started(
    control_plane, kubelet, namespace
):
    code = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, '-c', {HEEDLESS!r}], start_new_session=True)
print('child', child.pid, flush=True)
{HEEDLESS}
"""
    apply(control_plane, namespace, pod("one", code, terminationGracePeriodSeconds=1))
    wait_for_words(control_plane, namespace, "one", "ready")
    words = control_plane.kubectl("logs", "-n", namespace, "one").split()
    child = int(words[words.index("child") + 1])
    assert alive(child)
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--wait=false")
    wait_until_gone(control_plane, namespace, "one")
    assert not alive(child)


def test_a_pod_that_is_deleted_by_force_ends_at_once(control_plane, kubelet, namespace):
    apply(control_plane, namespace, pod("one", HEEDLESS, terminationGracePeriodSeconds=600))
    wait_for_words(control_plane, namespace, "one", "ready")
    pid = kubelet.pid_of(namespace, "one")
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--grace-period=0", "--force")
    wait_for(lambda: not alive(pid), "the process goes on")


def test_an_eviction_is_a_disruption(control_plane, namespace):
    # A finalizer of the test's, so that the last status can be read.
    document = pod("one", HEEDS, terminationGracePeriodSeconds=60)
    document["metadata"]["finalizers"] = ["test.esper.dev/look"]
    apply(control_plane, namespace, document)
    wait_for_words(control_plane, namespace, "one", "ready")
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "one"}}
    with control_plane.client() as client:
        path = f"/api/v1/namespaces/{namespace}/pods/one/eviction"
        assert client.post(path, json=eviction).is_success
    ended = wait_for_end(control_plane, namespace, "one")
    assert ended["status"]["phase"] == "Failed"
    assert state(ended)[1].items() >= {"exitCode": 75, "message": "asked"}.items()
    assert conditions(ended)["DisruptionTarget"] == "True"
    control_plane.kubectl(
        *("patch", "-n", namespace, "pod", "one", "--type=merge"),
        *("-p", '{"metadata": {"finalizers": null}}'),
    )
    wait_until_gone(control_plane, namespace, "one")


def test_probes_decide_who_is_ready_and_who_is_started_again(control_plane, kubelet, namespace):
    fast = {"periodSeconds": 1, "failureThreshold": 1}
    container = {
        "ports": [{"name": "http", "containerPort": 8080}],
        "volumeMounts": [{"name": "state", "mountPath": "/state"}],
        "startupProbe": {"tcpSocket": {"port": 8080}, "periodSeconds": 1, "failureThreshold": 60},
        "readinessProbe": {"httpGet": {"path": "/ready", "port": "http"}, **fast},
        "livenessProbe": {"exec": {"command": ["test", "!", "-e", "/state/dead"]}, **fast},
    }
    volumes = [{"name": "state", "emptyDir": {}}]
    apply(
        control_plane,
        namespace,
        pod("one", SERVES, container=container, volumes=volumes, restartPolicy="Always"),
    )
    there = wait_for_pod(
        *(control_plane, namespace, "one"),
        lambda pod: pod["status"].get("containerStatuses", [{}])[0].get("started"),
    )
    assert conditions(there)["Ready"] == "False"
    (found,) = kubelet.containers(namespace, "one")
    folder = os.path.join(os.path.dirname(found["folder"]), "volumes", "state")
    open(os.path.join(folder, "ready"), "w").close()
    wait_for_pod(control_plane, namespace, "one", lambda pod: conditions(pod)["Ready"] == "True")
    os.unlink(os.path.join(folder, "ready"))
    wait_for_pod(control_plane, namespace, "one", lambda pod: conditions(pod)["Ready"] == "False")
    open(os.path.join(folder, "dead"), "w").close()
    wait_for_pod(
        *(control_plane, namespace, "one"),
        lambda pod: pod["status"]["containerStatuses"][0]["restartCount"] > 0,
    )
    events = control_plane.get("-n", namespace, "events")["items"]
    assert {"Unhealthy", "Killing"} <= {event["reason"] for event in events}
    control_plane.kubectl("delete", "-n", namespace, "pod", "one", "--now")


def test_what_does_not_fit_says_why(control_plane, namespace):
    hungry = {"resources": {"requests": {"nvidia.com/gpu": "1"}, "limits": {"nvidia.com/gpu": "1"}}}
    apply(
        control_plane,
        namespace,
        pod("one", container=hungry),
        pod("two", nodeSelector={"zone": "none"}),
    )
    for name, why in [
        ("one", "0/1 nodes are available: 1 Insufficient nvidia.com/gpu."),
        ("two", "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."),
    ]:
        there = wait_for_pod(
            *(control_plane, namespace, name), lambda pod: pod["status"].get("conditions")
        )
        (condition,) = there["status"]["conditions"]
        assert condition["status"] == "False"
        assert (condition["reason"], condition["message"]) == ("Unschedulable", why)
        assert there["status"]["phase"] == "Pending"


def test_an_empty_volume_has_room_for_a_socket_and_goes_with_its_pod(control_plane, namespace):
    code = """
import os, pathlib, socket, tempfile
with socket.socket(socket.AF_UNIX) as listening:
    path = os.path.join(tempfile.mkdtemp(), 'listener-12345678')
    listening.bind(path)
    print(pathlib.Path(path).resolve())
"""
    name = "n" * 50
    spec = {
        "container": {
            "env": [{"name": "TMPDIR", "value": "/tmp"}],
            "volumeMounts": [{"name": "scratch", "mountPath": "/tmp"}],
        },
        "volumes": [{"name": "scratch", "emptyDir": {}}],
    }
    apply(control_plane, namespace, pod(name, code, **spec))
    wait_for_phase(control_plane, namespace, name, "Succeeded")
    path = control_plane.kubectl("logs", "-n", namespace, name).strip()
    assert len(path) > 107
    control_plane.kubectl("delete", "pod", "-n", namespace, name)
    wait_for(lambda: not os.path.exists(os.path.dirname(path)), "the volume is left")
