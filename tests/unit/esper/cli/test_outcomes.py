"""What ranks tell the process that supervises them."""

import json

import pytest

from esper.cli.outcomes import DONE, Ended, Note, Outcome, Outcomes, deciding
from esper.errors import (
    AcceleratorMissing,
    BusUnavailable,
    Conflict,
    ConflictReason,
    DataError,
    Interrupted,
    KernelNotFound,
    StorageFull,
)

CRASH = Ended(Outcome.CRASHED, "RankCrashed", "rank was killed by SIGKILL")


@pytest.mark.parametrize(
    ("error", "outcome", "reason", "status"),
    [
        (DataError("data.train", "nothing", "samples"), "bad-input", "DataError", 78),
        (
            KernelNotFound("kernel", "k", "one that was requested"),
            "bad-input",
            "KernelNotFound",
            78,
        ),
        (StorageFull("no room left"), "failed", "StorageFull", 1),
        (Conflict(ConflictReason.REVOKED, "revoked"), "failed", "Conflict", 1),
        (Interrupted("a checkpoint was written"), "interrupted", "Interrupted", 75),
        # A later try may succeed.
        (BusUnavailable("no answer"), "crashed", "BusUnavailable", 1),
        (ZeroDivisionError("by zero"), "crashed", "ZeroDivisionError", 1),
        # Started again at once it would come again.
        (MemoryError(), "failed", "OutOfMemory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "failed", "OutOfMemory", 1),
        (RuntimeError("shapes differ"), "crashed", "RuntimeError", 1),
        (AcceleratorMissing("limits", "2", "at most 0"), "bad-input", "AcceleratorMissing", 78),
    ],
)
def test_what_an_error_means_for_the_work(error, outcome, reason, status):
    ended = Ended.by(error)
    assert (ended.outcome, ended.reason, ended.status) == (outcome, reason, status)


def test_messages_are_one_line_that_a_termination_log_holds():
    ended = Ended.by(StorageFull("so\n" + "långt " * 1000))
    assert "\n" not in ended.message
    assert len(json.dumps({"message": ended.message}, ensure_ascii=False).encode()) < 4096
    assert Ended.by(KeyError("x")).message == "unexpected KeyError: 'x'"


def test_what_is_told_is_read_in_the_order_of_the_ranks(tmp_path):
    outcomes = Outcomes(tmp_path)
    assert (outcomes.notes(), outcomes.begun()) == ([], set())
    for rank in (10, 2):
        assert outcomes.begin(rank)
        outcomes.tell(rank, CRASH)
    assert outcomes.notes() == [Note(2, CRASH), Note(10, CRASH)]
    assert outcomes.begun() == {2, 10}
    assert not list(tmp_path.glob("*.partial"))


def test_what_a_rank_told_before_it_was_started_again_does_not_count(tmp_path):
    outcomes = Outcomes(tmp_path)
    outcomes.tell(1, DONE)
    outcomes.tell(2, DONE)
    assert outcomes.begin(1)
    assert outcomes.notes() == [Note(2, DONE)]


@pytest.mark.parametrize(
    ("rank", "ended", "goes_on"),
    [
        (0, DONE, False),
        (1, DONE, True),
        (0, Ended(Outcome.INTERRUPTED, "Interrupted", ""), True),
        (0, CRASH, True),
        (1, Ended(Outcome.FAILED, "StorageFull", ""), False),
        (1, Ended(Outcome.BAD_INPUT, "DataError", ""), False),
    ],
)
def test_a_rank_that_is_started_again_has_nothing_to_do_when_all_is_said(
    tmp_path, rank, ended, goes_on
):
    outcomes = Outcomes(tmp_path)
    outcomes.tell(rank, ended)
    assert outcomes.begin(0) == goes_on


def test_a_rank_that_is_started_while_all_are_stopped_has_nothing_to_do(tmp_path):
    outcomes = Outcomes(tmp_path)
    outcomes.stop()
    assert not outcomes.begin(0)
    assert outcomes.begun() == set()


def test_whose_end_counts():
    bad = Ended(Outcome.BAD_INPUT, "DataError", "")
    assert deciding([], set()) is None
    assert deciding([Note(0, DONE), Note(1, bad)], {0, 1}) == DONE
    assert deciding([Note(0, CRASH), Note(1, bad)], {0, 1}) == bad
    assert deciding([Note(0, CRASH), Note(1, DONE)], {0, 1}) == CRASH
    assert deciding([Note(1, DONE)], {0, 1}) is None
    assert deciding([Note(2, CRASH), Note(3, DONE)], {2, 3}) == DONE


def test_a_rank_that_begins_anew_has_met_nobody_yet(tmp_path):
    outcomes = Outcomes(tmp_path)
    for rank in (0, 1):
        outcomes.begin(rank)
        assert rank not in outcomes.met()
        outcomes.meet(rank)
    assert outcomes.met() == {0, 1}
    outcomes.begin(0)
    assert outcomes.met() == {1}


def test_a_note_that_is_taken_back_while_notes_are_read_is_none(tmp_path):
    outcomes = Outcomes(tmp_path)
    outcomes.tell(0, DONE)
    # As one that was listed, and that its rank, started again, has removed before it was read.
    (tmp_path / "rank-1.json").symlink_to(tmp_path / "removed")
    assert outcomes.notes() == [Note(0, DONE)]
