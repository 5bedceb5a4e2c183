"""A rank that does what a test has planned, as a program: PLAN --outcomes FOLDER.

The plan is a file of JSON, from a rank's number to what it does at each of its starts. What happens
is noted in files beside it. Real ranks import torch; this one needs none.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from esper.cli.outcomes import Outcomes
from esper.cli.process_tree import die_with_parent
from esper.cli.rank import told
from esper.configs import rank_of_process
from esper.errors import BusUnavailable, Interrupted, LossNotFinite, ManifestError


def main():
    plan, place = Path(sys.argv[1]), Path(sys.argv[1]).parent
    rank = rank_of_process()
    asked = []

    def ask(*_):
        asked.append(1)
        note(place, f"signals-{rank}", "SIGTERM")

    signal.signal(signal.SIGTERM, ask)
    die_with_parent()
    todo = json.loads(plan.read_text())[str(rank)]
    outcomes = Outcomes(Path(sys.argv[3]))
    return told(outcomes, rank, lambda: act(place, rank, todo, asked, outcomes))


def act(place, rank, todo, asked, outcomes):
    before = place / f"starts-{rank}"
    starts = 1 + (len(before.read_text().splitlines()) if before.exists() else 0)
    words = todo[min(starts, len(todo)) - 1].split()
    if "unmet" not in words:
        outcomes.meet(rank)
    note(place, f"starts-{rank}", str(os.getpid()))
    for word in words:
        globals()[f"do_{word}"](place, asked)


def note(place, name, text):
    """Append a line to a file; how many it has then."""
    path = place / name
    with path.open("a") as file:
        file.write(text + "\n")
    return len(path.read_text().splitlines())


def do_done(_place, _asked):
    # In one piece: another rank writes to the same stream.
    os.write(1, (json.dumps({"rank": rank_of_process()}) + "\n").encode())


def do_unmet(_place, _asked):
    """Wait for another rank, which does not come."""
    time.sleep(600)


def do_kill(_place, _asked):
    os.kill(os.getpid(), signal.SIGKILL)


def do_agent(_place, _asked):
    """Kill torchrun; the ranks die with it."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(60)


def do_progress(place, _asked):
    note(place, "progress", "checkpoint")


def do_reach(place, _asked):
    """Come to a checkpoint that rank 0 writes, on another node."""
    epoch = note(place, "reached", "checkpoint")
    Outcomes(Path(sys.argv[3])).reach(rank_of_process(), epoch)


def do_raise(_place, _asked):
    raise ZeroDivisionError("what nobody foresaw")


def do_unavailable(_place, _asked):
    raise BusUnavailable("a rank is gone")


def do_refuse(_place, _asked):
    raise ManifestError("spec.epochs", -1, "1 or more")


def do_fail(_place, _asked):
    raise LossNotFinite("the loss is nan")


def do_interrupted(_place, _asked):
    raise Interrupted("interrupted; a checkpoint was written")


def do_meet(place, _asked):
    """Wait until ranks 0 and 1 have started equally often: none is stopped before it begins."""
    paths = [place / "starts-0", place / "starts-1"]
    while len({path.exists() and len(path.read_text().split()) for path in paths}) > 1:
        time.sleep(0.01)


def do_store(place, _asked):
    """Note whether the store of the ranks is kept by torchrun, from start to start."""
    note(place, "stores", os.environ["TORCHELASTIC_USE_AGENT_STORE"])


def do_wait(_place, asked):
    """Train until asked to stop, and then for a moment more."""
    while not asked:
        time.sleep(0.01)
    time.sleep(0.1)


def do_fork(place, _asked):
    """Leave a process that no signal of a terminal reaches."""
    if os.fork() == 0:
        os.setsid()
        note(place, "forked", str(os.getpid()))
        time.sleep(600)
        os._exit(0)


def do_hang(_place, _asked):
    time.sleep(600)


if __name__ == "__main__":
    sys.exit(main())
