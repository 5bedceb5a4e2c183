"""The chart rendered: valid for every supported Kubernetes, restricted, and of one piece."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from kubernetes_validate import utils as library

import esper
from esper.configs import EsperConfig, OperatorConfig
from esper.contracts.resources import KINDS
from esper_operator.leading import options_of
from esper_operator.rbac import manifests
from tests.unit.charts.objects import (
    INSTALLATIONS,
    OTHERS,
    RELEASES,
    named,
    of_kind,
    pods,
    selects,
)
from tools import chart, helm
from tools.helm import HelmError

CLUSTER_WIDE = {"ClusterRole", "ClusterRoleBinding", "CustomResourceDefinition"}


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """For each object the library would read a megabyte of definitions anew."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(library, "schema_contents", cache(library.schema_contents))
        yield


@cache
def rendered(installation: str) -> list[dict[str, Any]]:
    return helm.render(INSTALLATIONS[installation])


def test_it_is_linted_without_a_warning() -> None:
    for values in INSTALLATIONS.values():
        helm.run("lint", "--strict", str(helm.CHART), values=values)
    helm.run("lint", "--strict", str(helm.CHART), "--values", str(helm.LOCAL_VALUES))


def test_its_versions_are_those_of_esper() -> None:
    said = yaml.safe_load((helm.CHART / "Chart.yaml").read_text())
    assert said["version"] == said["appVersion"] == esper.__version__
    assert said["kubeVersion"] == f">={RELEASES[0]}.0-0"


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_every_object_is_one_of_that_kubernetes(installation: str, release: str) -> None:
    for each in rendered(installation):
        if each["apiVersion"] not in OTHERS:
            kubernetes_validate.validate(each, release, strict=True)


def test_what_no_kubernetes_knows_is_refused_by_that_check() -> None:
    broken = named(rendered("default"), "Deployment", "esper-operator")
    broken = {**broken, "spec": {**broken["spec"], "replica": 2}}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(broken, RELEASES[-1], strict=True)


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_objects_are_named_once_placed_and_labelled(installation: str) -> None:
    found = set()
    for each in rendered(installation):
        meta = each["metadata"]
        identity = (each["kind"], meta.get("namespace"), meta["name"])
        assert identity not in found
        found.add(identity)
        assert (meta.get("namespace") is None) is (each["kind"] in CLUSTER_WIDE)
        assert meta["labels"]["app.kubernetes.io/part-of"] == "esper"
        if each["kind"] != "CustomResourceDefinition":
            assert meta["labels"]["app.kubernetes.io/instance"] == "esper"
            more = INSTALLATIONS[installation].get("commonLabels", {})
            assert more.items() <= meta["labels"].items()


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_every_pod_is_restricted(installation: str) -> None:
    for name, _, pod in pods(rendered(installation)):
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == security["fsGroup"] == 65532
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        assert not {"hostNetwork", "hostPID", "hostIPC", "initContainers"} & set(pod)
        assert pod["enableServiceLinks"] is False
        assert pod["automountServiceAccountToken"] is (name.endswith("-operator"))
        kinds = {key for volume in pod["volumes"] for key in volume if key != "name"}
        assert kinds <= {"projected", "secret", "configMap", "emptyDir", "persistentVolumeClaim"}
        for container in pod["containers"]:
            own = container["securityContext"]
            assert own["allowPrivilegeEscalation"] is False
            assert own["readOnlyRootFilesystem"] is True
            assert own["capabilities"] == {"drop": ["ALL"]}
            assert {"requests", "limits"} <= set(container["resources"])
            assert "/tmp" in {mount["mountPath"] for mount in container["volumeMounts"]}
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            assert mounted == {volume["name"] for volume in pod["volumes"]}
            probes = {"startupProbe", "livenessProbe", "readinessProbe"}
            assert probes <= set(container) or name.endswith("-test")


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_whatever_is_referred_to_is_there(installation: str) -> None:
    objects = rendered(installation)
    theirs = {"own", "esper-postgres", "s3", "esper-redis-admin"}
    for _, _, pod in pods(objects):
        for volume in pod["volumes"]:
            for source in volume.get("projected", {"sources": [volume]})["sources"]:
                if "configMap" in source:
                    assert named(objects, "ConfigMap", source["configMap"]["name"])
                if "secret" in source:
                    about = source["secret"]
                    name = about.get("name") or about["secretName"]
                    keys = {item["key"] for item in about["items"]}
                    assert name in theirs or keys <= set(named(objects, "Secret", name)["data"])
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            assert claim in {None, "one", "two"} or named(objects, "PersistentVolumeClaim", claim)
        if account := pod.get("serviceAccountName"):
            assert named(objects, "ServiceAccount", account)
    for service in of_kind(objects, "Service"):
        chosen = [
            pod
            for _, labels, pod in pods(objects)
            if service["spec"]["selector"].items() <= labels.items()
        ]
        assert len(chosen) == 1
        named_ports = {port["name"] for port in chosen[0]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= named_ports
    for each in of_kind(objects, "StatefulSet"):
        assert named(objects, "Service", each["spec"]["serviceName"])


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_selectors_choose_their_own_pods_and_no_others(installation: str) -> None:
    objects = rendered(installation)
    for each in of_kind(objects, "Deployment", "StatefulSet", "PodDisruptionBudget"):
        chosen = [n for n, labels, _ in pods(objects) if selects(each["spec"]["selector"], labels)]
        assert chosen == [each["metadata"]["name"]]
    for each in of_kind(objects, "NetworkPolicy"):
        selector = each["spec"]["podSelector"]
        chosen = [name for name, labels, _ in pods(objects) if selects(selector, labels)]
        assert chosen == [each["metadata"]["name"]]
    for each in of_kind(objects, "ServiceMonitor"):
        chosen = [
            found
            for found in of_kind(objects, "Service")
            if selects(each["spec"]["selector"], found["metadata"]["labels"])
        ]
        ports = {port["name"] for found in chosen for port in found["spec"]["ports"]}
        assert len(chosen) == 1
        assert each["spec"]["endpoints"][0]["port"] in ports


def served_of(installation: str) -> tuple[OperatorConfig, bool]:
    operator = INSTALLATIONS[installation].get("operator", {})
    namespaced = operator.get("namespaced", False)
    names = operator.get("namespaces") or (["esper-system"] if namespaced else [])
    name = INSTALLATIONS[installation].get("fullnameOverride", "esper")
    return OperatorConfig(namespaces=",".join(names), lease_name=f"{name}-operator"), namespaced


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_operators_rights_are_its_own_table(installation: str) -> None:
    config, namespaced = served_of(installation)
    kinds = ("ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding")

    def essence(objects: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
        found = [
            (
                each["kind"],
                each["metadata"].get("namespace"),
                each["metadata"]["name"],
                each.get("rules"),
                each.get("roleRef", {}).get("name"),
                each.get("subjects"),
            )
            for each in of_kind(objects, *kinds)
            if not each["metadata"]["name"].endswith(("-view", "-edit"))
        ]
        return sorted(found, key=lambda each: (each[0], str(each[1]), each[2]))

    told = manifests(config, namespaced=namespaced)
    ours = rendered(installation)
    text = yaml.safe_dump(essence(told)).replace("esper-operator", config.lease_name)
    assert yaml.safe_dump(essence(ours)) == text


@pytest.mark.parametrize("installation", ["namespaced", "namespaces", "own"])
def test_a_namespaced_installation_has_no_rights_beyond(installation: str) -> None:
    objects = rendered(installation)
    assert of_kind(objects, "ClusterRole", "ClusterRoleBinding") == []
    places = {each["metadata"]["namespace"] for each in of_kind(objects, "Role")}
    wanted = INSTALLATIONS[installation]["operator"].get("namespaces", [])
    assert places == {"esper-system", *wanted}


def test_people_get_what_their_roles_in_a_namespace_say() -> None:
    view = named(rendered("default"), "ClusterRole", "esper-view")
    edit = named(rendered("default"), "ClusterRole", "esper-edit")
    plurals = {of.plural for of in KINDS}
    assert set(view["rules"][0]["resources"]) == plurals
    assert set(view["rules"][0]["verbs"]) == {"get", "list", "watch"}
    assert "rbac.authorization.k8s.io/aggregate-to-view" not in edit["metadata"]["labels"]
    assert set(edit["rules"][0]["resources"]) == {"trainingsessions", "blueprints"}
    left = [each["metadata"]["name"] for each in of_kind(rendered("little"), "ClusterRole")]
    assert left == ["esper-operator"]


def test_the_definitions_are_those_of_the_sources_and_stay() -> None:
    made = {each["metadata"]["name"]: each for each in rendered("default")}
    for path in (helm.ROOT / "crds").glob("*.yaml"):
        source = yaml.safe_load(path.read_text())
        ours = made[source["metadata"]["name"]]
        assert ours["spec"] == source["spec"]
        assert ours["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert len(of_kind(rendered("default"), "CustomResourceDefinition")) == len(KINDS)
    assert of_kind(rendered("little"), "CustomResourceDefinition") == []
    assert (helm.CHART / "files" / "crds").resolve() == helm.ROOT / "crds"


def test_a_packaged_chart_has_the_definitions_in_it(tmp_path: Path) -> None:
    helm.run("package", str(helm.CHART), "--destination", str(tmp_path))
    (package,) = tmp_path.iterdir()
    assert helm.render(chart=package)[0]["kind"]
    assert len(of_kind(helm.render(chart=package), "CustomResourceDefinition")) == len(KINDS)


def test_what_the_next_installation_goes_on_with_is_kept() -> None:
    kept = {
        (each["kind"], each["metadata"]["name"])
        for each in rendered("default")
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
    }
    assert {name for kind, name in kept if kind == "PersistentVolumeClaim"} == {
        "esper-urza",
        "esper-redis",
    }
    assert ("Secret", "esper-credentials") in kept


def settings(installation: str, component: str, folder: Path) -> EsperConfig:
    """The settings of a component as its pod finds them, the Secrets' keys made up."""
    objects = rendered(installation)
    name = f"{INSTALLATIONS[installation].get('fullnameOverride', 'esper')}-{component}"
    ((_, _, pod),) = [each for each in pods(objects) if each[0] == name]
    made = {
        "redis.url": "redis://esper-hub:p@redis:6379/0",
        "database.url": "postgresql+asyncpg://esper:p@postgres/esper",
    }
    (volume,) = [each for each in pod["volumes"] if each["name"] == "settings"]
    for source in volume["projected"]["sources"]:
        if "configMap" in source:
            content = named(objects, "ConfigMap", source["configMap"]["name"])["data"]
            (folder / "esper.yaml").write_text(content["esper.yaml"])
        for item in source.get("secret", {}).get("items", ()):
            (folder / item["path"]).write_text(made.get(item["path"], "s" * 40))
    return EsperConfig.load(file=folder, environment={})


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_operators_settings_are_read(installation: str, tmp_path: Path) -> None:
    config = settings(installation, "operator", tmp_path)
    options = options_of(config)
    wanted, _ = served_of(installation)
    assert config.operator.namespaces == wanted.namespaces
    assert config.operator.lease_name == wanted.lease_name
    assert config.operator.lease_namespace == "esper-system"
    assert config.component.health_host == "0.0.0.0"
    assert config.hub.token is not None
    name = wanted.lease_name.removesuffix("-operator")
    assert options.hub_url == f"http://{name}-urza.esper-system.svc:8000"
    bundled = INSTALLATIONS[installation].get("redis", {}).get("bundled", True)
    assert options.redis_url == (
        f"redis://{name}-redis.esper-system.svc:6379/0" if bundled else "redis://redis.bus:6380/0"
    )
    assert (options.worker_egress is None) is (installation == "little")


def test_the_operators_pods_have_the_images_and_secrets_that_are_said(tmp_path: Path) -> None:
    options = options_of(settings("everything", "operator", tmp_path))
    assert options.image == f"r@sha256:{'0' * 64}"
    assert options.image_pull_secrets == ("pull", "pull-too")
    config = settings("everything", "operator", tmp_path)
    assert config.operator.workers == 32
    assert config.operator.catalogue == "esper-system"
    assert config.operator.excluded_namespaces == "team-own,team-too"


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_no_session_beside_it_may_name_a_secret_or_a_claim_of_the_installations(
    installation: str, tmp_path: Path
) -> None:
    options = options_of(settings(installation, "operator", tmp_path))
    named_secrets, named_claims = set(), set()
    for _, _, pod in pods(rendered(installation)):
        for volume in pod["volumes"]:
            for source in volume.get("projected", {"sources": [volume]})["sources"]:
                about = source.get("secret", {})
                named_secrets |= {about.get("name") or about.get("secretName")} - {None}
            named_claims |= {volume.get("persistentVolumeClaim", {}).get("claimName")} - {None}
    assert options.own_namespace == "esper-system"
    assert set(options.own_secrets) == named_secrets
    assert set(options.own_claims) == named_claims


@pytest.mark.parametrize("operator", [{"namespaced": True}, {"namespaces": ["team-a"]}])
def test_who_serves_named_namespaces_leaves_none_out(operator: dict[str, Any]) -> None:
    with pytest.raises(HelmError, match=r"operator\.excludedNamespaces: got some; allowed: none"):
        helm.render({"operator": {**operator, "excludedNamespaces": ["team-b"]}})


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_hubs_settings_are_read(installation: str, tmp_path: Path) -> None:
    config = settings(installation, "urza", tmp_path)
    urza = INSTALLATIONS[installation].get("urza", {})
    assert config.urza.signing_key is not None
    assert config.urza.admin_token is not None
    assert config.redis.url == "redis://esper-hub:p@redis:6379/0"
    assert config.urza.max_session_bytes == 64 * 2**30
    assert config.database.url.startswith("postgresql") is ("database" in urza)
    assert config.storage.bucket == urza.get("storage", {}).get("bucket")
    if config.storage.bucket is None:
        assert config.storage.folder.startswith("/var/lib/esper/")
    else:
        assert config.storage.access_key_id == "s" * 40
        assert config.storage.endpoint_url == "http://minio.store:9000"


def test_on_a_volume_there_is_never_a_second_hub() -> None:
    for installation in ("default", "postgres", "bucket", "claims"):
        assert named(rendered(installation), "StatefulSet", "esper-urza")["spec"]["replicas"] == 1
    assert named(rendered("elsewhere"), "Deployment", "esper-urza")["spec"]["replicas"] == 3
    assert of_kind(rendered("elsewhere"), "PersistentVolumeClaim") == []
    with pytest.raises(HelmError, match=r"urza\.replicas: got more than 1; allowed: 1, or"):
        helm.render({"urza": {"replicas": 2}})


def test_another_setting_starts_the_pod_anew_and_another_image_only_its_own() -> None:
    """A runtime image is the operator's to know: no hub and no Redis is started anew for it."""

    def templates(values: dict[str, Any]) -> dict[str, Any]:
        found = helm.render({"credentials": {"existingSecret": "own"}, **values})
        return {name: (labels, pod) for name, labels, pod in pods(found)} | {
            each["metadata"]["name"]: each["spec"]["template"]
            for each in of_kind(found, "Deployment", "StatefulSet")
        }

    before = templates({})
    changes = {
        "esper-operator": {"images": {"runtime": {"tag": "2"}}},
        "esper-urza": {"urza": {"logLevel": "debug"}},
        "esper-redis": {"redis": {"maxMemory": "1gb"}},
    }
    for name, values in changes.items():
        after = templates(values)
        assert {each for each in before if before[each] != after[each]} == {name}


def test_another_chart_of_the_same_content_starts_no_pod_anew(tmp_path: Path) -> None:
    newer = tmp_path / "esper"
    shutil.copytree(helm.CHART, newer)
    about = yaml.safe_load((newer / "Chart.yaml").read_text())
    (newer / "Chart.yaml").write_text(yaml.safe_dump({**about, "version": "9.0.0"}))
    values = {"credentials": {"existingSecret": "own"}}
    before, after = helm.render(values), helm.render(values, chart=newer)
    assert before != after
    for one, other in zip(before, after, strict=True):
        assert one.get("spec", {}).get("template") == other.get("spec", {}).get("template")


def test_the_files_from_the_operator_and_the_guides_table_are_up_to_date() -> None:
    assert chart.RULES.read_text() == chart.rules()
    assert chart.GUIDE.read_text() == chart.guide()
