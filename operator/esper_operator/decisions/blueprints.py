"""A Blueprint: into the hub, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from esper.contracts.assets import Blueprint as StoredBlueprint
from esper.contracts.blueprints import BlueprintDocument
from esper.contracts.enums import BlueprintState
from esper.contracts.refusals import first_refusal
from esper.contracts.resources import Blueprint, BlueprintSpec, BlueprintStatus, Condition
from esper.contracts.resources.common import LabelledMeta
from esper.errors import BlueprintError, one_line
from esper_operator.conditions import Kind, Reason, Truth, condition, merged
from esper_operator.observed import BlueprintObserved
from esper_operator.options import Options
from esper_operator.plans import Plan, Submission
from esper_operator.status import to_apply
from esper_operator.views import BlueprintView, KernelView

ASK_SECONDS, LONGEST_SECONDS = 5.0, 600.0
"""Between two questions whether the forge has validated it: twice as long each time, for nothing
may come to use it. While a kernel of it is being made, the first of the two."""
_DOUBLINGS = 7
REFUSED_SECONDS = 60.0
"""Until it is submitted again to a hub that refused it."""

_SETTLED = frozenset(
    {
        *(BlueprintState.CHARACTERIZED, BlueprintState.DEPLOYED),
        *(BlueprintState.FAILED, BlueprintState.ARCHIVED),
    }
)


def decide(observed: BlueprintObserved, options: Options) -> Plan:
    """What is to be done about a Blueprint now."""
    del options  # as of every decision; none of them is about Blueprints
    view = observed.blueprint
    if view.deleting:
        return Plan()
    try:
        document = document_of(view)
    except BlueprintError as error:
        status = _status(observed, BlueprintState.FAILED, "False", Reason.REFUSED, str(error))
        return Plan(status=to_apply(view, status))
    submission = Submission(document.to_wire(), document.digest)
    if observed.refused is not None:
        said = f"{observed.refused.reason}: {observed.refused.message}"
        status = _status(observed, BlueprintState.PROPOSED, "False", Reason.REFUSED, said)
        return Plan(to_apply(view, status), submit=submission, again_in=REFUSED_SECONDS)
    if observed.stored is None:
        return _unasked(observed, submission)
    written = to_apply(view, _as_stored(observed, observed.stored))
    if observed.stored.state in _SETTLED or _compiled(observed):
        return Plan(written)
    pause = _pause(observed)
    left = observed.asked_at + pause - observed.now
    if left > 0:
        return Plan(written, again_in=left)
    return Plan(written, submit=submission, again_in=pause)


def _pause(observed: BlueprintObserved) -> float:
    """Seconds from the hub's last answer to the next question."""
    if any(_is_being_made(view) for view in observed.kernels):
        return ASK_SECONDS
    doublings = min(max(observed.same_answers - 1, 0), _DOUBLINGS)
    return float(min(LONGEST_SECONDS, ASK_SECONDS * 2.0**doublings))


def _is_being_made(view: KernelView) -> bool:
    conditions = view.status().get("conditions", ())
    return all(item["status"] == "Unknown" for item in conditions if item["type"] == Kind.READY)


def document_of(view: BlueprintView) -> BlueprintDocument:
    """The blueprint as the forge takes it.

    Raises:
        BlueprintError: the graph is malformed, or there is no such built-in one or argument.
    """
    try:
        resource = Blueprint(
            api_version="esper.dev/v1alpha1",
            kind="Blueprint",
            metadata=LabelledMeta(name=view.name),
            spec=view.spec(),
        )
    except ValidationError as error:
        refused = first_refusal(error, BlueprintSpec)
        raise BlueprintError(f"spec.{refused.field}", refused.came, refused.allowed) from error
    return resource.document()


def _unasked(observed: BlueprintObserved, submission: Submission) -> Plan:
    """What the hub has said before the operator was started stands, for this spec."""
    view, before = observed.blueprint, _before(observed.blueprint)
    if before.observed_generation == view.generation and before.state in _SETTLED:
        ready = next((item for item in before.conditions if item.type == Kind.READY), None)
        if ready is not None:
            status = _with_kernels(observed, before, (ready,), before.state)
            return Plan(to_apply(view, status))
    message = "the hub has not answered yet"
    status = _status(observed, BlueprintState.PROPOSED, "Unknown", Reason.SUBMITTING, message)
    return Plan(to_apply(view, status), submit=submission)


def _as_stored(observed: BlueprintObserved, stored: StoredBlueprint) -> BlueprintStatus:
    state = stored.state
    if state is BlueprintState.FAILED:
        return _status(observed, state, "False", Reason.REFUSED, stored.error or "")
    if state is BlueprintState.ARCHIVED:
        return _status(observed, state, "False", Reason.REFUSED, "the hub has archived it")
    if state in _SETTLED:
        return _status(observed, state, "True", Reason.ACCEPTED, f"digest {stored.digest}")
    if _compiled(observed):
        # No worker of the forge need ever have tried it by itself: a Job has compiled it.
        state, message = BlueprintState.CHARACTERIZED, f"digest {stored.digest}"
        return _status(observed, state, "True", Reason.ACCEPTED, message)
    message = "it is tried as soon as a session asks for a kernel of it"
    return _status(observed, state, "Unknown", Reason.VALIDATING, message)


def _status(
    observed: BlueprintObserved, state: BlueprintState, ready: Truth, reason: Reason, message: str
) -> BlueprintStatus:
    view = observed.blueprint
    found = condition(
        Kind.READY,
        ready,
        reason,
        one_line(message, 1024),
        now=observed.now,
        generation=view.generation,
    )
    return _with_kernels(observed, _before(view), (found,), state)


def _compiled(observed: BlueprintObserved) -> list[Mapping[str, Any]]:
    """The statuses of its kernels that there are."""
    return [view.status() for view in observed.kernels if view.status().get("digest")]


def _with_kernels(
    observed: BlueprintObserved,
    before: BlueprintStatus,
    found: tuple[Condition, ...],
    state: BlueprintState,
) -> BlueprintStatus:
    compiled = _compiled(observed)
    sizes = [status["parameters"] for status in compiled if "parameters" in status]
    return BlueprintStatus(
        observed_generation=observed.blueprint.generation,
        conditions=merged(before.conditions, found),
        state=state,
        parameters=min(sizes) if sizes else before.parameters,
        kernels=len(compiled),
    )


def _before(view: BlueprintView) -> BlueprintStatus:
    try:
        return BlueprintStatus.model_validate(view.status(), by_alias=True, by_name=False)
    except ValidationError:
        return BlueprintStatus()
