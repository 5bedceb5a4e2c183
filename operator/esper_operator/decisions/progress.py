"""What a status takes from a session's reports, and how often.

A session that trains in seconds reports many times in one. Its figures are written at most every
few seconds; what a person waits for is written at once: its end, a checkpoint, a seed's new state.
"""

from __future__ import annotations

from datetime import datetime

from esper.contracts.enums import SessionOutcome
from esper.contracts.operational import SessionSnapshot
from esper.contracts.resources import TrainingSessionStatus
from esper_operator.decisions.ends import Step
from esper_operator.decisions.scene import Scene
from esper_operator.times import datetime_of

FIGURES_SECONDS = 5.0
"""Between two writes of figures alone."""


def told(scene: Scene) -> Step:
    """The scene with what the newest report says, or when that will be taken over.

    The first report of an attempt is taken over at once, whatever the clock of its machine says.
    """
    snapshot, record = scene.observed.snapshot, scene.record
    if snapshot is None or not 0 < snapshot.attempt <= record.attempt:
        return Step(scene)
    current = snapshot.attempt == record.attempt
    written, news = record.last_heartbeat_time, True
    if written is not None and not (current and _is_past(scene, written)):
        if snapshot.sequence < record.report_sequence or not (current or _is_past(scene, written)):
            return Step(scene)
        news = snapshot.sequence > record.report_sequence
        # The newest report is taken over though none may follow it.
        waiting = written.timestamp() + FIGURES_SECONDS - scene.now
        if 0 < waiting <= FIGURES_SECONDS and not _urgent(record, snapshot):
            return Step(scene, again_in=waiting)
    fields = snapshot.observed()
    fields["report_sequence"] = snapshot.sequence
    # Else a report that an earlier attempt has left would pass for a sign of this one, and one
    # that is read again for a new one.
    fields["last_heartbeat_time"] = datetime_of(_heard(scene)) if current and news else written
    return Step(scene.recorded(**fields))


def last_heard(scene: Scene) -> float | None:
    """When any attempt last reported, by the operator's clock; None: none has yet."""
    written, snapshot = scene.record.last_heartbeat_time, scene.observed.snapshot
    times = [] if written is None else [min(written.timestamp(), scene.now)]
    if snapshot is not None and _is_news(scene, snapshot):
        times.append(_heard(scene))
    return max(times, default=None)


def last_report(scene: Scene) -> float | None:
    """When the attempt last reported, by the operator's clock; None: it has not yet.

    A report that the status shows was heard when the status says so, however often it is read.
    """
    written = scene.record.last_heartbeat_time
    shown = written is not None and not _is_past(scene, written)
    times = [min(written.timestamp(), scene.now)] if written is not None and shown else []
    if scene.snapshot is not None and not (shown and not _is_news(scene, scene.snapshot)):
        times.append(_heard(scene))
    return max(times, default=None)


def _heard(scene: Scene) -> float:
    heard = scene.observed.heard
    return scene.now if heard is None else min(heard, scene.now)


def _is_news(scene: Scene, snapshot: SessionSnapshot) -> bool:
    """Whether it is newer than the report that the status shows."""
    return snapshot.sequence > scene.record.report_sequence


def _is_past(scene: Scene, written: datetime) -> bool:
    """Whether the report that was written last is one of an attempt before."""
    decided = scene.record.attempt_time
    return decided is None or written <= decided


def _urgent(record: TrainingSessionStatus, snapshot: SessionSnapshot) -> bool:
    return (
        snapshot.outcome is not SessionOutcome.RUNNING
        or snapshot.seed_counts != record.seeds
        or snapshot.checkpoint != record.checkpoint
    )
