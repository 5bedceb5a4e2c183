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

OLD = NOW


def after(
    report: Any, heartbeat: float | None, now: float = NOW, heard: float = OLD, **status: Any
) -> Any:
    """The status after a report, where the last one written had that time."""
    view = session()
    time = None if heartbeat is None else datetime_of(heartbeat)
    decided_on = datetime_of(NOW - 100)
    record = running(view, last_heartbeat_time=time, epoch=1, attempt_time=decided_on, **status)
    return decided(
        session(status=record),
        jobs=(job(view, created=NOW - 100),),
        pods=(pod(view, ready=True),),
        snapshot=report,
        heard=heard,
        now=now,
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
    ],
)
def test_figures_are_written_every_few_seconds_and_news_at_once(
    heartbeat: float | None, changes: dict[str, Any], taken: bool
) -> None:
    plan = after(snapshot(time=OLD, epoch=2, **changes), heartbeat)
    assert written(plan).epoch == (2 if taken else 1)


def test_figures_that_wait_are_looked_at_when_they_are_due() -> None:
    report = snapshot(time=OLD, epoch=2)
    assert after(report, OLD - 3).again_in == pytest.approx(2)
    assert written(after(report, OLD - 3, now=NOW + 1.9)).epoch == 1
    assert written(after(report, OLD - 3, now=NOW + 2)).epoch == 2


def test_an_older_report_changes_nothing() -> None:
    report = snapshot(time=OLD + 5, sequence=7, epoch=2, outcome="Succeeded")
    assert written(after(report, OLD - 9, report_sequence=8)).epoch == 1
    assert written(after(report, OLD - 9, report_sequence=6)).epoch == 2


def test_a_report_that_is_read_again_is_no_sign_of_life() -> None:
    report = snapshot(time=OLD, sequence=7, epoch=2)
    status = written(after(report, OLD - 90, now=NOW + 50, report_sequence=7))
    assert status.last_heartbeat_time == datetime_of(OLD - 90)
    assert status.epoch == 2  # the figures are its own, whatever somebody has written


@pytest.mark.parametrize("skew", [-7200.0, 0.0, 86_400.0])
def test_when_a_report_was_heard_is_written_whatever_its_clock_says(skew: float) -> None:
    report = snapshot(time=OLD + skew, sequence=7, epoch=2)
    status = written(after(report, OLD - 90, heard=NOW - 3, report_sequence=6))
    assert status.epoch == 2
    assert status.last_heartbeat_time == datetime_of(NOW - 3)
    assert status.report_sequence == 7


def test_a_status_that_is_ahead_of_the_operators_clock_holds_nothing_up() -> None:
    assert written(after(snapshot(time=OLD, epoch=2), OLD + 3600)).epoch == 2


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


def test_the_first_report_of_an_attempt_counts_though_its_clock_is_behind() -> None:
    view = session()
    before = NOW - 50
    record = running(
        view,
        attempt=2,
        attempt_time=datetime_of(NOW - 40),
        last_heartbeat_time=datetime_of(before),
        epoch=1,
    )
    plan = decided(
        session(status=record),
        jobs=(job(view, 2, created=NOW - 30),),
        pods=(pod(view, attempt=2, ready=True),),
        snapshot=snapshot(2, time=before - 600, epoch=2),
    )
    assert written(plan).epoch == 2
