"""Manifests: what pods may do, where they find things, and what a session can't change about it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import yaml

from esper.configs import EsperConfig
from esper.contracts.blueprints import CATALOGUE
from esper.contracts.manifests import parse_manifest
from esper.contracts.resources import Blueprint, RunPolicySpec
from esper_operator.children import blueprint as blueprints
from esper_operator.children import (
    compile_job,
    job,
    names,
    network_policy,
    secret,
    service,
    tamiyo,
)
from esper_operator.children.connections import redis_url
from esper_operator.children.objects import digest_in
from esper_operator.digests import digest_of_object
from esper_operator.options import Options
from esper_operator.times import datetime_of
from esper_operator.views import DIGEST_ANNOTATION, MetaView
from tests.unit.esper_operator.objects import (
    ISSUED,
    KERNEL_ISSUED,
    NAMESPACE,
    NOW,
    OPTIONS,
    UID,
    blueprint,
    decided,
    kernel,
    session,
    written,
)


def pod_of(manifest: dict[str, Any]) -> dict[str, Any]:
    found = manifest["spec"]["template"]["spec"]
    assert isinstance(found, dict)
    return found


def worker(attempt: int = 1, replicas: int = 2, **sections: Any) -> dict[str, Any]:
    return job.manifest(session(**sections), attempt, replicas, OPTIONS)


def template(**fields: Any) -> dict[str, Any]:
    return worker(workers={"podTemplate": fields})


KERNEL = kernel("5f" * 20, {"blueprint": "affine"})
ALL = {
    "worker": worker(),
    "tamiyo": tamiyo.shared(NAMESPACE, OPTIONS),
    "own tamiyo": tamiyo.dedicated(session(), OPTIONS),
    "compile": compile_job.manifest(KERNEL, 1, OPTIONS),
}


def test_workers_are_reached_by_each_other_alone_and_reach_what_is_said() -> None:
    rule = {"ports": [{"port": 53, "protocol": "UDP"}]}
    manifest = network_policy.manifest(session(), json.dumps([rule]))
    spec, labels = manifest["spec"], pod_of_job()["metadata"]["labels"]
    own = spec["podSelector"]["matchLabels"]
    assert own.items() <= labels.items()
    assert own["esper.dev/session-uid"] == UID
    assert spec["policyTypes"] == ["Ingress", "Egress"]
    assert spec["ingress"] == [{"from": [{"podSelector": {"matchLabels": own}}]}]
    assert spec["egress"] == [{"to": [{"podSelector": {"matchLabels": own}}]}, rule]
    assert manifest["metadata"]["ownerReferences"][0]["uid"] == UID
    for other in ("tamiyo", "own tamiyo", "compile"):
        assert not own.items() <= ALL[other]["spec"]["template"]["metadata"]["labels"].items()


def pod_of_job() -> dict[str, Any]:
    found = worker()["spec"]["template"]
    assert isinstance(found, dict)
    return found


def test_the_catalogue_is_that_of_every_session_with_its_label() -> None:
    made = blueprints.catalogue("team-a")
    assert [each["metadata"]["name"] for each in made] == [entry.name for entry in CATALOGUE]
    for each in made:
        assert each["metadata"]["labels"] == {"esper.dev/builtin": "true"}
        assert each["metadata"]["namespace"] == "team-a"
        Blueprint.model_validate(each, by_alias=True, by_name=False)


@pytest.mark.parametrize("manifest", ALL.values(), ids=ALL)
def test_every_pod_is_restricted(manifest: dict[str, Any]) -> None:
    pod = pod_of(manifest)
    assert pod["automountServiceAccountToken"] is False
    assert pod["enableServiceLinks"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    (container,) = pod["containers"]
    security = container["securityContext"]
    assert security["allowPrivilegeEscalation"] is False
    assert security["readOnlyRootFilesystem"] is True
    assert security["runAsNonRoot"] is True
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert not security.get("privileged")


@pytest.mark.parametrize("manifest", ALL.values(), ids=ALL)
def test_every_pod_has_room_to_write_in_tmp_alone(manifest: dict[str, Any]) -> None:
    (container,) = pod_of(manifest)["containers"]
    places = {item["name"]: item.get("value", "") for item in container["env"]}
    for variable in ("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"):
        assert places[variable].startswith("/tmp")
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_of(manifest)["volumes"]}
    assert volumes[mounts["/tmp"]]["emptyDir"] == {}
    assert set(mounts.values()) == set(volumes)


@pytest.mark.parametrize("manifest", ALL.values(), ids=ALL)
def test_no_secret_is_in_an_environment_or_an_argument(manifest: dict[str, Any]) -> None:
    (container,) = pod_of(manifest)["containers"]
    mounted = {m["mountPath"]: m for m in container["volumeMounts"]}["/etc/esper"]
    assert mounted["readOnly"] is True
    assert "/etc/esper/esper.yaml" in container["args"]
    taken = [item["valueFrom"] for item in container["env"] if "valueFrom" in item]
    assert not any(source.keys() - {"fieldRef"} for source in taken)
    assert "token" not in repr(container)


@pytest.mark.parametrize("manifest", ALL.values(), ids=ALL)
def test_every_pod_gives_up_a_lost_node_after_a_minute(manifest: dict[str, Any]) -> None:
    tolerations = {item["key"]: item for item in pod_of(manifest)["tolerations"]}
    for taint in ("not-ready", "unreachable"):
        found = tolerations[f"node.kubernetes.io/{taint}"]
        assert (found["effect"], found["tolerationSeconds"]) == ("NoExecute", 60)


@pytest.mark.parametrize("manifest", ALL.values(), ids=ALL)
def test_every_child_is_found_by_its_labels_and_known_by_its_digest(
    manifest: dict[str, Any],
) -> None:
    meta = manifest["metadata"]
    assert meta["labels"]["app.kubernetes.io/managed-by"] == "esper-operator"
    bare = {**manifest, "metadata": {k: v for k, v in meta.items() if k != "annotations"}}
    assert meta["annotations"] == {DIGEST_ANNOTATION: digest_of_object(bare)}
    assert MetaView.of({**manifest, "metadata": {**meta, "uid": "u"}}).digest == digest_in(manifest)


# -- the Job of an attempt --------------------------------------------------------------------


def test_a_job_is_indexed_and_its_ranks_share_their_fate() -> None:
    content = worker(replicas=3)["spec"]
    assert content["completionMode"] == "Indexed"
    assert content["completions"] == content["parallelism"] == 3
    assert content["backoffLimit"] == 0
    assert content["successPolicy"] == {"rules": [{"succeededIndexes": "0"}]}
    assert content["podReplacementPolicy"] == "Failed"
    assert "ttlSecondsAfterFinished" not in content
    assert content["template"]["spec"]["restartPolicy"] == "Never"


def test_a_disruption_and_an_interruption_are_no_failures() -> None:
    rules = worker()["spec"]["podFailurePolicy"]["rules"]
    assert [rule["action"] for rule in rules] == ["Ignore", "Ignore", "FailJob"]
    assert rules[0]["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert rules[1]["onExitCodes"]["values"] == [75]
    assert rules[2]["onExitCodes"]["values"] == [2, 78]
    assert {rule["onExitCodes"]["containerName"] for rule in rules[1:]} == {"worker"}


def test_the_attempt_is_in_the_name_the_rendezvous_and_the_environment() -> None:
    manifest = worker(attempt=7, replicas=2, workers={"replicas": 2, "processesPerWorker": 4})
    name = manifest["metadata"]["name"]
    assert name.startswith("digits-")
    assert name.endswith("-7")
    (container,) = pod_of(manifest)["containers"]
    arguments = dict(zip(container["args"][::2], container["args"][1::2], strict=True))
    assert arguments["--rendezvous"] == f"{name}-0.digits-workers:29400"
    assert arguments["--rendezvous-id"] == f"{UID}-7"
    assert (arguments["--nodes"], arguments["--processes"]) == ("2", "4")
    # The first pod is found under that name by its subdomain alone.
    assert pod_of(manifest)["subdomain"] == names.service("digits")
    assert arguments["--local-address"] == "$(POD_IP)"
    address = {"fieldRef": {"fieldPath": "status.podIP"}}
    assert {"name": "POD_IP", "valueFrom": address} in container["env"]
    assert {"name": "ESPER_TOLARIA__ATTEMPT", "value": "7"} in container["env"]
    assert container["command"] == ["esper", "worker", "/etc/esper/session.yaml"]
    EsperConfig.load(environment={"ESPER_TOLARIA__ATTEMPT": "7"}, command_line={})


def test_host_names_stay_labels() -> None:
    name = names.job("s" * 48, UID, 9999)
    assert len(f"{name}-4095") <= 63
    assert names.job("digits", "other", 1) != names.job("digits", UID, 1)
    assert len(names.service("s" * 48)) <= 63


def test_shared_memory_is_memory_with_a_bound() -> None:
    def memory(manifest: dict[str, Any]) -> dict[str, Any]:
        mounts = pod_of(manifest)["containers"][0]["volumeMounts"]
        name = next(m["name"] for m in mounts if m["mountPath"] == "/dev/shm")
        found = next(v for v in pod_of(manifest)["volumes"] if v["name"] == name)["emptyDir"]
        assert isinstance(found, dict)
        return found

    assert memory(worker()) == {"medium": "Memory", "sizeLimit": "1Gi"}
    assert memory(template(sharedMemory="8Gi"))["sizeLimit"] == "8Gi"


def test_gpus_and_an_image_of_the_sessions_own() -> None:
    resources = {"limits": {"nvidia.com/gpu": "2"}, "requests": {"cpu": "4"}}
    manifest = worker(
        workers={
            "image": "mine:1",
            "imagePullPolicy": "Always",
            "processesPerWorker": 2,
            "resources": resources,
        }
    )
    (container,) = pod_of(manifest)["containers"]
    assert container["resources"] == resources
    assert (container["image"], container["imagePullPolicy"]) == ("mine:1", "Always")
    (plain,) = pod_of(worker())["containers"]
    assert plain["image"] == OPTIONS.image
    assert "resources" not in plain


@pytest.mark.parametrize(
    ("storage", "place"),
    [
        ({}, "hub"),
        ({"claimName": "shared"}, "file:///var/lib/esper-claim"),
        ({"uri": "s3://bucket"}, None),
    ],
)
def test_what_outlives_a_pod_lies_elsewhere(storage: dict[str, Any], place: str | None) -> None:
    pod = pod_of(worker(storage=storage))
    (container,) = pod["containers"]
    values = {item["name"]: item.get("value") for item in container["env"]}
    assert values.get("ESPER_TOLARIA__STORAGE") == place
    EsperConfig.load(environment={"ESPER_TOLARIA__STORAGE": place or ""})
    mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert volumes[mounts["/var/lib/esper"]]["emptyDir"] == {}
    claim = volumes.get(mounts.get("/var/lib/esper-claim", ""))
    if "claimName" in storage:
        assert claim is not None
        assert claim["persistentVolumeClaim"] == {"claimName": "shared"}
    else:
        assert claim is None


def test_keys_of_a_bucket_come_from_the_users_own_secret() -> None:
    (container,) = pod_of(worker(storage={"uri": "s3://b", "secretName": "keys"}))["containers"]
    taken = {
        item["name"]: item["valueFrom"]["secretKeyRef"]
        for item in container["env"]
        if "secretKeyRef" in item.get("valueFrom", {})
    }
    assert taken["ESPER_STORAGE__SECRET_ACCESS_KEY"] == {
        "name": "keys",
        "key": "secretAccessKey",
        "optional": True,
    }
    EsperConfig.load(
        environment=dict.fromkeys(taken, "us-east-1")
        | {"ESPER_STORAGE__ENDPOINT_URL": "http://store:9000"}
    )


# -- Secrets ----------------------------------------------------------------------------------


def files(manifest: dict[str, Any]) -> dict[str, str]:
    return {name: base64.b64decode(data).decode() for name, data in manifest["data"].items()}


def test_a_sessions_secret_is_a_settings_file_and_its_manifest(tmp_path: Any) -> None:
    policy = {"suspend": True, "backoffLimit": 9}
    view = session(runPolicy=policy, workers={"podTemplate": {"env": [{"name": "A"}]}})
    found = files(secret.manifest(view, ISSUED, OPTIONS, NOW))
    path = tmp_path / "esper.yaml"
    path.write_text(found["esper.yaml"])
    config = EsperConfig.load(file=path, environment={})
    assert config.hub.url == "http://urza:8000"
    assert config.hub.token_file == "/etc/esper/hub-token"
    assert found["hub-token"] == "hub-token"
    assert config.redis.url == "redis://user:p%40ss%2Fword@redis:6379/0"
    assert config.redis.namespace == NAMESPACE
    parsed = parse_manifest(found["session.yaml"], "session.yaml").session
    assert parsed.metadata.uid == UID
    assert parsed.metadata.namespace == NAMESPACE
    assert parsed.spec.training == view.spec().training
    # What concerns pods alone is not the worker's.
    assert parsed.spec.run_policy == RunPolicySpec()
    assert parsed.spec.workers.pod_template.env == ()


def test_a_secret_says_when_its_credentials_are_to_be_renewed() -> None:
    def renewed(left: float) -> float | None:
        issued = ISSUED.model_copy(update={"expires_at": datetime_of(NOW + left)})
        manifest = secret.manifest(session(), issued, OPTIONS, NOW)
        return MetaView.of({**manifest, "kind": "Secret"}).renew_after - NOW

    assert renewed(90 * 86_400) == 60 * 86_400
    # What the hub gives ends at once, or has ended: that is no reason to ask without a pause.
    assert renewed(60) == renewed(-60) == 3600


def test_a_secret_is_known_by_what_is_no_secret() -> None:
    view = session()
    manifest = secret.manifest(view, ISSUED, OPTIONS, NOW)
    assert digest_in(manifest) == secret.digest(view, OPTIONS)
    other = ISSUED.model_copy(update={"hub_token": "another"})
    assert digest_in(secret.manifest(view, other, OPTIONS, NOW)) == digest_in(manifest)
    assert secret.digest(session(runPolicy={"suspend": True}), OPTIONS) == digest_in(manifest)
    assert secret.digest(session(workers={"replicas": 2}), OPTIONS) != digest_in(manifest)
    moved = Options(image="i", hub_url="http://other", redis_url="r")
    assert secret.digest(view, moved) != digest_in(manifest)


@pytest.mark.parametrize(
    ("url", "user", "wanted"),
    [
        ("redis://r:1/2", None, "redis://r:1/2"),
        ("redis://r:1/2", "u", "redis://u:p@r:1/2"),
        ("rediss://admin:secret@r", "u", "rediss://u:p@r"),
        ("redis://[::1]:6379", "u", "redis://u:p@[::1]:6379"),
    ],
)
def test_the_bus_is_reached_with_the_sessions_own_user(
    url: str, user: str | None, wanted: str
) -> None:
    assert redis_url(url, user, "p") == wanted


def test_blueprints_of_the_namespace_come_with_the_manifest() -> None:
    mine = blueprint({"builtin": "affine"}, name="mine", labels=(("team", "a"),))
    others = blueprint({"builtin": "affine"}, name="others")
    leaving = blueprint({"builtin": "affine"}, name="leaving", deleting=True)
    broken = blueprint({"builtin": "affine"}, name="broken", status={"state": "failed"})
    all_of_them = (mine, others, leaving, broken)

    def told(view: Any) -> list[str]:
        text = files(secret.manifest(view, ISSUED, OPTIONS, NOW, all_of_them))["session.yaml"]
        return [item.metadata.name for item in parse_manifest(text, "x").blueprints]

    assert told(session()) == ["mine", "others"]
    selecting = session(growth={"blueprints": {"matchLabels": {"team": "a"}}})
    assert told(selecting) == ["mine"]
    expressions = [{"key": "esper.dev/blueprint", "operator": "In", "values": ["others"]}]
    named = session(growth={"blueprints": {"matchExpressions": expressions}})
    assert told(named) == ["others"]


def test_one_of_the_catalogues_name_takes_its_place_there() -> None:
    narrow = blueprint({"builtin": "affine", "hosts": ["Linear"]}, name="affine")
    selecting = session(growth={"blueprints": {"matchLabels": {"esper.dev/builtin": "true"}}})
    found = secret.offered(selecting, (narrow,), OPTIONS)
    assert [item.metadata.name for item in found] == ["affine"]


def test_settings_of_what_outlives_sessions_are_given_anew_each_month() -> None:
    shared = secret.controller_manifest(NAMESPACE, ISSUED, OPTIONS, NOW)
    assert shared["metadata"]["name"] == names.TAMIYO
    assert digest_in(shared) == secret.settings_digest(names.TAMIYO, OPTIONS, NOW)
    assert digest_in(shared) != secret.settings_digest(names.TAMIYO, OPTIONS, NOW + 31 * 86_400)
    assert "redis" in yaml.safe_load(files(shared)["esper.yaml"])


def test_a_compile_job_has_a_secret_of_its_own_kernel_that_goes_with_it() -> None:
    manifest = secret.compile_manifest(KERNEL, KERNEL_ISSUED, OPTIONS, NOW)
    volumes = pod_of(ALL["compile"])["volumes"]
    assert {"secretName": manifest["metadata"]["name"], "defaultMode": 0o440} in [
        volume.get("secret") for volume in volumes
    ]
    (owner,) = manifest["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["uid"]) == ("CompiledKernel", KERNEL.uid)
    assert files(manifest)["hub-token"] == "kernel-token"
    assert "redis" not in yaml.safe_load(files(manifest)["esper.yaml"])
    view = MetaView.of({**manifest, "kind": "Secret"})
    assert view.kernel == KERNEL.name
    assert secret.compiles(view, KERNEL, OPTIONS, NOW)
    # Its token ends a day after it was given.
    assert not secret.compiles(view, KERNEL, OPTIONS, NOW + 86_400)
    other = kernel(KERNEL.name, {"blueprint": "affine"}, uid="made-anew")
    assert not secret.compiles(view, other, OPTIONS, NOW)
    assert not secret.compiles(None, KERNEL, OPTIONS, NOW)


# -- the rest ---------------------------------------------------------------------------------


def test_the_status_selects_the_workers_for_an_autoscaler() -> None:
    selector = written(decided(session())).selector or ""
    wanted = dict(pair.split("=") for pair in selector.split(","))
    labels = worker()["spec"]["template"]["metadata"]["labels"]
    assert wanted.items() <= labels.items()
    assert wanted["esper.dev/session-uid"] == UID
    others = ALL["own tamiyo"]["spec"]["template"]["metadata"]["labels"]
    assert not wanted.items() <= others.items()


def test_workers_find_each_other_before_they_are_ready() -> None:
    manifest = service.manifest(session())
    assert manifest["spec"]["clusterIP"] == "None"
    assert manifest["spec"]["publishNotReadyAddresses"] is True
    labels = worker()["spec"]["template"]["metadata"]["labels"]
    assert manifest["spec"]["selector"].items() <= labels.items()


@pytest.mark.parametrize("manifest", [ALL["tamiyo"], ALL["own tamiyo"]], ids=["shared", "own"])
def test_a_controller_is_selected_by_its_own_labels_and_probed(manifest: dict[str, Any]) -> None:
    content = manifest["spec"]
    labels = content["template"]["metadata"]["labels"]
    assert content["selector"]["matchLabels"].items() <= labels.items()
    (container,) = content["template"]["spec"]["containers"]
    assert container["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container["readinessProbe"]["httpGet"]["path"] == "/readyz"
    assert container["command"] == ["esper", "serve", "tamiyo"]


def test_a_controller_of_its_own_hears_its_session_alone_and_goes_with_it() -> None:
    own, shared = ALL["own tamiyo"], ALL["tamiyo"]
    (container,) = pod_of(own)["containers"]
    assert container["args"][-2:] == ["--session", UID]
    assert own["metadata"]["ownerReferences"][0]["uid"] == UID
    assert "ownerReferences" not in shared["metadata"]
    assert own["spec"]["selector"] != shared["spec"]["selector"]


def test_a_compile_job_is_given_up_and_cleared_away() -> None:
    content = ALL["compile"]["spec"]
    assert content["activeDeadlineSeconds"] == OPTIONS.compile_deadline_seconds
    assert content["ttlSecondsAfterFinished"] == OPTIONS.compile_ttl_seconds
    (container,) = content["template"]["spec"]["containers"]
    assert container["args"][:2] == ["--kernel", "5f" * 20]
    assert container["args"][-2:] == ["--termination-log", "/dev/termination-log"]
    assert ALL["compile"]["metadata"]["ownerReferences"][0]["kind"] == "CompiledKernel"
    assert len(f"{ALL['compile']['metadata']['name']}-abcde") <= 63


def test_labels_and_pull_secrets_of_the_installation_reach_every_pod() -> None:
    options = Options(
        image="i",
        hub_url="h",
        redis_url="r",
        pod_labels=(("net", "esper"), ("esper.dev/role", "evil")),
        image_pull_secrets=("pull",),
    )
    view = session()
    made = (
        job.manifest(view, 1, 1, options),
        tamiyo.shared(NAMESPACE, options),
        tamiyo.dedicated(view, options),
        compile_job.manifest(KERNEL, 1, options),
    )
    for manifest in made:
        labels = manifest["spec"]["template"]["metadata"]["labels"]
        assert labels["net"] == "esper"
        assert labels["esper.dev/role"] in ("worker", "tamiyo", "compile")
        assert pod_of(manifest)["imagePullSecrets"] == [{"name": "pull"}]


def test_numbers_in_a_sessions_manifest_stay_what_they_are() -> None:
    view = session(training={"optimizer": {"name": "sgd", "learningRate": 1e-5}})
    found = files(secret.manifest(view, ISSUED, OPTIONS, NOW))["session.yaml"]
    parsed = parse_manifest(found, "session.yaml").session
    assert parsed.spec.training.optimizer.learning_rate == 1e-5
