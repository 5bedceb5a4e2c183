"""Seed objects: as many as there may be, written as often as is worth it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from esper.contracts.operational import SeedSnapshot
from esper.contracts.resources import Seed
from esper_operator.children import names, seed
from esper_operator.children.objects import digest_in
from esper_operator.decisions import seeds
from esper_operator.decisions.seeds import SeedsPlan
from tests.unit.esper_operator.objects import NOW, meta, observed, session, snapshot


def grown(layer: str = "layers.0", slot: int = 0, **fields: Any) -> SeedSnapshot:
    given = {"state": "training", "blueprint": "affine", "kernel": "5f" * 20, "health_percent": 70}
    return SeedSnapshot(layer=layer, slot=slot, **given | fields)


def planned(
    *items: SeedSnapshot,
    before: SeedSnapshot | None = None,
    since: float = 1.0,
    outcome: str = "Running",
    others: int = 0,
    uid: str = "first",
) -> SeedsPlan:
    """The plan where the first seed was last written as `before`, so many seconds ago."""
    view = session()
    there = []
    statuses, times = {}, {}
    if before is not None:
        manifest = seed.manifest(view, before)
        name = manifest["metadata"]["name"]
        there.append(replace(meta("Seed", view, name, digest_in(manifest)), uid=uid))
        statuses["first"] = {**before.status().to_wire(), "observedGeneration": 1}
        times["first"] = NOW - since
    there += [meta("Seed", view, f"digits-old-{n:03}", "x") for n in range(others)]
    told = snapshot(seeds=items, outcome=outcome)
    return seeds.planned(
        observed(view, metas=tuple(there), snapshot=told, seed_statuses=statuses, seed_times=times)
    )


def test_a_seed_is_made_with_its_status() -> None:
    plan = planned(grown(slot=2))
    name = names.seed("digits", "layers.0", 2)
    assert [item["metadata"]["name"] for item in plan.apply] == [name]
    assert plan.statuses[0]["status"]["state"] == "training"
    whole = {**plan.apply[0], "status": plan.statuses[0]["status"]}
    made = Seed.model_validate(whole, by_alias=True, by_name=False)
    assert (made.spec.session, made.spec.layer, made.spec.slot) == ("digits", "layers.0", 2)
    assert made.metadata.owner_references[0].name == "digits"
    assert made.metadata.labels["esper.dev/session"] == "digits"


def test_a_seed_that_was_made_again_gets_its_status_again() -> None:
    assert planned(grown(), before=grown()).statuses == ()
    again = planned(grown(), before=grown(), uid="second")
    assert again.apply == ()
    assert again.statuses[0]["status"]["state"] == "training"


@pytest.mark.parametrize("layer", ["a", "features.0.conv", "A.B_c", "x" * 512])
def test_names_are_labels_that_tell_layers_apart(layer: str) -> None:
    name = names.seed("s" * 48, layer, 63)
    assert len(name) <= 63
    assert name != names.seed("s" * 48, layer + "x", 63)
    assert name == names.seed("s" * 48, layer, 63)


BEFORE = grown()


@pytest.mark.parametrize(
    ("change", "seconds", "written"),
    [
        ({}, 1e6, False),
        ({"state": "grafting"}, 0, True),
        ({"cycle": 1}, 0, True),
        ({"kernel": "60" * 20}, 0, True),
        ({"alpha_percent": 40}, 29, False),
        ({"alpha_percent": 40}, 30, True),
        ({"contribution": "0.5"}, 29, False),
        ({"contribution": "0.5"}, 30, True),
        ({"health_percent": 79}, 1e6, False),
        ({"health_percent": 61}, 1e6, False),
        ({"health_percent": 80}, 299, False),
        ({"health_percent": 80}, 300, True),
        ({"health_percent": 60}, 300, True),
        ({"health_percent": None}, 299, False),
        ({"health_percent": None}, 300, True),
        ({"health_percent": 80, "alpha_percent": 9}, 30, True),
    ],
)
def test_what_is_worth_a_write(change: dict[str, Any], seconds: float, written: bool) -> None:
    plan = planned(grown(**change), before=BEFORE, since=seconds)
    assert bool(plan.statuses) is written
    assert plan.apply == ()


def test_what_waits_is_looked_at_when_it_is_due() -> None:
    assert planned(grown(alpha_percent=1), before=BEFORE, since=10).again_in == pytest.approx(20)
    assert planned(grown(health_percent=1), before=BEFORE, since=10).again_in == pytest.approx(290)
    assert planned(grown(health_percent=69), before=BEFORE, since=10).again_in is None


def test_at_the_end_every_figure_is_written() -> None:
    plan = planned(grown(health_percent=71), before=BEFORE, since=0, outcome="Succeeded")
    assert len(plan.statuses) == 1


def test_after_a_restart_of_the_operator_each_is_written_once() -> None:
    view = session()
    manifest = seed.manifest(view, BEFORE)
    there = meta("Seed", view, manifest["metadata"]["name"], digest_in(manifest))
    told = snapshot(seeds=(BEFORE,))
    plan = seeds.planned(observed(view, metas=(there,), snapshot=told))
    assert plan.apply == ()
    assert len(plan.statuses) == 1


def test_one_that_was_deleted_is_made_anew() -> None:
    plan = planned(BEFORE, before=None)
    assert len(plan.apply) == 1


@pytest.mark.parametrize(("others", "deleted"), [(0, 0), (63, 0), (64, 1), (70, 7)])
def test_there_are_never_more_than_64(others: int, deleted: int) -> None:
    plan = planned(grown(), others=others)
    assert [item.kind for item in plan.delete] == ["Seed"] * deleted
    assert all(item.name.startswith("digits-old") for item in plan.delete)
    assert 1 + others - len(plan.delete) <= 64


def test_without_a_report_seeds_stay_as_they_are() -> None:
    assert seeds.planned(observed(session())) == SeedsPlan()
