from __future__ import annotations

import math
import os
import threading
from pathlib import Path
from typing import Any

from esper.contracts.base import utc_now
from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.manifests import parse_resource
from esper.contracts.operational import SeedTransition
from esper.contracts.resources import Condition, TrainingSession, TrainingSessionStatus
from esper.services.tolaria.checkpoints import Written
from esper.services.tolaria.reporting import SessionReport
from esper.services.tolaria.status import StatusFile, break_off
from tests.unit.esper.services.tolaria.checkpointing import snapshot
from tests.unit.esper.services.tolaria.sessions import resource

SESSION = resource()


def report_of(**changes: Any) -> SessionReport:
    values: dict[str, Any] = {
        "layers": {"hidden.0": "Linear", "head": "Linear"},
        "refused": {"attention.out_proj": "its forward is never called"},
        "parameters_base": 120,
        "epochs": 40,
        "threads": 1,
    }
    return SessionReport("small", **values | changes)


def status_file(folder: Path, **changes: Any) -> StatusFile:
    return StatusFile(folder / "status.yaml", SESSION, report_of(**changes))


def read(folder: Path) -> TrainingSessionStatus:
    text = (folder / "status.yaml").read_text(encoding="utf-8")
    found = parse_resource(text, "status.yaml", TrainingSession)
    assert found.spec == SESSION.spec
    assert found.metadata.name == SESSION.metadata.name
    assert found.status is not None
    return found.status


def row(epoch: int = 1, **rest: Any) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "trainLoss": 1.23456789,
        "validationLoss": 1e-7,
        "validationMetric": 0.5,
        "parameters": 150,
        "flops": 10**15,
    } | rest


def measured(**scores: float) -> list[dict[str, Any]]:
    return [{"layer": name, "healthScore": score} for name, score in scores.items()]


def condition(status: TrainingSessionStatus, kind: str = "Succeeded") -> Condition:
    (found,) = [one for one in status.conditions if one.type == kind]
    return found


def transition(layer: str, slot: int) -> SeedTransition:
    return SeedTransition(
        session="small",
        epoch=1,
        layer=layer,
        slot=slot,
        cycle=0,
        previous=SeedState.DORMANT,
        current=SeedState.GERMINATED,
        reason="decision",
    )


def test_the_first_status_says_that_the_session_trains(tmp_path: Path) -> None:
    status_file(tmp_path).write()
    found = read(tmp_path)
    assert (condition(found).status, condition(found).reason) == ("Unknown", "Running")
    assert (found.epoch, found.epochs, found.attempt) == (0, 40, 1)
    assert (found.parameters_base, found.parameters) == (120, 120)
    assert [(layer.name, layer.kind) for layer in found.layers] == [
        ("hidden.0", "Linear"),
        ("head", "Linear"),
    ]
    (refused,) = found.refused_layers
    assert refused.reason == "its forward is never called"
    assert found.start_time is not None
    assert found.completion_time is None


def test_an_epoch_is_written_at_boundaries_where_layers_are_measured(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    status.epoch(row(1))
    assert os.listdir(tmp_path) == []
    seed = {"layer": "head", "slot": 0, "state": "training", "reason": "a decision"}
    layers = [{"layer": "hidden.0", "healthScore": 0.876}]
    status.epoch(row(2, layers=layers, active=[seed]))
    found = read(tmp_path)
    assert found.epoch == 2
    assert found.metrics == {
        "trainLoss": "1.23457",
        "validationLoss": "1e-07",
        "validationMetric": "0.5",
    }
    assert (found.parameters, found.flops) == (150, 10**15)
    assert (found.seeds.training, found.seeds.dormant, found.seeds.active) == (1, 1, 1)
    assert [layer.health_percent for layer in found.layers] == [88, None]
    assert found.last_heartbeat_time is not None


def test_losses_that_are_not_finite_read_back(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    losses = {"trainLoss": math.nan, "validationLoss": math.inf, "validationMetric": -math.inf}
    status.epoch(row(1, layers=measured(head=0.0), **losses))
    assert set(read(tmp_path).metrics.values()) == {"NaN", "Infinity", "-Infinity"}


def test_layers_count_the_slots_that_have_left_dormancy(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    for slot in (0, 1, 1, 0):
        status.transition(transition("head", slot))
    status.epoch(row(1, layers=measured(head=1.0)))
    assert {layer.name: layer.seeds for layer in read(tmp_path).layers} == {
        "hidden.0": 0,
        "head": 2,
    }


def test_a_checkpoint_is_named_where_it_lies_once_it_is_there(tmp_path: Path) -> None:
    report = report_of()
    status = StatusFile(tmp_path / "status.yaml", SESSION, report)
    status.checkpoint(snapshot(12))
    status.write()
    assert read(tmp_path).checkpoint is None
    written = Written(where="checkpoints/epoch-000012", epoch=12, time=utc_now())
    thread = threading.Thread(target=report.checkpointed, args=(written,))
    thread.start()
    thread.join()
    status.write()
    found = read(tmp_path)
    assert found.checkpoint is not None
    assert (found.checkpoint.name, found.checkpoint.epoch) == ("checkpoints/epoch-000012", 12)
    assert condition(found, "Checkpointed").status == "True"


def test_an_event_becomes_the_summarys_message(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    status.write()
    since = condition(read(tmp_path)).last_transition_time
    status.event(3, "RolledBack", "the loss was not finite")
    found = condition(read(tmp_path))
    assert found.message == "RolledBack: the loss was not finite"
    assert (found.status, found.reason) == ("Unknown", "Running")
    assert found.last_transition_time == since


def test_the_ends_a_session_can_come_to(tmp_path: Path) -> None:
    expected = {
        SessionOutcome.SUCCEEDED: ("True", True),
        SessionOutcome.FAILED: ("False", True),
        SessionOutcome.INTERRUPTED: ("Unknown", False),
    }
    for outcome, (word, over) in expected.items():
        status = status_file(tmp_path)
        status.finish(outcome, "so it ended")
        found = read(tmp_path)
        assert (condition(found).status, condition(found).reason) == (word, outcome.value)
        assert condition(found).message == "so it ended"
        assert (found.completion_time is not None) is over
        assert found.workers == (0 if over else 1)


def test_the_summarys_time_moves_with_its_status(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    status.write()
    since = condition(read(tmp_path)).last_transition_time
    status.finish(SessionOutcome.SUCCEEDED, "done")
    assert condition(read(tmp_path)).last_transition_time > since


def test_the_test_sets_metric_joins_the_others_at_the_end(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    status.epoch(row(1, layers=measured(head=0.5)))
    status.finish(SessionOutcome.SUCCEEDED, "done", test=0.625, parameters=200)
    found = read(tmp_path)
    assert found.metrics["test"] == "0.625"
    assert found.metrics["validationMetric"] == "0.5"
    assert found.parameters == 200


def test_summaries_have_a_bound(tmp_path: Path) -> None:
    many = {f"layer.{n}": "Linear" for n in range(200)}
    refused = {f"other.{n}": "called many times" for n in range(200)}
    status_file(tmp_path, layers=many, refused=refused).write()
    found = read(tmp_path)
    assert (len(found.layers), len(found.refused_layers)) == (64, 64)


def test_long_reasons_and_messages_are_cut_to_what_the_resource_takes(tmp_path: Path) -> None:
    status = status_file(tmp_path, refused={"a": "x" * 5000})
    status.finish(SessionOutcome.FAILED, "y" * 50_000)
    found = read(tmp_path)
    assert len(found.refused_layers[0].reason) <= 1024
    assert len(condition(found).message) <= 32_768


def test_decisions_leave_the_status_alone_and_only_the_file_is_left(tmp_path: Path) -> None:
    status = status_file(tmp_path)
    status.write()
    before = (tmp_path / "status.yaml").read_bytes()
    status.write()
    assert (tmp_path / "status.yaml").read_bytes() == before
    assert os.listdir(tmp_path) == ["status.yaml"]


def test_who_has_seen_the_processes_end_says_that_the_session_failed(tmp_path: Path) -> None:
    path = tmp_path / "status.yaml"
    break_off(path, "no run began")
    assert not path.exists()
    status = status_file(tmp_path)
    status.epoch(row(4, layers=measured(head=1.0)))
    before = read(tmp_path)
    break_off(path, "RankCrashed: rank 1 was killed by SIGKILL; given up")
    failed = read(tmp_path)
    assert (failed.epoch, failed.metrics, failed.workers) == (4, before.metrics, 0)
    assert failed.completion_time is not None
    summary = condition(failed)
    assert (summary.status, summary.reason) == ("False", "Failed")
    assert summary.message == "RankCrashed: rank 1 was killed by SIGKILL; given up"
    # What the run itself has said stays.
    status.finish(SessionOutcome.INTERRUPTED, "asked to stop")
    break_off(path, "StopFailed: not in time")
    assert condition(read(tmp_path)).message == "asked to stop"
