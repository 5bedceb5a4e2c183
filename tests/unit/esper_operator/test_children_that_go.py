"""A child that is being deleted, and held by a finalizer, is waited for and not applied again."""

from __future__ import annotations

from dataclasses import replace

import pytest

from esper.contracts.operational import SeedSnapshot
from esper_operator.children import names, tamiyo
from esper_operator.children.objects import digest_in
from esper_operator.decisions import controller, namespaces, seeds
from esper_operator.observed import NamespaceObserved
from esper_operator.plans import Plan
from esper_operator.views import MetaView
from tests.unit.esper_operator.objects import (
    NAMESPACE,
    NOW,
    OPTIONS,
    applied,
    decided,
    deployment,
    made,
    meta,
    observed,
    running,
    session,
    snapshot,
)


def going(kind: str) -> tuple[MetaView, ...]:
    """What a session has, with the child of that kind being deleted, made of something else."""
    return tuple(
        replace(there, deleting=True, digest="old") if there.kind == kind else there
        for there in made(session())
    )


@pytest.mark.parametrize("kind", ["Service", "Secret"])
def test_a_child_that_goes_is_waited_for(kind: str) -> None:
    plan = decided(session(status=running(session())), metas=going(kind))
    assert not plan.credentials
    assert [child for child in applied(plan) if child.startswith(kind)] == []


def test_no_job_begins_with_a_secret_that_goes() -> None:
    plan = decided(session(status=running(session())), metas=going("Secret"))
    assert [child for child in applied(plan) if child.startswith("Job")] == []


def test_the_secret_that_a_namespace_shares_is_waited_for() -> None:
    there = MetaView("Secret", NAMESPACE, names.TAMIYO, "s", digest="old", deleting=True)
    seen = NamespaceObserved(namespace=NAMESPACE, now=NOW, sessions=(session(),), secret=there)
    assert namespaces.decide(seen, OPTIONS) == Plan()


def test_a_controller_that_goes_is_waited_for() -> None:
    manifest = tamiyo.shared(NAMESPACE, OPTIONS)
    assert controller.if_changed(manifest, deployment(names.TAMIYO, deleting=True)) == ()


def test_the_shared_controller_that_goes_holds_up_none_of_a_sessions_own() -> None:
    manifest = tamiyo.dedicated(session(), OPTIONS)
    shared = deployment(names.TAMIYO, digest=digest_in(manifest), deleting=True)
    assert controller.if_changed(manifest, shared) == (manifest,)


def test_a_seed_that_goes_is_waited_for() -> None:
    view = session()
    item = SeedSnapshot(layer="layers.0", slot=0, state="training", blueprint="affine")
    name = names.seed(view.name, item.layer, item.slot)
    there = meta("Seed", view, name, "x", deleting=True)
    plan = seeds.planned(observed(view, metas=(there,), snapshot=snapshot(seeds=[item])))
    assert plan == seeds.SeedsPlan()
