"""A session's status as the decisions carry it from visit to visit, and as it is applied.

All that must outlive the operator lies here. A decision that is made twice on the same objects
comes to the same status, so that a write that was lost is only written again.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from esper.contracts.base import canonical_json
from esper.contracts.resources import (
    API_VERSION,
    GROUP,
    Condition,
    Failure,
    TrainingSessionSpec,
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


def is_ours(spec: TrainingSessionSpec) -> bool:
    """Whether no other controller runs the session."""
    return spec.run_policy.managed_by in (None, CONTROLLER_NAME)


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
    kind: str, view: SessionView | BlueprintView | KernelView, status: ResourceModel
) -> Manifest | None:
    """The body that applies `status`; None where it is what the object has already.

    With the uid, so that no other object of that name is written to.
    """
    content: Mapping[str, Any] = status.to_wire()
    if canonical_json(content) == view.status_text:
        return None
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "metadata": {"name": view.name, "namespace": view.namespace, "uid": view.uid},
        "status": content,
    }
