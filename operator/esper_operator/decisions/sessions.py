"""A session's decision: its policies in turn, then what is to be written."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationError

from esper.contracts.refusals import first_refusal
from esper.contracts.resources import TrainingSessionSpec, TrainingSessionStatus
from esper.errors import one_line
from esper_operator.children import job as jobs
from esper_operator.children import names, network_policy, service
from esper_operator.children.objects import digest_in
from esper_operator.conditions import MAX_MESSAGE, Kind, Reason, condition, merged
from esper_operator.decisions import (
    attempts,
    controller,
    deadlines,
    expiry,
    lost,
    progress,
    seeds,
    sizing,
    standing,
    story,
    suspension,
)
from esper_operator.decisions.ends import End, Step, soonest
from esper_operator.decisions.scene import Scene
from esper_operator.decisions.workers import (
    credentials_last,
    has_secret,
    is_going,
    permanent_refusal,
    policy_is_news,
    policy_was_told,
    readiness,
    refused,
)
from esper_operator.observed import Observed
from esper_operator.options import Options
from esper_operator.plans import Deletion, Manifest, Notice, Plan
from esper_operator.status import (
    changed,
    is_finished,
    is_ours,
    record_of,
    to_apply,
)
from esper_operator.times import datetime_of
from esper_operator.views import JobView

REFUSED_SECONDS = 30.0
"""Until a child that was refused, but might not be for ever, is tried again."""

Policy = Callable[[Scene], Step]


def decide(observed: Observed, options: Options) -> Plan:
    """What is to be done about a session now; nothing where it is another controller's."""
    session = observed.session
    if session.deleting or not is_ours(session):
        return Plan()
    record = record_of(session)
    try:
        spec = session.spec()
    except ValidationError as error:
        return _unreadable(observed, record, error)
    scene = Scene(observed, spec, record, options, before=record)
    if is_finished(record):
        return _finished(scene)
    step = _through(scene, _policies(spec))
    return _ended(step, step.end) if step.end is not None else _going_on(step)


# -- policies ---------------------------------------------------------------------------------


def _policies(spec: TrainingSessionSpec) -> tuple[Policy, ...]:
    if spec.run_policy.suspend:
        return (_refused_template, progress.told, _trained_already, _timed)
    return (
        _refused_template,
        progress.told,
        suspension.resumed,
        attempts.advance,
        lost.followed,
        sizing.resized,
        _timed,
        _refused_for_good,
        _within_deadlines,
    )


def _through(scene: Scene, policies: tuple[Policy, ...]) -> Step:
    """Each policy in turn, on what the ones before have made of the scene; an end ends it."""
    taken = Step(scene)
    for policy in policies:
        step = policy(taken.scene)
        taken = Step(
            step.scene,
            step.end,
            (*taken.notices, *step.notices),
            soonest(taken.again_in, step.again_in),
        )
        if taken.end is not None:
            break
    return taken


def _refused_template(scene: Scene) -> Step:
    message = jobs.refused(scene.spec, scene.session.namespace, scene.options)
    if message is None:
        return Step(scene)
    return Step(scene, End(False, Reason.INVALID_SPEC, message, scene.now))


def _trained_already(scene: Scene) -> Step:
    """A suspended session whose Job was done before it was deleted has succeeded all the same."""
    job = scene.job
    if job is None:
        return Step(scene)
    if job.complete:
        return attempts.advance(scene)
    return Step(scene.recorded(job=job.name))


def _timed(scene: Scene) -> Step:
    return Step(suspension.timed(scene))


def _refused_for_good(scene: Scene) -> Step:
    message = permanent_refusal(scene)
    if message is None:
        return Step(scene)
    return Step(scene, End(False, Reason.CHILD_REFUSED, message, scene.now))


def _within_deadlines(scene: Scene) -> Step:
    return deadlines.bounded(scene, readiness(scene))


# -- plans ------------------------------------------------------------------------------------


def _going_on(step: Step) -> Plan:
    scene = step.scene
    if suspension.is_asked(scene):
        return _suspended(step)
    grown = seeds.planned(scene.observed)
    making = _makes_job(scene)
    record = standing.conditions(scene)
    # What has failed stays for its log until the next attempt begins.
    past = (job for job in scene.jobs if job.attempt < scene.record.attempt)
    gone = _deleted(job for job in past if making or not job.ended)
    unneeded = () if controller.is_dedicated(scene.spec) else _own_controller_removed(scene)
    return Plan(
        status=_status(scene, record),
        delete=(*gone, *lost.deletions(scene), *unneeded, *grown.delete),
        apply=(
            *_lasting(scene),
            *([_job(scene)] if making else []),
            *_controller(scene),
            *grown.apply,
        ),
        child_statuses=grown.statuses,
        notices=(*step.notices, *_story(scene, record)),
        again_in=soonest(
            step.again_in,
            grown.again_in,
            _paused(scene),
            lost.again_in(scene),
            credentials_last(scene) or None,
            REFUSED_SECONDS if scene.observed.refusals else None,
        ),
        credentials=not has_secret(scene)
        and not is_going(scene, "Secret", names.secret(scene.session.name)),
    )


def _suspended(step: Step) -> Plan:
    """The plan of a session that is to have no pod; its Service and its Secret may stay."""
    scene = step.scene
    grown = seeds.planned(scene.observed)
    record = standing.conditions(scene)
    return Plan(
        status=_status(scene, record),
        delete=(
            *_deleted(scene.jobs),
            *lost.deletions(scene),
            *_own_controller_removed(scene),
            *grown.delete,
        ),
        apply=grown.apply,
        child_statuses=grown.statuses,
        notices=(*step.notices, *_story(scene, record)),
        again_in=soonest(step.again_in, grown.again_in, lost.again_in(scene)),
        credentials=policy_is_news(scene),
    )


def _ended(step: Step, end: End) -> Plan:
    """The plan that ends a session: its end is written before what it leaves is cleared away."""
    scene = step.scene
    active = scene.record.active_since
    spent = 0 if active is None else max(0, int(scene.now - active.timestamp()))
    scene = scene.recorded(
        completion_time=datetime_of(end.time),
        start_time=scene.record.start_time or scene.record.attempt_time,
        active_since=None,
        active_seconds=scene.record.active_seconds + spent,
    )
    grown = seeds.planned(scene.observed)
    notice = Notice(
        "Normal" if end.succeeded else "Warning", end.reason, one_line(end.message, MAX_MESSAGE)
    )
    record = standing.final_conditions(scene, end)
    return Plan(
        status=_status(scene, record),
        delete=(*_cleared(scene), *grown.delete),
        apply=grown.apply,
        child_statuses=grown.statuses,
        notices=(*step.notices, *_story(scene, record), notice),
        again_in=soonest(expiry.left(scene), grown.again_in, lost.again_in(scene)),
    )


def _finished(scene: Scene) -> Plan:
    """What is left to do for a session that has ended: nothing is made anew but Seeds."""
    left = expiry.left(scene)
    news = policy_is_news(scene)
    if left == 0.0 and (not news or policy_was_told(scene)):
        notice = Notice("Normal", Reason.EXPIRED, "runPolicy.ttlSecondsAfterFinished has passed")
        return Plan(delete=(expiry.deletion(scene),), notices=(notice,))
    step = progress.told(scene)
    scene = step.scene.recorded(workers=0)
    grown = seeds.planned(scene.observed)
    record = standing.lasting_conditions(scene)
    return Plan(
        status=_status(scene, record),
        delete=(*_cleared(scene), *grown.delete),
        apply=grown.apply,
        child_statuses=grown.statuses,
        notices=_story(scene, record),
        again_in=soonest(left or None, step.again_in, grown.again_in, lost.again_in(scene)),
        credentials=news,
    )


def _unreadable(observed: Observed, record: TrainingSessionStatus, error: ValidationError) -> Plan:
    """The end of a session whose spec the API server took and the contract refuses."""
    if is_finished(record):
        return Plan()
    session = observed.session
    refused = first_refusal(error, TrainingSessionSpec)
    message = one_line(
        f"spec.{refused.field}: got {one_line(refused.came)}; allowed: {refused.allowed}",
        MAX_MESSAGE,
    )
    summary = condition(
        Kind.SUCCEEDED,
        "False",
        Reason.INVALID_SPEC,
        message,
        now=observed.now,
        generation=session.generation,
    )
    ended = changed(
        record,
        observed_generation=session.generation,
        conditions=merged(record.conditions, (summary,)),
        completion_time=datetime_of(observed.now),
    )
    own = (job for job in observed.jobs if job.session_uid == session.uid)
    return Plan(
        status=to_apply(session, ended),
        delete=_deleted(own),
        notices=(Notice("Warning", Reason.INVALID_SPEC, message),),
    )


# -- parts of plans ---------------------------------------------------------------------------


def _status(scene: Scene, record: TrainingSessionStatus) -> Manifest | None:
    labels = service.selector(scene.session)
    written = changed(
        record,
        observed_generation=scene.session.generation,
        selector=",".join(f"{name}={value}" for name, value in labels.items()),
    )
    return to_apply(scene.session, written)


def _story(scene: Scene, record: TrainingSessionStatus) -> tuple[Notice, ...]:
    told = story.told(scene.before, record, scene.observed.snapshot)
    return (*told, *(Notice("Warning", Reason.CHILD_REFUSED, text) for text in refused(scene)))


def _makes_job(scene: Scene) -> bool:
    if scene.job is not None or attempts.due(scene) > scene.now:
        return False
    name = scene.session.name
    goes = is_going(scene, "Service", names.service(name)) or (
        scene.options.worker_egress is not None
        and is_going(scene, "NetworkPolicy", names.network_policy(name))
    )
    return has_secret(scene) and not goes and not attempts.held_up(scene)


def _paused(scene: Scene) -> float | None:
    """Seconds until the attempt's Job may be made; None where it is there, or may be made now."""
    seconds = max(attempts.due(scene) - scene.now, attempts.held_up(scene))
    return seconds if seconds > 0 and scene.job is None else None


def _job(scene: Scene) -> Manifest:
    record = scene.record
    return jobs.manifest(scene.session, record.attempt, record.replicas, scene.options)


def _lasting(scene: Scene) -> tuple[Manifest, ...]:
    """What is to be there before the Job is, and as long as the session: what of it is not."""
    egress = scene.options.worker_egress
    policy = () if egress is None else (network_policy.manifest(scene.session, egress),)
    there = {(meta.kind, meta.name, meta.digest) for meta in scene.observed.metas}

    def is_missing(manifest: Manifest) -> bool:
        kind, name = manifest["kind"], manifest["metadata"]["name"]
        return (kind, name, digest_in(manifest)) not in there and not is_going(scene, kind, name)

    return tuple(filter(is_missing, (service.manifest(scene.session), *policy)))


def _controller(scene: Scene) -> tuple[Manifest, ...]:
    if not controller.is_dedicated(scene.spec):
        return ()
    view = scene.observed.tamiyo
    return controller.dedicated(scene.session, view, scene.options)


def _deleted(found: Iterable[JobView]) -> tuple[Deletion, ...]:
    return tuple(
        Deletion("batch/v1", "Job", job.namespace, job.name, job.uid)
        for job in found
        if not job.deleting
    )


def _own_controller_removed(scene: Scene) -> tuple[Deletion, ...]:
    view = scene.observed.tamiyo
    if view is None or view.session_uid != scene.session.uid:
        return ()
    return controller.removed(view)


def _cleared(scene: Scene) -> tuple[Deletion, ...]:
    """Jobs that have not ended, pods that can't end, and a controller for nobody."""
    unended = (job for job in scene.jobs if not job.ended)
    return (*_deleted(unended), *lost.deletions(scene), *_own_controller_removed(scene))
