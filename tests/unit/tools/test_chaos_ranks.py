"""What `make chaos-ranks` takes from a run's files: its starts, its losses, its phases."""

import json
import random

import pytest

from tools.chaos_checks import differences
from tools.chaos_ranks import main
from tools.rank_moments import Course, Moment, Phase
from tools.rank_worker import last_epoch, lost_epochs, starts, writing

LOG = """\
session ranks: 9 epochs, policy periodic
epoch  1/9  train 2.2
epoch 1: body.0[0] noop dormant -> germinated: Turn 1
epoch  2/9  train 2.1
epoch  3/9  train 2.0
session ranks: 9 epochs, policy periodic
session ranks: 9 epochs, policy periodic
epoch  3/9  train 2.0
epoch  4/9  train 1.9
[W] esper worker: rank 1 was killed
session ranks: 9 epochs, policy periodic
epoch  5/9  train 1.8
"""


def test_a_log_tells_what_each_start_has_lost(tmp_path):
    log = tmp_path / "run.log"
    assert starts(log) == []
    log.write_text(LOG)
    assert starts(log) == [[1, 2, 3], [], [3, 4], [5]]
    # Nothing was told by the second start: what it had lost the third one trains.
    assert lost_epochs(log) == [1, 0]


def test_the_last_epoch_is_that_of_the_last_whole_line(tmp_path):
    assert last_epoch(tmp_path) == 0
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1}\n{"epoch": 2}\n{"epo')
    assert last_epoch(tmp_path) == 2
    (tmp_path / "metrics.jsonl").write_text("")
    assert last_epoch(tmp_path) == 0


def test_a_checkpoint_is_being_written_while_its_partial_folder_is_there(tmp_path):
    (tmp_path / "checkpoints" / "epoch-000001").mkdir(parents=True)
    assert not writing(tmp_path)
    (tmp_path / "checkpoints" / ".epoch-000002.partial").mkdir()
    assert writing(tmp_path)


def moved(epoch, current, reason="its turn"):
    place = {"type": "transition", "layer": "body.0", "slot": 0}
    return place | {"epoch": epoch, "current": current, "reason": reason}


@pytest.fixture
def course(tmp_path):
    events = [
        moved(1, "germinated"),
        moved(1, "training"),
        {"type": "event", "epoch": 2, "reason": "RolledBack", "message": "."},
        moved(3, "grafting"),
        moved(5, "culled", "recovery trial: gain -0.1 nats"),
        moved(6, "dormant"),
    ]
    rows = [{"epoch": epoch, "seconds": float(epoch)} for epoch in range(1, 9)]
    for name, told in (("events", events), ("metrics", rows)):
        text = "".join(json.dumps(line) + "\n" for line in told)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return Course.of(tmp_path, 3)


def test_an_epoch_is_what_the_boundary_before_has_begun(course):
    kinds = ["training", "trials", "trials", "grafting", "recovery", *["training"] * 3]
    assert list(course.phases.values()) == kinds
    assert course.seconds[4] == 4.0
    assert course.epochs_of(Phase.CHECKPOINT) == [3, 6]
    assert course.epochs_of(Phase.TRAINING) == [1, 6, 7]  # after the last one ranks end


def test_ranks_that_end_at_once_are_not_met():
    phases = dict.fromkeys(range(1, 41), Phase.TRAINING)
    assert Course(phases, dict.fromkeys(phases, 0.3), 5).latest == 33  # 2.1 seconds are left
    assert Course(phases, dict.fromkeys(phases, 0.01), 5).latest == 30
    assert Course({1: Phase.TRAINING}, {1: 9.0}, 5).latest == 1


def test_moments_are_of_every_phase_and_in_order(course):
    moments = course.moments(12, random.Random(0))
    assert moments == sorted(moments)
    assert {phase: [m.phase for m in moments].count(phase) for phase in Phase} == dict.fromkeys(
        Phase, 2
    )
    assert moments == course.moments(12, random.Random(0))
    assert moments != course.moments(12, random.Random(1))


def test_a_phase_that_a_session_never_has_is_left_out(course):
    calm = Course({1: Phase.TRAINING, 2: Phase.TRAINING}, {1: 0.1, 2: 0.1}, 5)
    phases = [moment.phase for moment in calm.moments(4, random.Random(0))]
    assert sorted(phases) == [Phase.STARTING] * 2 + [Phase.TRAINING] * 2
    assert calm.moments(1, random.Random(0), [Phase.TRAINING]) == [
        Moment(1, pytest.approx(random.Random(0).random(), abs=1), Phase.TRAINING)
    ]


def test_runs_differ_in_what_they_measured_and_not_in_when(tmp_path):
    for name, time in (("one", 1.0), ("other", 2.0)):
        (tmp_path / name).mkdir()
        for log in ("metrics", "events", "decisions"):
            line = json.dumps({"epoch": 1, "time": time, "seconds": time})
            (tmp_path / name / f"{log}.jsonl").write_text(line + "\n")
    one, other = tmp_path / "one", tmp_path / "other"
    assert differences(one, other) == ["model.safetensors"]  # neither has come to one
    for run in (one, other):
        (run / "model.safetensors").write_bytes(b"weights")
    assert differences(one, other) == []
    (other / "model.safetensors").write_bytes(b"others")
    (other / "events.jsonl").write_text("")
    assert differences(one, other) == ["events.jsonl", "model.safetensors"]


def test_an_unknown_scenario_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["deaths"])
    assert "the scenarios are kills, stops, sizes" in capsys.readouterr().err
