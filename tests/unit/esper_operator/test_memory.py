"""What is remembered of an object: turns that never come to rest fail, applies have pauses."""

from __future__ import annotations

import pytest

from esper.errors import WorkFailed
from esper_operator.memory import AGAIN_SECONDS, MAX_BUSY_TURNS, Memory


def test_each_turn_too_many_that_writes_fails_until_one_rests() -> None:
    memory = Memory("u1")
    for _ in range(MAX_BUSY_TURNS):
        memory.took_turn(wrote=True)
    for _ in range(3):
        with pytest.raises(WorkFailed, match="allowed: 500"):
            memory.took_turn(wrote=True)
    memory.took_turn(wrote=False)
    memory.took_turn(wrote=True)


def test_a_child_is_applied_from_the_same_only_now_and_then() -> None:
    memory = Memory("u1")
    assert memory.paces("Service/a", "x", 100.0) == 0.0
    assert memory.paces("Service/a", "x", 101.0) == AGAIN_SECONDS - 1.0
    assert memory.paces("Service/b", "x", 101.0) == 0.0
    assert memory.paces("Service/a", "y", 101.0) == 0.0
    assert memory.paces("Service/a", "y", 101.0 + AGAIN_SECONDS) == 0.0
    assert memory.paces("Service/a", "y", 50.0) == 0.0  # the clock was set back


def test_what_the_hub_fills_is_not_asked_for_while_its_child_rests() -> None:
    memory = Memory("uid")
    assert memory.rests("Secret/a", 100.0) == 0.0
    assert memory.paces("Secret/a", "d1", 100.0) == 0.0
    assert memory.rests("Secret/a", 101.0) == AGAIN_SECONDS - 1.0
    assert memory.rests("Secret/b", 101.0) == 0.0
    assert memory.rests("Secret/a", 100.0 + AGAIN_SECONDS) == 0.0
