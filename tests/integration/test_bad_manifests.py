"""What is wrong is refused by the API server itself, at apply, with the field; and by `esper`.

A table has a row for each rule and type; hypothesis changes right manifests anywhere. Nothing is
stored: the API server judges in a dry run.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.cli.main import main
from esper.contracts.crds import crd, structural_schema
from esper.contracts.manifests import validate_resource
from esper.contracts.resources import KINDS
from esper.errors import EsperError, ManifestError
from tests.integration.bad_manifests import BASES, GONE, RULES, TABLE, changed

pytestmark = pytest.mark.xdist_group("cluster")

MODELS = {kind.__name__: kind for kind in KINDS}
SCHEMAS = {kind.__name__: structural_schema(kind) for kind in KINDS}
APPLY = "application/apply-patch+yaml"
NAMESPACE = "default"
ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Verdict:
    """What the API server says of a manifest; `message` where it refuses it."""

    accepted: bool
    message: str = ""


class Judge:
    """The API server in dry runs, as `kubectl apply` asks it: strict about unknown fields."""

    def __init__(self, client):
        self._client = client

    def applied(self, document: Mapping[str, Any]) -> Verdict:
        """As `kubectl apply --server-side --dry-run=server`."""
        name = document["metadata"]["name"]
        query = {"fieldManager": "kubectl", "force": "true"}
        return self._asked("PATCH", document, f"/{name}", query, APPLY)

    def created(self, document: Mapping[str, Any]) -> Verdict:
        """As `kubectl apply --dry-run=server` of what isn't there yet."""
        return self._asked("POST", document, "", {"fieldManager": "kubectl"}, "application/json")

    def _asked(self, method, document, name, query, kind) -> Verdict:
        plural = MODELS[document["kind"]].plural
        answer = self._client.request(
            method,
            f"/apis/esper.dev/v1alpha1/namespaces/{NAMESPACE}/{plural}{name}",
            params={**query, "dryRun": "All", "fieldValidation": "Strict"},
            headers={"Content-Type": kind},
            content=json.dumps(document),
        )
        if answer.is_success:
            return Verdict(True)
        assert answer.status_code in (400, 422, 500), answer.text
        return Verdict(False, answer.json()["message"])


@pytest.fixture(scope="module")
def judge(esper_control_plane):
    with esper_control_plane.client() as client:
        yield Judge(client)


def esper_refuses(document: Mapping[str, Any]) -> str | None:
    """Why the models that `esper validate` asks refuse a manifest, or None."""
    try:
        validate_resource(document, MODELS[document["kind"]])
    except EsperError as error:
        return str(error)
    return None


def test_the_table_is_long_and_says_nothing_twice():
    assert len(TABLE) >= 100
    rows = [(bad.base, bad.field, repr(bad.value), repr(bad.more)) for bad in TABLE]
    assert len(set(rows)) == len(rows)


@pytest.mark.parametrize("base", BASES)
def test_the_bases_are_right(judge, base):
    assert judge.applied(BASES[base]) == judge.created(BASES[base]) == Verdict(True)
    assert esper_refuses(BASES[base]) is None


JUDGED = [bad for bad in TABLE if bad.field != "kind"]


@pytest.mark.parametrize("bad", JUDGED, ids=lambda bad: f"{bad.base}-{bad.field}-{bad.value}"[:60])
def test_the_api_server_refuses_it_and_names_the_field(judge, bad):
    document = bad.manifest()
    for verdict in (judge.applied(document), judge.created(document)):
        assert not verdict.accepted
        assert bad.where in verdict.message
    assert esper_refuses(document) is not None


# What kubectl prints is what the tests beside this one look at: a few of all are enough.
@pytest.mark.parametrize("bad", JUDGED[::12], ids=lambda bad: f"{bad.base}-{bad.field}"[:60])
def test_kubectl_says_so_to_whoever_applies_it(esper_control_plane, bad):
    text = json.dumps(bad.manifest())
    done = esper_control_plane.try_kubectl("apply", "--dry-run=server", "-f", "-", given=text)
    assert done.returncode == 1
    assert bad.where in done.stderr


def test_every_rule_has_a_row(judge):
    messages = " ".join(judge.created(bad.manifest()).message for bad in RULES)
    wanted = {rule["message"] for schema in SCHEMAS.values() for rule in _rules(schema)}
    fixed = {message for message in wanted if "immutable" in message}
    assert fixed
    assert not [message for message in wanted - fixed if message not in messages]


def test_every_kind_of_constraint_of_every_kind_has_a_row():
    for kind in KINDS:
        rows = [bad for bad in TABLE if BASES[bad.base]["kind"] == kind.__name__]
        schema = SCHEMAS[kind.__name__]
        reached = [node for bad in rows for node in _nodes_at(schema, bad.field)]
        for keyword in ("type", "enum", "pattern", "minimum", "maximum", "maxLength", "minItems"):
            if any(keyword in node for node in _nodes(schema["properties"]["spec"])):
                assert any(keyword in node for node in reached), f"{kind.__name__}: {keyword}"


def _nodes(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield schema
    below = [*schema.get("properties", {}).values()]
    below += [schema[key] for key in ("items", "additionalProperties") if key in schema]
    for node in below:
        yield from _nodes(node)


def _rules(schema: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    for node in _nodes(schema):
        yield from node.get("x-kubernetes-validations", ())


def _nodes_at(schema: Mapping[str, Any], field: str) -> Iterator[Mapping[str, Any]]:
    node = schema
    for step in field.split("."):
        node = (
            node.get("properties", {}).get(step)
            or (node.get("items") if step.isdecimal() else node.get("additionalProperties"))
            or {}
        )
    yield node
    yield node.get("items", {})


# --- hypothesis: right manifests, changed somewhere ---

TEXT = ["", "a", "A", "a b", "a.b:c", "-a", "x" * 64, "x" * 3000, "2", "1.5", "NaN", "true", "ä"]
WRONG = [None, True, 1, 1.5, -1, "", "text", [], ["a"], {}, {"a": 1}, GONE]


def _leaves(schema: Mapping[str, Any], path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Every place of a schema that a manifest could fill, with its schema."""
    yield path, schema
    for name, below in schema.get("properties", {}).items():
        yield from _leaves(below, f"{path}.{name}")
    if "items" in schema:
        yield from _leaves(schema["items"], f"{path}.0")
    if "additionalProperties" in schema:
        yield from _leaves(schema["additionalProperties"], f"{path}.key")


def _values(schema: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """Values at, inside and beyond what a schema allows, and some of other types."""
    near: list[Any] = []
    for bound in ("minimum", "maximum"):
        if bound in schema:
            near += [schema[bound] + step for step in (-1, 0, 1)]
    near += schema.get("enum", [])
    if schema.get("type") == "string" or "x-kubernetes-int-or-string" in schema:
        near += TEXT
    if schema.get("type") == "number":
        near += [0.5, 0.999, 1.0]
    if schema.get("type") == "boolean":
        near += [True, False]
    if schema.get("type") == "array":
        inner = _values(schema["items"])
        return st.one_of(st.lists(inner, max_size=3).map(_without_gone), st.sampled_from(WRONG))
    return st.sampled_from([*near, *WRONG])


def _without_gone(values: list[Any]) -> list[Any]:
    return [value for value in values if value is not GONE]


@st.composite
def manifests(draw: st.DrawFn) -> tuple[dict[str, Any], list[str]]:
    """A right manifest with one to three places changed, and the places."""
    base = BASES[draw(st.sampled_from(sorted(BASES)))]
    spec = SCHEMAS[base["kind"]]["properties"]["spec"]
    places = dict(_leaves(spec, "spec"))
    fields = draw(st.lists(st.sampled_from(sorted(places)), min_size=1, max_size=3, unique=True))
    document, done = base, []
    for field in fields:
        try:
            document = changed(document, {field: draw(_values(places[field]))})
        except (KeyError, TypeError, ValueError, IndexError, AttributeError):
            continue  # nothing is there to change, or another change has taken its place
        done.append(field)
    return dict(document), done


WINDOWS = {"kernelSize", "stride", "padding", "dilation"}
"""One number, or as many as the layer has axes, or a word: no structural schema has such a type."""


def is_beyond_a_schema(document: Mapping[str, Any]) -> bool:
    """Whether all that is wrong is what no schema can say; it ends as a condition instead.

    That is how the nodes of a graph hang together and what a layer's sizes have to do with each
    other (errors of their validators), and windows.
    """
    try:
        MODELS[document["kind"]].model_validate(document)
    except ValidationError as error:
        return all(e["type"] == "value_error" or WINDOWS & {*e["loc"]} for e in error.errors())
    return False


@settings(max_examples=500, deadline=None, suppress_health_check=list(HealthCheck))
@given(manifests())
def test_the_api_server_and_esper_agree_on_what_is_wrong(judge, drawn):
    document, fields = drawn
    ours = esper_refuses(document)
    verdict = judge.created(document)
    if verdict.accepted:
        assert ours is None or is_beyond_a_schema(document), ours
        return
    assert ours is not None, verdict.message
    rules = [rule["message"] for rule in _rules(SCHEMAS[document["kind"]])]
    named = any(_section(field) in verdict.message for field in fields)
    assert named or any(rule in verdict.message for rule in rules), verdict.message


def _section(field: str) -> str:
    """The part of a spec that a change lies in: what is named may stand beside it, or above."""
    return ".".join(field.split(".")[:2])


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/session.yaml")))
def test_what_esper_validates_is_taken_by_the_api_server(esper_control_plane, capsys, path):
    assert main(["validate", str(path)]) == 0
    capsys.readouterr()
    esper_control_plane.kubectl("apply", "--dry-run=server", "-f", str(path))


def test_an_unknown_kind_is_refused_by_kubectl(esper_control_plane):
    (bad,) = [bad for bad in TABLE if bad.field == "kind"]
    text = json.dumps(bad.manifest())
    done = esper_control_plane.try_kubectl("apply", "--dry-run=server", "-f", "-", given=text)
    assert done.returncode == 1
    assert bad.where in done.stderr
    with pytest.raises(ManifestError):
        validate_resource(bad.manifest(), MODELS["TrainingSession"])


def test_the_definitions_are_of_these_models():
    assert {crd(kind)["spec"]["names"]["kind"] for kind in KINDS} == set(MODELS)
