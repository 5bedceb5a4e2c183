"""The controller that the sessions of a namespace share."""

from __future__ import annotations

from typing import Any

import pytest

from esper_operator.children import names, secret, tamiyo
from esper_operator.children.objects import digest_in
from esper_operator.decisions import namespaces
from esper_operator.observed import NamespaceObserved
from esper_operator.plans import Plan
from esper_operator.views import MetaView, SessionView
from tests.unit.esper_operator.objects import (
    COMPLETE,
    NAMESPACE,
    NOW,
    OPTIONS,
    applied,
    decided,
    deleted,
    deployment,
    job,
    running,
    session,
    spec,
)

THERE = MetaView(
    "Secret",
    NAMESPACE,
    names.TAMIYO,
    "secret-1",
    digest=secret.settings_digest(names.TAMIYO, OPTIONS, NOW),
)
CURRENT = deployment(names.TAMIYO, digest=digest_in(tamiyo.shared(NAMESPACE, OPTIONS)))


def planned(*sessions: SessionView, **fields: Any) -> Plan:
    given: dict[str, Any] = {"secret": THERE, "now": NOW, **fields}
    observed = NamespaceObserved(namespace=NAMESPACE, sessions=sessions, **given)
    return namespaces.decide(observed, OPTIONS)


def finished() -> SessionView:
    plan = decided(session(status=running(session())), jobs=(job(session(), conditions=COMPLETE),))
    return session(status=dict(plan.status or {}))


def policy(name: str, *, dedicated: bool = False) -> dict[str, Any]:
    return {"growth": {"controller": {"policy": name, "dedicated": dedicated}}}


def test_the_credentials_come_first() -> None:
    for there in (None, MetaView("Secret", NAMESPACE, names.TAMIYO, "s", digest="old")):
        plan = planned(session(), secret=there)
        assert plan.credentials
        assert plan.apply == ()
    assert applied(planned(session())) == [f"Deployment/{names.TAMIYO}"]


def test_one_that_is_there_is_left_alone() -> None:
    assert planned(session(), session(name="other"), tamiyo=CURRENT) == Plan()


def test_one_of_another_form_is_applied_anew() -> None:
    old = deployment(names.TAMIYO, digest="old")
    assert applied(planned(session(), tamiyo=old)) == [f"Deployment/{names.TAMIYO}"]


broken = spec()
broken["training"]["epochs"] = "many"


@pytest.mark.parametrize(
    "view",
    [
        session(runPolicy={"suspend": True}),
        session(runPolicy={"managedBy": "somebody"}),
        session(deleting=True),
        session(raw_spec=broken),
    ],
    ids=["suspended", "somebody's", "deleting", "unreadable"],
)
def test_none_stays_for_sessions_that_ask_nobody(view: SessionView) -> None:
    assert applied(planned(view)) == []
    gone = [f"Deployment/{names.TAMIYO}", f"Secret/{names.TAMIYO}"]
    assert deleted(planned(view, tamiyo=CURRENT)) == gone


def test_a_session_that_does_not_grow_is_told_so_by_a_controller() -> None:
    # Its worker asks at each interval, whatever the policy, and waits for the answer.
    assert applied(planned(session(**policy("none")))) == [f"Deployment/{names.TAMIYO}"]


def test_controllers_of_their_own_need_the_secret_and_not_the_shared_one() -> None:
    own = session(**policy("heuristic", dedicated=True))
    assert planned(own, secret=None).credentials
    assert applied(planned(own)) == []
    assert deleted(planned(own, tamiyo=CURRENT)) == [f"Deployment/{names.TAMIYO}"]
    assert applied(planned(own, session(name="other"))) == [f"Deployment/{names.TAMIYO}"]


@pytest.mark.parametrize(("passed", "gone"), [(0, False), (294, False), (295, True)])
def test_it_stays_for_a_while_after_the_last_session(passed: int, gone: bool) -> None:
    plan = planned(finished(), tamiyo=CURRENT, now=NOW + passed)
    assert bool(plan.delete) is gone
    if not gone:
        assert plan.again_in == pytest.approx(295 - passed)


def test_without_sessions_there_is_none() -> None:
    gone = [f"Deployment/{names.TAMIYO}", f"Secret/{names.TAMIYO}"]
    assert deleted(planned(tamiyo=CURRENT)) == gone
    assert planned(secret=None) == Plan()
