"""A session's snapshot: what the status of the session and of its seeds takes from it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import ValidationError

from esper.contracts.enums import ComponentType, SeedState, SessionOutcome
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import SeedSnapshot, SessionSnapshot
from esper.contracts.resources import (
    CheckpointStatus,
    LayerSummary,
    RefusedLayer,
    SeedCounts,
    TrainingSessionStatus,
)
from esper.contracts.resources.seed import SeedStatus, SeedTransitionStatus

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
SEED = SeedSnapshot(
    layer="layers.0",
    slot=1,
    state=SeedState.GRAFTING,
    blueprint="affine",
    kernel="5f" * 20,
    alpha_percent=40,
    health_percent=81,
    contribution="0.0125",
    cycle=2,
    transitions=(
        SeedTransitionStatus(
            time=NOON,
            epoch=3,
            previous=SeedState.TRAINING,
            current=SeedState.GRAFTING,
            reason="it pays",
        ),
    ),
)
FIELDS: dict[str, Any] = {
    "session": "digits",
    "attempt": 2,
    "sequence": 17,
    "time": NOON,
    "message": "RolledBack: once",
    "epoch": 4,
    "epochs": 20,
    "metrics": {"trainLoss": "0.5", "validationLoss": "NaN"},
    "parameters_base": 100,
    "parameters": 120,
    "flops": 10**15,
    "seed_counts": SeedCounts(grafting=1, active=1),
    "seeds": (SEED,),
    "seeds_left_out": 3,
    "layers": (LayerSummary(name="layers.0", kind="Linear", seeds=1, health_percent=81),),
    "refused_layers": (RefusedLayer(name="out_proj", reason="never called"),),
    "checkpoint": CheckpointStatus(name="checkpoints/epoch-000004", epoch=4, time=NOON),
    "threads": 1,
    "processes": 4,
}


def test_a_snapshot_crosses_the_bus_as_it_was() -> None:
    snapshot = SessionSnapshot(**FIELDS)
    message = OonaMessage.carrying(TopicNames.STATUS, snapshot, ComponentType.TOLARIA, scope="uid")
    came = OonaMessage.model_validate_json(message.model_dump_json(by_alias=True))
    assert came.open() == snapshot


def test_every_field_of_a_status_that_training_determines_comes_from_it() -> None:
    status = TrainingSessionStatus().model_copy(update=SessionSnapshot(**FIELDS).observed())
    others = {
        "observed_generation",
        "conditions",
        "attempt",
        "attempt_time",
        "failed_attempts",
        "fruitless_attempts",
        "report_sequence",
        "replicas",
        "job",
        "disruptions",
        "interrupted_pods",
        "failures",
        "workers",
        "selector",
        "start_time",
        "active_since",
        "active_seconds",
        "completion_time",
    }
    for name in TrainingSessionStatus.model_fields:
        told = FIELDS["seed_counts"] if name == "seeds" else FIELDS.get(name)
        told = NOON if name == "last_heartbeat_time" else told
        if name not in others:
            assert told is not None, name
            assert getattr(status, name) == told, name
    assert TrainingSessionStatus.model_validate(status.to_wire()) == status


def test_a_seeds_status_comes_from_its_snapshot() -> None:
    status = SEED.status()
    for name in SeedStatus.model_fields:
        if name not in ("observed_generation", "conditions"):
            assert getattr(status, name) == getattr(SEED, name), name


@pytest.mark.parametrize(
    "changes",
    [
        {"seeds": (SEED,) * 65},
        {"layers": FIELDS["layers"] * 65},
        {"metrics": {"trainLoss": 0.5}},
        {"epoch": -1},
        {"time": NOON.replace(tzinfo=None)},
        {"outcome": "Lost"},
        {"message": "x" * 1025},
        {"session": ""},
        {"unknown": 1},
    ],
)
def test_what_no_status_could_show_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        SessionSnapshot(**FIELDS | changes)


def test_without_more_it_says_that_the_session_runs() -> None:
    snapshot = SessionSnapshot(session="digits", sequence=0, time=NOON, epochs=1)
    assert snapshot.outcome is SessionOutcome.RUNNING
    assert snapshot.seeds == ()
