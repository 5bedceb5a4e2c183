"""When a status is written: before what follows from it, or once there is nothing else to do."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from esper_operator.carrying import Outcome
from esper_operator.metrics import OperatorMetrics
from esper_operator.plans import Plan
from esper_operator.reconciling import tells_only, work
from esper_operator.work import Key, WorkQueue
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


def test_the_key_of_an_object_that_is_gone_is_forgotten() -> None:
    key = Key("TrainingSession", "team", "first")

    async def life(outcome: Outcome) -> bool:
        """Whether the key still is known once it was looked at: then its next visit is no first."""
        queue, looked = WorkQueue(), asyncio.Event()

        async def reconcile(_: Key) -> Outcome:
            looked.set()
            return outcome

        working = asyncio.create_task(work(queue, reconcile, OperatorMetrics()))
        queue.add(key)
        await looked.wait()
        await asyncio.sleep(0.01)
        working.cancel()
        return key in queue

    assert asyncio.run(life(Outcome()))
    assert not asyncio.run(life(Outcome(gone=True)))
