"""Ranks of `esper worker` that are killed and stopped: the session ends as if they had not been.

`make chaos-ranks` does the same at many moments, with other sizes, and without logical shards.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import sys
from contextlib import closing
from pathlib import Path

import pytest

from esper.cli.main import main
from esper.cli.worker import newest_checkpoint
from tests.integration.spirals import status
from tools.chaos_checks import differences
from tools.chaos_ranks import INTERRUPTED, newest_epoch
from tools.rank_moments import Course, Moment, Phase, await_end, reach
from tools.rank_session import write_session
from tools.rank_worker import Worker, last_epoch, lost_epochs

EPOCHS, INTERVAL = 14, 2


def test_killed_and_stopped_ranks_end_as_one_process_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = write_session(
        tmp_path / "session",
        epochs=EPOCHS,
        logicalShards=4,
        checkpoint={"everyEpochs": INTERVAL},
    )
    undisturbed, directory = tmp_path / "undisturbed", tmp_path / "disturbed"
    monkeypatch.setattr(sys, "path", list(sys.path))  # its module is found beside it
    ended = main(["run", str(manifest), "--output-dir", str(undisturbed), "--quiet"])
    assert ended == 0, capsys.readouterr().err
    course = Course.of(undisturbed, INTERVAL)
    log = tmp_path / "disturbed.log"

    def moment(phase: Phase, after: int) -> Moment:
        return Moment(next(e for e in course.epochs_of(phase) if e > after), 0.5, phase)

    in_recovery = moment(Phase.RECOVERY, 1)
    in_grafting = moment(Phase.GRAFTING, in_recovery.epoch)
    in_trials = moment(Phase.TRIALS, in_grafting.epoch)
    with Worker(manifest, directory, 2, log) as worker:
        begun = 0
        for victim, killed in ((1, in_recovery), (0, in_grafting)):
            ranks = reach(worker, killed, course, 2, begun=begun)
            os.kill(ranks[victim], signal.SIGKILL)
            assert await_end(ranks.values(), 60.0)
            # Rank 0, if it was not killed itself, has lost another: that is not the session's end.
            assert status(directory)[1]["reason"] == hub_says(directory) == "Running"
            assert not (directory / "report.html").exists()
            begun = worker.starts()
        reach(worker, in_trials, course, 2, begun=begun)
        worker.signal(signal.SIGTERM)
        assert worker.wait() == INTERRUPTED, log.read_text()
        assert worker.alive() == []
    stopped_at = last_epoch(directory)
    assert newest_epoch(directory) == (stopped_at, ())
    with Worker(manifest, directory, 1, log) as worker:
        told, before = set(), -1
        while (ended := worker.wait(0.05)) is None:
            now = (directory / "status.yaml").stat().st_mtime_ns
            if now != before:  # to read it takes as long as to wait for it
                told.add(newest_checkpoint(directory))
                before = now
        assert ended == 0, log.read_text()
        # Also before this part of the run has written one: restarts are counted by it.
        assert min(told) >= stopped_at
        assert worker.alive() == []
    assert differences(undisturbed, directory) == []
    *killed_twice, stopped = lost_epochs(log)
    assert len(killed_twice) == 2
    assert max(killed_twice) <= INTERVAL
    assert stopped == 0


def hub_says(directory: Path) -> str:
    """How the run's own hub thinks that its session stands."""
    with closing(sqlite3.connect(directory / "hub" / "urza.sqlite")) as hub:
        ((outcome,),) = hub.execute("SELECT outcome FROM training_sessions")
        return str(outcome)
