"""A rank tells how it ended, and exits with 0 unless it crashed."""

import subprocess
import sys

import pytest

from esper.cli.accelerators import require_accelerators, require_any_accelerator
from esper.cli.outcomes import DONE, Outcome, Outcomes
from esper.cli.rank import told
from esper.contracts.manifests import validate_resource
from esper.contracts.resources import TrainingSession
from esper.errors import (
    AcceleratorMissing,
    BusUnavailable,
    Interrupted,
    LossNotFinite,
    ManifestError,
)


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


@pytest.mark.parametrize(("asked", "present"), [(None, 0), ("2", 2), ("2", 8)])
def test_a_worker_with_enough_gpus_is_taken(asked, present):
    require_accelerators(session_with(asked), present)


@pytest.mark.parametrize("present", [0, 1])
def test_a_session_that_asks_for_more_gpus_than_there_are_ends(present):
    with pytest.raises(AcceleratorMissing, match=f"got 2; allowed: at most {present}, as this"):
        require_accelerators(session_with("2"), present)


def session_with(gpus):
    limits = {} if gpus is None else {"nvidia.com/gpu": gpus}
    workers = {"processesPerWorker": int(gpus or 1), "resources": {"limits": limits}}
    spec = {"model": {"entrypoint": "a:b"}, "data": {"entrypoint": "a:c"}, "workers": workers}
    head = {"apiVersion": "esper.dev/v1alpha1", "kind": "TrainingSession"}
    data = head | {"metadata": {"name": "digits"}, "spec": spec}
    return validate_resource(data, TrainingSession)


def test_where_cuda_has_no_driver_nothing_is_begun():
    with pytest.raises(AcceleratorMissing, match="got 2; allowed: at most 0, as this"):
        require_any_accelerator(session_with("2"), "libnosuch.so.1")
    require_any_accelerator(session_with(None), "libnosuch.so.1")
    require_any_accelerator(session_with("2"), "libc.so.6")
