"""Tolaria's book of seeds: one record a slot that has left dormancy, and every trial so far."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from esper.contracts.enums import SeedState
from esper.contracts.operational import (
    Measurement,
    SeedObservation,
    SeedTransition,
    SessionEvent,
    TrialRecord,
)

ALIVE = (SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING, SeedState.FOSSILIZED)


@dataclass(kw_only=True)
class SeedRecord:
    """What Tolaria knows of one slot.

    `age_epochs` counts epochs in the present state, `faults` those the host has answered so far;
    `reason` says what last happened to the seed, and `trace_id` is that of the health signals on
    which it was germinated.
    """

    layer: str
    slot: int
    state: SeedState
    cycle: int
    blueprint: str = ""
    kernel: str = ""
    parameters: int = 0
    flops: int = 0
    rent: float = 0.0
    alpha: float = 0.0
    age_epochs: int = 0
    passes: int = 0
    ready: bool = False
    measurement: Measurement | None = None
    opens_epoch: int = 0
    grafted_epoch: int | None = None
    fossilized_epoch: int | None = None
    faults: int = 0
    reason: str = ""
    trace_id: str = ""

    @property
    def site(self) -> tuple[str, int]:
        """Where the seed sits: (layer, slot)."""
        return (self.layer, self.slot)

    @property
    def learning(self) -> bool:
        """Whether the seed's shadow trial is going on."""
        return self.state is SeedState.TRAINING and not self.ready

    def observation(self) -> SeedObservation:
        """The record as the controller sees it."""
        return SeedObservation(
            layer=self.layer,
            slot=self.slot,
            state=self.state,
            blueprint=self.blueprint or None,
            kernel=self.kernel or None,
            alpha=self.alpha,
            age_epochs=self.age_epochs,
            cycle=self.cycle,
            parameters=self.parameters,
            passes=self.passes,
            ready=self.ready,
            measurement=self.measurement,
        )


@dataclass
class SeedBook:
    """The records by site, in the order in which the sites were first used, and all trials."""

    records: dict[tuple[str, int], SeedRecord] = field(default_factory=dict)
    trials: list[TrialRecord] = field(default_factory=list)

    def in_state(self, *states: SeedState) -> list[SeedRecord]:
        """The records in one of `states`."""
        return [record for record in self.records.values() if record.state in states]

    def learning(self) -> list[SeedRecord]:
        """The seeds whose shadow trial is going on."""
        return [record for record in self.records.values() if record.learning]

    def counts(self) -> dict[str, int]:
        """How many seeds stand in each state; states without any are left out."""
        found: dict[str, int] = {}
        for record in self.records.values():
            found[record.state.value] = found.get(record.state.value, 0) + 1
        return dict(sorted(found.items()))

    def lives(self, slots: int) -> dict[str, int]:
        """What became of every seed that ever lived, by the state in which it ended.

        `slots` are all the session's; those that hold nothing now are dormant.
        """
        found = dict.fromkeys((state.value for state in SeedState), 0)
        for trial in self.trials:
            found[trial.state.value] += 1
        found[SeedState.DORMANT.value] = slots - len(self.in_state(*ALIVE))
        return found

    def open_trial(self, record: SeedRecord, epoch: int) -> None:
        """Remember that a candidate is being tried."""
        self.trials.append(
            TrialRecord(
                layer=record.layer,
                slot=record.slot,
                blueprint=record.blueprint,
                cycle=record.cycle,
                started_epoch=epoch,
                state=record.state,
            )
        )

    def update_trial(self, record: SeedRecord, epoch: int) -> None:
        """Bring the trial of `record` up to its state and newest measurement."""
        for index in range(len(self.trials) - 1, -1, -1):
            trial = self.trials[index]
            if (trial.layer, trial.slot, trial.cycle) == (record.layer, record.slot, record.cycle):
                over = record.state in (SeedState.CULLED, SeedState.FOSSILIZED)
                self.trials[index] = trial.model_copy(
                    update={
                        "state": record.state,
                        "measurement": record.measurement,
                        "ended_epoch": epoch if over else None,
                    }
                )
                return

    def trace_of(self, item: SeedTransition | SessionEvent) -> str | None:
        """The trace of what was told in an earlier process, where the book still knows it."""
        if not isinstance(item, SeedTransition):
            return None
        record = self.records.get((item.layer, item.slot))
        return record.trace_id or None if record and record.cycle == item.cycle else None

    def to_state(self) -> dict[str, Any]:
        """JSON-ready, for a checkpoint."""
        records = []
        for record in self.records.values():
            plain = asdict(record) | {"state": record.state.value, "measurement": None}
            if record.measurement is not None:
                plain["measurement"] = record.measurement.to_wire()
            records.append(plain)
        return {"records": records, "trials": [trial.to_wire() for trial in self.trials]}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> SeedBook:
        """The book that `to_state` wrote."""
        book = cls()
        for plain in state["records"]:
            measurement = plain["measurement"]
            record = SeedRecord(
                **plain
                | {
                    "state": SeedState(plain["state"]),
                    "measurement": Measurement.model_validate(measurement) if measurement else None,
                }
            )
            book.records[record.site] = record
        book.trials = [TrialRecord.model_validate(trial) for trial in state["trials"]]
        return book
