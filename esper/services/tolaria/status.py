"""The session's status as the cluster would show it, kept up to date while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from esper.contracts.base import utc_now
from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.manifests import parse_resource, session_document
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.contracts.resources import (
    CheckpointStatus,
    Condition,
    LayerSummary,
    RefusedLayer,
    SeedCounts,
    TrainingSession,
    TrainingSessionStatus,
)
from esper.contracts.resources.common import decimal_text
from esper.contracts.resources.session import MAX_SUMMARIES
from esper.errors import BadInput, one_line
from esper.services.tolaria.checkpoints import Written
from esper.services.tolaria.run_directory import write_atomically
from esper.services.tolaria.snapshots import Snapshot

SUMMARY = "Succeeded"
MAX_REASON, MAX_MESSAGE = 1024, 32768  # what the resource takes


class StatusFile:
    """Writes `status.yaml`: the resource as applied, with what was observed so far."""

    def __init__(
        self,
        path: Path,
        session: TrainingSession,
        *,
        layers: Mapping[str, str],
        refused: Mapping[str, str],
        parameters_base: int,
        seeds: Iterable[tuple[str, int]] = (),
    ) -> None:
        """`layers` are the hosts' kinds by name, `refused` the other layers' reasons.

        `seeds` are the sites that left dormancy before a resumption; when the session started is
        read from the file that is there.
        """
        self._path = path
        self._session = session
        self._kinds = dict(layers)
        self._seeds: dict[str, set[int]] = {}
        for layer, slot in seeds:
            self._seeds.setdefault(layer, set()).add(slot)
        self._checkpoint: Written | None = None
        self._conditions: dict[str, Condition] = {}
        self._condition(SUMMARY, "Unknown", SessionOutcome.RUNNING.value, "the session trains")
        self._status = TrainingSessionStatus(
            observed_generation=session.metadata.generation,
            attempt=1,
            epochs=session.spec.training.epochs,
            parameters_base=parameters_base,
            parameters=parameters_base,
            threads=session.spec.training.threads,
            workers=1,
            start_time=_started(path) or utc_now(),
            layers=self._summaries({}),
            refused_layers=tuple(
                RefusedLayer(name=name, reason=one_line(reason, MAX_REASON))
                for name, reason in list(refused.items())[:MAX_SUMMARIES]
            ),
        )

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Take over an epoch's figures; written at boundaries, where layers are measured."""
        health = {layer["layer"]: layer["healthScore"] for layer in row.get("layers", ())}
        counts = {SeedState(state): count for state, count in row["seeds"].items()}
        self._update(
            epoch=row["epoch"],
            metrics={
                "trainLoss": decimal_text(row["trainLoss"]),
                "validationLoss": decimal_text(row["validationLoss"]),
                "validationMetric": decimal_text(row["validationMetric"]),
            },
            parameters=row["parameters"],
            flops=row["flops"],
            seeds=SeedCounts.of(counts),
            last_heartbeat_time=utc_now(),
        )
        if health:
            self._update(layers=self._summaries(health))
            self.write()

    def transition(self, transition: SeedTransition) -> None:
        """Remember which slots have left dormancy."""
        self._seeds.setdefault(transition.layer, set()).add(transition.slot)

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """A decision shows in the seeds it moves, not here."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        """An event of the whole session becomes the summary's message."""
        self._condition(SUMMARY, "Unknown", SessionOutcome.RUNNING.value, f"{reason}: {message}")
        self.write()

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A checkpoint that is due is not there yet; `checkpointed` hears when it is."""

    def checkpointed(self, written: Written) -> None:
        """Name the newest checkpoint from the next `write` on; called from any thread."""
        self._checkpoint = written

    def finish(
        self, outcome: SessionOutcome, message: str, *, changes: Mapping[str, object] | None = None
    ) -> None:
        """Say how the session ended."""
        status = {SessionOutcome.SUCCEEDED: "True", SessionOutcome.FAILED: "False"}
        self._condition(SUMMARY, status.get(outcome, "Unknown"), outcome.value, message)
        if outcome in status:
            self._update(completion_time=utc_now(), workers=0)
        if changes:
            self._update(**changes)
        self.write()

    def test_metric(self, value: float) -> dict[str, str]:
        """The metrics with the test set's added."""
        return dict(self._status.metrics) | {"test": decimal_text(value)}

    def write(self) -> None:
        """Write the file in one step."""
        newest = self._checkpoint
        if newest is not None:
            self._condition("Checkpointed", "True", "Written", newest.where)
            self._update(
                checkpoint=CheckpointStatus(name=newest.where, epoch=newest.epoch, time=newest.time)
            )
        self._update(conditions=tuple(self._conditions.values()))
        resource = self._session.model_copy(update={"status": self._status})
        write_atomically(self._path, session_document(resource).encode())

    def _update(self, **changes: object) -> None:
        self._status = self._status.model_copy(update=changes)

    def _summaries(self, health: Mapping[str, float]) -> tuple[LayerSummary, ...]:
        return tuple(
            LayerSummary(
                name=name,
                kind=kind,
                seeds=len(self._seeds.get(name, ())) if health else 0,
                health_percent=round(100 * health[name]) if name in health else None,
            )
            for name, kind in list(self._kinds.items())[:MAX_SUMMARIES]
        )

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


def break_off(path: Path, message: str) -> None:
    """Say in the status at `path` that the session failed, if it says that the session runs.

    For who has seen the processes end that would say so themselves.

    Raises:
        OSError: the file can't be written.
        BadInput: it is no status.
    """
    if not path.is_file():
        return
    session = parse_resource(path.read_text(encoding="utf-8"), path.name, TrainingSession)
    if session.status is None:
        return
    now, conditions = utc_now(), []
    for condition in session.status.conditions:
        if condition.type == SUMMARY:
            if condition.reason != SessionOutcome.RUNNING.value:
                return
            condition = condition.model_copy(
                update={
                    "status": "False",
                    "reason": SessionOutcome.FAILED.value,
                    "message": message[:MAX_MESSAGE],
                    "last_transition_time": now,
                }
            )
        conditions.append(condition)
    changes = {"conditions": tuple(conditions), "completion_time": now, "workers": 0}
    status = session.status.model_copy(update=changes)
    ended = session.model_copy(update={"status": status})
    write_atomically(path, session_document(ended).encode())


def _started(path: Path) -> datetime | None:
    """When the session whose status stands in `path` started; None where that can't be told."""
    try:
        earlier = parse_resource(path.read_text(encoding="utf-8"), path.name, TrainingSession)
    except (OSError, UnicodeDecodeError, BadInput):
        return None
    return earlier.status.start_time if earlier.status else None
