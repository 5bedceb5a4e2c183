"""A supervisor of planned ranks in its own process; as a program: PLACE SETTINGS NAME PARENT."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from esper.cli.process_tree import die_with_parent
from esper.cli.supervising import AGENT, Placement, Supervisor, heeding_signals

HERE = Path(__file__).parent
TORCHRUN = AGENT
SMALL_AGENT = (sys.executable, str(HERE / "small_agent.py"))


class Worker:
    """One node at work in `place`, with what its ranks are to do."""

    def __init__(
        self, place, plan=None, *, agent=SMALL_AGENT, restarts=1, name="", first=0, **placement
    ):
        """The small agent's ranks begin with the number `first`."""
        self.place, self.name = place, name
        if plan is not None:
            (place / "plan.json").write_text(json.dumps(plan))
        given = {"placement": {"processes": 1, "meeting": "test"} | placement, "agent": agent}
        self.process = subprocess.Popen(
            [
                *(sys.executable, __file__, place),
                *(json.dumps(given | {"restarts": restarts}), name, str(os.getpid())),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Folders of launches lie here, to be counted.
            env=os.environ
            | {"TMPDIR": str(place), "OMP_NUM_THREADS": "1", "FIRST_RANK": str(first)},
        )

    def signal(self, number):
        self.process.send_signal(number)

    def wait(self):
        """Wait for the end; `out` and `err` are what was written, `ended` is what was told."""
        self.out, self.err = self.process.communicate(timeout=120)
        self.ended = json.loads((self.place / f"ended{self.name}.json").read_text())
        return self.process.returncode

    def lines(self, name):
        """What ranks noted under that name."""
        path = self.place / name
        return path.read_text().splitlines() if path.exists() else []

    def until(self, name, lines=1):
        """Wait until ranks have noted so many lines."""
        end = time.monotonic() + 120
        while len(self.lines(name)) < lines:
            assert time.monotonic() < end, f"{name}: {self.lines(name)}"
            assert self.process.poll() is None, self.process.stderr.read()
            time.sleep(0.02)

    def living(self):
        """Processes of ranks that have not ended."""
        noted = [pid for path in self.place.glob("starts-*") for pid in self.lines(path.name)]
        return [pid for pid in (*noted, *self.lines("forked")) if alive(int(pid))]


def alive(pid):
    """Whether there is such a process that has not ended; nobody may have reaped it."""
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def main():
    # A test that fails leaves nothing behind: the process of the tests takes this one along.
    die_with_parent(int(sys.argv[4]))
    place, given = Path(sys.argv[1]), json.loads(sys.argv[2])
    progress = place / "progress"
    with heeding_signals() as requests:
        (place / f"pid{sys.argv[3]}").write_text(str(os.getpid()))
        supervisor = Supervisor(
            Placement(**given["placement"]),
            [sys.executable, str(HERE / "planned_rank.py"), str(place / "plan.json")],
            restarts=given["restarts"],
            stop_seconds=2,
            progress=lambda: len(progress.read_text().splitlines()) if progress.exists() else 0,
            agent=given["agent"],
        )
        ended = supervisor.run(requests)
    (place / f"ended{sys.argv[3]}.json").write_text(json.dumps(asdict(ended)))
    return ended.status


if __name__ == "__main__":
    sys.exit(main())
