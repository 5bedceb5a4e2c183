"""How a session stands, in conditions: what `kubectl get` and `kubectl wait` show of it."""

from __future__ import annotations

from esper.contracts.resources import Condition, TrainingSessionStatus
from esper_operator.children import names
from esper_operator.conditions import Kind, Reason, Truth, condition, merged
from esper_operator.decisions import attempts, controller, suspension
from esper_operator.decisions.ends import End
from esper_operator.decisions.scene import Scene
from esper_operator.decisions.workers import Readiness, num_ready, readiness, refused
from esper_operator.status import changed, summary_of


def conditions(scene: Scene) -> TrainingSessionStatus:
    """The status of a session that goes on, with all of its conditions."""
    workers = _workers(scene)
    found = (
        _condition(scene, Kind.SUCCEEDED, "Unknown", *_summary(scene, workers)),
        _suspended(scene),
        _condition(scene, Kind.WORKERS_READY, workers.status, workers.reason, workers.message),
        _controller_ready(scene),
        _checkpointed(scene),
    )
    return changed(
        scene.record,
        conditions=merged(scene.record.conditions, found),
        workers=num_ready(scene),
    )


def final_conditions(scene: Scene, end: End) -> TrainingSessionStatus:
    """The status of a session that has just ended."""
    found = (
        _condition(
            scene, Kind.SUCCEEDED, "True" if end.succeeded else "False", end.reason, end.message
        ),
        _condition(scene, Kind.SUSPENDED, "False", Reason.NOT_SUSPENDED, ""),
        _condition(scene, Kind.WORKERS_READY, "False", Reason.FINISHED, ""),
        _condition(
            scene, Kind.CONTROLLER_READY, "True", Reason.NOT_NEEDED, "the session has ended"
        ),
        _checkpointed(scene),
    )
    return changed(scene.record, conditions=merged(scene.record.conditions, found), workers=0)


def lasting_conditions(scene: Scene) -> TrainingSessionStatus:
    """The status of a session that ended before; its last report may have come since."""
    found = (_checkpointed(scene),)
    kept = merged(scene.record.conditions, found)
    in_order = {item.type: item for item in scene.record.conditions}
    in_order |= {item.type: item for item in kept}
    return changed(scene.record, conditions=tuple(in_order.values()))


def _workers(scene: Scene) -> Readiness:
    if suspension.is_asked(scene):
        left = sum(1 for pod in scene.pods if not pod.over)
        message = f"{left} pods are ending" if left else "no pod is left"
        return Readiness("False", Reason.SUSPENDED, message)
    return readiness(scene)


def _summary(scene: Scene, workers: Readiness) -> tuple[str, str]:
    """Reason and message of the summary, while the end is unknown."""
    before = summary_of(scene.record)
    if suspension.is_asked(scene):
        return Reason.SUSPENDED, workers.message
    if suspension.is_queued(scene):
        queue = scene.spec.run_policy.queue_name
        return Reason.QUEUED, workers.message if queue is None else f"waits in queue {queue}"
    if workers.ready or _is_ending(scene):
        return Reason.RUNNING, "; ".join((workers.message, *refused(scene)))
    if scene.job is not None and scene.record.interrupted_pods:
        lost = len(scene.record.interrupted_pods)
        return Reason.INTERRUPTED, f"{lost} pods were ended from outside; {workers.message}"
    if workers.reason == Reason.NODE_NOT_READY:
        return Reason.INTERRUPTED, workers.message
    if before is not None and before.reason in attempts.FOLLOWING:
        return before.reason, before.message
    if scene.job is None and (before is None or before.reason == Reason.CREATED):
        return Reason.CREATED, workers.message
    return Reason.STARTING, workers.message


def _is_ending(scene: Scene) -> bool:
    """Whether a worker has ended well: the others are about to, and nothing starts any more."""
    job = scene.job
    return job is not None and any(pod.phase == "Succeeded" for pod in scene.pods_of(job))


def _suspended(scene: Scene) -> Condition:
    if suspension.is_asked(scene):
        message = "runPolicy.suspend"
        return _condition(scene, Kind.SUSPENDED, "True", Reason.SUSPEND_REQUESTED, message)
    if suspension.is_queued(scene):
        message = f"Job {scene.job_name} is suspended"
        return _condition(scene, Kind.SUSPENDED, "True", Reason.WAITING_IN_QUEUE, message)
    return _condition(scene, Kind.SUSPENDED, "False", Reason.NOT_SUSPENDED, "")


def _controller_ready(scene: Scene) -> Condition:
    if suspension.is_asked(scene):
        message = "the session is suspended"
        return _condition(scene, Kind.CONTROLLER_READY, "True", Reason.NOT_NEEDED, message)
    own = controller.is_dedicated(scene.spec)
    name = names.tamiyo(scene.session.name) if own else names.TAMIYO
    observed = scene.observed
    found = controller.standing(scene.spec, name, observed.tamiyo, observed.refusals)
    return _condition(scene, Kind.CONTROLLER_READY, *found)


def _checkpointed(scene: Scene) -> Condition:
    checkpoint = scene.record.checkpoint
    if checkpoint is None:
        return _condition(scene, Kind.CHECKPOINTED, "False", Reason.NO_CHECKPOINT, "")
    return _condition(scene, Kind.CHECKPOINTED, "True", Reason.CHECKPOINT_WRITTEN, checkpoint.name)


def _condition(scene: Scene, kind: Kind, status: Truth, reason: str, message: str) -> Condition:
    return condition(
        kind, status, reason, message, now=scene.now, generation=scene.session.generation
    )
