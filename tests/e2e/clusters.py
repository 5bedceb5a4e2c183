"""What tests on a real cluster do again and again: pods, commands of the tools, waiting."""

import contextlib
import json
import os
import subprocess
import sys
import time
import uuid

from tools.cluster.containers.layout import STATE

SOON = [
    {
        "key": f"node.kubernetes.io/{taint}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 5,
    }
    for taint in ("not-ready", "unreachable")
]
"""Tolerations of a pod that leaves a node soon which does not answer."""
CORDONED = {"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}
SECONDS = 300.0
"""For what takes seconds where the machine has nothing else to do. What has to be quick is measured
by the times that objects bear, not by how long a test may wait."""


def module(name, *words, state, check=True):
    """Run a module of the tools over a cluster's folder; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", name, *words],
        env=os.environ | {STATE: str(state)},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@contextlib.contextmanager
def made_namespace(cluster):
    """A namespace that refuses pods that are not restricted."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    cluster.kubectl("create", "namespace", name)
    cluster.kubectl("label", "namespace", name, "pod-security.kubernetes.io/enforce=restricted")
    account = f"serviceaccount/default -n {name}".split()
    until(lambda: not failed(cluster.kubectl, "get", *account))
    yield name
    cluster.kubectl("delete", "namespace", name, "--wait=false")


class Pods:
    """Pods of one namespace as any namespace with restricted Pod Security admits them."""

    def __init__(self, cluster, namespace):
        self.cluster = cluster
        self.namespace = namespace

    def kubectl(self, *words, given=None):
        return self.cluster.kubectl("-n", self.namespace, *words, given=given)

    def apply(self, *documents):
        self.kubectl(
            "apply",
            "-f",
            "-",
            given=json.dumps({"apiVersion": "v1", "kind": "List", "items": documents}),
        )

    def start(self, name, image, command, *, node=None, claim=None, labels=None, tolerations=()):
        """Make a pod; it has /tmp, and a claim's volume at /data.

        One that asks for a node gets there also where nothing else is to be scheduled.
        """
        volumes = [{"name": "tmp", "emptyDir": {}}]
        if claim:
            volumes.append({"name": "data", "persistentVolumeClaim": {"claimName": claim}})
        paths = {"tmp": "/tmp", "data": "/data"}
        self.apply(
            {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": name, "labels": labels or {}},
                "spec": {
                    "restartPolicy": "Never",
                    "automountServiceAccountToken": False,
                    "terminationGracePeriodSeconds": 1,
                    "tolerations": [*tolerations, *([CORDONED] if node else [])],
                    "nodeSelector": {"kubernetes.io/hostname": node} if node else {},
                    "securityContext": {
                        "runAsNonRoot": True,
                        "seccompProfile": {"type": "RuntimeDefault"},
                    },
                    "containers": [
                        {
                            "name": "main",
                            "image": image,
                            "imagePullPolicy": "Never",
                            "command": command,
                            "securityContext": {
                                "readOnlyRootFilesystem": True,
                                "allowPrivilegeEscalation": False,
                                "capabilities": {"drop": ["ALL"]},
                            },
                            "volumeMounts": [
                                {"name": v["name"], "mountPath": paths[v["name"]]} for v in volumes
                            ],
                        }
                    ],
                    "volumes": volumes,
                },
            }
        )

    def get(self, name):
        return self.cluster.get("-n", self.namespace, "pod", name)

    def running(self, name):
        """Wait until a pod is ready."""
        self.kubectl("wait", f"pod/{name}", "--for=condition=Ready", f"--timeout={SECONDS:g}s")

    def run(self, name, image, command, **options):
        """What a pod prints that runs to its end; it must succeed."""
        self.start(name, image, command, **options)
        ended = {"Succeeded", "Failed"}
        until(lambda: self.get(name)["status"]["phase"] in ended)
        said = self.kubectl("logs", name)
        assert self.get(name)["status"]["phase"] == "Succeeded", said
        return said

    def evict(self, name):
        """Through the Eviction API, as a drain does it, which keeps to PodDisruptionBudgets."""
        meta = {"name": name, "namespace": self.namespace}
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{name}/eviction"
        self.cluster.kubectl("create", "--raw", path, "-f", "-", given=json.dumps(eviction))

    def execute(self, name, *command, given=None):
        words = ("-i",) if given is not None else ()
        return self.kubectl("exec", *words, name, "--", *command, given=given)


def until(holds, *, seconds=SECONDS):
    """Wait for the first true answer."""
    deadline = time.monotonic() + seconds
    while not (answer := holds()):
        assert time.monotonic() < deadline, f"nothing after {seconds:g} s"
        time.sleep(0.2)
    return answer


def failed(call, *words):
    """Whether a call raises."""
    with contextlib.suppress(Exception):
        call(*words)
        return False
    return True
