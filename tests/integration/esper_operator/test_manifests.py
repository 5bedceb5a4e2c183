"""Every manifest that the operator renders, as a real API server takes it, and what it refuses."""

import json
import uuid

import pytest

from esper.contracts.operational import SeedSnapshot
from esper_operator.api import refusal as as_refused
from esper_operator.children import compile_job, job, secret, seed, service, tamiyo
from esper_operator.decisions.scene import Scene
from esper_operator.decisions.workers import permanent_refusal
from esper_operator.kinds import BY_NAME
from esper_operator.status import record_of
from esper_operator.views import Said
from tests.unit.esper_operator.objects import (
    ISSUED,
    KERNEL_ISSUED,
    NAMESPACE,
    NOW,
    OPTIONS,
    kernel,
    observed,
    running,
    session,
)

pytestmark = pytest.mark.xdist_group("cluster")

TEMPLATE = {
    "env": [{"name": "MINE", "value": "1"}],
    "envFrom": [{"configMapRef": {"name": "c"}}],
    "volumes": [{"name": "data", "persistentVolumeClaim": {"claimName": "d"}}],
    "volumeMounts": [{"name": "data", "mountPath": "/data"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"podAntiAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": []}},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "imagePullSecrets": [{"name": "pull"}],
    "sharedMemory": "8Gi",
    "terminationGracePeriodSeconds": 300,
    "extra": {
        "schedulerName": "mine",
        "hostAliases": [{"ip": "10.0.0.1", "hostnames": ["store"]}],
        "securityContext": {"runAsUser": 1000, "supplementalGroups": [5]},
    },
}
GPUS = {"limits": {"nvidia.com/gpu": 2, "memory": "8Gi"}, "requests": {"cpu": "500m"}}
SESSIONS = {
    "plain": {},
    "large": {"workers": {"replicas": 4, "processesPerWorker": 2, "resources": GPUS}},
    "template": {"workers": {"podTemplate": TEMPLATE}},
    "queued": {"runPolicy": {"queueName": "gpus", "queuePriorityClass": "high"}},
    "claimed": {"storage": {"claimName": "shared"}},
    "bucket": {"storage": {"uri": "s3://bucket", "secretName": "keys"}},
}
JOBS = {name: job.manifest(session(**content), 1, 2, OPTIONS) for name, content in SESSIONS.items()}
SEED = SeedSnapshot(layer="features.0", slot=1, state="training")
KERNEL = kernel("5f" * 20, {"blueprint": "affine"})
OTHERS = {
    "service": service.manifest(session()),
    "secret": secret.manifest(session(), ISSUED, OPTIONS, NOW),
    "secret of controllers": secret.controller_manifest(NAMESPACE, ISSUED, OPTIONS, NOW),
    "secret of a compile job": secret.compile_manifest(KERNEL, KERNEL_ISSUED, OPTIONS, NOW),
    "tamiyo": tamiyo.shared(NAMESPACE, OPTIONS),
    "own tamiyo": tamiyo.dedicated(session(), OPTIONS),
    "compile job": compile_job.manifest(KERNEL, 1, OPTIONS),
    "seed": seed.manifest(session(), SEED),
}
PODS = {**JOBS, **{name: OTHERS[name] for name in ("tamiyo", "own tamiyo", "compile job")}}


@pytest.fixture(scope="module")
def team(esper_control_plane):
    """The namespace of the manifests, which takes restricted pods alone."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    esper_control_plane.create_namespace(NAMESPACE, labels)
    yield NAMESPACE
    esper_control_plane.delete_namespace(NAMESPACE, wait=True)


def applied(plane, manifest):
    """The answer to a manifest as the operator sends it; nothing is stored."""
    meta = manifest["metadata"]
    with plane.client() as client:
        return client.patch(
            BY_NAME[manifest["kind"]].path(meta["namespace"], meta["name"]),
            params={"fieldManager": "esper-operator", "force": "true", "dryRun": "All"},
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(manifest),
        )


@pytest.mark.parametrize("name", [*JOBS, *OTHERS])
def test_it_is_taken_as_it_is(esper_control_plane, team, name):
    manifest = {**JOBS, **OTHERS}[name]
    answer = applied(esper_control_plane, manifest)
    assert answer.is_success, answer.text
    assert answer.json()["metadata"]["annotations"] == manifest["metadata"]["annotations"]


@pytest.mark.parametrize("name", PODS)
def test_its_pods_are_restricted(esper_control_plane, team, name):
    template = PODS[name]["spec"]["template"]
    spec = {key: value for key, value in template["spec"].items() if key != "priorityClassName"}
    spec.pop("runtimeClassName", None)  # of classes that the cluster would have to have
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"p-{uuid.uuid4().hex[:8]}", "namespace": team},
        "spec": {"restartPolicy": "Never", **spec},
    }
    answer = applied(esper_control_plane, pod)
    assert answer.is_success, answer.text


@pytest.mark.parametrize(
    ("template", "field"),
    [
        ({"extra": {"schedulerNme": "mine"}}, "schedulerNme"),
        ({"extra": {"dnsPolicy": "Sometimes"}}, "dnsPolicy"),
        ({"extra": {"activeDeadlineSeconds": "soon"}}, "activeDeadlineSeconds"),
        ({"tolerations": [{"operator": "Maybe"}]}, "tolerations"),
        ({"volumes": [{"name": "UPPER", "emptyDir": {}}]}, "volumes"),
        ({"volumeMounts": [{"name": "nowhere", "mountPath": "/x"}]}, "nowhere"),
        ({"envFrom": [{"configMapRef": {"nme": "c"}}]}, "nme"),
        ({"env": [{"name": "A", "valueFrom": {"fieldRef": {"fieldPath": "spec.x"}}}]}, "spec.x"),
        ({"affinity": {"nodeAffinity": {"required": 1}}}, "required"),
    ],
)
def test_what_no_pod_can_be_is_refused_for_good(esper_control_plane, team, template, field):
    view = session(workers={"podTemplate": template})
    manifest = job.manifest(view, 1, 1, OPTIONS)
    name = manifest["metadata"]["name"]
    answer = applied(esper_control_plane, manifest)
    error = as_refused(f"Job/{name}", answer.status_code, answer.content)
    assert field in str(error)
    said = {f"Job/{name}": Said(error.reason, error.said)}
    at_work = session(status=running(view, job=None), workers={"podTemplate": template})
    record = record_of(at_work)
    scene = Scene(observed(at_work, refusals=said), at_work.spec(), record, OPTIONS, before=record)
    message = permanent_refusal(scene)
    assert message is not None, (error.status, error.reason)
    assert field in message
