"""Manifests: one TrainingSession, and any Blueprints, in the YAML that kubectl takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from esper.contracts.blueprints import BlueprintDocument, BuiltinBlueprint
from esper.contracts.refusals import first_refusal
from esper.contracts.resources import (
    API_VERSION,
    Blueprint,
    LabelSelector,
    Resource,
    TrainingSession,
)
from esper.errors import BadInput, BlueprintError, ManifestError
from esper.utils.documents import MAX_BYTES, Document, read_documents, write_document

NAME_LABEL = "esper.dev/blueprint"
"""Carried by every blueprint of an embedded run, with its name."""

_GRAPH_FIELDS = ("spec.graph", "spec.builtin", "spec.arguments", "spec.hosts")

ResourceT = TypeVar("ResourceT", bound=Resource)


@dataclass(frozen=True)
class Manifest:
    """What a manifest asks for."""

    session: TrainingSession
    blueprints: tuple[Blueprint, ...] = ()


def load_manifest(path: Path) -> Manifest:
    """The manifest in the file `path`.

    Raises:
        ManifestError: no such file, not readable, no UTF-8, or as `parse_manifest`.
        BlueprintError: as `parse_manifest`.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        came = error.strerror or type(error).__name__
        raise ManifestError(str(path), came, "a readable manifest file") from error
    if len(content) > MAX_BYTES:
        raise ManifestError(str(path), f"more than {MAX_BYTES} bytes", f"at most {MAX_BYTES}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ManifestError(str(path), f"byte {error.start} is no UTF-8", "UTF-8 text") from error
    return parse_manifest(text, path.name)


def parse_manifest(text: str, source: str) -> Manifest:
    """The manifest in `text`; `source` names it in errors.

    A status is left out, as the API server leaves it out of what a person applies.

    Raises:
        ManifestError: broken YAML, another kind or apiVersion, a field that is unknown, missing, of
            a wrong type or out of range, not exactly one TrainingSession, or a name twice.
        BlueprintError: a Blueprint's graph is malformed or too large, or its built-in blueprint or
            argument is unknown.
    """
    sessions: list[TrainingSession] = []
    blueprints: dict[str, Blueprint] = {}
    for document in read_documents(text, source):
        match _kind(document):
            case "TrainingSession":
                sessions.append(_parsed(_without_status(document), TrainingSession))
            case "Blueprint":
                blueprint = _parsed(_without_status(document), Blueprint)
                _refuse_unbuildable(blueprint, document)
                name = blueprint.metadata.name
                if name in blueprints:
                    allowed = f"each Blueprint once ({document.place(('metadata', 'name'))})"
                    raise ManifestError("metadata.name", name, allowed)
                blueprints[name] = blueprint
            case kind:
                allowed = f"TrainingSession or Blueprint ({document.place(('kind',))})"
                raise ManifestError("kind", kind, allowed)
    if len(sessions) != 1:
        came = f"{len(sessions) or 'no'} TrainingSession documents"
        raise ManifestError(source, came, "exactly one, and any number of Blueprints")
    return Manifest(sessions[0], tuple(blueprints.values()))


def parse_resource(text: str, source: str, model: type[ResourceT]) -> ResourceT:
    """The one resource in `text`, status included: what `session_document` wrote.

    Raises:
        ManifestError: as `parse_manifest`, or not exactly one document.
        BlueprintError: a Blueprint's graph is malformed or too large.
    """
    documents = read_documents(text, source)
    if len(documents) != 1:
        raise ManifestError(source, f"{len(documents) or 'no'} documents", "exactly one")
    kind = _kind(documents[0])
    if kind != model.__name__:
        allowed = f"{model.__name__} ({documents[0].place(('kind',))})"
        raise ManifestError("kind", kind, allowed)
    return _parsed(documents[0], model)


def validate_resource(data: Mapping[str, Any], model: type[ResourceT]) -> ResourceT:
    """A resource from JSON-like data with the wire's names.

    Raises:
        ManifestError: a field is unknown, missing, of a wrong type or out of range.
        BlueprintError: a Blueprint's graph is malformed or too large.
    """
    return _parsed(Document("resource", dict(data)), model)


def session_document(resource: Resource) -> str:
    """`resource` as YAML, in kubectl's order: apiVersion, kind, metadata, spec, status.

    Every default stands written out, as the API server would store it; of the metadata, only what
    is set.
    """
    return write_document(document_data(resource))


def document_data(resource: Resource) -> dict[str, object]:
    """What `session_document` writes, as JSON."""
    data = resource.to_wire()
    metadata = data["metadata"]
    assert isinstance(metadata, dict)
    data["metadata"] = {key: value for key, value in metadata.items() if value not in ({}, [])}
    return data


def select_blueprints(
    selector: LabelSelector,
    catalogue: Iterable[BuiltinBlueprint],
    documents: Iterable[Blueprint],
) -> list[BlueprintDocument]:
    """The blueprints that may germinate: catalogue first, then the manifest's, each in its order.

    A Blueprint of the manifest takes the place of the catalogue's of the same name, as an applied
    object would. Each carries the label `esper.dev/blueprint` with its name. An empty selector
    selects all.

    Raises:
        ManifestError: the selector selects nothing.
        BlueprintError: a Blueprint names an unknown built-in one.
    """
    offered: dict[str, tuple[dict[str, str], BlueprintDocument]] = {}
    for entry in catalogue:
        offered[entry.name] = (entry.labels, entry.document)
    for blueprint in documents:
        name = blueprint.metadata.name
        offered[name] = (blueprint.metadata.labels, blueprint.document())
    selected = [
        document
        for name, (labels, document) in offered.items()
        if selector.matches({NAME_LABEL: name, **labels})
    ]
    if not selected:
        came = write_document(selector.to_wire())
        allowed = f"labels of at least one blueprint: {', '.join(offered)}"
        raise ManifestError("spec.growth.blueprints", came, allowed)
    return selected


def _kind(document: Document) -> object:
    data = document.data
    if not isinstance(data, dict):
        allowed = f"a mapping with apiVersion, kind, metadata and spec ({document.place(())})"
        raise ManifestError("document", data, allowed)
    for key in ("apiVersion", "kind"):
        if data.get(key) is None:
            allowed = API_VERSION if key == "apiVersion" else "TrainingSession or Blueprint"
            raise ManifestError(key, "nothing", f"{allowed} ({document.place((key,))})")
    if data["apiVersion"] != API_VERSION:
        allowed = f"{API_VERSION} ({document.place(('apiVersion',))})"
        raise ManifestError("apiVersion", data["apiVersion"], allowed)
    return data["kind"]


def _without_status(document: Document) -> Document:
    data = {key: value for key, value in document.data.items() if key != "status"}
    return Document(document.source, data, document.lines)


def _parsed(document: Document, model: type[ResourceT]) -> ResourceT:
    try:
        return model.model_validate(document.data, by_alias=True, by_name=False)
    except ValidationError as error:
        refusal = first_refusal(error, model)
        place = f" ({document.place(refusal.path)})" if document.lines else ""
        kind: type[BadInput] = ManifestError
        if model is Blueprint and refusal.field.startswith(_GRAPH_FIELDS):
            kind = BlueprintError
        raise kind(refusal.field, refusal.came, refusal.allowed + place) from error


def _refuse_unbuildable(blueprint: Blueprint, document: Document) -> None:
    try:
        blueprint.document()
    except BlueprintError as error:
        place = document.place(("spec", "builtin"))
        raise BlueprintError(error.field, error.came, f"{error.allowed} ({place})") from error
