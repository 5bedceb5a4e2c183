"""Conditions and reasons."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.contracts.resources import Condition
from esper_operator.conditions import Kind, Reason, condition, found, is_reason, merged
from esper_operator.times import datetime_of, seconds_of, text_of
from tests.unit.esper_operator.objects import NOW

GUIDE = Path(__file__).parents[3] / "docs/guides/operator.md"


def made(kind: Kind, status: str, reason: Reason, now: float = NOW, message: str = "") -> Condition:
    return condition(kind, status, reason, message, now=now, generation=2)  # type: ignore[arg-type]


def test_the_time_of_a_transition_changes_with_the_status_alone() -> None:
    before = (made(Kind.READY, "Unknown", Reason.SUBMITTING),)
    same = merged(before, (made(Kind.READY, "Unknown", Reason.VALIDATING, NOW + 9, "m"),))
    assert same[0].last_transition_time == datetime_of(NOW)
    assert (same[0].reason, same[0].message) == ("Validating", "m")
    other = merged(same, (made(Kind.READY, "True", Reason.ACCEPTED, NOW + 10),))
    assert other[0].last_transition_time == datetime_of(NOW + 10)


def test_conditions_of_others_stay() -> None:
    theirs = made(Kind.READY, "True", Reason.ACCEPTED).model_copy(update={"type": "Theirs"})
    ours = made(Kind.SUCCEEDED, "Unknown", Reason.CREATED)
    assert merged((theirs,), (ours,)) == (ours, theirs)
    assert found((theirs, ours), Kind.SUCCEEDED) == ours
    assert found((theirs,), Kind.SUCCEEDED) is None


def test_a_message_is_one_line_of_a_bounded_length() -> None:
    text = made(Kind.READY, "True", Reason.ACCEPTED, message="a\n b" + "x" * 9000).message
    assert "\n" not in text
    assert len(text) <= 1024


@pytest.mark.parametrize("reason", list(Reason))
def test_every_reason_is_a_constant(reason: Reason) -> None:
    assert is_reason(reason)


@pytest.mark.parametrize("text", ["", "lower", "With Space", "Ünder", "A" * 129, "9A", "A-B"])
def test_what_is_no_constant(text: str) -> None:
    assert not is_reason(text)


def test_the_guide_tells_of_every_reason_and_of_no_other() -> None:
    rows = re.findall(r"^\| `([A-Z]\w+)` \|", GUIDE.read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted(reason.value for reason in Reason)


@given(st.integers(0, 4_000_000_000))
def test_times_come_back_as_they_went(seconds: int) -> None:
    assert seconds_of(text_of(seconds)) == seconds


@pytest.mark.parametrize("text", [None, "", 5])
def test_what_is_no_time_is_none(text: object) -> None:
    assert seconds_of(text) is None
