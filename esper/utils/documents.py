"""YAML as Esper reads and writes it: JSON's data model, YAML 1.2's core scalars, nothing else.

`5e-3` is a number, `no` is text, and every mapping has each key once. Aliases and merge keys work
while what they expand to stays small. Tags that build objects are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode
from yaml.parser import Parser
from yaml.reader import Reader
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from esper.errors import ManifestError

MAX_BYTES = 2**20
MAX_VALUES = 100_000
MAX_DEPTH = 64

Path = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_CORE = (
    ("null", re.compile(r"^(?:~|null|Null|NULL|)$"), ["~", "n", "N", ""]),
    ("bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"^(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)$"), list("-+0123456789")),
    (
        "float",
        re.compile(
            r"^(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
            r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
        ),
        list("-+0123456789."),
    ),
    ("merge", re.compile(r"^<<$"), ["<"]),
)
_QUOTED = re.compile(r"(['\"])[^<].+\1")  # more than one character, and no token's name
_NUMBER_BASES = {"0o": 8, "0x": 16}


class _CoreResolver(BaseResolver):
    """Plain scalars by YAML 1.2's core schema."""


class _Loader(Reader, Scanner, Parser, Composer, _CoreResolver):
    """Text to nodes, no further: what the nodes mean is decided here, not by PyYAML."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        _CoreResolver.__init__(self)


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else; writes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


for _name, _pattern, _first in _CORE:
    _CoreResolver.add_implicit_resolver(_TAG + _name, _pattern, _first)
    if _name in {"int", "float"}:
        _Dumper.add_implicit_resolver(_TAG + _name, _pattern, _first)


@dataclass
class Document:
    """One YAML document: its data, and the line on which each value starts."""

    source: str
    data: Any
    lines: dict[Path, int] = field(default_factory=dict)

    def place(self, path: Path) -> str:
        """Where `path`, or the nearest value above it that is there, stands: "file line 12"."""
        while path and path not in self.lines:
            path = path[:-1]
        return f"{self.source} line {self.lines.get(path, 1)}"


def read_documents(text: str, source: str, *, quoting: bool = True) -> list[Document]:
    """The documents of `text` that are not empty; `source` names it in errors.

    Without `quoting`, for text that may hold secrets, errors say where and what is wrong, and of
    the text itself nothing but the name of a key that is there twice.

    Raises:
        ManifestError: larger than `MAX_BYTES`, no YAML (with line and column), a key twice, a tag
            beyond JSON's types, or nested or expanding beyond `MAX_DEPTH` and `MAX_VALUES`.
    """
    size = len(text.encode(errors="replace"))
    if size > MAX_BYTES:
        raise ManifestError(source, f"{size} bytes", f"at most {MAX_BYTES}")
    documents = []
    try:
        for node in _compose(text):
            reading = _Reading(source, quoting)
            data = reading.value(node, ())
            if data is not None:
                documents.append(Document(source, data, reading.lines))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        problem = error.problem or error.context or "no YAML"
        if not quoting:
            problem = _QUOTED.sub("…", problem)
        raise ManifestError(where, f"broken YAML: {problem}", "well-formed YAML") from error
    except yaml.reader.ReaderError as error:
        came = f"character #x{error.character:02x} at position {error.position}"
        raise ManifestError(source, came, "YAML's printable characters") from error
    except RecursionError as error:
        raise ManifestError(source, "very deep nesting", f"at most {MAX_DEPTH} levels") from error
    return documents


def write_document(data: object) -> str:
    """`data` as YAML, mappings in their own order, in the layout that kubectl prints."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _compose(text: str) -> Iterator[Node]:
    loader = _Loader(text)
    while loader.check_node():
        node = loader.get_node()
        assert node is not None  # check_node said so
        yield node


class _Reading:
    """Turns one document's nodes into data; counts values, so that aliases can't explode."""

    def __init__(self, source: str, quoting: bool) -> None:
        self.source = source
        self.quoting = quoting
        self.lines: dict[Path, int] = {}
        self.values = 0

    def value(self, node: Node, path: Path) -> Any:
        self.values += 1
        if self.values > MAX_VALUES:
            raise self.refused(node, f"more than {MAX_VALUES} values", "fewer, aliases expanded")
        if len(path) > MAX_DEPTH:
            raise self.refused(node, f"more than {MAX_DEPTH} levels", "less nesting or recursion")
        self.lines[path] = node.start_mark.line + 1
        kind = node.tag.removeprefix(_TAG)
        match node:
            case MappingNode() if kind == "map":
                return self.mapping(node, path)
            case SequenceNode() if kind == "seq":
                return [self.value(item, (*path, index)) for index, item in enumerate(node.value)]
            case ScalarNode() if kind in {"str", "null", "bool", "int", "float", "merge"}:
                return self.scalar(node, kind)
        tag = f"tag {node.tag}" if self.quoting else "a tag"
        raise self.refused(node, tag, "plain values, lists and mappings")

    def mapping(self, node: MappingNode, path: Path) -> dict[str, Any]:
        own: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key, item in node.value:
            if key.tag == _TAG + "merge":
                for base in self.bases(item, path):
                    merged = {**base, **merged}
                continue
            if not isinstance(key, ScalarNode) or key.tag == _TAG + "null":
                raise self.refused(key, "a key that is no text", "text")
            name = key.value
            if name in own:
                raise self.refused(key, f"key {name!r} twice", "each key once in a mapping")
            own[name] = self.value(item, (*path, name))
        return {**merged, **own}

    def bases(self, node: Node, path: Path) -> list[dict[str, Any]]:
        items = node.value if isinstance(node, SequenceNode) else [node]
        if not all(isinstance(item, MappingNode) for item in items):
            raise self.refused(node, "<< with something else", "<< with mappings")
        return [self.value(item, (*path, "<<")) for item in items]

    def scalar(self, node: ScalarNode, kind: str) -> object:
        text = node.value
        try:
            match kind:
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    base = _NUMBER_BASES.get(text[:2], 10)
                    return int(text[2:] if base != 10 else text, base)
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except (ValueError, KeyError) as error:
            came = text if self.quoting else "another value"
            raise self.refused(node, came, f"a value of tag {kind}") from error
        return text

    def refused(self, node: Node, came: object, allowed: str) -> ManifestError:
        mark = node.start_mark
        return ManifestError(f"{self.source}:{mark.line + 1}:{mark.column + 1}", came, allowed)
