"""The generated CustomResourceDefinitions: current, structural, and saying what the models say."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from pydantic import ConfigDict, Field

from esper.contracts.crds import crd, crds, structural_schema, write_crds
from esper.contracts.refusals import dotted
from esper.contracts.resources import (
    KINDS,
    Blueprint,
    CompiledKernel,
    Resource,
    Seed,
    TrainingSession,
)
from esper.contracts.resources.common import ObjectMeta, ResourceModel, immutable, rules
from esper.utils.documents import read_documents

Schema = dict[str, Any]

REPOSITORY = Path(__file__).parents[4]

# What JSON Schema has and a structural schema refuses.
FORBIDDEN = {
    "$ref",
    "$defs",
    "anyOf",
    "oneOf",
    "allOf",
    "not",
    "const",
    "discriminator",
    "prefixItems",
    "patternProperties",
    "propertyNames",
    "uniqueItems",
    "examples",
    "title",
}


def _nodes(schema: Schema, path: tuple[str | int, ...] = ()) -> Iterator[tuple[str, Schema]]:
    yield dotted(path), schema
    for name, below in schema.get("properties", {}).items():
        yield from _nodes(below, (*path, name))
    for keyword in ("items", "additionalProperties"):
        if keyword in schema:
            yield from _nodes(schema[keyword], (*path, keyword))


def _below(kind: type[Resource], *names: str) -> Schema:
    node = structural_schema(kind)
    for name in names:
        node = node["items"] if name == "items" else node["properties"][name]
    return node


def test_the_files_are_as_generated(tmp_path: Path) -> None:
    written = write_crds(tmp_path / "crds")
    assert {path.name for path in written} == {
        path.name for path in (REPOSITORY / "crds").glob("*.yaml")
    }
    for path in written:
        committed = (REPOSITORY / "crds" / path.name).read_text(encoding="utf-8")
        assert committed == path.read_text(encoding="utf-8"), "run `esper crds` and commit"


def test_a_file_holds_its_definition(tmp_path: Path) -> None:
    for path, definition in zip(write_crds(tmp_path), crds(), strict=True):
        (document,) = read_documents(path.read_text(encoding="utf-8"), path.name)
        assert document.data == definition


@pytest.mark.parametrize(
    ("kind", "plural", "short", "columns"),
    [
        (
            "TrainingSession",
            "trainingsessions",
            "ts",
            "State Epoch Metric Params Seeds Fossilized Workers Age",
        ),
        ("Seed", "seeds", "seed", "Session Layer State Blueprint Alpha Health Gain Age"),
        ("Blueprint", "blueprints", "bp", "State Builtin Params Kernels Age"),
        ("CompiledKernel", "compiledkernels", "ck", "Blueprint Layer Ready Bytes Params Age"),
    ],
)
def test_names_and_columns(kind: str, plural: str, short: str, columns: str) -> None:
    (definition,) = [crd(k) for k in KINDS if k.__name__ == kind]
    assert definition["metadata"]["name"] == f"{plural}.esper.dev"
    spec = definition["spec"]
    assert (spec["group"], spec["scope"]) == ("esper.dev", "Namespaced")
    assert spec["names"] == {
        "kind": kind,
        "listKind": f"{kind}List",
        "plural": plural,
        "singular": plural[:-1],
        "shortNames": [short],
        "categories": ["esper"],
    }
    (version,) = spec["versions"]
    assert (version["name"], version["served"], version["storage"]) == ("v1alpha1", True, True)
    assert version["subresources"]["status"] == {}
    assert " ".join(c["name"] for c in version["additionalPrinterColumns"]) == columns


@pytest.mark.parametrize("kind", KINDS)
def test_columns_and_scale_point_at_fields(kind: type[Resource]) -> None:
    version = crd(kind)["spec"]["versions"][0]
    paths = {c["jsonPath"]: c["type"] for c in version["additionalPrinterColumns"]}
    for name, path in version["subresources"].get("scale", {}).items():
        paths[path] = "string" if name == "labelSelectorPath" else "integer"
    for path, type_ in paths.items():
        if path.startswith((".metadata", ".status.conditions")):
            continue
        node = structural_schema(kind)
        for name in path.split(".")[1:]:
            node = node.get("properties", {}).get(name) or node["additionalProperties"]
        assert node["type"] == type_, path


def test_seeds_are_selectable_by_fields_that_are_there() -> None:
    selectable = {kind: crd(kind)["spec"]["versions"][0].get("selectableFields") for kind in KINDS}
    assert selectable.pop(Seed) == [{"jsonPath": ".spec.session"}, {"jsonPath": ".status.state"}]
    assert set(selectable.values()) == {None}
    assert _below(Seed, "spec", "session")["type"] == _below(Seed, "status", "state")["type"]


@pytest.mark.parametrize(
    ("kind", "longest"), [(TrainingSession, 48), (Seed, 63), (Blueprint, 63), (CompiledKernel, 253)]
)
def test_names_are_checked_where_they_stand(kind: type[Resource], longest: int) -> None:
    metadata = structural_schema(kind)["properties"]["metadata"]
    assert set(metadata) == {"type", "properties"}
    assert set(metadata["properties"]) == {"name"}
    assert metadata["properties"]["name"]["maxLength"] == longest


@pytest.mark.parametrize("kind", KINDS)
def test_kubectl_explains_every_field(kind: type[Resource]) -> None:
    # What every object has the API server describes; the IR is described in its guide.
    elsewhere = re.compile(r"(apiVersion|kind|metadata(\.name)?)$|spec\.(graph|target)\.")
    silent = [
        path
        for path, node in _nodes(structural_schema(kind))
        if path.rsplit(".", 1)[-1] not in {"", "items", "additionalProperties"}
        and not elsewhere.match(path)
        and not node.get("description")
    ]
    assert silent == []


def test_sessions_scale_by_workers() -> None:
    assert crd(TrainingSession)["spec"]["versions"][0]["subresources"]["scale"] == {
        "specReplicasPath": ".spec.workers.replicas",
        "statusReplicasPath": ".status.workers",
        "labelSelectorPath": ".status.selector",
    }


@pytest.mark.parametrize("kind", KINDS)
def test_schemas_are_structural(kind: type[Resource]) -> None:
    for path, node in _nodes(structural_schema(kind)):
        assert not FORBIDDEN & node.keys(), path
        escapes = {"x-kubernetes-preserve-unknown-fields", "x-kubernetes-int-or-string"}
        assert "type" in node or escapes & node.keys(), path
        assert not {"properties", "additionalProperties"} <= node.keys(), path
        assert node.get("additionalProperties") is not False, path
        for bound in ("exclusiveMinimum", "exclusiveMaximum"):
            assert node.get(bound, True) is True, path
        if node.get("type") == "array":
            assert "items" in node, path
        if node.get("type") == "integer":
            assert node["format"] == "int64", path
        assert "default" not in node or node["default"] is not None, path
        assert "\n" not in node.get("description", ""), path


@pytest.mark.parametrize("kind", KINDS)
def test_a_status_has_neither_defaults_nor_decimals(kind: type[Resource]) -> None:
    status = structural_schema(kind)["properties"]["status"]
    for path, node in _nodes(status):
        assert "default" not in node, path
        assert node.get("type") != "number", path


@pytest.mark.parametrize("kind", KINDS)
def test_rules_read_fields_that_are_there(kind: type[Resource]) -> None:
    for path, node in _nodes(structural_schema(kind)):
        for rule in node.get("x-kubernetes-validations", ()):
            assert rule["message"]
            for chain in re.findall(r"\b(?:self|oldSelf)((?:\.[A-Za-z]+)+)\b(?!\()", rule["rule"]):
                below = node
                for name in chain.split(".")[1:]:
                    if name in {"metadata", "name"} and not path:
                        break
                    below = below["properties"][name]
                    # Of what has no type a rule sees nothing, not even whether it is there.
                    entries = below.get("additionalProperties", below)
                    typed = {"type", "x-kubernetes-int-or-string"} & entries.keys()
                    assert typed, f"{path}: a rule can't see {chain}"


@pytest.mark.parametrize("kind", [TrainingSession, Blueprint])
def test_lists_that_people_write_have_a_cap(kind: type[Resource]) -> None:
    for path, node in _nodes(structural_schema(kind)["properties"]["spec"]):
        if node.get("type") == "array":
            assert node["maxItems"] <= 128, path


def _defaulted(schema: Schema, value: object) -> object:
    """As the API server defaults."""
    if isinstance(value, dict) and "properties" in schema:
        for name, below in schema["properties"].items():
            if name not in value and "default" in below:
                value[name] = below["default"]
            if name in value:
                value[name] = _defaulted(below, value[name])
    return value


def test_the_api_server_and_the_models_default_alike() -> None:
    spec = {"model": {"entrypoint": "a:b"}, "data": {"entrypoint": "a:b"}}
    session = {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": "a"},
        "spec": spec,
    }
    expected = TrainingSession.model_validate(session).to_wire()["spec"]
    assert _defaulted(_below(TrainingSession, "spec"), spec) == expected


class _Part(ResourceModel):
    model_config = ConfigDict(json_schema_extra=rules(("has(self.size)", "size is required")))

    size: int | float | None = None
    """How large.

    What stands here is for readers of the code.
    """
    shape: int | list[int] = 1
    code: Literal["a"] | Annotated[str, Field(max_length=3)] = "a"


class _Odd(Resource):
    plural: ClassVar[str] = "odds"
    singular: ClassVar[str] = "odd"
    short_names: ClassVar[tuple[str, ...]] = ("o",)
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = ()

    metadata: ObjectMeta
    spec: Annotated[_Part, Field(json_schema_extra=immutable("spec"))]
    status: _Part | None = None


def test_any_resource_has_a_structural_schema() -> None:
    spec = structural_schema(_Odd)["properties"]["spec"]
    assert [rule["message"] for rule in spec["x-kubernetes-validations"]] == [
        "size is required",
        "spec is immutable",
    ]
    assert spec["properties"] == {
        "size": {"type": "number", "description": "How large."},
        "shape": {"x-kubernetes-preserve-unknown-fields": True, "default": 1},
        "code": {"type": "string", "default": "a"},
    }


def test_conditions_are_a_map_by_type() -> None:
    for kind in KINDS:
        conditions = _below(kind, "status", "conditions")
        assert conditions["x-kubernetes-list-type"] == "map"
        assert conditions["x-kubernetes-list-map-keys"] == ["type"]


def test_numbers_keep_their_bounds() -> None:
    rate = _below(TrainingSession, "spec", "training", "optimizer", "learningRate")
    assert rate == {
        "description": "At its highest, after the warm-up.",
        "type": "number",
        "maximum": 100,
        "default": 0.001,
        "minimum": 0,
        "exclusiveMinimum": True,
    }
    flops = _below(TrainingSession, "status", "flops")
    assert "maximum" not in flops, "2**63 - 1 is no float"


def test_rules_beside_fields_and_models() -> None:
    seed = _below(TrainingSession, "spec", "training", "seed")
    assert seed["x-kubernetes-validations"] == [
        {"rule": "self == oldSelf", "message": "training.seed is immutable"}
    ]
    expected: dict[type[Resource], list[str]] = {
        TrainingSession: [
            "training.batchSize: at least the number of processes",
            "training.sharding: full needs more than one process",
            "training.logicalShards: 1 or a multiple of the number of processes",
            "training.batchSize: at least training.logicalShards",
            "runPolicy.queueName is immutable unless suspended",
            "workers.replicas is immutable unless suspended or elastic (minReplicas)",
            "training is immutable unless suspended",
            "growth is immutable unless suspended",
            "storage is immutable unless suspended",
            "workers.processesPerWorker is immutable unless suspended",
            "workers.imagePullPolicy is immutable unless suspended",
            "workers.resources is immutable unless suspended",
            "workers.podTemplate is immutable unless suspended",
            "workers.image is immutable unless suspended",
        ],
        Blueprint: [
            "spec is immutable",
            "graph: exactly one of graph and builtin",
            "arguments: only with builtin",
            "hosts: required with graph",
        ],
        CompiledKernel: ["spec is immutable"],
    }
    for kind, messages in expected.items():
        found = _below(kind, "spec")["x-kubernetes-validations"]
        assert [rule["message"] for rule in found] == messages


def test_a_tagged_union_is_one_object_with_a_rule_a_tag() -> None:
    node = _below(Blueprint, "spec", "graph", "nodes", "items")
    operations = node["properties"]["op"]["enum"]
    assert {"input", "linear", "conv2d", "add", "zeros"} <= set(operations)
    assert node["required"] == ["op"]
    assert len(node["x-kubernetes-validations"]) == len(operations)
    assert all("default" not in below for below in node["properties"].values())
    rules = {r["rule"].split("'")[1]: r for r in node["x-kubernetes-validations"]}
    assert "has(self.features)" in rules["linear"]["rule"]
    assert "!has(self.inputs)" in rules["linear"]["rule"]
    assert "!has(self.features)" in rules["add"]["rule"]
    assert rules["linear"]["message"].endswith("required: id, input, features")


def test_other_unions_become_what_a_schema_can_say() -> None:
    properties = _below(Blueprint, "spec", "graph", "nodes", "items")["properties"]
    assert properties["features"] == {
        "x-kubernetes-int-or-string": True,
        "minimum": 1,
        "maximum": 1_000_000,
        "pattern": "^(in|out)$",
    }
    # A window may be one number, two, or a word.
    assert properties["kernelSize"] == {"x-kubernetes-preserve-unknown-fields": True}
    assert "traced" in properties["kind"]["enum"]
    arguments = _below(Blueprint, "spec", "arguments")
    assert arguments["additionalProperties"] == {
        "x-kubernetes-int-or-string": True,
        "maxLength": 256,
    }


def test_json_values_and_quantities() -> None:
    arguments = _below(TrainingSession, "spec", "model", "arguments")
    # Null is a value here: an argument that is null is passed on as None.
    assert arguments["additionalProperties"] == {
        "x-kubernetes-preserve-unknown-fields": True,
        "nullable": True,
    }
    limits = _below(TrainingSession, "spec", "workers", "resources", "limits")
    assert limits["additionalProperties"]["x-kubernetes-int-or-string"] is True
    labels = _below(TrainingSession, "spec", "growth", "blueprints", "matchLabels")
    assert labels["additionalProperties"]["type"] == "string"
    volumes = _below(TrainingSession, "spec", "workers", "podTemplate", "volumes", "items")
    assert volumes["type"] == "object"
