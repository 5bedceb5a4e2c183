"""Seed objects: which there are, and when their status is written.

At most 64 a session. A transition is written at once; a share that ramps and a gain at most every
half minute, a layer's health on a change of ten points and at most every five minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from esper.contracts.assets import MAX_SEEDS
from esper.contracts.enums import SessionOutcome
from esper.contracts.operational import SeedSnapshot
from esper.contracts.resources import API_VERSION
from esper_operator.children import names, seed
from esper_operator.children.objects import Json
from esper_operator.decisions.ends import soonest
from esper_operator.observed import Observed
from esper_operator.plans import Deletion, Manifest
from esper_operator.views import MetaView

FIGURES_SECONDS = 30.0
HEALTH_SECONDS = 300.0
HEALTH_POINTS = 10

_FIGURES = frozenset({"alphaPercent", "contribution", "healthPercent"})


@dataclass(frozen=True)
class SeedsPlan:
    """What is to be written of a session's Seeds."""

    apply: tuple[Manifest, ...] = ()
    statuses: tuple[Manifest, ...] = ()
    delete: tuple[Deletion, ...] = ()
    again_in: float | None = None


def planned(observed: Observed) -> SeedsPlan:
    """The Seeds of the newest report; without one they stay as they are."""
    snapshot, session = observed.snapshot, observed.session
    if snapshot is None:
        return SeedsPlan()
    of_session = [m for m in observed.metas if m.kind == "Seed"]
    there = {m.name: m for m in of_session if not m.deleting}
    going = {m.name for m in of_session if m.deleting}
    final = snapshot.outcome is not SessionOutcome.RUNNING
    apply: list[Manifest] = []
    statuses: list[Manifest] = []
    waits: list[float | None] = []
    told: set[str] = set()
    for item in snapshot.seeds[:MAX_SEEDS]:
        name = names.seed(session.name, item.layer, item.slot)
        told.add(name)
        if name in going:
            continue  # it is made again when it has gone, which is heard
        meta = there.get(name)
        if meta is None or meta.session_uid != session.uid:
            apply.append(seed.manifest(session, item))
        content = _content(item)
        wait = _wait(observed, meta, content, final=final)
        if wait == 0.0:
            statuses.append(seed.status(session, item, content))
        else:
            waits.append(wait)
    return SeedsPlan(tuple(apply), tuple(statuses), _surplus(there, told), soonest(*waits))


def _content(item: SeedSnapshot) -> Json:
    return {**item.status().to_wire(), "observedGeneration": 1}


def _wait(
    observed: Observed, meta: MetaView | None, content: Mapping[str, Any], *, final: bool
) -> float | None:
    """Seconds until the status is to be written; None: it need not be.

    A Seed that was deleted comes back as another object, which has none.
    """
    before = None if meta is None else observed.seed_statuses.get(meta.uid)
    if meta is None or before is None:
        return 0.0
    differing = {key for key in {*before, *content} if before.get(key) != content.get(key)}
    if not differing:
        return None
    if final or differing - _FIGURES:
        return 0.0
    since = observed.seed_times.get(meta.uid, 0.0)
    waits = []
    if differing - {"healthPercent"}:
        waits.append(since + FIGURES_SECONDS - observed.now)
    if _health_moved(before.get("healthPercent"), content.get("healthPercent")):
        waits.append(since + HEALTH_SECONDS - observed.now)
    return max(0.0, min(waits)) if waits else None


def _health_moved(before: object, now: object) -> bool:
    if not isinstance(before, int) or not isinstance(now, int):
        return before != now
    return abs(now - before) >= HEALTH_POINTS


def _surplus(there: Mapping[str, MetaView], told: set[str]) -> tuple[Deletion, ...]:
    """Those that are no longer told of, as far as they leave no room for those that are."""
    untold = sorted(there.keys() - told)
    beyond = len(there.keys() | told) - MAX_SEEDS
    return tuple(
        Deletion(API_VERSION, "Seed", there[name].namespace, name, there[name].uid)
        for name in untold[: max(0, beyond)]
    )
