"""Manifests: what kubectl takes is taken; what is wrong is named with place and remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from esper.contracts.blueprints import CATALOGUE
from esper.contracts.manifests import (
    NAME_LABEL,
    load_manifest,
    parse_manifest,
    parse_resource,
    select_blueprints,
    session_document,
    validate_resource,
)
from esper.contracts.resources import Blueprint, LabelSelector, TrainingSession
from esper.errors import BadInput, BlueprintError, ManifestError
from esper.utils.documents import MAX_BYTES

SESSION = """\
apiVersion: esper.dev/v1alpha1
kind: TrainingSession
metadata: {name: mnist1d}
spec:
  model: {entrypoint: "zoo.mlp:make", arguments: {width: 16}}
  data: {entrypoint: "zoo.data:load"}
  training:
    epochs: 20
    optimizer: {learningRate: 5e-3}
"""
HEADER = """\
---
apiVersion: esper.dev/v1alpha1
kind: Blueprint
metadata: {name: mine, labels: {team: a}}
spec:
"""
GRAPH = """\
  hosts: [Linear]
  graph:
    nodes:
      - {op: input, id: x}
      - {op: linear, id: a, input: x, features: 8}
      - {op: linear, id: out, input: a, features: out, init: zero}
    output: out
"""
BLUEPRINT = HEADER + GRAPH
MANIFEST = SESSION + BLUEPRINT
EXPONENT = "learningRate: 5e-3"


def _refused(text: str) -> BadInput:
    with pytest.raises(BadInput) as caught:
        parse_manifest(text, "session.yaml")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{caught.value.field}: got ")
    return caught.value


def test_a_session_and_its_blueprints() -> None:
    manifest = parse_manifest(MANIFEST, "session.yaml")
    assert manifest.session.spec.training.optimizer.learning_rate == 0.005
    assert manifest.session.spec.model.arguments == {"width": 16}
    assert [blueprint.metadata.name for blueprint in manifest.blueprints] == ["mine"]
    assert parse_manifest(BLUEPRINT + "---\n" + SESSION, "s").session == manifest.session


def test_an_applied_status_is_left_out() -> None:
    assert parse_manifest(SESSION + "status: {whatever: 1}\n", "s").session.status is None


def test_an_empty_section_is_a_default_section() -> None:
    assert parse_manifest(SESSION + "  growth:\n", "s").session.spec.growth.seeds_per_layer == 1


# What replaces what in MANIFEST, and the field, what came and what is allowed in the error.
SESSION_ERRORS = [
    ("epochs: 20", "epoch: 20", "spec.training.epoch", "an unknown field", "did you mean epochs?"),
    ("epochs: 20", "batch_size: 20", "spec.training.batch_size", "unknown", "batchSize, seed"),
    ("epochs: 20", "zzz: 20", "spec.training.zzz", "unknown", "nonFinite (session.yaml line 8)"),
    ("epochs: 20", "epochs: '20'", "spec.training.epochs", 'the text "20"', "whole number"),
    ("epochs: 20", "epochs: 0", "spec.training.epochs", "0", "from 1 to 100000"),
    ("epochs: 20", "epochs: 2.5", "spec.training.epochs", "2.5", "a whole number from 1"),
    ("epochs: 20", "epochs: true", "spec.training.epochs", "true", "a whole number"),
    ("epochs: 20", "epochs: [1]", "spec.training.epochs", "[1]", "a whole number"),
    ("epochs: 20", "compile: 1", "spec.training.compile", "1", "true or false"),
    ("epochs: 20", "precision: float16", "spec.training.precision", "float16", "one of float32, b"),
    ("epochs: 20", "objective: rank", "spec.training.objective", "rank", "module.path:attribute"),
    ("epochs: 20", "sharding: full", "spec.training.sharding", "full", "none or data"),
    ("epochs: 20", "schedule: cosine", "spec.training.schedule", 'text "cosine"', "a mapping with"),
    (
        EXPONENT,
        "learningRate: -1",
        "spec.training.optimizer.learningRate",
        "-1",
        "a number above 0 and at most 100 (session.yaml line 9)",
    ),
    (EXPONENT, "learningRate: .nan", "spec.training.optimizer.learningRate", "NaN", "above 0"),
    (EXPONENT, "learningRate: 1e999", "spec.training.optimizer.learningRate", "Infinity", "above"),
    (EXPONENT, "learningRate: fast", "spec.training.optimizer.learningRate", '"fast"', "above 0"),
    (EXPONENT, "momentum: 0.9", "spec.training.optimizer.momentum", "0.9", "0 with adamw"),
    (EXPONENT, "betas: [0.1]", "spec.training.optimizer.betas", "[0.1]", "a list of 2 entries"),
    (EXPONENT, "betas: [a, 1]", "spec.training.optimizer.betas[0]", '"a"', "(and 1 more to mend)"),
    (EXPONENT, "name: lion", "spec.training.optimizer.name", "lion", "adamw, adam, sgd, rmsprop"),
    ("mnist1d", "MNIST", "metadata.name", "MNIST", "lower-case letters"),
    ("mnist1d", "m" * 49, "metadata.name", "mmm", "1 to 48 characters"),
    ("name: mnist1d", "namespace: a", "metadata.name", "nothing", "lower-case letters"),
    ("{name: mnist1d}", "3", "metadata", "3", "a mapping with name, namespace"),
    ("mnist1d", "mnist1d, labels: {a b: c}", "metadata.labels.a b", "a b", "a name: a label key"),
    ("mnist1d", "mnist1d, labels: {a: 1}", "metadata.labels.a", "1", "letters, digits"),
    ("mnist1d", "a, creationTimestamp: now", "metadata.creationTimestamp", "now", "2026-01-31T"),
    ("zoo.mlp:make", "zoo.mlp", "spec.model.entrypoint", "zoo.mlp", "module.path:attribute"),
    ("{width: 16}", "[16]", "spec.model.arguments", "[16]", "a mapping"),
    ("{width: 16}", "{w: .inf}", "spec.model.arguments.w", "Infinity", "a finite number"),
    ("{width: 16}", "{w: %s}" % ("x" * 70000), "spec.model.arguments", "{", "65536 bytes"),
    ('  data: {entrypoint: "zoo.data:load"}\n', "", "spec.data", "nothing", "entrypoint"),
    ("  model:", "  models:", "spec.models", "unknown", "mean model?) (and 1 more to mend)"),
    ("kind: TrainingSession", "kind: TrainingJob", "kind", "TrainingJob", "or Blueprint"),
    ("kind: TrainingSession", "kind: Seed", "kind", "Seed", "TrainingSession or Blueprint"),
    ("kind: TrainingSession\n", "", "kind", "nothing", "TrainingSession or Blueprint"),
    ("v1alpha1\nkind: T", "v1\nkind: T", "apiVersion", "esper.dev/v1", "esper.dev/v1alpha1"),
    ("apiVersion: esper.dev/v1alpha1\nkind: T", "kind: T", "apiVersion", "nothing", "v1alpha1"),
]


@pytest.mark.parametrize(
    ("old", "new", "field", "came", "allowed"),
    SESSION_ERRORS,
    ids=[f"{row[2]}-{row[1][:20]}" for row in SESSION_ERRORS],
)
def test_errors_in_a_session(old: str, new: str, field: str, came: str, allowed: str) -> None:
    assert old in MANIFEST
    error = _refused(MANIFEST.replace(old, new, 1))
    assert type(error) is ManifestError
    assert error.field == field
    assert came in str(error.came)
    assert allowed in error.allowed


# Sections added to the session's spec.
SECTION_ERRORS = [
    ("growth: {controller: {policy: gnn}}", "growth.controller.policy", "heuristic, periodic"),
    ("growth: {gates: {ageEpochs: 3}}", "growth.gates.ageEpochs", "at least dwellEpochs, 5"),
    ("growth: {gates: {passes: 11}}", "growth.gates.passes", "at most ageEpochs, 10"),
    ("growth: {gates: {confidenceLevel: 0.5}}", "growth.gates.confidenceLevel", "above 0.5"),
    ("growth: {gates: []}", "growth.gates", "a mapping with confidenceLevel"),
    (
        "growth: {layers: {types: [Conv3d]}}",
        "growth.layers.types[0]",
        "one of Linear, Conv1d, Conv2d",
    ),
    ("growth: {layers: {types: []}}", "growth.layers.types", "a list of 1 to 6 entries"),
    ("growth: {layers: {types: Linear}}", "growth.layers.types", "a list of 1 to 6 entries"),
    ("growth: {layers: {include: [a], exclude: [a]}}", "growth.layers.include", "exclude names"),
    ("growth: {layers: {include: ['']}}", "growth.layers.include[0]", "1 to 512 characters"),
    ("growth: {seedsPerLayer: 65}", "growth.seedsPerLayer", "from 1 to 64"),
    (
        "growth: {blueprints: {matchExpressions: [{key: a, operator: Is}]}}",
        "growth.blueprints.matchExpressions[0].operator",
        "In, NotIn, Exists, DoesNotExist",
    ),
    (
        "growth: {blueprints: {matchExpressions: [{key: a, operator: In}]}}",
        "growth.blueprints.matchExpressions[0].values",
        "at least one value",
    ),
    (
        "growth: {blueprints: {matchLabels: {a: true}}}",
        "growth.blueprints.matchLabels.a",
        "letters",
    ),
    ("workers: {replicas: 65}", "training.batchSize", "processes, 65"),
    ("workers: {minReplicas: 3}", "workers.minReplicas", "at most replicas, 1"),
    (
        "workers: {resources: {limits: {nvidia.com/gpu: 2}}}",
        "workers.resources.limits[nvidia.com/gpu]",
        "equal to processesPerWorker, 1",
    ),
    ("workers: {resources: {limits: {cpu: x}}}", "workers.resources.limits.cpu", "500m or 4Gi"),
    ("workers: {resources: {limits: {cpu: 1.5}}}", "workers.resources.limits.cpu", "500m or 4Gi"),
    ("workers: {podTemplate: {image: x}}", "workers.podTemplate.image", "env, envFrom, volumes"),
    ("runPolicy: {backoffLimit: -1}", "runPolicy.backoffLimit", "from 0 to 1000"),
    ("runPolicy: {deletionPolicy: Keep}", "runPolicy.deletionPolicy", "Retain, Delete"),
    ("storage: {uri: bucket}", "storage.uri", "text that matches ^(s3|file)://.+"),
    ("storage: {secretName: a}", "storage.secretName", "nothing without uri"),
]


@pytest.mark.parametrize(
    ("section", "field", "allowed"), SECTION_ERRORS, ids=[row[0] for row in SECTION_ERRORS]
)
def test_errors_in_sections(section: str, field: str, allowed: str) -> None:
    error = _refused(f"{SESSION}  {section}\n")
    assert error.field == f"spec.{field}"
    assert allowed in error.allowed
    line = 8 if field == "training.batchSize" else 10
    assert error.allowed.endswith(f"(session.yaml line {line})")


LINEAR = "op: linear, id: a, input: x, features: 8"
BLUEPRINT_ERRORS = [
    (LINEAR, "op: lin, id: a, input: x", "spec.graph.nodes[1].op", "lin", "one of activation, add"),
    (LINEAR, "id: a, input: x", "spec.graph.nodes[1].op", "nothing", "one of activation, add"),
    (LINEAR, "op: linear, id: a, input: x", "spec.graph.nodes[1].features", "nothing", "in, out"),
    ("features: 8", "features: 0", "spec.graph.nodes[1].features", "0", "from 1 to 1000000"),
    ("features: 8", "features: all", "spec.graph.nodes[1].features", "all", "one of in, out"),
    ("features: 8", "width: 8", "spec.graph.nodes[1].width", "unknown", "id, input, features"),
    ("id: a, input: x", "id: a, input: out", "spec.graph.nodes[1].input", "cycle", "earlier id"),
    ("id: a, input: x", "id: a, input: a", "spec.graph.nodes[1].input", "cycle", "earlier id"),
    ("id: a, input: x", "id: A, input: x", "spec.graph.nodes[1].id", "A", "[a-z0-9_]"),
    ("output: out", "output: nope", "spec.graph.output", "nope", "x, a, out"),
    ("output: out", "output: a", "spec.graph.nodes[2].id", "out", "a path to the output"),
    ("  hosts: [Linear]\n", "", "spec.hosts", "nothing", "a list of layer types"),
    ("[Linear]", "[LSTM]", "spec.hosts[0]", "LSTM", "one of Linear, Conv1d, Conv2d"),
    ("  hosts", "  builtin: noop\n  hosts", "spec.builtin", "noop", "nothing together with graph"),
    (GRAPH, "  description: x\n", "spec.graph", "nothing", "a graph, or builtin"),
    (GRAPH, "  builtin: none-such\n", "spec.builtin", "none-such", "noop, affine, low-rank"),
    (GRAPH, "  {builtin: noop, arguments: {rank: 1}}\n", "spec.arguments.rank", "rank", "no arg"),
    (
        GRAPH,
        "  {builtin: low-rank, arguments: {rank: 0}}\n",
        "spec.arguments.rank",
        "0",
        "whole number from 1",
    ),
    (
        GRAPH,
        "  {builtin: low-rank, arguments: {rank: true}}\n",
        "spec.arguments.rank",
        "true",
        "a whole number or text",
    ),
    (
        GRAPH,
        "  {builtin: bottleneck-mlp, hosts: [Conv2d]}\n",
        "spec.hosts",
        "Conv2d",
        "Linear",
    ),
    (
        "    nodes:\n",
        "    nodes:\n" + "".join(f"      - {{op: input, id: n{i}}}\n" for i in range(64)),
        "spec.graph.nodes",
        "[",
        "a list of 1 to 64 entries",
    ),
]


@pytest.mark.parametrize(
    ("old", "new", "field", "came", "allowed"),
    BLUEPRINT_ERRORS,
    ids=[f"{row[2]}-{row[3]}" for row in BLUEPRINT_ERRORS],
)
def test_errors_in_a_blueprint(old: str, new: str, field: str, came: str, allowed: str) -> None:
    assert old in BLUEPRINT
    error = _refused(SESSION + BLUEPRINT.replace(old, new, 1))
    assert type(error) is BlueprintError
    assert error.field == field
    assert came in str(error.came)
    assert allowed in error.allowed
    assert "session.yaml line " in error.allowed


def test_a_blueprint_of_a_bad_name_is_a_manifest_error() -> None:
    error = _refused(MANIFEST.replace("name: mine", "name: Mine"))
    assert (type(error), error.field, error.came) == (ManifestError, "metadata.name", "Mine")


@pytest.mark.parametrize(
    ("text", "field", "came"),
    [
        ("", "session.yaml", "no TrainingSession"),
        ("# nothing\n", "session.yaml", "no TrainingSession"),
        (BLUEPRINT, "session.yaml", "no TrainingSession"),
        (SESSION + "---\n" + SESSION, "session.yaml", "2 TrainingSession"),
        (SESSION + BLUEPRINT + BLUEPRINT, "metadata.name", "mine"),
        ("- 1\n", "document", "[1]"),
        ("text\n", "document", "text"),
        ("a: [1\n", "session.yaml:2:1", "broken YAML"),
        (SESSION + "kind: Blueprint\n", "session.yaml:10:1", "key 'kind' twice"),
    ],
)
def test_what_is_no_manifest_is_refused(text: str, field: str, came: str) -> None:
    error = _refused(text)
    assert type(error) is ManifestError
    assert error.field == field
    assert came in str(error.came)


def test_a_manifest_is_loaded_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "session.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MANIFEST.encode())
    assert load_manifest(path) == parse_manifest(MANIFEST, "session.yaml")


def test_files_that_cannot_be_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "latin1.yaml").write_bytes(b"a: \xe4\n")
    (tmp_path / "huge.yaml").write_bytes(b"#" * (MAX_BYTES + 1))
    expected = {
        "missing.yaml": "No such file",
        ".": "directory",
        "latin1.yaml": "byte 3 is no UTF-8",
        "huge.yaml": "more than",
    }
    for name, came in expected.items():
        with pytest.raises(ManifestError) as caught:
            load_manifest(tmp_path / name)
        assert caught.value.field == str(tmp_path / name)
        assert came in str(caught.value.came)


def test_a_written_session_reads_back_with_its_status() -> None:
    session = parse_manifest(MANIFEST, "s").session
    data = session.to_wire() | {"status": {"epoch": 3, "metrics": {"validationLoss": "5e-05"}}}
    running = validate_resource(data, TrainingSession)
    text = session_document(running)
    assert [line for line in text.splitlines() if not line.startswith(" ")] == [
        "apiVersion: esper.dev/v1alpha1",
        "kind: TrainingSession",
        "metadata:",
        "spec:",
        "status:",
    ]
    assert "finalizers" not in text
    assert parse_resource(text, "status.yaml", TrainingSession) == running
    assert parse_manifest(text, "status.yaml").session == session


def test_a_written_blueprint_reads_back() -> None:
    (blueprint,) = parse_manifest(MANIFEST, "s").blueprints
    assert parse_resource(session_document(blueprint), "b.yaml", Blueprint) == blueprint


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("", "status.yaml"),
        (MANIFEST, "status.yaml"),
        (BLUEPRINT, "kind"),
        (SESSION + "status: {epoch: -1}\n", "status.epoch"),
    ],
)
def test_what_is_no_single_session_is_refused(text: str, field: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_resource(text, "status.yaml", TrainingSession)
    assert caught.value.field == field


def test_data_without_a_file_names_no_line() -> None:
    with pytest.raises(ManifestError) as caught:
        validate_resource({"apiVersion": "esper.dev/v1alpha1"}, TrainingSession)
    assert "line" not in caught.value.allowed


def _selected(selector: dict[str, object], text: str = MANIFEST) -> list[str]:
    blueprints = parse_manifest(text, "s").blueprints
    chosen = select_blueprints(LabelSelector.model_validate(selector), CATALOGUE, blueprints)
    return [document.name for document in chosen]


BUILTINS = [entry.name for entry in CATALOGUE]


@pytest.mark.parametrize(
    ("selector", "names"),
    [
        ({}, [*BUILTINS, "mine"]),
        ({"matchLabels": {"esper.dev/builtin": "true"}}, BUILTINS),
        ({"matchLabels": {"team": "a"}}, ["mine"]),
        ({"matchLabels": {NAME_LABEL: "widen"}}, ["widen"]),
        (
            {
                "matchExpressions": [
                    {"key": NAME_LABEL, "operator": "In", "values": ["mine", "noop"]}
                ]
            },
            ["noop", "mine"],
        ),
        (
            {"matchExpressions": [{"key": "esper.dev/builtin", "operator": "DoesNotExist"}]},
            ["mine"],
        ),
    ],
)
def test_blueprints_are_selected_by_label(selector: dict[str, object], names: list[str]) -> None:
    assert _selected(selector) == names


def test_a_blueprint_of_the_manifest_replaces_the_built_in_of_its_name() -> None:
    text = MANIFEST.replace("name: mine", "name: widen")
    assert _selected({}, text) == BUILTINS
    assert _selected({"matchLabels": {"team": "a"}}, text) == ["widen"]
    assert "widen" not in _selected({"matchLabels": {"esper.dev/builtin": "true"}}, text)


def test_a_selector_that_selects_nothing_is_refused() -> None:
    with pytest.raises(ManifestError) as caught:
        _selected({"matchLabels": {"team": "b"}})
    assert caught.value.field == "spec.growth.blueprints"
    assert "mine" in caught.value.allowed
