"""A rank tells how it ended, and exits with 0 unless it crashed."""

import subprocess
import sys

import pytest

from esper.cli.outcomes import DONE, Outcome, Outcomes
from esper.cli.rank import told
from esper.errors import BusUnavailable, Interrupted, LossNotFinite, ManifestError


def ends_with(error):
    def work():
        if error is not None:
            raise error

    return work


@pytest.mark.parametrize(
    ("error", "outcome", "status"),
    [
        (None, Outcome.DONE, 0),
        (Interrupted("a checkpoint was written"), Outcome.INTERRUPTED, 0),
        (ManifestError("spec", 1, "2"), Outcome.BAD_INPUT, 0),
        (LossNotFinite("the loss is nan"), Outcome.FAILED, 0),
        (BusUnavailable("a rank is gone"), Outcome.CRASHED, 1),
        (ZeroDivisionError("by\nzero"), Outcome.CRASHED, 1),
        (SystemExit(0), Outcome.CRASHED, 1),
    ],
)
def test_only_a_crash_is_torchruns_business(tmp_path, capsys, error, outcome, status):
    outcomes = Outcomes(tmp_path)
    assert told(outcomes, 3, ends_with(error)) == status
    (note,) = outcomes.notes()
    assert (note.rank, note.ended.outcome) == (3, outcome)
    printed = capsys.readouterr().err
    # The supervisor says once what all ranks have told.
    assert (printed.count("\n"), "esper worker: rank 3: " in printed) == (status, status == 1)


def test_the_trace_of_a_crash_is_shown_with_debug_only(tmp_path, capsys):
    told(Outcomes(tmp_path), 0, ends_with(ZeroDivisionError("x")), debug=True)
    assert "Traceback" in capsys.readouterr().err


def test_a_rank_does_nothing_when_all_is_said(tmp_path):
    outcomes = Outcomes(tmp_path)
    outcomes.tell(0, DONE)
    assert told(outcomes, 1, lambda: pytest.fail("it worked")) == 0


def test_a_rank_heeds_signals_before_anything_is_imported():
    heavy = {"torch", "pydantic", "argparse", "yaml"}
    code = f"import sys, esper.cli.rank; sys.exit(bool({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
