"""Liveness knows of work and of watches; the numbers by state are read once a change."""

from __future__ import annotations

import urllib.error
import urllib.request

from esper.services.health import HealthServer
from esper_operator.health import OperatorHealth
from esper_operator.leading import States
from esper_operator.memory import Memory
from esper_operator.metrics import OperatorMetrics
from esper_operator.plans import Notice
from esper_operator.views import Said
from tests.unit.esper_operator.objects import session


def asked(url: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read().decode()


def test_a_fault_of_the_work_fails_liveness_and_readiness_and_passes_with_it() -> None:
    health = OperatorHealth(OperatorMetrics())
    health.started()
    with HealthServer(health) as server:
        assert asked(f"{server.url}/healthz")[0] == 200
        health.fault("the watch of Job has not told of team/one, and is dead")
        assert asked(f"{server.url}/healthz")[0] == 503
        assert asked(f"{server.url}/readyz") == (
            503,
            "the watch of Job has not told of team/one, and is dead\n",
        )
        health.fault(None)
        assert asked(f"{server.url}/healthz")[0] == 200
        text = asked(f"{server.url}/metrics")[1]
        assert "esper_operator_uptime_seconds" in text
        assert "esper_operator_leading 0.0" in text


def test_sessions_are_counted_by_the_reason_of_their_condition() -> None:
    states = States()
    running = {"conditions": [{"type": "Succeeded", "status": "Unknown", "reason": "Running"}]}
    first = session(uid="u1", status=running)
    second = session(uid="u2", name="other")
    assert states.of([first, second]) == {"Running": 1, "New": 1}
    done = {"conditions": [{"type": "Succeeded", "status": "True", "reason": "Completed"}]}
    assert states.of([session(uid="u1", status=done), second]) == {"Completed": 1, "New": 1}
    assert states.of([]) == {}


def test_a_refused_child_is_tried_again_later_or_when_it_is_another() -> None:
    memory, said = Memory("u1"), Said("Invalid", "no such field")
    memory.refuse("Job/a", {"spec": 1}, said, 100.0, lasting=True)
    assert memory.refusals() == {"Job/a": said}
    assert memory.waits("Job/a", {"spec": 1}, 100.0) == 16.0
    assert memory.waits("Job/a", {"spec": 1}, 116.0) == 0.0
    assert memory.waits("Job/a", {"spec": 2}, 100.0) == 0.0
    memory.refuse("Job/a", {"spec": 1}, said, 116.0, lasting=True)
    assert memory.waits("Job/a", {"spec": 1}, 116.0) == 32.0
    memory.refuse("Job/a", {"spec": 2}, said, 116.0, lasting=False)
    assert memory.waits("Job/a", {"spec": 2}, 116.0) == 1.0
    memory.accepted("Job/a")
    assert memory.refusals() == {}


def test_a_notice_that_holds_is_told_once() -> None:
    memory = Memory("u1")
    notices = [Notice("Normal", "Started", f"attempt {number}") for number in range(100)]
    assert [memory.tells(notices[0]) for _ in range(3)] == [True, False, False]
    assert all(memory.tells(notice) for notice in notices[1:])
