"""What a session tells of itself: gathered from its trainer, and bounded."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count
from typing import Any

import pytest

from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.operational import (
    MAX_SNAPSHOT_BYTES,
    MAX_SNAPSHOT_SEEDS,
    Measurement,
    SeedTransition,
    SessionSnapshot,
)
from esper.contracts.resources import SeedCounts
from esper.services.tolaria.checkpoints import Written
from esper.services.tolaria.reporting import SessionReport, fitted
from esper.services.tolaria.seeds import SeedRecord

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
MEASURED = Measurement(mean=0.0123456789, lower=0.01, upper=0.02, rent=0.0, samples=10)
S = SeedState


def report_of(**changes: Any) -> SessionReport:
    """A report whose clock goes on by a second each time."""
    ticks = count()
    values: dict[str, Any] = {
        "layers": {"hidden.0": "Linear", "head": "Linear"},
        "refused": {},
        "parameters_base": 120,
        "epochs": 40,
        "threads": 2,
        "clock": lambda: NOON + timedelta(seconds=next(ticks)),
    }
    return SessionReport("small", **values | changes)


def moved(
    previous: SeedState, current: SeedState, layer: str = "head", slot: int = 0, **rest: Any
) -> SeedTransition:
    values: dict[str, Any] = {"cycle": 0, "epoch": 1, "reason": "a decision"}
    if current is not S.DORMANT:
        values |= {"blueprint": "affine", "kernel": "5f" * 20}
    return SeedTransition(
        session="small",
        layer=layer,
        slot=slot,
        previous=previous,
        current=current,
        **values | rest,
    )


def record(**changes: Any) -> SeedRecord:
    values: dict[str, Any] = {"layer": "head", "slot": 0, "state": S.GRAFTING, "cycle": 0}
    return SeedRecord(**values | {"blueprint": "affine", "kernel": "5f" * 20} | changes)


def row(*records: SeedRecord, epoch: int = 3) -> dict[str, Any]:
    """A line of metrics.jsonl as a trainer makes it at a boundary."""
    return {
        "epoch": epoch,
        "trainLoss": 1.5,
        "validationLoss": 1.25,
        "validationMetric": 0.5,
        "parameters": 150,
        "flops": 10**12,
        "layers": [{"layer": "head", "healthScore": 0.876}],
        "active": [one.observation().to_wire() | {"reason": "so"} for one in records],
    }


def test_a_seed_is_told_with_its_state_and_its_last_transitions() -> None:
    report = report_of()
    life = [(S.DORMANT, S.GERMINATED), (S.GERMINATED, S.TRAINING), (S.TRAINING, S.GRAFTING)]
    for epoch, (previous, current) in enumerate(life):
        report.transition(moved(previous, current, epoch=epoch))
    report.epoch(row(record(alpha=0.4, measurement=MEASURED)))
    (seed,) = report.snapshot().seeds
    assert (seed.layer, seed.slot, seed.state, seed.cycle) == ("head", 0, S.GRAFTING, 0)
    assert (seed.blueprint, seed.kernel) == ("affine", "5f" * 20)
    assert (seed.alpha_percent, seed.health_percent, seed.contribution) == (40, 88, "0.0123457")
    assert [(step.previous, step.current, step.epoch) for step in seed.transitions] == [
        (previous, current, epoch) for epoch, (previous, current) in enumerate(life)
    ]
    times = [step.time for step in seed.transitions]
    assert times == sorted(times)
    report.transition(moved(S.GRAFTING, S.FOSSILIZED, measurement=MEASURED))
    assert report.snapshot().seeds[0].alpha_percent == 100


def test_a_seed_that_went_is_told_without_what_it_was() -> None:
    report = report_of()
    report.epoch(row(record(alpha=1.0, measurement=MEASURED)))
    report.transition(moved(S.GRAFTING, S.CULLED, measurement=MEASURED))
    (seed,) = report.snapshot().seeds
    assert (seed.alpha_percent, seed.contribution) == (0, "0.0123457")
    report.transition(moved(S.CULLED, S.DORMANT))
    (seed,) = report.snapshot().seeds
    assert (seed.state, seed.blueprint, seed.kernel, seed.contribution) == (S.DORMANT, *[None] * 3)


def test_those_that_live_come_first_then_the_newest_and_the_rest_is_counted() -> None:
    report = report_of()
    for slot in range(60):
        report.transition(moved(S.TRAINING, S.CULLED, slot=slot))
    for slot in range(10):
        state = S.FOSSILIZED if slot % 2 else S.GRAFTING
        report.transition(moved(S.TRAINING, state, layer="hidden.0", slot=slot))
    snapshot = report.snapshot()
    assert [(s.layer, s.slot) for s in snapshot.seeds[:10]] == [
        ("hidden.0", slot) for slot in reversed(range(10))
    ]
    assert [s.slot for s in snapshot.seeds[10:]] == list(range(59, 5, -1))
    assert (len(snapshot.seeds), snapshot.seeds_left_out) == (MAX_SNAPSHOT_SEEDS, 6)
    assert {layer.name: layer.seeds for layer in snapshot.layers} == {"hidden.0": 10, "head": 60}


def test_transitions_are_the_newest_32_oldest_first() -> None:
    report = report_of()
    for epoch in range(40):
        report.transition(moved(S.DORMANT, S.GERMINATED, epoch=epoch))
    (seed,) = report.snapshot().seeds
    assert [step.epoch for step in seed.transitions] == list(range(8, 40))


def test_every_change_is_another_version_and_a_greater_sequence() -> None:
    report = report_of(attempt=3, processes=4)
    snapshots = [report.snapshot()]
    changes = (
        lambda: report.begun(lambda: 7),
        lambda: report.epoch(row()),
        lambda: report.transition(moved(S.DORMANT, S.GERMINATED)),
        lambda: report.event(1, "RolledBack", "the loss was not finite"),
        lambda: report.checkpointed(Written(where="a", epoch=1, time=NOON)),
        report.heartbeat,
        lambda: report.finish(SessionOutcome.INTERRUPTED, "asked to stop"),
    )
    for version, change in enumerate(changes):
        assert report.version == version
        change()
        snapshots.append(report.snapshot())
    sequences = [snapshot.sequence for snapshot in snapshots]
    assert sequences == sorted(set(sequences))
    times = [snapshot.time for snapshot in snapshots]
    assert times == sorted(set(times))
    assert report.steps == 7
    last = snapshots[-1]
    assert (last.attempt, last.processes, last.threads) == (3, 4, 2)
    assert (last.outcome, last.message) == (SessionOutcome.INTERRUPTED, "asked to stop")
    assert snapshots[4].message == "RolledBack: the loss was not finite"


def test_within_one_millisecond_sequences_grow_too() -> None:
    report = report_of(clock=lambda: NOON)
    first, second = report.snapshot().sequence, report.snapshot().sequence
    assert first == NOON.timestamp() * 1000
    assert second == first + 1


def test_a_session_that_goes_on_knows_its_seeds_and_their_history() -> None:
    report = report_of()
    written = Written(where="checkpoints/epoch-000003", epoch=3, time=NOON)
    history = [(NOON, moved(S.DORMANT, S.GERMINATED)), (NOON, moved(S.GERMINATED, S.TRAINING))]
    # As the log has what is not finite.
    seen = record(measurement=MEASURED).observation().to_wire() | {"reason": "so"}
    seen["measurement"] = {"mean": None}
    logged = row() | {"trainLoss": None, "active": [seen]}
    report.resumed([record(alpha=0.5, cycle=2)], history, written, logged)
    assert report.version == 0, "it is news once training begins"
    snapshot = report.snapshot()
    (seed,) = snapshot.seeds
    assert (seed.state, seed.alpha_percent, seed.cycle) == (S.GRAFTING, 50, 2)
    assert [step.time for step in seed.transitions] == [NOON, NOON]
    assert snapshot.checkpoint is not None
    assert snapshot.checkpoint.name == "checkpoints/epoch-000003"
    assert (snapshot.epoch, snapshot.parameters) == (3, 150)
    assert snapshot.metrics["trainLoss"] == "NaN"
    assert snapshot.seed_counts.grafting == 1


def test_counts_are_those_of_the_seeds_that_are_told_of() -> None:
    report = report_of(seeds_per_layer=3)
    assert report.snapshot().seed_counts == SeedCounts(dormant=6)
    # No epoch's figures have come since.
    report.transition(moved(S.DORMANT, S.GERMINATED))
    report.transition(moved(S.DORMANT, S.GERMINATED, slot=2))
    report.transition(moved(S.GERMINATED, S.TRAINING, slot=2))
    snapshot = report.snapshot()
    assert snapshot.seed_counts == SeedCounts(dormant=4, germinated=1, training=1, active=2)
    report.transition(moved(S.TRAINING, S.CULLED, slot=2))
    report.transition(moved(S.CULLED, S.DORMANT, slot=2))
    report.epoch(row())
    assert report.snapshot().seed_counts == SeedCounts(dormant=5, germinated=1, active=1)


def size(snapshot: SessionSnapshot) -> int:
    return len(snapshot.model_dump_json(by_alias=True, exclude_none=True).encode())


def crowded(reason: str, *, name: str = "layer", transitions: int = 32) -> SessionSnapshot:
    """64 seeds in 64 layers, each with so many transitions; 64 refused layers."""
    names = [f"{name}.{number}"[-512:] for number in range(64)]
    report = report_of(
        layers=dict.fromkeys(names, "Linear"), refused=dict.fromkeys(names, reason * 4)
    )
    for layer in names:
        for epoch in range(transitions):
            report.transition(
                moved(S.DORMANT, S.GERMINATED, layer=layer, slot=63, epoch=epoch, reason=reason)
            )
    report.event(1, "RolledBack", reason)
    return report.snapshot()


def test_one_that_is_small_enough_is_told_as_it_is() -> None:
    snapshot = crowded("a decision", transitions=8)
    assert fitted(snapshot) is snapshot
    assert size(snapshot) < MAX_SNAPSHOT_BYTES


@pytest.mark.parametrize(
    ("reason", "name"),
    [("x" * 500, "layer"), ("é" * 500, "l" * 509), ("\N{GRINNING FACE}" * 500, "\0" * 512)],
    ids=["long reasons", "long names", "escaped names and reasons of four bytes a character"],
)
def test_the_worst_is_cut_down_to_its_bytes(reason: str, name: str) -> None:
    snapshot = crowded(reason, name=name)
    assert size(snapshot) > MAX_SNAPSHOT_BYTES
    cut = fitted(snapshot)
    assert size(cut) <= MAX_SNAPSHOT_BYTES
    assert SessionSnapshot.model_validate_json(cut.model_dump_json(by_alias=True)) == cut
    assert len(cut.seeds) + cut.seeds_left_out == 64
    assert cut.seeds
    for seed, whole in zip(cut.seeds, snapshot.seeds, strict=False):
        assert seed.transitions[-1].epoch == whole.transitions[-1].epoch == 31
    assert cut.seed_counts == snapshot.seed_counts


def test_whatever_is_most_is_cut_down_first() -> None:
    cut = fitted(crowded("x" * 500), most=4096)
    assert size(cut) <= 4096
    assert len(cut.seeds) + cut.seeds_left_out == 64
    assert cut.seeds
    assert 0 < len(cut.layers) < 64
