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

FIGURES_SECONDS = 5.0
"""Between two writes of figures alone."""


def told(scene: Scene) -> Step:
    """The scene with what the newest report says, or when that will be taken over.

    The first report of an attempt is taken over at once, whatever the clock of its machine says.
    """
    snapshot = scene.observed.snapshot
    if snapshot is None or not 0 < snapshot.attempt <= scene.record.attempt:
        return Step(scene)
    current = snapshot.attempt == scene.record.attempt
    time = snapshot.time.replace(microsecond=0)
    written = scene.record.last_heartbeat_time
    if written is not None and not (current and _is_past(scene, written)):
        if time < written:
            return Step(scene)
        due = written.timestamp() + FIGURES_SECONDS
        # The newest report is taken over though none may follow it, and though clocks differ.
        waiting = due - max(scene.now, snapshot.time.timestamp())
        if waiting > 0 and not _urgent(scene.record, snapshot):
            return Step(scene, again_in=min(waiting, FIGURES_SECONDS))
    fields = snapshot.observed()
    # Else a report that an earlier attempt has left would pass for a sign of this one.
    fields["last_heartbeat_time"] = time if current else written
    return Step(scene.recorded(**fields))


def last_report(scene: Scene) -> float | None:
    """When the attempt last reported; None: it has not yet."""
    times = []
    if scene.snapshot is not None:
        times.append(scene.snapshot.time.timestamp())
    written, decided = scene.record.last_heartbeat_time, scene.record.attempt_time
    if written is not None and decided is not None and written > decided:
        times.append(written.timestamp())
    return max(times, default=None)


def _is_past(scene: Scene, written: datetime) -> bool:
    """Whether the report that was written last is one of an attempt before."""
    decided = scene.record.attempt_time
    return decided is not None and written <= decided


def _urgent(record: TrainingSessionStatus, snapshot: SessionSnapshot) -> bool:
    return (
        snapshot.outcome is not SessionOutcome.RUNNING
        or snapshot.seed_counts != record.seeds
        or snapshot.checkpoint != record.checkpoint
    )
