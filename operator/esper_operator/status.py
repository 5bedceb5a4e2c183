"""A session's status as the decisions carry it from visit to visit, and as it is applied.

All that must outlive the operator lies here. A decision that is made twice on the same objects
comes to the same status, so that a write that was lost is only written again.
"""

from __future__ import annotations

import json

from pydantic import ValidationError

from esper.contracts.base import canonical_json
from esper.contracts.resources import (
    GROUP,
    Condition,
    Failure,
    TrainingSessionStatus,
)
from esper.contracts.resources.common import ResourceModel
from esper.contracts.resources.session import MAX_FAILURES
from esper_operator.conditions import Kind, found
from esper_operator.plans import Manifest
from esper_operator.views import BlueprintView, KernelView, SessionView

CONTROLLER_NAME = f"{GROUP}/operator"
"""What `runPolicy.managedBy` says where it names this operator."""

_ALIASES = {field.alias or name for name, field in TrainingSessionStatus.model_fields.items()}


def record_of(session: SessionView) -> TrainingSessionStatus:
    """The status as it was written; an empty one where there is none that can be read.

    Fields of another version of the operator are left out.
    """
    data = {name: value for name, value in session.status().items() if name in _ALIASES}
    try:
        return TrainingSessionStatus.model_validate(data, by_alias=True, by_name=False)
    except ValidationError:
        return TrainingSessionStatus()


def is_ours(session: SessionView) -> bool:
    """Whether no other controller runs the session; also of one whose spec can't be read."""
    policy = json.loads(session.spec_text).get("runPolicy") or {}
    return policy.get("managedBy") in (None, CONTROLLER_NAME)


def changed(record: TrainingSessionStatus, **fields: object) -> TrainingSessionStatus:
    """`record` with other values of those fields."""
    return record.model_copy(update=fields)


def with_failure(record: TrainingSessionStatus, failure: Failure) -> TrainingSessionStatus:
    """`record` with one more of the last failures."""
    return changed(record, failures=(*record.failures, failure)[-MAX_FAILURES:])


def summary_of(record: TrainingSessionStatus) -> Condition | None:
    """The condition that sums the session up."""
    return found(record.conditions, Kind.SUCCEEDED)


def is_finished(record: TrainingSessionStatus) -> bool:
    """Whether the session has come to its end, from which it does not return."""
    summary = summary_of(record)
    return summary is not None and summary.status != "Unknown"


def to_apply(
    view: SessionView | BlueprintView | KernelView, status: ResourceModel
) -> Manifest | None:
    """The whole `status` as it is applied; None where it is what the object has already."""
    content = status.to_wire()
    return None if canonical_json(content) == view.status_text else content
