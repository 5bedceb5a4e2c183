"""Pods of nodes that are lost: nobody there can end them, so the API server is told to forget them.

Who ends a pod gives it a time until which it may take; its node ends it then at the latest. One
that is there for longer is on a node that does not answer. Its work may still go on, out of reach:
so it is followed by another attempt, whose number keeps it from writing checkpoints beside the new
one.
"""

from __future__ import annotations

from esper_operator.conditions import Reason
from esper_operator.decisions import attempts
from esper_operator.decisions.ends import Step, soonest
from esper_operator.decisions.scene import Scene
from esper_operator.plans import Deletion
from esper_operator.pod_view import PodView

MARGIN_SECONDS = 30.0
"""How long after the end of its grace a pod is taken for lost: nodes and clocks are not exact."""


def followed(scene: Scene) -> Step:
    """Another attempt where the Job waits for a lost pod, or when one of its pods will be lost."""
    job = scene.job
    if job is None or job.ended or job.suspended:
        return Step(scene)
    lost = [pod for pod in scene.pods_of(job) if _left(scene, pod) == 0.0]
    if not lost:
        return Step(scene)
    where = f" on node {lost[0].node}" if lost[0].node else ""
    message = (
        f"attempt {job.attempt}: pod {lost[0].name}{where} has not ended in time; "
        f"attempt {job.attempt + 1} goes on without it"
    )
    return attempts.followed(scene, Reason.DISRUPTED, message, summary=Reason.INTERRUPTED)


def deletions(scene: Scene) -> tuple[Deletion, ...]:
    """Of the session's lost pods, whichever attempt they are of, each once and with no grace."""
    return tuple(
        Deletion("v1", "Pod", pod.namespace, pod.name, pod.uid, grace_seconds=0)
        for pod in scene.pods
        if not pod.given_up and _left(scene, pod) == 0.0
    )


def again_in(scene: Scene) -> float | None:
    """Seconds until one more pod is lost that is being ended now."""
    waits = (_left(scene, pod) for pod in scene.pods if not pod.given_up)
    return soonest(*(seconds for seconds in waits if seconds))


def _left(scene: Scene, pod: PodView) -> float | None:
    """Seconds until a pod is taken for lost; None: it is not about to be.

    Only one that a disruption ends: its node has been given up, or should have ended it.
    """
    if pod.over or pod.disrupted is None or pod.deleted_by is None:
        return None
    return max(0.0, pod.deleted_by + MARGIN_SECONDS - scene.now)
