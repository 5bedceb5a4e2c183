"""Conditions as metav1 has them, and every reason that the operator gives: constants, in one place.

`docs/guides/operator.md` has a table of the reasons; a test compares the two.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import Literal

from esper.contracts.resources import Condition
from esper.errors import one_line
from esper_operator.times import datetime_of

MAX_MESSAGE = 1024
Truth = Literal["True", "False", "Unknown"]


class Kind(StrEnum):
    """The types of conditions. `Succeeded` sums up a session, `Ready` what stays."""

    SUCCEEDED = "Succeeded"
    SUSPENDED = "Suspended"
    WORKERS_READY = "WorkersReady"
    CONTROLLER_READY = "ControllerReady"
    CHECKPOINTED = "Checkpointed"
    READY = "Ready"


class Reason(StrEnum):
    """Why a condition is as it is. What a worker says of its own end comes in addition."""

    # -- a session, while its end is unknown --------------------------------------------------
    CREATED = "Created"
    SUSPENDED = "Suspended"
    QUEUED = "Queued"
    STARTING = "Starting"
    RUNNING = "Running"
    RETRYING = "Retrying"
    INTERRUPTED = "Interrupted"

    # -- a session at its end -----------------------------------------------------------------
    COMPLETED = "Completed"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    BAD_INPUT = "BadInput"
    INVALID_SPEC = "InvalidSpec"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    PROGRESS_DEADLINE_EXCEEDED = "ProgressDeadlineExceeded"
    ACTIVE_DEADLINE_EXCEEDED = "ActiveDeadlineExceeded"

    # -- why workers are not ready, or never became so ----------------------------------------
    WORKERS_READY = "WorkersReady"
    CREDENTIALS_MISSING = "CredentialsMissing"
    CHILD_REFUSED = "ChildRefused"
    PODS_REFUSED = "PodsRefused"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    CONTAINER_REFUSED = "ContainerRefused"
    NODE_NOT_READY = "NodeNotReady"
    WORKERS_STARTING = "WorkersStarting"
    BACKING_OFF = "BackingOff"
    FINISHED = "Finished"

    # -- how an attempt ended -----------------------------------------------------------------
    JOB_DELETED = "JobDeleted"
    DISRUPTED = "Disrupted"
    INTERRUPTED_TOO_OFTEN = "InterruptedTooOften"
    RESIZED = "Resized"
    RESUMED = "Resumed"

    # -- suspension ---------------------------------------------------------------------------
    SUSPEND_REQUESTED = "SuspendRequested"
    WAITING_IN_QUEUE = "WaitingInQueue"
    NOT_SUSPENDED = "NotSuspended"

    # -- the controller -----------------------------------------------------------------------
    CONTROLLER_AVAILABLE = "ControllerAvailable"
    CONTROLLER_STARTING = "ControllerStarting"
    CONTROLLER_FAILED = "ControllerFailed"
    NOT_NEEDED = "NotNeeded"

    # -- checkpoints --------------------------------------------------------------------------
    CHECKPOINT_WRITTEN = "CheckpointWritten"
    NO_CHECKPOINT = "NoCheckpoint"

    # -- blueprints and kernels ---------------------------------------------------------------
    SUBMITTING = "Submitting"
    VALIDATING = "Validating"
    ACCEPTED = "Accepted"
    REFUSED = "Refused"
    BLUEPRINT_MISSING = "BlueprintMissing"
    REQUESTED = "Requested"
    COMPILING = "Compiling"
    COMPILED = "Compiled"
    COMPILATION_FAILED = "CompilationFailed"
    KERNEL_MISMATCH = "KernelMismatch"

    # -- notices alone ------------------------------------------------------------------------
    EXPIRED = "Expired"
    SEED_FOSSILIZED = "SeedFossilized"
    SEED_CULLED = "SeedCulled"
    TOO_MANY_KERNELS = "TooManyKernels"


def condition(
    kind: Kind, status: Truth, reason: str, message: str, *, now: float, generation: int
) -> Condition:
    """A condition that has just come about."""
    return Condition(
        type=kind,
        status=status,
        reason=str(reason),
        message=one_line(message, MAX_MESSAGE) if message else "",
        last_transition_time=datetime_of(now),
        observed_generation=generation,
    )


def merged(before: Sequence[Condition], found: Iterable[Condition]) -> tuple[Condition, ...]:
    """`found` in its order; where a status is as before, so is the time of its transition.

    Types that are not found stay as they were: they are somebody else's.
    """
    old = {item.type: item for item in before}
    new = {item.type: _since(old.get(item.type), item) for item in found}
    rest = [item for item in before if item.type not in new]
    return (*new.values(), *rest)


def _since(before: Condition | None, now: Condition) -> Condition:
    if before is None or before.status != now.status:
        return now
    return now.model_copy(update={"last_transition_time": before.last_transition_time})


def found(conditions: Iterable[Condition], kind: Kind) -> Condition | None:
    """The condition of that type, if there is one."""
    return next((item for item in conditions if item.type == kind), None)


def is_reason(text: str) -> bool:
    """Whether `text` can stand as a condition's reason."""
    return 0 < len(text) <= 128 and text.isalnum() and text.isascii() and text[0].isupper()
