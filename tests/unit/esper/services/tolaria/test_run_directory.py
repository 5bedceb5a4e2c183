from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import AdaptationDecision, SeedTransition
from esper.errors import Interrupted, LossNotFinite, OutputError, StorageFull
from esper.services.tolaria.checkpoints import Checkpoints, Written
from esper.services.tolaria.run_directory import (
    FILES,
    FOLDERS,
    LOGS,
    MANIFEST,
    RunDirectory,
    RunLog,
    refuse_unusable,
    write_atomically,
)
from tests.unit.esper.services.tolaria.checkpointing import in_run, newest, snapshot

TEXT = "kind: TrainingSession\n"


def logging_run(path: Path, keep: int = 2) -> tuple[RunDirectory, RunLog]:
    run = RunDirectory.create(path, TEXT, overwrite=False)
    return run, RunLog(run, in_run(path, keep))


def decision(epoch: int) -> AdaptationDecision:
    return AdaptationDecision(
        id=f"{epoch:032d}",
        session="s",
        epoch=epoch,
        action=DecisionAction.GERMINATE,
        layer="hidden.0",
        slot=0,
        blueprint="widen",
        confidence=0.9,
        reason="größer – because",
    )


def transition(epoch: int) -> SeedTransition:
    return SeedTransition(
        session="s",
        epoch=epoch,
        layer="hidden.0",
        slot=0,
        cycle=0,
        previous=SeedState.DORMANT,
        current=SeedState.GERMINATED,
        reason="it was time",
    )


def boundary(log: RunLog, epoch: int) -> None:
    """What one boundary tells, all four kinds."""
    log.epoch({"epoch": epoch, "trainLoss": float("nan")})
    log.transition(transition(epoch))
    log.decision(decision(epoch), True, "germinated")
    log.event(epoch, "RolledBack", "the loss was not finite")


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# -- claiming -----------------------------------------------------------------------------------


def test_a_new_run_begins_with_its_manifest(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "a" / "b", TEXT, overwrite=False)
    assert os.listdir(run.path) == [MANIFEST]
    assert run.manifest == TEXT
    assert run.result() is None
    run.close()


HOLDING = """
import fcntl, os, sys
fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_directory_that_another_process_holds_is_refused_until_that_one_dies(
    tmp_path: Path,
) -> None:
    RunDirectory.create(tmp_path, TEXT, overwrite=False).close()
    with subprocess.Popen(
        [sys.executable, "-c", HOLDING, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(OutputError, match="in which another process runs"):
            RunDirectory.open(tmp_path)
        with pytest.raises(OutputError, match="in which another process runs"):
            RunDirectory.create(tmp_path, "", overwrite=True)
        assert (tmp_path / MANIFEST).read_text() == TEXT
        other.kill()
        other.wait()
    RunDirectory.open(tmp_path).close()


def test_the_same_process_cannot_claim_twice_either(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, TEXT, overwrite=False)
    with pytest.raises(OutputError, match="a directory of its own for each run"):
        RunDirectory.open(tmp_path)
    run.close()
    run.close()
    RunDirectory.open(tmp_path).close()


def test_a_failed_start_lets_go_of_the_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left on device"):
        RunDirectory.create(tmp_path, TEXT, overwrite=False)
    monkeypatch.undo()
    RunDirectory.create(tmp_path, TEXT, overwrite=False).close()
    assert os.listdir(tmp_path) == [MANIFEST]


def test_only_a_runs_directory_is_opened(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(OutputError, match=r"--resume: .*the output directory of a run"):
            RunDirectory.open(path)


# -- refusing -----------------------------------------------------------------------------------


def test_a_directory_that_holds_something_is_refused(tmp_path: Path) -> None:
    refuse_unusable(tmp_path, overwrite=False)
    refuse_unusable(tmp_path / "new" / "deep", overwrite=False)
    (tmp_path / "thesis.tex").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=r"holds thesis\.tex and is no run"):
            refuse_unusable(tmp_path, overwrite=overwrite)


def test_a_runs_directory_is_refused_with_both_ways_on(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, TEXT, overwrite=False).close()
    with pytest.raises(OutputError) as caught:
        RunDirectory.create(tmp_path, TEXT, overwrite=False)
    assert "which holds a run" in str(caught.value.came)
    assert f"--resume {tmp_path}" in caught.value.allowed
    assert "--overwrite" in caught.value.allowed
    refuse_unusable(tmp_path, overwrite=True)


def test_a_file_or_a_place_below_one_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(OutputError, match="a file; allowed: a directory"):
        refuse_unusable(file, overwrite=True)
    with pytest.raises(OutputError, match="--output-dir"):
        refuse_unusable(file / "below", overwrite=False)


def test_a_place_where_nobody_can_write_is_refused() -> None:
    # Not even root makes a directory here.
    with pytest.raises(OutputError, match="a directory you may write to"):
        RunDirectory.create(Path("/proc/esper-run"), TEXT, overwrite=False)


def test_a_start_cut_short_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / f".{MANIFEST}.partial").write_text("half a man")
    refuse_unusable(tmp_path, overwrite=False)
    RunDirectory.create(tmp_path, TEXT, overwrite=False).close()
    assert os.listdir(tmp_path) == [MANIFEST]


def test_overwriting_removes_what_a_run_leaves_and_nothing_else(tmp_path: Path) -> None:
    RunDirectory.create(tmp_path, TEXT, overwrite=False).close()
    for name in (*FILES, "notes.txt"):
        (tmp_path / name).write_text("old")
    for name in FOLDERS:
        (tmp_path / name / "deep").mkdir(parents=True)
    RunDirectory.create(tmp_path, "new: manifest\n", overwrite=True).close()
    assert sorted(os.listdir(tmp_path)) == sorted([MANIFEST, "notes.txt"])
    assert (tmp_path / MANIFEST).read_text() == "new: manifest\n"


# -- results ------------------------------------------------------------------------------------


def test_a_result_marks_the_run_as_finished(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path, TEXT, overwrite=False)
    run.write_result({"accuracy": 1 / 3})
    assert run.result() == {"accuracy": 1 / 3}
    run.close()


def test_a_write_that_fails_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    monkeypatch.undo()
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


# -- the log ------------------------------------------------------------------------------------


def test_every_kind_of_line_is_json_that_reads_back(tmp_path: Path) -> None:
    run, log = logging_run(tmp_path)
    log.open()
    boundary(log, 1)
    # Flushed line by line: another process reads along.
    (row,) = lines(tmp_path / "metrics.jsonl")
    assert row["epoch"] == 1
    moved, told = lines(tmp_path / "events.jsonl")
    assert moved["type"] == "transition"
    fields = {key: value for key, value in moved.items() if key not in ("time", "type")}
    assert SeedTransition.model_validate(fields) == transition(1)
    assert (told["type"], told["epoch"], told["reason"]) == ("event", 1, "RolledBack")
    (decided,) = lines(tmp_path / "decisions.jsonl")
    assert (decided.pop("applied"), decided.pop("outcome")) == (True, "germinated")
    del decided["time"]
    assert AdaptationDecision.model_validate(decided) == decision(1)
    log.close()
    run.close()


def test_rewinding_cuts_to_the_checkpoint_and_gives_back_the_lost_decisions(
    tmp_path: Path,
) -> None:
    run, log = logging_run(tmp_path)
    log.open()
    boundary(log, 1)
    log.checkpoint(snapshot(1, sequence=1))
    log.drain()
    kept = {name: (tmp_path / name).read_bytes() for name in LOGS}
    boundary(log, 2)
    boundary(log, 3)
    log.close()
    # A kill cuts the last lines short.
    for name in LOGS:
        with (tmp_path / name).open("ab") as file:
            file.write(b'{"epoch": 4, "tra')
    found = in_run(tmp_path).newest()
    assert found is not None
    assert found.snapshot.epoch == 1
    assert found.snapshot.state["sequence"] == 1

    again = RunLog(run, in_run(tmp_path))
    assert again.rewind(found) == [decision(2), decision(3)]
    assert {name: (tmp_path / name).read_bytes() for name in LOGS} == kept
    again.open()
    boundary(again, 2)
    again.close()
    assert [row["epoch"] for row in lines(tmp_path / "metrics.jsonl")] == [1, 2]
    assert again.rewind(found) == [decision(2)]
    run.close()


def test_without_a_checkpoint_everything_is_cut_and_given_back(tmp_path: Path) -> None:
    run, log = logging_run(tmp_path)
    assert log.rewind(None) == []
    log.open()
    boundary(log, 1)
    log.close()
    assert log.rewind(None) == [decision(1)]
    assert all((tmp_path / name).read_bytes() == b"" for name in LOGS)
    run.close()


def test_a_log_that_is_shorter_than_remembered_is_not_filled_up(tmp_path: Path) -> None:
    run, log = logging_run(tmp_path)
    log.open()
    boundary(log, 1)
    log.checkpoint(snapshot(1, sequence=1))
    log.drain()
    log.close()
    (tmp_path / "metrics.jsonl").write_bytes(b"")
    assert log.rewind(in_run(tmp_path).newest()) == []
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""
    run.close()


def test_a_checkpoint_knows_the_lengths_at_its_time_and_leaves_the_snapshot_alone(
    tmp_path: Path,
) -> None:
    run, log = logging_run(tmp_path, keep=1)
    log.open()
    for epoch in (1, 2, 3):
        boundary(log, epoch)
        taken = snapshot(epoch)
        log.checkpoint(taken)
        assert "lengths" not in taken.state
    log.drain()
    log.close()
    assert os.listdir(tmp_path / "checkpoints") == ["epoch-000003"]
    lengths = newest(in_run(tmp_path)).state["lengths"]
    assert lengths == {name: (tmp_path / name).stat().st_size for name in LOGS}
    run.close()


# -- checkpoints --------------------------------------------------------------------------------


def elsewhere(tmp_path: Path) -> Checkpoints:
    return in_run(tmp_path / "run", uri=f"file://{tmp_path}/elsewhere")


def test_a_directory_that_lost_its_files_gets_them_back_from_the_checkpoint(tmp_path: Path) -> None:
    run = RunDirectory.create(tmp_path / "run", TEXT, overwrite=False)
    log = RunLog(run, elsewhere(tmp_path))
    log.open()
    boundary(log, 1)
    log.checkpoint(snapshot(1))
    log.drain()
    kept = {name: (run.path / name).read_bytes() for name in LOGS}
    boundary(log, 2)
    log.close()
    (run.path / "metrics.jsonl").write_bytes(b"")  # shorter
    (run.path / "events.jsonl").unlink()
    again = RunLog(run, elsewhere(tmp_path))
    # The decisions file begins as the checkpoint has it, so what came after is replayed.
    assert again.rewind(elsewhere(tmp_path).newest()) == [decision(2)]
    assert {name: (run.path / name).read_bytes() for name in LOGS} == kept
    assert len(run.told("s")) == 2
    (run.path / "decisions.jsonl").write_bytes(b"x" * 5000)  # of another run
    assert again.rewind(elsewhere(tmp_path).newest()) == []
    assert {name: (run.path / name).read_bytes() for name in LOGS} == kept
    run.close()


class Disk:
    """Where fsync of a name finds the disk full."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        real = os.fsync

        def fsync(descriptor: int) -> None:
            if Path(f"/proc/self/fd/{descriptor}").readlink().name == name:
                raise OSError(errno.ENOSPC, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)


@pytest.mark.parametrize("name", ["events.jsonl", "structure.json"])
def test_a_full_disk_is_told_at_the_next_hand_over_or_at_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Logs are durable before the checkpoint that counts on them has its name."""
    written: list[Written] = []
    run = RunDirectory.create(tmp_path, TEXT, overwrite=False)
    log = RunLog(run, in_run(tmp_path), written.append)
    log.open()
    boundary(log, 1)
    log.checkpoint(snapshot(1))
    log.drain()
    Disk(monkeypatch, name)
    log.checkpoint(snapshot(2))
    with pytest.raises(StorageFull, match="No space left"):
        log.checkpoint(snapshot(3))
    log.checkpoint(snapshot(4))
    with pytest.raises(StorageFull, match="No space left"), log.draining():
        raise Interrupted("asked to stop")
    log.checkpoint(snapshot(5))
    with pytest.raises(LossNotFinite), log.draining():
        raise LossNotFinite("it is what ended the run")
    monkeypatch.undo()
    with log.draining():
        log.checkpoint(snapshot(6))
    log.close()
    assert [one.epoch for one in written] == [1, 6]
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["epoch-000001", "epoch-000006"]
    run.close()


def test_the_snapshot_handed_over_last_is_not_written_again(tmp_path: Path) -> None:
    written: list[Written] = []
    run = RunDirectory.create(tmp_path, TEXT, overwrite=False)
    log = RunLog(run, in_run(tmp_path), written.append)
    log.open()
    one, other = snapshot(1), snapshot(1)
    for taken in (one, one, other):
        log.checkpoint(taken)
    log.drain()
    log.close()
    assert [one.where for one in written] == ["checkpoints/epoch-000001"] * 2
    run.close()
