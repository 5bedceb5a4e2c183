"""CustomResourceDefinitions from the resource models.

A structural schema is narrower than JSON Schema: no references, no unions, no null. So references
are written out; an optional field is one that may be absent; a union of objects becomes one object
with every field optional and one CEL rule a branch; a union of an integer and text becomes
int-or-string; what no structural schema can say is preserved and checked when it is used.
"""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path
from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from esper.contracts.refusals import entry_schema
from esper.contracts.resources import API_VERSION, GROUP, KINDS, VERSION, Resource
from esper.contracts.resources.common import INT64_MAX
from esper.utils.documents import write_document

Schema = dict[str, Any]

CATEGORY = "esper"
PRESERVED: Schema = {"x-kubernetes-preserve-unknown-fields": True}
ANY: Schema = {**PRESERVED, "nullable": True}
"""Any JSON value: null is one too, and is not pruned."""
INT_OR_STRING: Schema = {"x-kubernetes-int-or-string": True}

_KEPT = (
    "type",
    "format",
    "description",
    "enum",
    "pattern",
    "minimum",
    "maximum",
    "minLength",
    "maxLength",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "required",
    "default",
)
_SCALARS = {"integer", "number", "string", "boolean"}


def crd(kind: type[Resource]) -> Schema:
    """The CustomResourceDefinition of one kind, JSON-ready."""
    version: Schema = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "additionalPrinterColumns": [
            {"name": name, "type": type_, "jsonPath": path} for name, type_, path in kind.columns
        ],
        "schema": {"openAPIV3Schema": structural_schema(kind)},
        "subresources": {"status": {}},
    }
    if kind.selectable:
        version["selectableFields"] = [{"jsonPath": path} for path in kind.selectable]
    if kind.scale:
        version["subresources"]["scale"] = dict(kind.scale)
    names: Schema = {
        "kind": kind.__name__,
        "listKind": f"{kind.__name__}List",
        "plural": kind.plural,
        "singular": kind.singular,
        "shortNames": list(kind.short_names),
        "categories": [CATEGORY],
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{kind.plural}.{GROUP}"},
        "spec": {"group": GROUP, "names": names, "scope": "Namespaced", "versions": [version]},
    }


def crds() -> tuple[Schema, ...]:
    """The definitions of every kind."""
    return tuple(crd(kind) for kind in KINDS)


def write_crds(folder: Path) -> list[Path]:
    """Writes one file a kind, `esper.dev_seeds.yaml` and so on, and returns their paths.

    Raises:
        OSError: the folder can't be made or written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for definition in crds():
        path = folder / f"{GROUP}_{definition['spec']['names']['plural']}.yaml"
        header = "# Generated from esper.contracts.resources; `esper crds` writes it anew.\n"
        path.write_text(header + write_document(definition), encoding="utf-8")
        paths.append(path)
    return paths


def structural_schema(kind: type[Resource]) -> Schema:
    """The schema of one kind.

    Of the metadata only the name is ours to check. A status has no defaults: what is absent was
    not observed.
    """
    full = kind.model_json_schema(
        by_alias=True, schema_generator=_DefaultsInFull, mode="validation"
    )
    schema = _structural(full, full["$defs"])
    properties = schema["properties"]
    properties["apiVersion"] = {"type": "string", "enum": [API_VERSION]}
    properties["kind"] = {"type": "string", "enum": [kind.__name__]}
    name = properties["metadata"]["properties"]["name"]
    properties["metadata"] = {"type": "object", "properties": {"name": name}}
    properties["status"] = _without_defaults(properties["status"])
    schema["required"] = ["spec"]
    return schema


class _DefaultsInFull(GenerateJsonSchema):
    """Writes out defaults that a factory makes: a rule can't read below `default: {}`."""

    def get_default_value(self, schema: Any) -> Any:
        factory = schema.get("default_factory")
        return factory() if factory else super().get_default_value(schema)


def _structural(node: Schema, definitions: dict[str, Schema]) -> Schema:
    if "$ref" in node:
        target = definitions[node["$ref"].rsplit("/", 1)[-1]]
        siblings = {key: value for key, value in node.items() if key != "$ref"}
        return _structural(_beside(target, siblings), definitions)
    branches = node.get("anyOf") or node.get("oneOf")
    if branches is not None:
        return _union(node, branches, definitions)
    schema = _own_keywords(node)
    if schema.get("type") == "array":
        schema["items"] = _structural(node["items"], definitions)
    if schema.get("type") == "object":
        if "properties" in node:
            schema["properties"] = {
                name: _structural(item, definitions) for name, item in node["properties"].items()
            }
        elif not PRESERVED.keys() & node.keys():
            schema["additionalProperties"] = _structural(entry_schema(node), definitions)
    return schema


def _own_keywords(node: Schema) -> Schema:
    """What a schema says of its own value, in the words that a structural schema has."""
    schema = {key: node[key] for key in _KEPT if key in node}
    schema |= {key: value for key, value in node.items() if key.startswith("x-kubernetes-")}
    if "description" in schema:
        schema["description"] = " ".join(schema["description"].split("\n\n")[0].split())
    if "default" in schema:
        schema["default"] = _without_nulls(schema["default"])
        if schema["default"] is None:
            del schema["default"]
    if INT_OR_STRING.keys() & node.keys():
        return schema
    if "const" in node:
        schema["enum"] = [node["const"]]
    if "type" not in schema:
        return {**ANY, **_annotations(schema)}
    if "prefixItems" in node:  # a fixed tuple of the IR may also be written as one number
        return {**PRESERVED, **_annotations(schema)}
    for bound in ("Minimum", "Maximum"):
        if f"exclusive{bound}" in node:
            schema[bound.lower()] = node[f"exclusive{bound}"]
            schema[f"exclusive{bound}"] = True
    if schema["type"] == "integer":
        schema["format"] = "int64"
        # The API server keeps bounds as floats, which can't hold this one; the format does.
        if schema.get("maximum") == INT64_MAX:
            del schema["maximum"]
    return schema


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return value


def _without_defaults(schema: Schema) -> Schema:
    bare = {key: value for key, value in schema.items() if key != "default"}
    if "properties" in bare:
        bare["properties"] = {
            name: _without_defaults(item) for name, item in bare["properties"].items()
        }
    if "items" in bare:
        bare["items"] = _without_defaults(bare["items"])
    return bare


def _annotations(node: Schema) -> Schema:
    return {key: node[key] for key in ("description", "default") if key in node}


def _beside(target: Schema, siblings: Schema) -> Schema:
    """A referenced schema with what stands beside the reference; rules of both hold."""
    key = "x-kubernetes-validations"
    merged = {**target, **siblings}
    if key in target and key in siblings:
        merged[key] = [*target[key], *siblings[key]]
    return merged


def _union(node: Schema, branches: list[Schema], definitions: dict[str, Schema]) -> Schema:
    beside = {key: value for key, value in node.items() if key not in {"anyOf", "oneOf"}}
    present = [branch for branch in branches if branch.get("type") != "null"]
    if len(present) == 1:
        return _structural(_beside(present[0], beside), definitions)
    parts = [_structural(branch, definitions) for branch in present]
    if "discriminator" in node:
        merged = _one_object(parts, node["discriminator"]["propertyName"])
    else:
        merged = reduce(_either, parts)
    extras = {key: value for key, value in _own_keywords(beside).items() if key not in ANY}
    return {**merged, **extras}


def _one_object(parts: list[Schema], tag: str) -> Schema:
    """One object for a tagged union: fields of all, and for each tag which may and must be set."""
    properties: dict[str, Schema] = {}
    for part in parts:
        for name, item in part["properties"].items():
            # A default would be written into branches that have no such field.
            bare = {key: value for key, value in item.items() if key != "default"}
            properties[name] = _either(properties[name], bare) if name in properties else bare
    # A rule sees no preserved field; whoever compiles the graph checks those.
    visible = [name for name, item in properties.items() if not PRESERVED.keys() & item.keys()]
    validations = []
    for part in parts:
        (value,) = part["properties"][tag]["enum"]
        names = [name for name in part["properties"] if name != tag]
        required = [name for name in part.get("required", ()) if name != tag]
        terms = [f"has(self.{name})" for name in required if name in visible]
        terms += [f"!has(self.{name})" for name in visible if name not in (tag, *names)]
        validations.append(
            {
                "rule": f"self.{tag} != '{value}' || ({' && '.join(terms)})",
                "message": f"{tag} {value} takes {', '.join(names)}"
                + (f"; required: {', '.join(required)}" if required else ""),
            }
        )
    return {
        "type": "object",
        "required": [tag],
        "properties": properties,
        "x-kubernetes-validations": validations,
    }


def _int_or_string(number: Schema, text: Schema) -> Schema:
    """Bounds hold for a number alone and patterns for a text alone: both can stand."""
    bounds: Schema = {key: number[key] for key in ("minimum", "maximum") if key in number}
    words: Schema = {key: text[key] for key in ("pattern", "minLength", "maxLength") if key in text}
    if "enum" in text:
        words["pattern"] = f"^({'|'.join(map(re.escape, text['enum']))})$"
    return {**INT_OR_STRING, **bounds, **words}


def _either(left: Schema, right: Schema) -> Schema:
    """A schema that allows what either allows, or more where that can't be said."""
    left, right = (
        {key: value for key, value in side.items() if key != "description"}
        for side in (left, right)
    )
    if left == right:
        return left
    types = {left.get("type"), right.get("type")}
    if types == {"string"} and "enum" in left and "enum" in right:
        return {"type": "string", "enum": list(dict.fromkeys(left["enum"] + right["enum"]))}
    if len(types) == 1 and types <= _SCALARS:
        return {"type": types.pop()}
    if types == {"integer", "number"}:
        return {"type": "number"}
    if types == {"integer", "string"}:
        return _int_or_string(*sorted((left, right), key=lambda side: side["type"]))
    return dict(PRESERVED)
