"""Sessions that have ended go after a while: `runPolicy.ttlSecondsAfterFinished`."""

from __future__ import annotations

from esper.contracts.resources import API_VERSION
from esper_operator.decisions.scene import Scene
from esper_operator.plans import Deletion


def left(scene: Scene) -> float | None:
    """Seconds until the session is to be deleted, 0 where it is due; None: it stays."""
    ttl, ended = scene.spec.run_policy.ttl_seconds_after_finished, scene.record.completion_time
    if ttl is None or ended is None:
        return None
    return max(0.0, ended.timestamp() + ttl - scene.now)


def deletion(scene: Scene) -> Deletion:
    """The session's end; all that is its own goes with it."""
    session = scene.session
    return Deletion(API_VERSION, "TrainingSession", session.namespace, session.name, session.uid)
