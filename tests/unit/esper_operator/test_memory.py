"""What is remembered of an object: turns that never come to rest are failures, with their pauses."""

from __future__ import annotations

import pytest

from esper.errors import WorkFailed
from esper_operator.memory import MAX_BUSY_TURNS, Memory


def test_each_turn_too_many_that_writes_fails_until_one_rests() -> None:
    memory = Memory("u1")
    for _ in range(MAX_BUSY_TURNS):
        memory.took_turn(wrote=True)
    for _ in range(3):
        with pytest.raises(WorkFailed, match="allowed: 500"):
            memory.took_turn(wrote=True)
    memory.took_turn(wrote=False)
    memory.took_turn(wrote=True)
