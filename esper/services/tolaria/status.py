"""The session's status as the cluster would show it, kept up to date while it trains."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from esper.contracts.base import utc_now
from esper.contracts.enums import SessionOutcome
from esper.contracts.manifests import parse_resource, session_document
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.contracts.resources import Condition, TrainingSession, TrainingSessionStatus
from esper.errors import BadInput
from esper.services.tolaria.reporting import SessionReport
from esper.services.tolaria.run_directory import write_atomically
from esper.services.tolaria.snapshots import Snapshot

SUMMARY = "Succeeded"
MAX_MESSAGE = 32768  # what the resource takes


class StatusFile:
    """Writes `status.yaml`: the resource as applied, with what `report` has observed so far."""

    def __init__(self, path: Path, session: TrainingSession, report: SessionReport) -> None:
        """When the session started is read from the file that is there."""
        self._path = path
        self._session = session
        self._report = report
        self._conditions: dict[str, Condition] = {}
        self._condition(SUMMARY, "Unknown", SessionOutcome.RUNNING.value, "the session trains")
        self._status = TrainingSessionStatus(
            observed_generation=session.metadata.generation,
            attempt=report.snapshot().attempt or 1,
            workers=1,
            start_time=_started(path) or utc_now(),
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Written at boundaries, where layers are measured."""
        self._report.epoch(row)
        if row.get("layers"):
            self.write()

    def transition(self, transition: SeedTransition) -> None:
        """A transition shows with the next boundary."""
        self._report.transition(transition)

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """A decision shows in the seeds it moves, not here."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        """An event of the whole session becomes the summary's message."""
        self._report.event(epoch, reason, message)
        self._condition(SUMMARY, "Unknown", SessionOutcome.RUNNING.value, f"{reason}: {message}")
        self.write()

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A checkpoint that is due is not there yet; the report hears when it is."""

    def finish(
        self,
        outcome: SessionOutcome,
        message: str,
        *,
        test: float | None = None,
        parameters: int | None = None,
        flops: int | None = None,
    ) -> None:
        """Say how the session ended; `test` is the metric on the test set."""
        self._report.finish(outcome, message, test=test, parameters=parameters, flops=flops)
        status = {SessionOutcome.SUCCEEDED: "True", SessionOutcome.FAILED: "False"}
        self._condition(SUMMARY, status.get(outcome, "Unknown"), outcome.value, message)
        if outcome in status:
            self._update(completion_time=utc_now(), workers=0)
        self.write()

    def write(self) -> None:
        """Write the file in one step."""
        observed = self._report.snapshot()
        if observed.checkpoint is not None:
            self._condition("Checkpointed", "True", "Written", observed.checkpoint.name)
        self._update(conditions=tuple(self._conditions.values()), **observed.observed())
        resource = self._session.model_copy(update={"status": self._status})
        write_atomically(self._path, session_document(resource).encode())

    def _update(self, **changes: object) -> None:
        self._status = self._status.model_copy(update=changes)

    def _condition(self, kind: str, status: str, reason: str, message: str) -> None:
        old = self._conditions.get(kind)
        moved: datetime = utc_now()
        if old is not None and old.status == status:
            moved = old.last_transition_time
        self._conditions[kind] = Condition(
            type=kind,
            status=status,  # type: ignore[arg-type]
            reason=reason,
            message=message[:MAX_MESSAGE],
            last_transition_time=moved,
            observed_generation=self._session.metadata.generation,
        )


def _started(path: Path) -> datetime | None:
    """When the session whose status stands in `path` started; None where that can't be told."""
    try:
        earlier = parse_resource(path.read_text(encoding="utf-8"), path.name, TrainingSession)
    except (OSError, UnicodeDecodeError, BadInput):
        return None
    return earlier.status.start_time if earlier.status else None
