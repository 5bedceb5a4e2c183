"""What `kubectl describe` tells of a session: an Event for each turn that its status takes.

An Event goes with the status whose news it is, so it is told once, whoever decides next. Before
workers run only what keeps them from it is told: of a thousand sessions that are applied at once,
each would have to be written for its Events before the next one gets its Job.
"""

from __future__ import annotations

from collections.abc import Mapping

from esper.contracts.enums import SeedState
from esper.contracts.operational import SeedSnapshot, SessionSnapshot
from esper.contracts.resources import TrainingSessionStatus
from esper.errors import one_line
from esper_operator.conditions import MAX_MESSAGE, Kind, Reason, found
from esper_operator.plans import Notice
from esper_operator.status import summary_of

TROUBLE = frozenset(
    {
        *(Reason.CREDENTIALS_MISSING, Reason.CHILD_REFUSED, Reason.PODS_REFUSED),
        *(Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_REFUSED),
    }
)
"""Reasons of the condition WorkersReady that are told."""
MAX_NAMED = 5
"""Seeds that one Event names; however many have come to a state at a boundary, it is one Event."""

_STATES: Mapping[SeedState, Reason] = {
    SeedState.FOSSILIZED: Reason.SEED_FOSSILIZED,
    SeedState.CULLED: Reason.SEED_CULLED,
}


def told(
    before: TrainingSessionStatus, after: TrainingSessionStatus, snapshot: SessionSnapshot | None
) -> tuple[Notice, ...]:
    """The Events of the way from one status to the next, but for those that end an attempt."""
    return (*_seeds(before, after, snapshot), *_hindered(before, after), *_turned(before, after))


def _turned(before: TrainingSessionStatus, after: TrainingSessionStatus) -> tuple[Notice, ...]:
    """What the summary has come to."""
    old, new = summary_of(before), summary_of(after)
    if new is None or (old is not None and old.reason == new.reason):
        return ()
    same_attempt = before.attempt == after.attempt
    if new.reason == Reason.RUNNING:
        lost = f", after {after.disruptions} disruptions" if after.disruptions else ""
        text = f"Job {after.job}{lost}: {new.message}"
        return (_notice("Normal", Reason.RUNNING, after, text),)
    if new.reason == Reason.INTERRUPTED and same_attempt:
        text = f"{new.message} ({after.disruptions} disruptions so far)"
        return (_notice("Warning", Reason.INTERRUPTED, after, text),)
    if new.reason == Reason.SUSPENDED and before.job is not None:
        return (_notice("Normal", Reason.SUSPENDED, after, "its workers are ended"),)
    return ()


def _hindered(before: TrainingSessionStatus, after: TrainingSessionStatus) -> tuple[Notice, ...]:
    """What has come to stand in the workers' way."""
    old = found(before.conditions, Kind.WORKERS_READY)
    new = found(after.conditions, Kind.WORKERS_READY)
    if new is None or new.reason not in TROUBLE or (old is not None and old.reason == new.reason):
        return ()
    return (_notice("Warning", Reason(new.reason), after, new.message),)


def _seeds(
    before: TrainingSessionStatus, after: TrainingSessionStatus, snapshot: SessionSnapshot | None
) -> tuple[Notice, ...]:
    """Seeds that have become fossils or were culled, as the counts of the two statuses say."""
    if snapshot is None:
        return ()
    told: list[Notice] = []
    for state, reason in _STATES.items():
        count = getattr(after.seeds, state.value)
        num_new = count - getattr(before.seeds, state.value)
        if num_new > 0:
            newest = sorted(
                (seed for seed in snapshot.seeds if seed.state is state), key=_since, reverse=True
            )
            names = ", ".join(_name(seed) for seed in newest[: min(num_new, MAX_NAMED)])
            more = f" and {num_new - MAX_NAMED} more" if num_new > MAX_NAMED else ""
            text = f"epoch {after.epoch}: {names}{more}; {count} {state.value} in all"
            told.append(Notice("Normal", reason, one_line(text, MAX_MESSAGE), background=True))
    return tuple(told)


def _since(seed: SeedSnapshot) -> float:
    return seed.transitions[-1].time.timestamp() if seed.transitions else 0.0


def _name(seed: SeedSnapshot) -> str:
    blueprint = f" ({seed.blueprint})" if seed.blueprint else ""
    return f"{seed.layer} slot {seed.slot}{blueprint}"


def _notice(kind: str, reason: Reason, status: TrainingSessionStatus, text: str) -> Notice:
    message = one_line(f"attempt {status.attempt}: {text}", MAX_MESSAGE)
    return Notice("Warning" if kind == "Warning" else "Normal", reason, message)
