"""Suspension: `runPolicy.suspend` deletes the Job, and a queue starts and stops it by itself."""

from __future__ import annotations

from esper_operator.conditions import Kind, Reason, found
from esper_operator.decisions import attempts
from esper_operator.decisions.ends import Step
from esper_operator.decisions.scene import Scene
from esper_operator.times import datetime_of


def is_asked(scene: Scene) -> bool:
    """Whether the session is to have no pod."""
    return scene.spec.run_policy.suspend


def is_queued(scene: Scene) -> bool:
    """Whether a queue holds the attempt's Job back; who suspends a Job otherwise holds it too."""
    return scene.job is not None and scene.job.suspended and not scene.job.ended


def is_active(scene: Scene) -> bool:
    """Whether time counts: the session is neither suspended nor held back."""
    if is_asked(scene) or is_queued(scene):
        return False
    return scene.spec.run_policy.queue_name is None or scene.job is not None


def resumed(scene: Scene) -> Step:
    """Another attempt, where the session was suspended after its Job had been made."""
    before = found(scene.record.conditions, Kind.SUSPENDED)
    was = before is not None and before.status == "True"
    if not was or before is None or before.reason != Reason.SUSPEND_REQUESTED:
        return Step(scene)
    if scene.record.job is None and scene.job is None:
        return Step(scene)
    message = f"the session goes on with attempt {scene.record.attempt + 1}"
    return attempts.followed(scene, Reason.RESUMED, message)


def timed(scene: Scene) -> Scene:
    """The scene with the session's active time brought up to date."""
    record, now = scene.record, scene.now
    active = is_active(scene)
    if active and record.active_since is None:
        since = datetime_of(now)
        return scene.recorded(active_since=since, start_time=record.start_time or since)
    if not active and record.active_since is not None:
        spent = max(0, int(now - record.active_since.timestamp()))
        return scene.recorded(active_since=None, active_seconds=record.active_seconds + spent)
    return scene
