"""What a session may say of its workers' pods, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from pydantic import ValidationError

from esper.contracts.resources import PodTemplate
from esper_operator.children import job, names
from esper_operator.options import Options
from esper_operator.views import SessionView
from tests.unit.esper_operator.objects import NAMESPACE, OPTIONS, session


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found = manifest["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


def worker(**sections: Any) -> dict[str, Any]:
    return job.manifest(session(**sections), 1, 2, OPTIONS)


def template(**fields: Any) -> dict[str, Any]:
    return worker(workers={"podTemplate": fields})


def refused(view: SessionView, options: Options = OPTIONS) -> str | None:
    return job.refused(view.spec(), view.namespace, options)


def test_what_a_template_may_say() -> None:
    pod = pod_of(
        template(
            env=[{"name": "MINE", "value": "1"}],
            envFrom=[{"configMapRef": {"name": "c"}}],
            volumes=[{"name": "data", "persistentVolumeClaim": {"claimName": "d"}}],
            volumeMounts=[{"name": "data", "mountPath": "/data"}],
            nodeSelector={"pool": "gpu"},
            tolerations=[{"key": "gpu", "operator": "Exists"}],
            affinity={"nodeAffinity": {}},
            runtimeClassName="nvidia",
            priorityClassName="high",
            imagePullSecrets=[{"name": "pull"}],
            terminationGracePeriodSeconds=300,
            extra={"schedulerName": "mine", "topologySpreadConstraints": [{"maxSkew": 1}]},
        )
    )
    (container,) = pod["containers"]
    values = {item["name"]: item.get("value") for item in container["env"]}
    assert values["MINE"] == "1"
    assert values["HOME"] == "/tmp"
    assert container["envFrom"] == [{"configMapRef": {"name": "c"}}]
    assert {"name": "data", "mountPath": "/data"} in container["volumeMounts"]
    assert pod["volumes"][-1]["name"] == "data"
    assert pod["nodeSelector"] == {"pool": "gpu"}
    assert {"key": "gpu", "operator": "Exists"} in pod["tolerations"]
    assert pod["affinity"] == {"nodeAffinity": {}}
    assert (pod["runtimeClassName"], pod["priorityClassName"]) == ("nvidia", "high")
    assert pod["imagePullSecrets"] == [{"name": "pull"}]
    assert pod["terminationGracePeriodSeconds"] == 300
    assert pod["schedulerName"] == "mine"
    assert pod["topologySpreadConstraints"] == [{"maxSkew": 1}]


def test_a_session_may_bear_a_lost_node_for_longer() -> None:
    own = {"key": "node.kubernetes.io/not-ready", "operator": "Exists", "tolerationSeconds": 900}
    tolerations = pod_of(template(tolerations=[own]))["tolerations"]
    found = [item for item in tolerations if item["key"] == own["key"]]
    assert found == [own]


@pytest.mark.parametrize("path", ["/etc/esper/", "/tmp", "//tmp//", "/x/../tmp", "/etc/esper/x"])
def test_a_template_can_mount_nothing_over_what_is_the_operators(path: str) -> None:
    with pytest.raises(ValidationError, match="not the operator's"):
        template(volumeMounts=[{"name": "x", "mountPath": path}])


@pytest.mark.parametrize("path", ["/tmp/data", "/etc/espers", "/var/lib/esper/data", "/a/.b/..c"])
def test_beside_it_and_below_it_there_is_room(path: str) -> None:
    mounts = pod_of(template(volumeMounts=[{"name": "x", "mountPath": path}]))["containers"][0]
    assert {"name": "x", "mountPath": path} in mounts["volumeMounts"]


@pytest.mark.parametrize(
    "storage",
    [{}, {"claimName": "c"}, {"uri": "s3://b"}, {"uri": "s3://b", "secretName": "keys"}],
    ids=str,
)
def test_nothing_that_the_operator_sets_can_be_set_by_a_template(storage: dict[str, str]) -> None:
    pod = pod_of(worker(storage=storage))
    (container,) = pod["containers"]
    for volume in pod["volumes"]:
        with pytest.raises(ValidationError, match="begin with esper-"):
            template(volumes=[{"name": volume["name"], "emptyDir": {}}])
    for mount in container["volumeMounts"]:
        with pytest.raises(ValidationError, match="not the operator's"):
            template(volumeMounts=[{"name": "x", "mountPath": mount["mountPath"]}])
    for item in container["env"]:
        try:
            given = {"podTemplate": {"env": [{"name": item["name"], "value": "x"}]}}
            view = session(workers=given, storage=storage)
        except ValidationError as error:
            assert "that the operator does not set" in str(error)  # noqa: PT017
        else:
            message = refused(view)
            assert message is not None
            assert message.startswith("spec.workers.podTemplate.env[0].name: got ESPER_STORAGE__")
    for field in pod.keys() - {"securityContext"}:
        view = session(workers={"podTemplate": {"extra": {field: "x"}}}, storage=storage)
        assert f"extra.{field}: got" in (refused(view) or "")


def test_what_a_template_has_a_field_for_is_said_there_alone() -> None:
    for field in PodTemplate().to_wire().keys() | {"affinity", "priorityClassName"}:
        view = session(workers={"podTemplate": {"extra": {field: {}}}})
        message = refused(view) or ""
        assert message.startswith(f"spec.workers.podTemplate.extra.{field}: got"), field
    view = session(workers={"podTemplate": {"extra": {"dnsPolicy": "None"}}})
    assert refused(view) is None


def test_who_the_pod_is_may_be_said() -> None:
    security = pod_of(template(extra={"securityContext": {"runAsUser": 1000, "fsGroup": 5}}))
    assert security["securityContext"]["runAsUser"] == 1000
    assert security["securityContext"]["fsGroup"] == 5
    assert security["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize(
    "name",
    [names.secret("any"), names.kernel_secret("5f" * 20), names.TAMIYO, "sh.helm.release.v1.e.v1"],
)
def test_no_session_can_name_a_secret_of_the_operators_or_helms(name: str) -> None:
    with pytest.raises(ValidationError, match="neither the operator's nor Helm's"):
        template(volumes=[{"name": "v", "secret": {"secretName": name}}])


def _volume(**source: Any) -> dict[str, Any]:
    return {"workers": {"podTemplate": {"volumes": [{"name": "v", **source}]}}}


def _env(**fields: Any) -> dict[str, Any]:
    return {"workers": {"podTemplate": fields}}


KEY = {"name": "keys", "key": "k"}
COPY = {"volumeClaimTemplate": {"spec": {"dataSource": {"name": "hub"}}}}
COPY_REF = {"volumeClaimTemplate": {"spec": {"dataSourceRef": {"name": "hub"}}}}
NAMES_OURS = {
    "storage.secretName": {"storage": {"uri": "s3://b", "secretName": "keys"}},
    "env[0].valueFrom.secretKeyRef.name": _env(
        env=[{"name": "A", "valueFrom": {"secretKeyRef": KEY}}]
    ),
    "envFrom[0].secretRef.name": _env(envFrom=[{"secretRef": {"name": "keys"}}]),
    "volumes[0].secret.secretName": _volume(secret={"secretName": "keys"}),
    "volumes[0].csi.nodePublishSecretRef.name": _volume(
        csi={"driver": "d", "nodePublishSecretRef": {"name": "keys"}}
    ),
    "projected.sources[0].secret.name": _volume(
        projected={"sources": [{"secret": {"name": "keys"}}]}
    ),
    "storage.claimName": {"storage": {"claimName": "hub"}},
    "persistentVolumeClaim.claimName": _volume(persistentVolumeClaim={"claimName": "hub"}),
    "volumeClaimTemplate.spec.dataSource.name": _volume(ephemeral=COPY),
    "volumeClaimTemplate.spec.dataSourceRef.name": _volume(ephemeral=COPY_REF),
}


@pytest.mark.parametrize("field", NAMES_OURS)
def test_a_session_beside_the_installation_can_name_nothing_of_it(field: str) -> None:
    """With the key in its Secret one could sign tokens of an administrator's."""
    view = session(**NAMES_OURS[field])
    own = {"own_secrets": ("keys", "more"), "own_claims": ("hub",)}
    message = refused(view, replace(OPTIONS, own_namespace=NAMESPACE, **own))
    assert message is not None
    assert f"{field}: got " in message
    assert message.endswith("that is not the installation's")
    # Elsewhere, and under another name, it is the user's.
    assert refused(view, replace(OPTIONS, own_namespace="another", **own)) is None
    others = {"own_secrets": ("hub",), "own_claims": ("keys",)}
    assert refused(view, replace(OPTIONS, own_namespace=NAMESPACE, **others)) is None


def test_what_has_no_name_names_nothing() -> None:
    options = replace(OPTIONS, own_namespace=NAMESPACE, own_claims=("hub",), own_secrets=("keys",))
    for source in ({"ephemeral": {"volumeClaimTemplate": 3}}, {"persistentVolumeClaim": {}}):
        assert refused(session(**_volume(**source)), options) is None
