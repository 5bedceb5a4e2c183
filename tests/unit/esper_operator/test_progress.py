"""What a status takes from reports, and how often."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.times import datetime_of
from tests.unit.esper_operator.objects import (
    NOW,
    decided,
    job,
    pod,
    running,
    session,
    snapshot,
    written,
)

OLD = NOW - 60


def after(report: Any, heartbeat: float | None, **status: Any) -> Any:
    """The status after a report, where the last one written had that time."""
    view = session()
    time = None if heartbeat is None else datetime_of(heartbeat)
    record = running(view, last_heartbeat_time=time, epoch=1, **status)
    return decided(
        session(status=record),
        jobs=(job(view, created=NOW - 100),),
        pods=(pod(view, ready=True),),
        snapshot=report,
    )


@pytest.mark.parametrize(
    ("heartbeat", "changes", "taken"),
    [
        (None, {}, True),
        (OLD - 5, {}, True),
        (OLD - 4, {}, False),
        (OLD - 1, {"seed_counts": {"training": 1, "active": 1}}, True),
        (OLD - 1, {"checkpoint": {"name": "c", "epoch": 1}}, True),
        (OLD - 1, {"outcome": "Succeeded"}, True),
        (OLD + 1, {"outcome": "Succeeded"}, False),
    ],
)
def test_figures_are_written_every_few_seconds_and_news_at_once(
    heartbeat: float | None, changes: dict[str, Any], taken: bool
) -> None:
    plan = after(snapshot(time=OLD, epoch=2, **changes), heartbeat)
    assert written(plan).epoch == (2 if taken else 1)


def test_figures_that_wait_are_looked_at_when_they_are_due() -> None:
    plan = after(snapshot(time=OLD, epoch=2), OLD - 3)
    assert plan.again_in == pytest.approx(2)


@pytest.mark.parametrize(("attempt", "taken"), [(0, False), (1, True), (2, False)])
def test_reports_of_attempts_that_are_not_the_operators_are_left_out(
    attempt: int, taken: bool
) -> None:
    plan = after(snapshot(attempt, time=OLD, epoch=2), None)
    assert written(plan).epoch == (2 if taken else 1)


def test_every_figure_is_taken_over() -> None:
    report = snapshot(
        time=OLD + 0.25,
        epoch=3,
        metrics={"validationMetric": "0.91"},
        parameters_base=100,
        parameters=130,
        flops=10**15,
        seed_counts={"fossilized": 2},
        layers=({"name": "a", "kind": "Linear", "seeds": 1, "health_percent": 50},),
        refused_layers=({"name": "b", "reason": "never called"},),
        threads=2,
    )
    status = written(after(report, None))
    for name, value in report.observed().items():
        if name != "last_heartbeat_time":
            assert getattr(status, name) == value, name
    assert status.last_heartbeat_time == datetime_of(OLD)
