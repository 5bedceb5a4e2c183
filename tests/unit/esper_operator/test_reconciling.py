"""When a status is written: before what follows from it, or once there is nothing else to do."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.plans import Plan
from esper_operator.reconciling import tells_only
from tests.unit.esper_operator.objects import session

STARTING = {"type": "Succeeded", "status": "Unknown", "reason": "Starting"}
RUNNING = {"type": "Succeeded", "status": "Unknown", "reason": "Running"}
BEFORE = {"attempt": 1, "conditions": [STARTING]}


@pytest.mark.parametrize(
    ("status", "only"),
    [
        (None, False),
        ({"attempt": 1, "conditions": [RUNNING]}, True),
        ({"attempt": 2, "conditions": [STARTING]}, False),
        ({"attempt": 1, "conditions": [RUNNING], "job": "first-1"}, False),
    ],
)
def test_a_status_can_wait_if_only_its_conditions_are_new(
    status: dict[str, Any] | None, only: bool
) -> None:
    assert tells_only(session(status=BEFORE), Plan(status=status)) is only
