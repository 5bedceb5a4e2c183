"""What becomes of what a session keeps goes by its spec as it is now, also once it has ended."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper_operator.children import secret
from esper_operator.conditions import Kind, Reason, condition
from esper_operator.plans import Plan
from esper_operator.times import datetime_of
from esper_operator.views import MetaView, Said, SessionView
from tests.unit.esper_operator.objects import (
    ISSUED,
    NOW,
    OPTIONS,
    decided,
    deleted,
    job,
    made,
    pod,
    running,
    session,
)

DELETE, RETAIN = ({"deletionPolicy": policy} for policy in ("Delete", "Retain"))


def told(view: SessionView, policy: str) -> tuple[MetaView, ...]:
    """The Service and the Secret of a session of which the hub was told that policy."""
    service, given = made(view)
    return service, replace(given, deletion_policy=policy)


def at_work(**policy: Any) -> SessionView:
    view = session(runPolicy=policy)
    return session(status=running(view), runPolicy=policy)


def ended(ttl: int | None = None, **policy: Any) -> SessionView:
    policy |= {} if ttl is None else {"ttlSecondsAfterFinished": ttl}
    view = session(runPolicy=policy)
    done = condition(
        Kind.SUCCEEDED, "True", Reason.COMPLETED, "", now=NOW - 60, generation=view.generation
    )
    status = running(view, conditions=(done,), completion_time=datetime_of(NOW - 60))
    return session(status=status, runPolicy=policy)


def of_running(view: SessionView, before: str) -> Plan:
    jobs, pods = (job(view),), (pod(view, ready=True),)
    return decided(view, jobs=jobs, pods=pods, metas=told(view, before))


def test_the_secret_says_what_the_hub_was_told() -> None:
    for policy in ("Delete", "Retain"):
        manifest = secret.manifest(
            session(runPolicy={"deletionPolicy": policy}), ISSUED, OPTIONS, NOW
        )
        assert MetaView.of({**manifest, "kind": "Secret"}).deletion_policy == policy


@pytest.mark.parametrize("policy", [DELETE, RETAIN], ids=str)
def test_a_running_session_tells_the_hub_and_no_worker(policy: dict[str, str]) -> None:
    view = at_work(**policy)
    plan = of_running(view, "Retain" if policy is DELETE else "Delete")
    assert plan.credentials
    assert (deleted(plan), plan.apply) == ([], ())
    assert not of_running(view, policy["deletionPolicy"]).credentials


def test_a_suspended_session_tells_the_hub() -> None:
    view = at_work(suspend=True, **RETAIN)
    assert decided(view, metas=told(view, "Delete")).credentials
    assert not decided(view, metas=told(view, "Retain")).credentials


def test_a_session_that_has_ended_tells_the_hub() -> None:
    view = ended(**RETAIN)
    assert decided(view, metas=told(view, "Delete")).credentials
    assert not decided(view, metas=told(view, "Retain")).credentials
    # Nothing is made anew for one whose Secret is gone.
    assert not decided(view, metas=()).credentials


def test_the_hub_is_told_before_a_time_to_live_is_over() -> None:
    view = ended(ttl=30, **RETAIN)
    waiting = decided(view, metas=told(view, "Delete"))
    assert waiting.credentials
    assert deleted(waiting) == []
    assert deleted(decided(view, metas=told(view, "Retain"))) == ["TrainingSession/digits"]


def test_a_session_whose_credentials_were_revoked_is_not_held_up() -> None:
    view = ended(ttl=30, **RETAIN)
    said = {"Secret/digits-esper": Said("Conflict", "its credentials were revoked")}
    plan = decided(view, metas=told(view, "Delete"), refusals=said)
    assert not plan.credentials
    assert deleted(plan) == ["TrainingSession/digits"]


@pytest.mark.parametrize(("reason", "told_already"), [("Forbidden", True), ("Unavailable", False)])
def test_what_the_api_server_refuses_after_the_hub_was_told_holds_no_session_up(
    reason: str, told_already: bool
) -> None:
    view = ended(ttl=30, **RETAIN)
    said = {"Secret/digits-esper": Said(reason, "no")}
    plan = decided(view, metas=told(view, "Delete"), refusals=said)
    assert deleted(plan) == (["TrainingSession/digits"] if told_already else [])


def test_a_policy_that_goes_back_after_a_refusal_is_told_again() -> None:
    view = at_work(**RETAIN)
    said = {"Secret/digits-esper": Said("Forbidden", "no")}
    jobs, pods = (job(view),), (pod(view, ready=True),)
    plan = decided(view, jobs=jobs, pods=pods, metas=told(view, "Retain"), refusals=said)
    assert plan.credentials
