"""The supervisor of ranks: real processes, with an agent that needs no torch."""

import os
import signal
import time

import pytest

from esper.cli.outcomes import Ended, Note, Outcome
from esper.cli.supervising import Placement, judged
from tests.unit.esper.cli.supervised import Worker, alive

DONE = Ended(Outcome.DONE, "Succeeded", "done")
STOPPED = Ended(Outcome.INTERRUPTED, "Interrupted", "a checkpoint was written")
CRASH = Ended(Outcome.CRASHED, "RankCrashed", "rank 0 was killed by SIGKILL")
BAD = Ended(Outcome.BAD_INPUT, "ManifestError", "spec")


@pytest.mark.parametrize(
    ("notes", "begun", "requests", "outcome"),
    [
        # Nothing was told: again, or what a request found.
        ({}, set(), 0, None),
        ({}, {0}, 0, None),
        ({}, set(), 1, Outcome.INTERRUPTED),
        ({}, {0}, 1, Outcome.CRASHED),
        ({}, {0}, 2, Outcome.CRASHED),
        # Rank 0's end counts, and a crash is no end.
        ({0: DONE, 1: CRASH}, {0, 1}, 0, Outcome.DONE),
        ({0: CRASH, 1: DONE}, {0, 1}, 0, None),
        ({1: DONE}, {0, 1}, 0, None),
        ({0: CRASH}, {0}, 1, Outcome.CRASHED),
        # Where rank 0 is on another node, any rank's.
        ({2: DONE, 3: CRASH}, {2, 3}, 0, Outcome.DONE),
        ({2: CRASH}, {2, 3}, 0, None),
        # What one rank can't do, all can't.
        ({0: CRASH, 1: BAD}, {0, 1}, 0, Outcome.BAD_INPUT),
        ({0: DONE, 1: BAD}, {0, 1}, 0, Outcome.DONE),
        # Interrupted counts where this node was asked.
        ({0: STOPPED}, {0}, 0, None),
        ({0: STOPPED}, {0}, 1, Outcome.INTERRUPTED),
        ({0: STOPPED}, {0}, 2, Outcome.INTERRUPTED),
        ({0: DONE}, {0}, 1, Outcome.DONE),
    ],
)
def test_what_a_launch_came_to(notes, begun, requests, outcome):
    told = [Note(rank, end) for rank, end in notes.items()]
    ended = judged(told, begun, requests, stopped=requests > 0)
    assert (ended and ended.outcome) == outcome


def test_ranks_that_crashed_by_themselves_just_before_a_request_are_judged_as_crashed():
    assert judged([], {0}, 1, stopped=False) is None
    assert judged([Note(0, CRASH)], {0}, 1, stopped=False) is None


def test_nodes_find_each_other_at_the_first_one():
    first = Placement(processes=2, meeting="m", nodes=3, host="job-0.session", port=29400)
    assert first.options() == [
        "--nnodes=3",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=job-0.session:29400",
        "--rdzv-id=m",
        "--rdzv-conf=is_host=true,join_timeout=600",
    ]
    third = Placement(processes=2, meeting="m", nodes=3, node=2, host="::1", port=1)
    assert "--rdzv-endpoint=[::1]:1" in third.options()
    assert "--rdzv-conf=is_host=false,join_timeout=600" in third.options()
    there = Placement(processes=1, meeting="m", nodes=2, node=1, address="127.0.0.2").options()
    assert "--local-addr=127.0.0.2" in there
    alone = Placement(processes=1, meeting="m").options()
    assert {"--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"} <= set(alone)


@pytest.mark.parametrize(
    ("plan", "status", "reason", "starts"),
    [
        ({"0": ["done"]}, 0, "Succeeded", 1),
        ({"0": ["refuse"]}, 78, "ManifestError", 1),
        ({"0": ["fail"]}, 1, "LossNotFinite", 1),
        # torchrun starts it again; after a second crash without progress nobody does.
        ({"0": ["kill", "done"]}, 0, "Succeeded", 2),
        ({"0": ["raise"]}, 1, "ZeroDivisionError", 2),
        ({"0": ["unavailable"]}, 1, "BusUnavailable", 2),
        ({"0": ["raise", "kill"]}, 1, "RankCrashed", 2),
        # With a newer checkpoint the count begins anew.
        ({"0": ["raise", "progress raise", "raise", "done"]}, 0, "Succeeded", 4),
        ({"0": ["raise", "progress raise", "raise", "raise", "done"]}, 1, "ZeroDivisionError", 4),
        # torchrun itself is gone, or was stopped by another: once more without progress.
        ({"0": ["agent", "done"]}, 0, "Succeeded", 2),
        ({"0": ["agent"]}, 1, "RanksLost", 2),
        ({"0": ["interrupted", "done"]}, 0, "Succeeded", 2),
        ({"0": ["interrupted"]}, 1, "Interrupted", 2),
    ],
)
def test_how_ranks_end_and_how_often_they_start(tmp_path, plan, status, reason, starts):
    worker = Worker(tmp_path, plan)
    assert worker.wait() == status, worker.err
    assert worker.ended["reason"] == reason
    assert len(worker.lines("starts-0")) == starts
    assert worker.living() == []
    assert not list(tmp_path.glob("esper-worker-*"))
    if status == 1 and starts > 1:
        assert "given up after 1 restarts without a newer checkpoint" in worker.ended["message"]


@pytest.mark.parametrize(
    ("plan", "status", "starts"),
    [
        (["agent", "reach agent", "done"], 0, 3),
        (["agent", "reach agent", "agent", "done"], 1, 3),
        (["progress agent", "progress agent", "done"], 1, 2),  # that folder is none of its own
    ],
)
def test_a_node_without_rank_0_counts_the_checkpoints_that_its_ranks_come_to(
    tmp_path, plan, status, starts
):
    worker = Worker(tmp_path, {"1": plan}, first=1)
    assert worker.wait() == status, worker.err
    assert len(worker.lines("starts-1")) == starts


def test_what_one_rank_can_not_do_ends_all(tmp_path):
    # Rank 0 finds that a rank is gone, and is started again.
    worker = Worker(tmp_path, {"0": ["wait raise", "hang"], "1": ["meet refuse"]}, processes=2)
    worker.until("starts-0")
    worker.until("starts-1")
    rank = int(worker.lines("starts-0")[0])
    os.kill(rank, signal.SIGTERM)
    assert worker.wait() == 78, worker.err
    assert "spec.epochs" in worker.ended["message"]
    assert worker.living() == []


def test_a_signal_ends_the_ranks_with_a_checkpoint(tmp_path):
    worker = Worker(tmp_path, {"0": ["wait interrupted"], "1": ["wait interrupted"]}, processes=2)
    worker.until("starts-0")
    worker.until("starts-1")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 75, worker.err
    assert worker.ended["message"] == "interrupted; a checkpoint was written"
    assert worker.lines("signals-0") == worker.lines("signals-1") == ["SIGTERM"]


def test_ranks_that_are_done_when_the_signal_comes_are_done(tmp_path):
    worker = Worker(tmp_path, {"0": ["wait done"]})
    worker.until("starts-0")
    worker.signal(signal.SIGINT)
    assert worker.wait() == 0


def test_ranks_that_crash_when_asked_to_stop_are_not_started_again(tmp_path):
    worker = Worker(tmp_path, {"0": ["wait raise"]})
    worker.until("starts-0")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 1
    assert worker.ended["reason"] == "ZeroDivisionError"
    assert len(worker.lines("starts-0")) == 1


def test_ranks_that_do_not_stop_in_time_are_killed_with_what_they_forked(tmp_path):
    worker = Worker(tmp_path, {"0": ["fork hang"]})
    worker.until("forked")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 1
    assert worker.ended["reason"] == "StopFailed"
    assert worker.living() == []


def test_ranks_that_wait_for_each_other_are_not_waited_for(tmp_path):
    # Started again after a crash, rank 0 waits for one that was stopped before it could come.
    plan = {"0": ["wait raise", "unmet"], "1": ["meet kill", "wait interrupted"]}
    worker = Worker(tmp_path, plan, processes=2)
    worker.until("starts-0", 2)
    worker.until("starts-1", 2)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 75, worker.err
    assert worker.ended["message"] == "asked to stop while no rank was at work"
    assert worker.living() == []


def test_a_second_signal_ends_ranks_at_once(tmp_path):
    worker = Worker(tmp_path, {"0": ["hang"]})
    worker.until("starts-0")
    worker.signal(signal.SIGTERM)
    worker.until("signals-0")
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 1
    assert worker.ended["reason"] == "Killed"
    assert worker.living() == []


def test_a_signal_between_two_launches_loses_nothing(tmp_path):
    worker = Worker(tmp_path, {"0": ["progress agent"]}, restarts=9)
    worker.until("progress")
    while worker.living():
        time.sleep(0.01)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 75
    assert worker.ended["message"] == "asked to stop while no rank was at work"


def test_a_node_waits_for_the_store_of_the_first_one_and_heeds_signals_meanwhile(tmp_path):
    worker = Worker(tmp_path, {"0": ["done"]}, nodes=2, node=1, port=1)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 75
    assert worker.lines("starts-0") == []


def test_ranks_die_with_a_supervisor_that_is_killed(tmp_path):
    worker = Worker(tmp_path, {"0": ["hang"], "1": ["hang"]}, processes=2)
    worker.until("starts-0")
    worker.until("starts-1")
    worker.process.kill()
    worker.process.communicate()
    end = time.monotonic() + 60
    while worker.living():
        assert time.monotonic() < end
        time.sleep(0.01)
    assert not alive(worker.process.pid)
