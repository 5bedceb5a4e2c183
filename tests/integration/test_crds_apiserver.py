"""The CustomResourceDefinitions in a real API server: taken, complete, and as people use them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from esper.contracts.resources import KINDS, CompiledKernel, TrainingSession
from esper.utils.documents import read_documents
from tests.integration.bad_manifests import BASES, changed
from tests.integration.pods import find
from tools.servers.process import ServerError

pytestmark = pytest.mark.xdist_group("cluster")

REPOSITORY = Path(__file__).parents[2]
CRDS = sorted((REPOSITORY / "crds").glob("*.yaml"))
UNPROCESSABLE = 422
GROUP = "apis/esper.dev/v1alpha1"


def applied(plane, namespace, document, *words):
    """What kubectl says of a document that is applied."""
    return plane.kubectl("apply", "-n", namespace, "-f", "-", *words, given=json.dumps(document))


def kept(plane, namespace, document):
    """What the API server has under a document's name."""
    kind = model_of(document).plural
    return find(plane, namespace, document["metadata"]["name"], kind, GROUP)


def sent(plane, namespace, document):
    """The API server's answer to a document that is applied, as kubectl asks with --server-side."""
    path = f"/{GROUP}/namespaces/{namespace}/{model_of(document).plural}"
    with plane.client() as client:
        return client.patch(
            f"{path}/{document['metadata']['name']}",
            params={"fieldManager": "kubectl", "force": "true", "fieldValidation": "Strict"},
            headers={"Content-Type": "application/apply-patch+yaml"},
            content=json.dumps(document),
        )


def set_status(plane, namespace, kind, name, status):
    patch = json.dumps({"status": status})
    plane.kubectl(
        *("patch", "-n", namespace, kind, name, "--subresource=status", "--type=merge"),
        *("-p", patch),
    )


@pytest.fixture
def plane(esper_control_plane):
    return esper_control_plane


def test_they_are_established_without_a_word_against_them(plane):
    for path in CRDS:
        name = ".".join(reversed(path.stem.split("_")))
        found = plane.get("crd", name)
        conditions = {c["type"]: c["status"] for c in found["status"]["conditions"]}
        assert conditions == {"Established": "True", "NamesAccepted": "True"}
        assert found["status"]["acceptedNames"] == found["spec"]["names"]
        assert found["status"]["storedVersions"] == ["v1alpha1"]


@pytest.mark.parametrize("words", [(), ("--server-side", "--force-conflicts")])
def test_they_can_be_applied_again_either_way(plane, words):
    # What kubectl keeps of an object for the next time is an annotation, of at most 256 KiB.
    said = plane.kubectl("apply", *words, "-f", str(REPOSITORY / "crds"))
    assert len(said.splitlines()) == len(CRDS)
    again = plane.kubectl("apply", *words, "-f", str(REPOSITORY / "crds"))
    assert all(line.endswith(("unchanged", "serverside-applied")) for line in again.splitlines())


def test_every_field_of_growth_is_explained(plane):
    said = plane.kubectl("explain", "ts.spec.growth")
    assert "How the model grows while it trains." in said
    for field in ("layers", "seedsPerLayer", "blueprints", "budget", "controller", "gates"):
        assert field in said
    said = plane.kubectl("explain", "ts.spec.growth.gates.confidenceLevel")
    assert "One-sided level of the bounds that gates compare with the rent." in said
    assert "0.95" not in plane.kubectl("explain", "ts.status.seeds")


# A node of a graph has other fields and defaults for each operation: the server writes none.
# So have windows for each kind of layer: a kernel's are given.
@pytest.mark.parametrize("base", sorted(BASES.keys() - {"graph"}))
def test_the_server_fills_in_what_the_models_fill_in(plane, namespace, base):
    document = BASES[base]
    if base == "kernel":
        windows = {"stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
        layer = {**document["spec"]["target"]["layer"], **windows}
        document = changed(document, {"spec.target.layer": layer})
    applied(plane, namespace, document)
    found = kept(plane, namespace, document)
    assert found["spec"] == model_of(document).model_validate(document).to_wire()["spec"]


@pytest.mark.parametrize("base", BASES)
def test_what_the_server_keeps_is_what_was_meant(plane, namespace, base):
    document = BASES[base]
    applied(plane, namespace, document)
    found = kept(plane, namespace, document)
    model = model_of(document)
    assert model.model_validate(found).spec == model.model_validate(document).spec


def test_a_kernel_for_a_layer_of_one_axis_is_read_back(plane, namespace):
    layer = {"kind": "Conv1d", "inputs": 4, "outputs": 8, "kernelSize": 3}
    document = changed(BASES["kernel"], {"spec.target.layer": layer})
    applied(plane, namespace, document)
    found = plane.get("-n", namespace, "ck", "k-1a2b")
    kernel = CompiledKernel.model_validate(found)
    assert kernel.spec == CompiledKernel.model_validate(document).spec
    assert kernel.spec.target.layer.stride == (1,)


def model_of(document):
    (model,) = [kind for kind in KINDS if kind.__name__ == document["kind"]]
    return model


@pytest.mark.parametrize("path", sorted((REPOSITORY / "examples").glob("*/session.yaml")))
def test_every_example_applies(plane, namespace, path):
    said = plane.kubectl("apply", "-n", namespace, "-f", str(path))
    documents = read_documents(path.read_text(), path.name)
    assert said.splitlines() == [
        f"{d.data['kind'].lower()}.esper.dev/{d.data['metadata']['name']} created"
        for d in documents
    ]
    again = plane.kubectl("apply", "-n", namespace, "-f", str(path))
    assert all(line.endswith("unchanged") for line in again.splitlines())
    for document in documents:
        model = model_of(document.data)
        found = kept(plane, namespace, document.data)
        assert model.model_validate(found).spec == model.model_validate(document.data).spec


def test_null_is_a_value_for_an_argument_and_nothing_elsewhere(plane, namespace):
    nothing = {
        "spec.training.epochs": None,
        "spec.runPolicy.activeDeadlineSeconds": None,
        "spec.growth.blueprints.matchLabels.a": None,
        "spec.workers.resources.limits.memory": None,
    }
    document = changed(BASES["session"], {"spec.model.arguments": {"depth": None}, **nothing})
    # Of what it applies by itself, kubectl takes away every null before it asks.
    plane.kubectl("create", "-n", namespace, "-f", "-", given=json.dumps(document))
    found = kept(plane, namespace, BASES["session"])["spec"]
    assert found["model"]["arguments"] == {"depth": None}
    assert found == TrainingSession.model_validate(document).to_wire()["spec"]
    assert found["training"]["epochs"] == 10


def test_columns_tell_how_things_stand(plane, namespace):
    for document in BASES.values():
        applied(plane, namespace, document)
    time = "2026-01-01T00:00:00Z"
    condition = {
        "status": "Unknown",
        "reason": "Training",
        "message": "",
        "lastTransitionTime": time,
    }
    set_status(
        *(plane, namespace, "ts", "session"),
        {
            "conditions": [{"type": "Succeeded", **condition}],
            "epoch": 7,
            "metrics": {"validationMetric": "0.93"},
            "parameters": 1234,
            "seeds": {"active": 2, "fossilized": 1},
            "workers": 2,
        },
    )
    seed = {"state": "grafting", "blueprint": "wide", "alphaPercent": 40, "healthPercent": 90}
    set_status(plane, namespace, "seed", "session-1a2b-0", {**seed, "contribution": "0.012"})
    set_status(plane, namespace, "bp", "wide", {"state": "deployed", "parameters": 9, "kernels": 2})
    ready = {"type": "Ready", **condition, "status": "True", "reason": "Compiled"}
    set_status(
        *(plane, namespace, "ck", "k-1a2b"), {"conditions": [ready], "bytes": 77, "parameters": 9}
    )

    def rows(names):
        lines = plane.kubectl("get", "-n", namespace, names).splitlines()
        return [line.split() for line in lines if line]

    headings, row = rows("ts")
    assert " ".join(headings) == "NAME STATE EPOCH METRIC PARAMS SEEDS FOSSILIZED WORKERS AGE"
    assert row[1:-1] == ["Training", "7", "0.93", "1234", "2", "1", "2"]
    headings, row = rows("seeds")
    assert " ".join(headings) == "NAME SESSION LAYER STATE BLUEPRINT ALPHA HEALTH GAIN AGE"
    assert row[1:-1] == ["session", "features.0", "grafting", "wide", "40", "90", "0.012"]
    headings, other, row = rows("bp")
    assert " ".join(headings) == "NAME STATE BUILTIN PARAMS KERNELS AGE"
    assert row[1:-1] == ["deployed", "widen", "9", "2"]
    assert other[0] == "graph"
    headings, row = rows("ck")
    assert " ".join(headings) == "NAME BLUEPRINT LAYER READY BYTES PARAMS AGE"
    assert row[1:-1] == ["wide", "Linear", "True", "77", "9"]
    for names in ("ts,seeds,bp,ck", "esper"):
        found = {row[0].split("/")[0] for row in rows(names) if "/" in row[0]}
        kinds = ("trainingsession", "seed", "blueprint", "compiledkernel")
        assert found == {f"{kind}.esper.dev" for kind in kinds}


def test_seeds_are_selected_by_session_and_state(plane, namespace):
    for session, slot, state in [
        ("one", 0, "training"),
        ("one", 1, "culled"),
        ("two", 0, "culled"),
    ]:
        name = f"{session}-{slot}"
        fields = {"metadata.name": name, "spec.session": session, "spec.slot": slot}
        applied(plane, namespace, changed(BASES["seed"], fields))
        set_status(plane, namespace, "seed", name, {"state": state})

    def selected(selector):
        said = plane.kubectl(
            "get", "-n", namespace, "seeds", "--field-selector", selector, "-o", "name"
        )
        return said.split()

    assert selected("spec.session=one") == ["seed.esper.dev/one-0", "seed.esper.dev/one-1"]
    assert selected("status.state=culled") == ["seed.esper.dev/one-1", "seed.esper.dev/two-0"]
    assert selected("spec.session=one,status.state=culled") == ["seed.esper.dev/one-1"]
    assert selected("spec.session!=one") == ["seed.esper.dev/two-0"]
    with pytest.raises(ServerError, match="field label not supported"):
        selected("spec.layer=a")


def test_a_session_is_scaled_where_it_may_be(plane, namespace):
    applied(plane, namespace, changed(BASES["session"], {"spec.workers.minReplicas": 1}))

    def scale(replicas):
        plane.kubectl("scale", "-n", namespace, "ts/session", f"--replicas={replicas}")

    scale(3)
    found = kept(plane, namespace, BASES["session"])
    assert found["spec"]["workers"]["replicas"] == 3
    assert found["metadata"]["generation"] == 2
    set_status(plane, namespace, "ts", "session", {"workers": 3, "selector": "a=b"})
    scaled = plane.kubectl("get", "--raw", f"{path_of(namespace)}/session/scale")
    # What an autoscaler finds the pods with.
    assert json.loads(scaled)["status"] == {"replicas": 3, "selector": "a=b"}
    with pytest.raises(ServerError, match="replicas"):
        scale(0)
    applied(plane, namespace, changed(BASES["session"], {"metadata.name": "fixed"}))
    with pytest.raises(ServerError, match="immutable unless suspended or elastic"):
        plane.kubectl("scale", "-n", namespace, "ts/fixed", "--replicas=2")


def path_of(namespace):
    return f"/apis/esper.dev/v1alpha1/namespaces/{namespace}/trainingsessions"


def test_a_status_is_written_apart_from_the_spec(plane, namespace):
    applied(plane, namespace, {**BASES["session"], "status": {"epoch": 5}})
    found = kept(plane, namespace, BASES["session"])
    assert "status" not in found
    set_status(plane, namespace, "ts", "session", {"epoch": 5})
    again = kept(plane, namespace, BASES["session"])
    assert again["status"] == {"epoch": 5}
    assert again["metadata"]["generation"] == found["metadata"]["generation"]
    with pytest.raises(ServerError, match=r"status\.epoch"):
        set_status(plane, namespace, "ts", "session", {"epoch": 0.5})


CHANGES = [
    ("session", {"spec.model.entrypoint": "a.b:d"}, "model is immutable"),
    ("session", {"spec.model.arguments.width": 5}, "model is immutable"),
    ("session", {"spec.data.entrypoint": "d:g"}, "data is immutable"),
    ("session", {"spec.data.arguments": {"deep": {"er": [1]}}}, "data is immutable"),
    ("session", {"spec.training.seed": 1}, "training.seed is immutable"),
    ("session", {"spec.workers.replicas": 2}, "workers.replicas is immutable unless"),
    ("session", {"spec.runPolicy.queueName": "q"}, "runPolicy.queueName is immutable unless"),
    ("session", {"spec.training.epochs": 20}, "training is immutable unless suspended"),
    ("session", {"spec.training.optimizer": {"name": "sgd"}}, "training is immutable unless"),
    ("session", {"spec.growth.layers.exclude": ["head"]}, "growth is immutable unless suspended"),
    ("session", {"spec.storage.claimName": "disk"}, "storage is immutable unless suspended"),
    ("session", {"spec.workers.image": "other"}, "workers.image is immutable unless suspended"),
    ("session", {"spec.workers.imagePullPolicy": "Never"}, "workers.imagePullPolicy is immutable"),
    (
        "session",
        {"spec.workers.resources": {"limits": {"memory": "1Gi"}}},
        "workers.resources is immutable unless suspended",
    ),
    (
        "session",
        {"spec.workers.podTemplate": {"env": [{"name": "A", "value": "b"}]}},
        "workers.podTemplate is immutable unless suspended",
    ),
    (
        "session",
        {"spec.workers.podTemplate": {"extra": {"hostAliases": [{"ip": "10.0.0.1"}]}}},
        "workers.podTemplate is immutable unless suspended",
    ),
    ("session", {"spec.runPolicy.managedBy": "example.com/other"}, "managedBy is immutable"),
    ("builtin", {"spec.arguments.units": 9}, "spec is immutable"),
    ("builtin", {"spec.description": "other"}, "spec is immutable"),
    ("graph", {"spec.graph.nodes.1.features": 3}, "spec is immutable"),
    ("graph", {"spec.hosts": ["Linear", "Conv2d"]}, "spec is immutable"),
    ("seed", {"spec.slot": 1}, "spec is immutable"),
    ("kernel", {"spec.target.device": "cuda"}, "spec is immutable"),
    ("kernel", {"spec.target.layer.stride": [2, 2]}, "spec is immutable"),
]


@pytest.mark.parametrize(("base", "changes", "message"), CHANGES)
def test_what_is_fixed_stays(plane, namespace, base, changes, message):
    made = sent(plane, namespace, BASES[base]).json()
    refusal = sent(plane, namespace, changed(BASES[base], changes))
    assert refusal.status_code == UNPROCESSABLE
    assert message in refusal.json()["message"]
    assert sent(plane, namespace, BASES[base]).json() == made


MENDS = [
    ({}, {"spec.runPolicy.suspend": True}),
    ({}, {"spec.workers.minReplicas": 1}),
    ({"spec.runPolicy.suspend": True}, {"spec.training.epochs": 20}),
    ({"spec.runPolicy.suspend": True}, {"spec.growth.gates.passes": 3}),
    ({"spec.runPolicy.suspend": True}, {"spec.storage.claimName": "disk"}),
    ({"spec.runPolicy.suspend": True}, {"spec.workers.image": "other"}),
    (
        {"spec.runPolicy.suspend": True},
        {"spec.workers.podTemplate": {"env": [{"name": "A", "value": "b"}]}},
    ),
    ({}, {"spec.runPolicy.activeDeadlineSeconds": 60}),
    ({"spec.runPolicy.suspend": True}, {"spec.workers.replicas": 2}),
    ({"spec.runPolicy.suspend": True}, {"spec.runPolicy.queueName": "q"}),
    ({"spec.runPolicy": {"suspend": True, "queueName": "q"}}, {"spec.runPolicy.queueName": "r"}),
    ({"spec.workers.minReplicas": 1}, {"spec.workers.replicas": 2}),
]


@pytest.mark.parametrize(("before", "changes"), MENDS)
def test_what_may_change_changes(plane, namespace, before, changes):
    document = changed(BASES["session"], before)
    made = sent(plane, namespace, document).json()
    after = sent(plane, namespace, changed(document, changes))
    assert after.is_success, after.text
    assert after.json()["metadata"]["generation"] == made["metadata"]["generation"] + 1


def test_a_suspended_session_can_be_resized_in_the_step_that_resumes_it(plane, namespace):
    suspended = changed(BASES["session"], {"spec.runPolicy.suspend": True})
    applied(plane, namespace, suspended)
    applied(plane, namespace, changed(BASES["session"], {"spec.workers.replicas": 2}))
    assert kept(plane, namespace, BASES["session"])["spec"]["runPolicy"]["suspend"] is False
