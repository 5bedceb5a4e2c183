"""What the operator makes is valid for every supported Kubernetes."""

from __future__ import annotations

from typing import Any

import kubernetes_validate
import pytest
import yaml

from esper.configs import OperatorConfig
from esper_operator.children import compile_job, job, network_policy, secret, service, tamiyo
from esper_operator.rbac import rendered
from tests.unit.charts.objects import RELEASES
from tests.unit.esper_operator.objects import (
    ISSUED,
    KERNEL_ISSUED,
    NAMESPACE,
    NOW,
    OPTIONS,
    kernel,
    session,
)

KERNEL = kernel("5f" * 20, {"blueprint": "low-rank"})
TEMPLATE = {
    "env": [
        {"name": "A", "value": "1"},
        {"name": "B", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "k"}}},
        {"name": "C", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu"}}},
    ],
    "envFrom": [{"prefix": "P_", "configMapRef": {"name": "c"}}, {"secretRef": {"name": "s"}}],
    "volumes": [
        {"name": "a", "persistentVolumeClaim": {"claimName": "data", "readOnly": True}},
        {"name": "b", "secret": {"secretName": "keys", "defaultMode": 256}},
        {"name": "c", "csi": {"driver": "d", "nodePublishSecretRef": {"name": "keys"}}},
        {"name": "d", "projected": {"sources": [{"configMap": {"name": "c"}}]}},
        {"name": "e", "downwardAPI": {"items": []}},
        {"name": "f", "ephemeral": {"volumeClaimTemplate": {"spec": {"resources": {}}}}},
    ],
    "volumeMounts": [{"name": "a", "mountPath": "/data", "readOnly": True, "subPath": "x"}],
    "nodeSelector": {"pool": "gpu"},
    "tolerations": [{"key": "gpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "runtimeClassName": "nvidia",
    "priorityClassName": "high",
    "imagePullSecrets": [{"name": "pull"}],
    "sharedMemory": "2Gi",
    "terminationGracePeriodSeconds": 300,
    "extra": {"schedulerName": "mine", "securityContext": {"runAsUser": 1000}},
}
GPUS = {
    "replicas": 2,
    "processesPerWorker": 2,
    "resources": {"limits": {"nvidia.com/gpu": 2}},
    "podTemplate": TEMPLATE,
}
QUEUED = {"queueName": "q", "queuePriorityClass": "p"}
PLAIN = session()
RICH = session(workers=GPUS, storage={"claimName": "kept"}, runPolicy=QUEUED)
KEYS = session(storage={"uri": "s3://b/f", "secretName": "keys"})
EGRESS = '[{"ports": [{"port": 53, "protocol": "UDP"}]}]'
MADE: dict[str, dict[str, Any]] = {
    "job": job.manifest(PLAIN, 1, 1, OPTIONS),
    "job-rich": job.manifest(RICH, 2, 2, OPTIONS),
    "job-keys": job.manifest(KEYS, 1, 1, OPTIONS),
    "service": service.manifest(PLAIN),
    "secret": secret.manifest(PLAIN, ISSUED, OPTIONS, NOW),
    "network-policy": network_policy.manifest(PLAIN, EGRESS),
    "tamiyo": tamiyo.shared(NAMESPACE, OPTIONS),
    "tamiyo-own": tamiyo.dedicated(PLAIN, OPTIONS),
    "tamiyo-secret": secret.controller_manifest(NAMESPACE, ISSUED, OPTIONS, NOW),
    "compile": compile_job.manifest(KERNEL, 1, OPTIONS),
    "compile-secret": secret.compile_manifest(KERNEL, KERNEL_ISSUED, OPTIONS, NOW),
}


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("name", MADE)
def test_every_child_is_one_of_that_kubernetes(name: str, release: str) -> None:
    kubernetes_validate.validate(MADE[name], release, strict=True)


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("namespaced", [False, True])
def test_so_are_the_roles_that_it_prints(namespaced: bool, release: str) -> None:
    config = OperatorConfig(namespaces="team-a" if namespaced else "")
    for role in yaml.safe_load_all(rendered(config, namespaced=namespaced)):
        kubernetes_validate.validate(role, release, strict=True)


def test_what_no_kubernetes_knows_is_refused_by_that_check() -> None:
    spec = {**MADE["job"]["spec"], "completion": 3}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate({**MADE["job"], "spec": spec}, RELEASES[0], strict=True)
