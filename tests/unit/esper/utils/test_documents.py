"""YAML as JSON: YAML 1.2's scalars, no objects, no explosions."""

from __future__ import annotations

import math

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from esper.errors import ManifestError
from esper.utils.documents import (
    MAX_BYTES,
    MAX_DEPTH,
    MAX_VALUES,
    read_documents,
    write_document,
)


def _read(text: str) -> object:
    (document,) = read_documents(text, "a.yaml")
    return document.data


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("5e-3", 0.005),
        ("1E6", 1e6),
        (".5", 0.5),
        ("1.", 1.0),
        ("-2.5e+3", -2500.0),
        (".inf", math.inf),
        ("-.Inf", -math.inf),
        ("3", 3),
        ("+3", 3),
        ("-3", -3),
        ("010", 10),
        ("0o17", 15),
        ("0x1F", 31),
        ("true", True),
        ("FALSE", False),
        ("yes", "yes"),
        ("no", "no"),
        ("on", "on"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2026-01-31", "2026-01-31"),
        ("'3'", "3"),
        ("!!str 3", "3"),
        ("!!int '3'", 3),
        ("!!float '3'", 3.0),
        ("~", None),
        ("null", None),
        ("", None),
        ("=", "="),
        ("<<", "<<"),
    ],
)
def test_plain_scalars_follow_yaml_1_2(scalar: str, value: object) -> None:
    assert _read(f"a: {scalar}") == {"a": value}
    assert type(_read(f"a: {scalar}")["a"]) is type(value)  # type: ignore[index]


def test_not_a_number_is_read() -> None:
    assert math.isnan(_read("a: .nan")["a"])  # type: ignore[index]


def test_keys_are_text_as_json_has_them() -> None:
    assert _read("{1: a, true: b}") == {"1": "a", "true": "b"}


def test_empty_documents_are_skipped() -> None:
    documents = read_documents("---\n---\na: 1\n---\n# nothing\n---\nb: 2\n...\n", "a.yaml")
    assert [document.data for document in documents] == [{"a": 1}, {"b": 2}]
    assert read_documents("", "a.yaml") == []


def test_merge_keys_give_way_to_own_keys_and_earlier_bases_to_none() -> None:
    text = (
        "one: &one {a: 1, b: 1}\ntwo: &two {b: 2, c: 2}\n"
        "single: {<<: *one, b: 9}\nseveral: {<<: [*one, *two]}\n"
    )
    data = _read(text)
    assert data["single"] == {"a": 1, "b": 9}  # type: ignore[index]
    assert data["several"] == {"a": 1, "b": 1, "c": 2}  # type: ignore[index]


def test_places_name_the_nearest_line() -> None:
    (document,) = read_documents("a:\n  b:\n    - 1\n    - c: 2\n", "a.yaml")
    assert document.place(("a", "b", 1, "c")) == "a.yaml line 4"
    assert document.place(("a", "b", 1, "missing", "below")) == "a.yaml line 4"
    assert document.place(("nowhere",)) == "a.yaml line 1"


def _bomb(levels: int) -> str:
    lines = ["a0: &a0 [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "field", "came"),
    [
        ("a: [1", "a.yaml:1:6", "broken YAML"),
        ("a: 1\n\tb: 2", "a.yaml:2:1", "broken YAML"),
        ("a: 'open", "a.yaml:1:9", "broken YAML"),
        ("a: *nowhere", "a.yaml:1:4", "undefined alias"),
        ("%YAML 9.9\n---\na: 1", "a.yaml:1:1", "broken YAML"),
        ("a: \x01", "a.yaml", "character #x01"),
        ("a: 1\na: 2", "a.yaml:2:1", "key 'a' twice"),
        ("a: {b: 1, 'b': 2}", "a.yaml:1:11", "key 'b' twice"),
        ("[1]: 2", "a.yaml:1:1", "a key that is no text"),
        ("~: 2", "a.yaml:1:1", "a key that is no text"),
        ("<<: 3", "a.yaml:1:5", "<< with something else"),
        ("a: !!python/object/apply:os.getcwd []", "a.yaml:1:4", "python/object"),
        ("a: !!timestamp 2026-01-01", "a.yaml:1:4", "timestamp"),
        ("a: !!binary aGk=", "a.yaml:1:4", "binary"),
        ("a: !!set {b}", "a.yaml:1:4", "set"),
        ("a: !own 1", "a.yaml:1:4", "!own"),
        ("a: !!int x", "a.yaml:1:4", "x"),
        ("a: !!bool x", "a.yaml:1:4", "x"),
        ("a: !!float x", "a.yaml:1:4", "x"),
        ("a: !!map [1]", "a.yaml:1:4", "tag"),
        ("a: " + "9" * 5000, "a.yaml:1:4", "999"),
        ("a: &a [*a]", "a.yaml:1:4", f"more than {MAX_DEPTH} levels"),
        (_bomb(9), "a.yaml:1:37", f"more than {MAX_VALUES} values"),
        ("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2), "a.yaml:1:66", "levels"),
        ("[" * 5000, "a.yaml", "very deep nesting"),
        ("#" * (MAX_BYTES + 1), "a.yaml", f"{MAX_BYTES + 1} bytes"),
    ],
    ids=lambda value: value[:24],
)
def test_what_is_no_data_is_refused_with_its_place(text: str, field: str, came: str) -> None:
    with pytest.raises(ManifestError) as caught:
        read_documents(text, "a.yaml")
    assert caught.value.field == field
    assert came in str(caught.value.came)
    assert "\n" not in str(caught.value)
    assert caught.value.allowed


def test_a_file_at_the_size_cap_is_read() -> None:
    text = "a: 1\n"
    assert _read(text + "#" * (MAX_BYTES - len(text))) == {"a": 1}


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cc", "Cs"]), max_size=8)
    | st.sampled_from(
        ["5e-3", "no", "1:30", "0o7", "null", "~", "2026-01-01", "<<", ".inf", "- a"]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text("abcno15e-", max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abcxyz", min_size=1), _JSON, min_size=1))
def test_what_is_written_is_read_the_same(data: dict[str, object]) -> None:
    assert _read(write_document(data)) == data


@pytest.mark.parametrize("text", ["no", "on", "1:30", "2026-01-01", "5e-3", "0o7", "010", "1_0"])
def test_written_text_is_text_for_yaml_1_1_too(text: str) -> None:
    assert yaml.safe_load(write_document({"a": text})) == {"a": text}


def test_written_documents_keep_order_and_carry_no_alias() -> None:
    shared = {"z": 1}
    assert write_document({"b": shared, "a": [shared]}) == "b:\n  z: 1\na:\n  - z: 1\n"
