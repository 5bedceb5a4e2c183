"""Attempts: which Job is the session's, when it has failed, and when the next one is due.

A Job is one attempt. A failure of any of its workers fails it, and the next attempt begins after a
pause that grows; `runPolicy.backoffLimit` bounds how many may fail. What ends workers from outside
is no failure: the Job replaces the pods itself, and only after several of them is it followed by a
new Job, because its own pauses between pods grow with each. Where one attempt after another ends
so before it has reported anything, there are pauses too, and but for evictions there is an end.

The new attempt's number is written to the status, with all that counts, before its Job is made.
"""

from __future__ import annotations

from esper.contracts.resources import Failure
from esper.contracts.resources.session import MAX_INTERRUPTED_PODS
from esper.errors import one_line
from esper_operator.children.job import BAD_INPUT, INTERRUPTED
from esper_operator.conditions import Kind, Reason, condition, is_reason, merged
from esper_operator.decisions import progress
from esper_operator.decisions.ends import End, Step
from esper_operator.decisions.scene import Scene
from esper_operator.plans import Notice
from esper_operator.pod_view import PodView
from esper_operator.status import summary_of, with_failure
from esper_operator.times import datetime_of
from esper_operator.views import JobView, Said

FIRST_PAUSE = 10.0
LONGEST_PAUSE = 360.0
"""Seconds between an attempt that failed and the next; the pause doubles with each."""
EVIDENCE_SECONDS = 5.0
"""How long the pods of a failed Job may take to be seen: the two are watched apart."""
AT_ONCE = 2
"""Attempts in a row that may end uncounted without a report and be followed without a pause."""
MAX_FRUITLESS = 10
"""Of those after which a session has failed whose pods are refused, or whose Job is deleted."""
DISRUPTIONS_A_JOB = 3
"""Pods that a Job may lose before a new one is quicker than its own back-off."""
FOLLOWING = frozenset({Reason.RETRYING, Reason.INTERRUPTED})
"""Said of a session from the end of an attempt on until the next one's workers are ready."""

OUT_OF_MEMORY = "OOMKilled"
"""A kubelet's reason where the kernel has killed a process of a container for its memory."""
_FAILED_BY_RULE = "PodFailurePolicy"
_MAX_TEXT = 1024


def advance(scene: Scene) -> Step:
    """Take note of what has become of the attempt: at most one end, or one new attempt."""
    scene = _caught_up(scene)
    if scene.record.attempt == 0:
        return Step(_next(scene))
    if scene.record.attempt_time is None:
        scene = scene.recorded(attempt_time=datetime_of(scene.now))
    job = scene.job
    if job is None:
        return _without_job(scene)
    scene = scene.recorded(job=job.name)
    if job.complete:
        message = f"attempt {job.attempt}: the session is trained"
        return Step(scene, End(True, Reason.COMPLETED, message, _finished(job)))
    scene = _with_disruptions(scene, job)
    if job.failed is not None:
        return _after_failure(scene, job, job.failed)
    return _after_disruptions(scene, job)


def failed(scene: Scene, reason: Reason, message: str) -> Step:
    """The attempt has failed though its Job has not: the next one, or the end."""
    counted = scene.recorded(failed_attempts=scene.record.failed_attempts + 1)
    return _concluded(counted, message, End(False, reason, message, scene.now))


def followed(
    scene: Scene, reason: Reason, message: str, *, summary: Reason = Reason.STARTING
) -> Step:
    """The next attempt begins without a failure being counted."""
    notice = Notice("Normal", reason, one_line(message, _MAX_TEXT))
    fruitless = _fruitless(scene) if summary == Reason.INTERRUPTED else 0
    followed_by = _next(scene).recorded(fruitless_attempts=fruitless)
    return Step(_summed_up(followed_by, summary, message), notices=(notice,))


def due(scene: Scene) -> float:
    """When the attempt's Job may be made."""
    decided, summary = scene.record.attempt_time, summary_of(scene.record)
    if decided is None:
        return scene.now
    if summary is not None and summary.reason == Reason.RETRYING:
        return decided.timestamp() + _pause(max(scene.record.failed_attempts, 1))
    if summary is not None and summary.reason == Reason.INTERRUPTED:
        return decided.timestamp() + _pause(scene.record.fruitless_attempts - AT_ONCE)
    return decided.timestamp()


def held_up(scene: Scene) -> float:
    """Seconds for which the Job waits for workers of the attempt before, which are being ended.

    Where the operator itself has ended them, the checkpoint that they write then is the one to go
    on from. Those of a node that is lost are not waited for longer than they may take.
    """
    decided, summary = scene.record.attempt_time, summary_of(scene.record)
    if decided is None or (summary is not None and summary.reason in FOLLOWING):
        return 0.0
    if all(pod.over or pod.attempt >= scene.record.attempt for pod in scene.pods):
        return 0.0
    own = scene.spec.workers.pod_template.termination_grace_period_seconds
    grace = scene.options.grace_seconds if own is None else own
    return max(0.0, decided.timestamp() + grace - scene.now)


# -- what became of a Job ---------------------------------------------------------------------


def _caught_up(scene: Scene) -> Scene:
    """The scene with a status that is not behind the Jobs: each was decided on before it was made.

    It is where somebody has changed the status, or where what was written is not yet seen here.
    """
    newest = max((job.attempt for job in scene.jobs), default=0)
    if newest <= scene.record.attempt:
        return scene
    for job in scene.jobs:
        if scene.record.attempt <= job.attempt < newest and job.failed is not None:
            cause = _cause(scene, job)
            if cause is not None:
                scene = _with_cause(scene, job, cause)
    latest = next(job for job in scene.jobs if job.attempt == newest)
    return scene.recorded(
        attempt=newest,
        attempt_time=datetime_of(latest.created),
        job=None,
        interrupted_pods=(),
        replicas=latest.completions,
    )


def _without_job(scene: Scene) -> Step:
    """The Job may not have been made yet; one that was there, or whose pods are, is gone.

    Young pods may have been seen before their Job.
    """
    orphaned = any(
        pod.attempt == scene.record.attempt and scene.now - pod.created > EVIDENCE_SECONDS
        for pod in scene.pods
    )
    leaving = any(job.attempt == scene.record.attempt for job in scene.jobs)
    if scene.record.job is None and not orphaned and not leaving:
        return Step(scene)
    message = f"Job {scene.job_name} is gone; attempt {scene.record.attempt + 1} follows it"
    counted = scene.recorded(disruptions=scene.record.disruptions + 1)
    return _followed_to_a_limit(counted, Reason.JOB_DELETED, message)


def _after_failure(scene: Scene, job: JobView, said: Said) -> Step:
    cause = _cause(scene, job)
    if cause is None and said.reason == _FAILED_BY_RULE:
        return Step(scene, End(False, Reason.BAD_INPUT, said.message, _finished(job)))
    if cause is None:
        waiting = _finished(job) + EVIDENCE_SECONDS - scene.now
        if waiting > 0:
            return Step(scene, again_in=waiting)
        message = f"Job {job.name} failed ({said.reason}): {_refused(scene, job)}"
        return _followed_to_a_limit(scene, Reason.DISRUPTED, message)
    scene = _with_cause(scene, job, cause)
    text = _text(cause)
    if cause.exit_code in BAD_INPUT:
        told = cause.told.reason if cause.told is not None else ""
        reason = told if is_reason(told) else Reason.BAD_INPUT
        message = cause.told.message if cause.told is not None else text
        return Step(scene, End(False, reason, message, _finished(job)))
    message = f"attempt {job.attempt}: pod {cause.name}: {text}"
    end = End(False, Reason.BACKOFF_LIMIT_EXCEEDED, message, _finished(job))
    return _concluded(scene, message, end)


def _after_disruptions(scene: Scene, job: JobView) -> Step:
    """A new Job, where this one has lost many pods and still has to replace some."""
    lost = len(scene.record.interrupted_pods)
    missing = job.completions - len(scene.living(job))
    if job.suspended or lost < DISRUPTIONS_A_JOB or missing <= 0:
        return Step(scene)
    unasked = [pod for pod in _since_resumed(scene, job) if _unasked(pod)]
    if len(unasked) >= DISRUPTIONS_A_JOB and scene.snapshot is None:
        message = (
            f"attempt {job.attempt}: {len(unasked)} workers ended as interrupted, "
            "which nobody had asked for, without any progress"
        )
        return failed(scene, Reason.INTERRUPTED_TOO_OFTEN, message)
    message = f"Job {job.name} has lost {lost} pods to disruptions; a new one goes on"
    return followed(scene, Reason.DISRUPTED, message, summary=Reason.INTERRUPTED)


def _concluded(scene: Scene, message: str, end: End) -> Step:
    """The end, where one attempt too many has failed; else the next one, after a pause."""
    limit = scene.spec.run_policy.backoff_limit
    if scene.record.failed_attempts > limit:
        message = f"{end.message} (runPolicy.backoffLimit: {limit})"
        return Step(scene, End(False, end.reason, message, end.time))
    notice = Notice("Warning", Reason.RETRYING, one_line(message, _MAX_TEXT))
    return Step(_summed_up(_next(scene), Reason.RETRYING, message), notices=(notice,))


def _followed_to_a_limit(scene: Scene, reason: Reason, message: str) -> Step:
    """The next attempt; the end, where too many in a row have come to nothing like this one."""
    count = _fruitless(scene)
    if count < MAX_FRUITLESS:
        return followed(scene, reason, message, summary=Reason.INTERRUPTED)
    text = f"{message}; {count} attempts in a row have ended without a report"
    ended = scene.recorded(fruitless_attempts=count)
    return Step(ended, End(False, Reason.INTERRUPTED_TOO_OFTEN, text, scene.now))


def _fruitless(scene: Scene) -> int:
    """Attempts in a row that have ended uncounted without a report, with the one that ends now."""
    if progress.last_report(scene) is not None:
        return 0
    return scene.record.fruitless_attempts + 1


def _pause(times: int) -> float:
    """Seconds until the next attempt, after so many in a row that call for a pause."""
    if times < 1:
        return 0.0
    return min(FIRST_PAUSE * 2.0 ** min(times - 1, 10), LONGEST_PAUSE)


def _summed_up(scene: Scene, reason: Reason, message: str) -> Scene:
    """The scene with how the last attempt ended as its summary, until workers are ready."""
    summary = condition(
        Kind.SUCCEEDED,
        "Unknown",
        reason,
        message,
        now=scene.now,
        generation=scene.session.generation,
    )
    return scene.recorded(conditions=merged(scene.record.conditions, (summary,)))


def _next(scene: Scene) -> Scene:
    return scene.recorded(
        attempt=scene.record.attempt + 1,
        attempt_time=datetime_of(scene.now),
        job=None,
        interrupted_pods=(),
        fruitless_attempts=0,
        replicas=scene.spec.workers.replicas,
    )


# -- what became of pods ----------------------------------------------------------------------


def _cause(scene: Scene, job: JobView) -> PodView | None:
    """The pod that has failed the Job: bad input counts first, then what happened first."""
    failed_pods = [pod for pod in scene.pods_of(job) if _has_failed(pod)]
    return min(
        failed_pods,
        key=lambda pod: (pod.exit_code not in BAD_INPUT, pod.finished or scene.now, pod.index),
        default=None,
    )


def _has_failed(pod: PodView) -> bool:
    """Whether its container has ended with an error of its own.

    One that never ran, as where a node refuses it, has not; nor has one that was to be ended.
    """
    if pod.exit_code in (None, 0, INTERRUPTED):
        return False
    return pod.disrupted is None and not pod.deleting


def _refused(scene: Scene, job: JobView) -> str:
    """What its node says of a pod that never ran, where there is one; else that none failed."""
    for pod in scene.pods_of(job):
        if pod.phase == "Failed" and pod.exit_code is None and pod.ended is not None:
            return f"pod {pod.name}: {pod.ended.reason or 'Failed'}: {pod.ended.message}"
    return "none of its pods did by itself"


def _with_cause(scene: Scene, job: JobView, cause: PodView) -> Scene:
    failure = Failure(
        pod=cause.name,
        exit_code=min(max(cause.exit_code or 0, 0), 255),
        reason=one_line(_text(cause), _MAX_TEXT),
        time=datetime_of(cause.finished or _finished(job)),
    )
    counted = scene.recorded(failed_attempts=scene.record.failed_attempts + 1)
    return counted.recorded(failures=with_failure(counted.record, failure).failures)


def _text(pod: PodView) -> str:
    """Why a pod has failed, in its worker's words where it has left any.

    With control groups of version 1 a rank alone is killed that takes too much memory: its worker
    tells of a signal, and the node why.
    """
    said = pod.ended or Said("Error")
    if pod.told is not None:
        text = f"{pod.told.reason}: {pod.told.message}"
        return f"{said.reason}: {text}" if said.reason == OUT_OF_MEMORY else text
    text = f"{said.reason or 'Error'}, exit code {pod.exit_code}"
    return f"{text}: {said.message}" if said.message else text


def _with_disruptions(scene: Scene, job: JobView) -> Scene:
    """Each pod of the attempt that was ended from outside counts once, also once it is gone.

    A queue that takes its room back ends them all. That is its doing, and when the Job is resumed
    it makes them anew without a pause of its own.
    """
    if job.suspended:
        return scene.recorded(interrupted_pods=())
    counted = scene.record.interrupted_pods
    pods = _since_resumed(scene, job)
    # The Job ends with its first worker, and ends the others; word of that may come before its own.
    ended = job.ended or any(pod.index == 0 and pod.exit_code == 0 for pod in pods)
    lost = [pod.name for pod in pods if _was_interrupted(pod, ended=ended)]
    new = [name for name in lost if name not in counted][: MAX_INTERRUPTED_PODS - len(counted)]
    if not new:
        return scene
    return scene.recorded(
        interrupted_pods=(*counted, *new), disruptions=scene.record.disruptions + len(new)
    )


def _since_resumed(scene: Scene, job: JobView) -> tuple[PodView, ...]:
    """The pods of a Job but for those that ended, or are still ending, as it was suspended."""
    return tuple(pod for pod in scene.pods_of(job) if pod.created >= job.pods_since)


def _was_interrupted(pod: PodView, *, ended: bool) -> bool:
    """Whether something else than its own work, or the end of all, has ended it or is about to."""
    if pod.disrupted is not None:
        return True
    if pod.exit_code == INTERRUPTED and not ended:
        return True
    if pod.over and pod.exit_code is None:
        return pod.phase == "Failed"
    return pod.deleting and not pod.over and not ended


def _unasked(pod: PodView) -> bool:
    return pod.exit_code == INTERRUPTED and pod.disrupted is None and not pod.deleting


def _finished(job: JobView) -> float:
    return job.finished if job.finished is not None else job.created
