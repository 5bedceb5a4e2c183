"""The three deadlines that bound a session's life, each counted only while it can be kept.

- `activeDeadlineSeconds`: of the whole session, without what it was suspended or in a queue.
- `startupDeadlineSeconds`: from an attempt's workers to its first report. It ends the session, with
  what stood in the way as its reason.
- `progressDeadlineSeconds`: between two reports. It ends the attempt, which may have hung.

A session reports as long as it makes progress, and when the operator heard that lies in the status.
While the bus does not answer nobody can tell. Once it does, and when the operator itself was away,
it listens for a while before it says that somebody was silent for too long. Workers that do not
come up are seen without it.

Disruptions may begin attempt after attempt. So that they end some time, a session has failed too
that is active and reports nothing for as long as all of its attempts might have taken.
"""

from __future__ import annotations

from esper_operator.conditions import Reason
from esper_operator.decisions import attempts, progress, suspension
from esper_operator.decisions.ends import End, Step, soonest
from esper_operator.decisions.scene import Scene
from esper_operator.decisions.workers import Readiness

LISTENING_SECONDS = 60.0
"""Within which a session that goes on is heard; workers report every half minute at least."""

_TELLING = frozenset(
    {
        *(Reason.CREDENTIALS_MISSING, Reason.CHILD_REFUSED, Reason.PODS_REFUSED),
        *(Reason.UNSCHEDULABLE, Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_REFUSED),
    }
)
"""What stood in the way of workers and is worth being the reason of the end."""


def bounded(scene: Scene, workers: Readiness) -> Step:
    """The end, or another attempt, where a deadline has passed; else when the next one would."""
    active = _active(scene)
    if active is not None and active <= 0:
        limit = scene.spec.run_policy.active_deadline_seconds
        message = f"active for {limit} s (runPolicy.activeDeadlineSeconds)"
        return Step(scene, End(False, Reason.ACTIVE_DEADLINE_EXCEEDED, message, scene.now))
    if not suspension.is_active(scene) and scene.job is not None:
        return Step(scene, again_in=active)
    has_reported = progress.last_report(scene) is not None
    step = _progressing(scene, workers) if has_reported else _starting(scene, workers)
    stalled = _stalled(scene)
    if step.end is None and stalled is not None and stalled <= 0:
        spent = f"{_longest(scene):.0f} s, over {scene.record.attempt} attempts"
        message = f"no progress within {spent}"
        return Step(scene, End(False, Reason.PROGRESS_DEADLINE_EXCEEDED, message, scene.now))
    return Step(step.scene, step.end, step.notices, soonest(active, stalled, step.again_in))


def _active(scene: Scene) -> float | None:
    """Seconds that are left of the session's active time; None: there is no limit, or it rests."""
    limit, since = scene.spec.run_policy.active_deadline_seconds, scene.record.active_since
    if limit is None or since is None:
        return None
    return limit - scene.record.active_seconds - (scene.now - since.timestamp())


def _stalled(scene: Scene) -> float | None:
    """Seconds that are left for any attempt to report; None where that can't be said."""
    since, heard = scene.record.active_since, scene.observed.hearing_since
    if since is None or heard is None:
        return None
    last = max(since.timestamp(), progress.last_heard(scene) or 0.0)
    return _listened(heard, last, _longest(scene)) - scene.now


def _longest(scene: Scene) -> float:
    policy = scene.spec.run_policy
    attempt = max(policy.startup_deadline_seconds, policy.progress_deadline_seconds)
    return float(attempt * (policy.backoff_limit + 1))


def _starting(scene: Scene, workers: Readiness) -> Step:
    since = _began(scene)
    limit = float(scene.spec.run_policy.startup_deadline_seconds)
    field = "runPolicy.startupDeadlineSeconds"
    if scene.record.last_heartbeat_time is not None and workers.reason == Reason.UNSCHEDULABLE:
        # It has trained before, and waits for room as one that was preempted does.
        limit = max(limit, float(scene.spec.run_policy.progress_deadline_seconds))
        field = "runPolicy.progressDeadlineSeconds"
    due = since + limit
    if workers.ready:
        heard = scene.observed.hearing_since
        if heard is None:
            return Step(scene)
        due = _listened(heard, since, limit)
    left = due - scene.now
    if left > 0:
        return Step(scene, again_in=left)
    reason = workers.reason if workers.reason in _TELLING else Reason.STARTUP_DEADLINE_EXCEEDED
    message = f"no first step within {limit:.0f} s ({field}): {workers.message}"
    return Step(scene, End(False, reason, message, scene.now))


def _progressing(scene: Scene, workers: Readiness) -> Step:
    heard = scene.observed.hearing_since
    if workers.ready and heard is None:
        return Step(scene)
    limit = scene.spec.run_policy.progress_deadline_seconds
    since = max(_began(scene), progress.last_report(scene) or 0.0)
    listening = workers.ready and heard is not None
    due = _listened(heard or 0.0, since, limit) if listening else since + limit
    left = due - scene.now
    if left > 0:
        return Step(scene, again_in=left)
    message = (
        f"attempt {scene.record.attempt}: no progress within {limit} s "
        f"(runPolicy.progressDeadlineSeconds): {workers.message}"
    )
    return attempts.failed(scene, Reason.PROGRESS_DEADLINE_EXCEEDED, message)


def _listened(heard: float, since: float, limit: float) -> float:
    """When a deadline may be said to be missed, where the bus has answered since `heard`."""
    return max(since + limit, heard + min(limit, LISTENING_SECONDS))


def _began(scene: Scene) -> float:
    """Since when the attempt's workers could have been at work."""
    job = scene.job
    if job is not None:
        return job.started if job.started is not None else job.created
    active = scene.record.active_since
    return max(attempts.due(scene), 0.0 if active is None else active.timestamp())
