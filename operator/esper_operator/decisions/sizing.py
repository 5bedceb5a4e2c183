"""How many workers an attempt has, and when another one has to begin because that has changed.

The number of nodes is in a worker's command line, which no Job can change: a session of another
size is another attempt, which goes on from the newest checkpoint and counts as no failure.

An elastic session (`workers.minReplicas`) goes on with those workers that found a node, once the
others have waited for long. Its next attempt asks for all of them again, and so does any change of
its spec.
"""

from __future__ import annotations

from esper.contracts.resources import TrainingSessionSpec
from esper_operator.conditions import Reason
from esper_operator.decisions import attempts
from esper_operator.decisions.ends import Step
from esper_operator.decisions.scene import Scene

ELASTIC_SECONDS = 120.0
"""How long workers may find no node before an elastic session goes on without them."""


def resized(scene: Scene) -> Step:
    """Another attempt where the number of workers is to be another one."""
    job, wanted = scene.job, scene.spec.workers.replicas
    if job is None:
        # No Job has taken the number over yet, but one of an attempt that has shrunk stays.
        if _spec_changed(scene) or scene.record.replicas == 0:
            return Step(scene.recorded(replicas=wanted))
        return Step(scene)
    if job.completions != scene.record.replicas:
        scene = scene.recorded(replicas=job.completions)
    if wanted < job.completions or (wanted > job.completions and _spec_changed(scene)):
        message = f"{job.completions} workers become {wanted}; attempt {job.attempt + 1} goes on"
        return attempts.followed(scene, Reason.RESIZED, message)
    return _shrunk(scene)


def fits(spec: TrainingSessionSpec, replicas: int) -> bool:
    """Whether the session can be trained by that many workers."""
    processes = replicas * spec.workers.processes_per_worker
    shards = spec.training.logical_shards
    if shards > 1 and shards % processes:
        return False
    return spec.training.sharding != "full" or processes > 1


def _spec_changed(scene: Scene) -> bool:
    return scene.record.observed_generation != scene.session.generation


def _shrunk(scene: Scene) -> Step:
    """An attempt with fewer workers, where an elastic session waits for nodes in vain."""
    job, least = scene.job, scene.spec.workers.min_replicas
    if job is None or least is None or job.suspended:
        return Step(scene)
    living = scene.living(job).values()
    waiting = [pod for pod in living if pod.unschedulable and not pod.node]
    if not waiting:
        return Step(scene)
    patience = max(pod.created for pod in waiting) + ELASTIC_SECONDS - scene.now
    placed = sum(1 for pod in living if pod.node)
    size = next((n for n in range(placed, least - 1, -1) if fits(scene.spec, n)), None)
    if size is None or size >= job.completions:
        return Step(scene)
    if patience > 0:
        return Step(scene, again_in=patience)
    message = f"{len(waiting)} workers found no node; attempt {job.attempt + 1} has {size}"
    step = attempts.followed(scene, Reason.RESIZED, message)
    return Step(step.scene.recorded(replicas=size), notices=step.notices)
