"""docs/api.md, from the hub's OpenAPI description and the docstrings of its modules.

python -m tools.api_reference            write docs/api.md
python -m tools.api_reference --check    end with 1 if docs/api.md is not up to date
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from esper.configs import EsperConfig, UrzaConfig
from esper.services.urza import auth, problems
from esper.services.urza.api import (
    blueprints,
    internal,
    kernels,
    objects,
    operations,
    sessions,
)
from esper.services.urza.main import create_app

PATH = Path(__file__).parent.parent / "docs" / "api.md"
COMMAND = "python -m tools.api_reference"
_SECTIONS = {
    "blueprints": blueprints,
    "kernels": kernels,
    "sessions": sessions,
    "session objects": objects,
    "internal": internal,
    "operations": operations,
}
_METHODS = ("get", "post", "put", "patch", "delete")


def reference() -> str:
    """The whole page."""
    key = SecretStr("only to describe, never to sign anything")
    config = EsperConfig(urza=UrzaConfig(signing_key=key)).inside(Path("unused"))
    described = create_app(config).openapi()
    parts = [
        "# Urza's API\n",
        f"Made by `{COMMAND}` from the OpenAPI description that every hub serves at "
        "`/openapi.json`; never edited by hand.\n",
        described["info"]["description"],
        "## Tokens\n",
        _body(auth.__doc__),
        "`esper token --role worker --days 30` makes one.\n",
        "## Problems\n",
        _body(problems.__doc__),
        _problems(),
    ]
    for tag, module in _SECTIONS.items():
        parts += [f"## {tag.capitalize()}\n", _body(module.__doc__)]
        for path, methods in described["paths"].items():
            for method in _METHODS:
                operation = methods.get(method)
                if operation is not None and tag in operation["tags"]:
                    parts.append(_operation(method, path, operation))
    parts += ["## Schemas\n", "Field names are those of JSON; a `?` may be left out.\n"]
    schemas = described["components"]["schemas"]
    parts += [_schema(name, schemas[name]) for name in sorted(schemas)]
    return "\n".join(part.rstrip() + "\n" for part in parts)


def _body(docstring: str | None) -> str:
    """A module's docstring; a table in it, of reStructuredText, as a block."""
    lines = (docstring or "").strip().splitlines()
    found: list[str] = []
    fenced = False
    for index, line in enumerate(lines):
        ruled = line.startswith("====")
        if ruled and not fenced:
            found.append("```text")
            fenced = True
        found.append(line)
        if ruled and fenced and (index + 1 == len(lines) or not lines[index + 1]):
            found.append("```")
            fenced = False
    return "\n".join(found) + "\n"


def _problems() -> str:
    rows = [
        f"| `{problems.TYPE_PREFIX}{kind}` | {status} | {title} |"
        for kind, (_, status, title) in problems.KINDS.items()
    ]
    return "\n".join(["| type | usual status | meaning |", "|---|---|---|", *rows]) + "\n"


def _operation(method: str, path: str, operation: dict[str, Any]) -> str:
    lines = [f"### {method.upper()} {path}\n", operation["description"].strip() + "\n"]
    needs = operation["x-permission"]
    lines.append("Open to everyone." if needs == "none" else f"Permission: *{needs}*.")
    lines.append("")
    for parameter in operation.get("parameters", ()):
        schema = parameter["schema"]
        text = parameter.get("description", "")
        must = "" if parameter["required"] else "?"
        lines.append(
            f"- `{parameter['name']}{must}` in {parameter['in']}: {_type(schema)}. {text}".rstrip()
        )
    for media, content in operation.get("requestBody", {}).get("content", {}).items():
        lines.append(f"- body, {media}: {_type(content['schema'])}")
    lines.append("")
    for status, response in sorted(operation["responses"].items()):
        shown = [_type(part["schema"]) for part in response.get("content", {}).values()]
        carried = f" with {', '.join(response['headers'])}" if response.get("headers") else ""
        answered = " or ".join(shown) or "no body"
        lines.append(f"- {status}, {response['description'].rstrip('.')}: {answered}{carried}")
    return "\n".join(lines) + "\n"


def _type(schema: dict[str, Any]) -> str:
    """A schema in words, others by name."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "const" in schema:
        return f"`{schema['const']}`"
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    for kind in ("anyOf", "oneOf"):
        if kind in schema:
            return " or ".join(dict.fromkeys(_type(part) for part in schema[kind]))
    if schema.get("type") == "array":
        items = schema.get("items")
        return f"list of {_type(items)}" if items else "list"
    text = str(schema.get("type", "anything"))
    bounds = {
        "pattern": "matching `{}`",
        "format": "{}",
        "minimum": "at least {}",
        "exclusiveMinimum": "more than {}",
        "maximum": "at most {}",
        "minLength": "at least {} characters",
        "maxLength": "at most {} characters",
    }
    told = [words.format(schema[name]) for name, words in bounds.items() if name in schema]
    return ", ".join([text, *told])


def _schema(name: str, schema: dict[str, Any]) -> str:
    lines = [f"### {name}\n", " ".join(schema.get("description", "").split()) + "\n"]
    needed = set(schema.get("required", ()))
    for field, kind in schema.get("properties", {}).items():
        lines.append(f"- `{field}{'' if field in needed else '?'}`: {_type(kind)}")
    for example in schema.get("examples", ()):
        lines += ["", "```json", json.dumps(example, indent=2, ensure_ascii=False), "```"]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write or check."""
    parser = argparse.ArgumentParser(description="Write docs/api.md.")
    parser.add_argument("--check", action="store_true", help="only say whether it is up to date")
    checking = parser.parse_args().check
    made = reference()
    if not checking:
        PATH.write_text(made, encoding="utf-8")
        return 0
    if PATH.exists() and PATH.read_text(encoding="utf-8") == made:
        return 0
    sys.stderr.write(f"docs/api.md is not what the hub's description gives: {COMMAND}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
