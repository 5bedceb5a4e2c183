"""pydantic's errors in one line, for any model."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pytest
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from esper.contracts.refusals import describe, dotted, one_line_error, schema_of, steps


class _Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    size: Annotated[int, Field(gt=0, le=8, strict=True)] = 1


class _Empty(BaseModel):
    model_config = ConfigDict(extra="forbid")


class _Outer(BaseModel):
    model_config = ConfigDict(extra="forbid")

    one: Literal[1] = 1
    inner: _Inner | None = None
    empty: _Empty | None = None
    many: list[_Inner] = []
    pair: tuple[int, int] = (1, 2)
    either: int | Literal["all"] = "all"
    table: dict[str, list[int]] = {}
    word: Annotated[str, Field(min_length=2)] = "ab"
    count: Annotated[int, Field(ge=1)] = 1
    below: Annotated[float, Field(lt=1)] = 0.5
    free: int = 1
    checked: str = ""
    tags: Annotated[list[str], Field(min_length=1)] = ["a"]

    @field_validator("checked")
    @classmethod
    def _refuse(cls, value: str) -> str:
        if value == "said":
            raise ValueError("part[0]: got x; allowed: y")
        if value:
            raise ValueError("not this one")
        return value


@pytest.mark.parametrize(
    ("data", "line"),
    [
        ({"one": 2}, "one: got 2; allowed: 1"),
        (
            {"inner": {"size": 0}},
            "inner.size: got 0; allowed: a whole number above 0 and at most 8",
        ),
        (
            {"inner": {"sizes": 1}},
            "inner.sizes: got an unknown field; allowed: size (did you mean size?)",
        ),
        ({"empty": {"a": 1}}, "empty.a: got an unknown field; allowed: no field"),
        ({"inner": 3}, "inner: got 3; allowed: a mapping with size"),
        (
            {"many": [{}, {"size": "1"}]},
            'many[1].size: got the text "1"; allowed: a whole number above 0',
        ),
        ({"many": 1}, "many: got 1; allowed: a list"),
        ({"pair": [1, "a"]}, "pair[1]: got a; allowed: a whole number"),
        ({"pair": [1, 2, 3]}, "pair: got [1, 2, 3]; allowed: a list of 2 entries"),
        ({"either": "x"}, "either: got x; allowed: a whole number or all"),
        ({"table": {"a.b": [1, "x"]}}, "table[a.b][1]: got x; allowed: a whole number"),
        ({"table": {3: []}}, "table[3]: got 3; allowed: a name: a valid string"),
        ({"word": "a"}, "word: got a; allowed: text"),
        ({"count": 0}, "count: got 0; allowed: a whole number at least 1"),
        ({"below": 1}, "below: got 1; allowed: a number below 1"),
        ({"free": []}, "free: got []; allowed: a whole number"),
        ({"free": {1, 2}}, "free: got {1, 2}; allowed: a whole number"),
        ({"checked": "said"}, "checked.part[0]: got x; allowed: y"),
        ({"checked": "a"}, "checked: got a; allowed: not this one"),
        ({"tags": []}, "tags: got []; allowed: a list of at least 1 entries"),
        ({"count": 0, "below": 2}, "count: got 0; allowed: a whole number at least 1 (and 1 more"),
        ({"count": 0, "zzz": 2}, "zzz: got an unknown field; allowed: one, inner, "),
    ],
    ids=str,
)
def test_one_line_per_error(data: dict[str, Any], line: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _Outer.model_validate(data)
    assert str(one_line_error(caught.value, _Outer)).startswith(line)


def test_a_wrong_root_is_described() -> None:
    with pytest.raises(ValidationError) as caught:
        _Inner.model_validate(3)
    assert one_line_error(caught.value, _Inner).allowed == "a mapping with size"


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ((), ""),
        (("spec",), "spec"),
        (("spec", "nodes", 3, "features"), "spec.nodes[3].features"),
        (("limits", "nvidia.com/gpu"), "limits[nvidia.com/gpu]"),
        ((0, "a"), "[0].a"),
    ],
)
def test_paths_are_written_and_read(path: tuple[str | int, ...], text: str) -> None:
    assert dotted(path) == text
    assert steps(text) == path


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({}, ""),
        ({"pattern": "^a$"}, "text that matches ^a$"),
        ({"type": "string"}, "text"),
        ({"type": "string", "maxLength": 3}, "text, at most 3 characters"),
        ({"enum": [1, "a", None]}, "one of 1, a, null"),
        ({"anyOf": [{"type": "integer"}, {"type": "null"}]}, "a whole number"),
        ({"oneOf": [{"type": "boolean"}, {"type": "string"}]}, "true or false or text"),
        (
            {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1},
            "a number above 0 and below 1",
        ),
    ],
)
def test_schemas_in_words(schema: dict[str, Any], words: str) -> None:
    assert describe(schema, schema_of(_Inner)) == words
