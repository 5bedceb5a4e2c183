"""pydantic's errors as one line: which field, what came, what is allowed.

What is allowed is read from the model's own JSON schema, so that a message gives the whole range
or every name, not only the bound that was broken.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pydantic import BaseModel, ValidationError

from esper.contracts.resources.common import (
    DECIMAL_PATTERN,
    DIGEST_PATTERN,
    ENTRY_POINT_PATTERN,
    LABEL_1035_PATTERN,
    LABEL_KEY_PATTERN,
    LABEL_VALUE_PATTERN,
    QUANTITY_PATTERN,
    SUBDOMAIN_PATTERN,
)
from esper.contracts.resources.training import OBJECTIVE_PATTERN
from esper.errors import ManifestError

Path = tuple[str | int, ...]
Schema = dict[str, Any]

_WORDS = {
    ENTRY_POINT_PATTERN: "module.path:attribute",
    OBJECTIVE_PATTERN: "classification, regression or module.path:attribute",
    LABEL_1035_PATTERN: "lower-case letters, digits and '-', starting with a letter and not "
    "ending with '-'",
    SUBDOMAIN_PATTERN: "lower-case letters, digits, '-' and '.', starting and ending with a "
    "letter or digit",
    LABEL_KEY_PATTERN: "a label key such as team or example.com/team",
    LABEL_VALUE_PATTERN: "letters, digits, '-', '_' and '.', starting and ending with a letter or "
    "digit",
    QUANTITY_PATTERN: "a quantity such as 2, 500m or 4Gi",
    DECIMAL_PATTERN: "a decimal number as text",
    DIGEST_PATTERN: "a digest in hexadecimal",
}
# A validator in the IR says all three things in its message; the field is below the model it names.
_SAID = re.compile(
    r"^(?P<field>[\w.\[\]]+): got (?P<came>.*); allowed: (?P<allowed>.*)$", re.DOTALL
)


@dataclass(frozen=True)
class Refusal:
    """One thing wrong: where, what came, what is allowed."""

    path: Path
    came: object
    allowed: str

    @property
    def field(self) -> str:
        """The path as people write it."""
        return dotted(self.path)


def one_line_error(error: ValidationError, root: type[BaseModel]) -> ManifestError:
    """The first thing wrong, as one line, and how many more there are.

    `root` is the model that was validated; the field is spelt as the manifest spells it.
    """
    refusal = first_refusal(error, root)
    return ManifestError(refusal.field, refusal.came, refusal.allowed)


def first_refusal(error: ValidationError, root: type[BaseModel]) -> Refusal:
    """The first thing wrong.

    An unknown field comes first, wherever it stands: it is often the reason why another is
    missing.
    """
    schema = schema_of(root)
    errors = error.errors(include_url=False)
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    path, came, allowed = _explained(dict(first), schema)
    paths = {_walk(e["loc"], schema)[0] for e in errors}
    # A list with a wrong entry also counts as too short: one thing to mend, not two.
    others = sum(not any(p != q and q[: len(p)] == p for q in paths) for p in paths) - 1
    if others:
        allowed += f" (and {others} more to mend)"
    return Refusal(path, came, allowed)


def dotted(path: Path) -> str:
    """A path as people write it: `spec.graph.nodes[1].features`, `limits[nvidia.com/gpu]`."""
    text = ""
    for step in path:
        if isinstance(step, int) or "." in step:
            text += f"[{step}]"
        else:
            text += f".{step}" if text else step
    return text


def steps(field: str) -> Path:
    """The path that `dotted` writes as `field`."""
    found = re.findall(r"\[([^\]]*)\]|([^.\[\]]+)", field)
    return tuple(int(key) if key.isdigit() else key or name for key, name in found)


@lru_cache(maxsize=16)
def schema_of(root: type[BaseModel]) -> Schema:
    """The model's JSON schema, with the names that a manifest uses."""
    return root.model_json_schema(by_alias=True, mode="validation")


def _explained(error: Mapping[str, Any], root: Schema) -> tuple[Path, object, str]:
    path, node = _walk(error["loc"], root)
    kind, came, context = error["type"], error["input"], error.get("ctx", {})
    match kind:
        case "extra_forbidden":
            names = _names(_walk(error["loc"][:-1], root)[1])
            close = difflib.get_close_matches(str(error["loc"][-1]), names, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            return path, "an unknown field", (", ".join(names) or "no field") + hint
        case "missing":
            return path, "nothing", describe(node, root)
        case "union_tag_not_found":
            return (*path, "op"), "nothing", f"one of {_tags(node)}"
        case "union_tag_invalid":
            return (*path, "op"), context["tag"], f"one of {_tags(node)}"
        case "cross_field":
            return (*path, *steps(context["field"])), _shown(context["came"]), context["allowed"]
        case "value_error":
            said = _SAID.match(str(context["error"]))
            if said:
                return (*path, *steps(said["field"])), said["came"], said["allowed"]
            return path, _shown(came), str(context["error"])
        case "too_large" | "reserved":
            return path, _shown(came), error["msg"]
    if error["loc"] and error["loc"][-1] == "[key]":
        return path, came, "a name: " + _WORDS.get(context.get("pattern", ""), _reason(error))
    allowed = describe(node, root) or _reason(error)
    # "3" and 3 look the same without quotes.
    quoted = kind.endswith("_type") and isinstance(came, str)
    return path, f'the text "{came}"' if quoted else _shown(came), allowed


def _reason(error: Mapping[str, Any]) -> str:
    return str(error["msg"]).removeprefix("Input should be ").removeprefix("String should ")


def _shown(value: object) -> object:
    """A value as a manifest spells it."""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False)
    except (TypeError, ValueError):
        return value


def describe(node: Schema, root: Schema) -> str:
    """In words, what a schema allows; empty where it says nothing."""
    node = _resolved(node, root)
    branches = node.get("anyOf") or node.get("oneOf")
    if branches:
        words = [describe(b, root) for b in branches if b.get("type") != "null"]
        return " or ".join(dict.fromkeys(word for word in words if word))
    if "const" in node:
        return _literal(node["const"])
    if "enum" in node:
        return f"one of {', '.join(_literal(value) for value in node['enum'])}"
    match node.get("type"):
        case "integer":
            return "a whole number" + _range(node)
        case "number":
            return "a number" + _range(node)
        case "boolean":
            return "true or false"
        case "string":
            return _text(node)
        case "array":
            return "a list" + _sizes(node, "entries")
        case "object":
            names = _names(node)
            return f"a mapping with {', '.join(names)}" if names else "a mapping"
    return _text(node) if "pattern" in node else ""


def entry_schema(node: Schema) -> Schema:
    """The schema of a free mapping's values; empty for anything else."""
    if isinstance(node.get("additionalProperties"), dict):
        return dict(node["additionalProperties"])
    return dict(next(iter(node.get("patternProperties", {}).values()), {}))


def _literal(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _range(node: Schema) -> str:
    low, high = node.get("minimum"), node.get("maximum")
    above, below = node.get("exclusiveMinimum"), node.get("exclusiveMaximum")
    if low is not None and high is not None:
        return f" from {low} to {high}"
    bounds = (("above", above), ("at least", low), ("at most", high), ("below", below))
    words = [f"{word} {bound}" for word, bound in bounds if bound is not None]
    return " " + " and ".join(words) if words else ""


def _sizes(node: Schema, unit: str) -> str:
    kind = "Items" if unit == "entries" else "Length"
    low, high = node.get(f"min{kind}", 0), node.get(f"max{kind}")
    if high is None:
        return f" of at least {low} {unit}" if low else ""
    if low == high:
        return f" of {low} {unit}"
    return f" of {low} to {high} {unit}"


def _text(node: Schema) -> str:
    pattern = node.get("pattern")
    if node.get("format") == "date-time":
        return "a time such as 2026-01-31T12:00:00Z"
    words = _WORDS.get(pattern, f"text that matches {pattern}") if pattern else "text"
    high = node.get("maxLength")
    if high is None:
        return words
    low = node.get("minLength", 0)
    return f"{words}, {low} to {high} characters" if low else f"{words}, at most {high} characters"


def _names(node: Schema) -> list[str]:
    return list(node.get("properties", {}))


def _tags(node: Schema) -> str:
    return ", ".join(node.get("discriminator", {}).get("mapping", {}))


def _resolved(node: Schema, root: Schema) -> Schema:
    while "$ref" in node:
        node = root["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    branches = [b for b in node.get("anyOf", ()) if b.get("type") != "null"]
    return _resolved(branches[0], root) if len(branches) == 1 else node


def _walk(location: Sequence[str | int], root: Schema) -> tuple[Path, Schema]:
    """The path along `location`, without the names of unions' branches, and the schema there."""
    path: list[str | int] = []
    node = _resolved(root, root)
    for position, step in enumerate(location):
        properties = node.get("properties", {})
        mapping = node.get("discriminator", {}).get("mapping", {})
        if step in properties:
            node = properties[step]
        elif isinstance(step, int) and ("items" in node or "prefixItems" in node):
            node = node.get("items") or node["prefixItems"][min(step, len(node["prefixItems"]) - 1)]
        elif step in mapping:
            node = {"$ref": mapping[step]}
            node = _resolved(node, root)
            continue
        elif step == "[key]":
            continue
        elif "properties" in node and position == len(location) - 1:
            node = {}  # An unknown field.
        elif entry_schema(node):
            node = entry_schema(node)
        else:
            continue  # The name of a union's branch.
        path.append(step)
        node = _resolved(node, root)
    return tuple(path), node
