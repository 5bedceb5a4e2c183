"""Sessions in a small cluster: whatever happens, and wherever the operator ends, it converges."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper_operator.status import CONTROLLER_NAME
from tests.unit.esper_operator.objects import rests
from tests.unit.esper_operator.world import Crash, World

SECTIONS: dict[str, Any] = {
    "workers": {"replicas": 2},
    "training": {"batchSize": 64},
    "runPolicy": {
        "startupDeadlineSeconds": 120,
        "progressDeadlineSeconds": 120,
        "activeDeadlineSeconds": 4000,
        "backoffLimit": 2,
        "managedBy": CONTROLLER_NAME,
    },
}
LONGEST = 6000.0
"""Seconds within which a session must have ended that is left in peace."""


def summary(world: World) -> tuple[str, str]:
    assert world.session is not None
    conditions = world.session["status"].get("conditions", ())
    found = (c for c in conditions if c["type"] == "Succeeded")
    return next((c["status"], c["reason"]) for c in found)


def live_on(world: World, seconds: float = LONGEST) -> None:
    """Let time pass, with an operator at work, until the session has ended."""
    until = world.now + seconds
    while world.now < until:
        world.settle()
        if summary(world)[0] != "Unknown":
            break
        world.step()
    for _ in range(30):
        world.settle()
        world.step()
    world.settle()


def check_rest(world: World) -> None:
    """Nothing is left to write, and nothing is there twice."""
    plan = world.decide()
    assert rests(plan), plan
    unended = [job for job in world.jobs() if not job["status"].get("conditions")]
    assert unended == []
    assert len(world.jobs()) <= 1
    assert world.alive() == []


@pytest.mark.parametrize(
    ("behaviour", "status", "reason", "attempts"),
    [
        ("trains", "True", "Completed", 1),
        ("fails", "False", "BackoffLimitExceeded", 3),
        ("bad-input", "False", "EntryPointError", 1),
        ("hangs", "False", "StartupDeadlineExceeded", 1),
        ("no-node", "False", "Unschedulable", 1),
        ("no-image", "False", "ImagePullFailed", 1),
        ("interrupts", "False", "InterruptedTooOften", 3),
    ],
)
def test_every_session_ends_with_a_reason(
    behaviour: str, status: str, reason: str, attempts: int
) -> None:
    world = World(SECTIONS, behaviour=behaviour)
    live_on(world)
    assert summary(world) == (status, reason)
    assert world.statuses[-1].attempt == attempts
    assert len(world.made_jobs) == attempts
    check_rest(world)


@pytest.mark.parametrize(
    ("refused", "reason"), [("Invalid", "ChildRefused"), ("Forbidden", "ChildRefused")]
)
def test_a_job_that_is_refused_ends_the_session(refused: str, reason: str) -> None:
    world = World(SECTIONS, refuse_jobs=refused)
    live_on(world)
    assert summary(world) == ("False", reason)


def test_a_hub_that_never_answers_ends_the_session() -> None:
    world = World(SECTIONS, hub_answers=False)
    live_on(world)
    assert summary(world) == ("False", "CredentialsMissing")


def test_pods_that_their_node_refuses_end_the_session_after_few_jobs() -> None:
    world = World({**SECTIONS, "runPolicy": {}}, behaviour="refuses")
    began = world.now
    live_on(world)
    assert summary(world) == ("False", "InterruptedTooOften")
    assert len(world.made_jobs) == 10
    assert world.statuses[-1].failed_attempts == 0
    assert world.now - began > 10 + 20 + 40 + 80 + 160 + 320 + 360
    check_rest(world)


def test_a_session_that_hangs_is_tried_again_before_it_fails() -> None:
    world = World(SECTIONS)
    for _ in range(4):
        world.settle()
        world.step()
    world.behaviour = "hangs"
    live_on(world)
    assert world.statuses[-1].failed_attempts == 1
    assert len(world.made_jobs) == 2
    assert summary(world) == ("False", "StartupDeadlineExceeded")


@pytest.mark.parametrize("behaviour", ["trains", "fails"])
def test_a_crash_after_any_write_changes_nothing_of_the_outcome(behaviour: str) -> None:
    whole = World(SECTIONS, behaviour=behaviour)
    live_on(whole)
    for writes in range(whole.num_writes):
        world = World(SECTIONS, behaviour=behaviour, writes_left=writes)
        try:
            live_on(world)
        except Crash:
            world.writes_left = None
            world.step(10.0)
        live_on(world)
        assert summary(world) == summary(whole), writes
        assert world.made_jobs == whole.made_jobs, writes
        check_rest(world)


def test_a_cluster_that_evicts_for_ever_does_not_hold_a_session_for_ever() -> None:
    policy = {"startupDeadlineSeconds": 120, "progressDeadlineSeconds": 120, "backoffLimit": 1}
    world = World({**SECTIONS, "runPolicy": policy}, behaviour="hangs")
    began = world.now
    world.settle()
    while summary(world)[0] == "Unknown":
        world.settle()
        for pod in world.alive():
            world.disrupt(pod)
        world.step(1.0)
        assert world.now < began + 1000
    assert world.statuses[-1].failed_attempts == 0
    assert summary(world) == ("False", "ProgressDeadlineExceeded")


def test_a_session_costs_five_writes_until_its_workers_are_up() -> None:
    world = World(SECTIONS)
    world.settle()
    assert world.num_writes == 5  # two of its status, Service, Secret and Job
    world.control(world.jobs()[0])
    world.settle()
    assert len(world.pods) == 2
    assert world.num_writes == 5


def pick(world: World, number: int) -> dict[str, Any] | None:
    pods = sorted(world.alive(), key=lambda pod: str(pod["metadata"]["name"]))
    return pods[number % len(pods)] if pods else None


def suspended(value: bool) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        content["runPolicy"]["suspend"] = value

    return change


def resized(replicas: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        if content["runPolicy"]["suspend"]:
            content["workers"]["replicas"] = replicas

    return change


def happen(world: World, event: str, number: int) -> None:
    """One thing that people, nodes and time do to a session."""
    pod = pick(world, number)
    if event == "evict" and pod is not None:
        world.disrupt(pod)
    elif event == "delete-pod" and pod is not None:
        pod["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
    elif event == "lose-node" and pod is not None:
        world.lose(pod)
    elif event == "interrupt" and pod is not None:
        world.end(pod, 75)
    elif event == "fail" and pod is not None:
        world.end(pod, 1)
    elif event == "kill-node" and pod is not None:
        world.disrupt(pod)
        world.end(pod, 137)
    elif event == "kill-pod" and pod is not None:  # its grace was over before it had ended
        pod["metadata"]["deletionTimestamp"] = "2027-01-15T08:00:00Z"
        world.end(pod, 137)
    elif event == "delete-child":
        children = sorted(world.children)
        if children:
            world.delete(*children[number % len(children)])
    elif event == "hub":
        world.hub_answers = number % 2 == 0
    elif event == "unseen":
        world.pods_unseen = number % 2 == 0
    elif event == "suspend":
        world.edit(suspended(number % 2 == 0))
    elif event == "resize":
        world.edit(resized(1 + number % 4))
    elif event == "crash":
        world.writes_left = number % 4
    elif event == "step":
        world.step(1.0 + number % 20)


EVENTS = (
    *(
        "evict",
        "evict",
        "delete-pod",
        "kill-pod",
        "interrupt",
        "kill-node",
        "lose-node",
        "delete-child",
        "hub",
        "suspend",
    ),
    "unseen",
    *("resize", "crash", "step", "step", "step"),
)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(
    events=st.lists(st.tuples(st.sampled_from((*EVENTS, "fail")), st.integers(0, 50)), max_size=40),
    behaviour=st.sampled_from(["trains", "fails", "hangs", "bad-input", "no-node", "no-image"]),
)
def test_whatever_happens_a_session_ends_and_nothing_is_made_twice(
    events: list[tuple[str, int]], behaviour: str
) -> None:
    world = World(SECTIONS, behaviour="trains")
    for event, number in events:
        happen(world, event, number)
        try:
            world.settle()
        except Crash:
            world.writes_left = None
        assert len([j for j in world.jobs() if not j["status"].get("conditions")]) <= 2
    world.writes_left, world.hub_answers, world.behaviour = None, True, behaviour
    world.pods_unseen = False
    world.edit(suspended(False))
    live_on(world)
    assert summary(world)[0] in ("True", "False")
    assert world.statuses[-1].failed_attempts <= 3
    check_rest(world)


@settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 50)), max_size=40))
def test_what_comes_from_outside_never_fails_a_session(events: list[tuple[str, int]]) -> None:
    content = {**SECTIONS, "runPolicy": {"backoffLimit": 0, "startupDeadlineSeconds": 3600}}
    world = World(content, behaviour="trains")
    for event, number in events:
        happen(world, event, number)
        try:
            world.settle()
        except Crash:
            world.writes_left = None
    world.writes_left, world.hub_answers, world.pods_unseen = None, True, False
    world.edit(suspended(False))
    live_on(world)
    assert summary(world) == ("True", "Completed")
    assert world.statuses[-1].failed_attempts == 0


@settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True
)
@given(events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 50)), max_size=20))
def test_a_suspended_session_has_no_pod_and_comes_to_rest(events: list[tuple[str, int]]) -> None:
    world = World(SECTIONS, behaviour="trains")
    for event, number in events:
        happen(world, event, number)
        try:
            world.settle()
        except Crash:
            world.writes_left = None
    world.writes_left, world.pods_unseen = None, False
    world.edit(suspended(True))
    for _ in range(10):
        world.settle()
        world.step()
    assert rests(world.settle())
    assert world.jobs() == [] or summary(world)[0] != "Unknown"
    assert world.alive() == []
    status = world.statuses[-1]
    if summary(world)[0] == "Unknown":
        assert summary(world) == ("Unknown", "Suspended")
        assert status.active_since is None
        world.edit(lambda content: content["workers"].update(replicas=3))
        world.edit(suspended(False))
        world.hub_answers = True
        live_on(world)
        assert summary(world)[0] == "True"


@pytest.mark.parametrize("when", range(0, 60, 5))
def test_a_ttl_takes_everything_with_it(when: int) -> None:
    content = {**SECTIONS, "runPolicy": {"ttlSecondsAfterFinished": when}}
    world = World(content)
    for _ in range(60):
        world.settle()
        world.step()
    assert world.session is None
    assert world.children == {}
    assert world.pods == {}
