"""`make chaos-ranks`: ranks of `esper worker` are killed and stopped while their session trains.

- kills: any rank is killed at random moments, while all start, in shadow and recovery trials, while
  a seed is grafted, while a checkpoint is written. Each time all ranks go on from the newest
  checkpoint; no more than the epochs between two of them is trained again.
- stops: SIGTERM at a moment of each kind ends the worker with 75 within ten seconds, and no epoch
  is trained again.
- sizes, in logical shards: the worker is stopped, then killed itself, and its torchrun is killed,
  while 2, then 1, then 4 ranks train.

In the end metrics, events, decisions and model are those of a run that nobody disturbed, to the
bit: with logical shards of `esper run`, without them of as many ranks. No process is left behind.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from esper.cli.run_checkpoints import run_checkpoints
from esper.configs import EsperConfig
from esper.contracts.manifests import parse_manifest
from tools.chaos_checks import Outcome, differences
from tools.rank_moments import Course, Moment, Phase, await_end, reach
from tools.rank_session import write_session
from tools.rank_worker import Worker, WorkerEnded, last_epoch, lost_epochs

SHARDS = 4
PROCESSES = 2
STOP_SECONDS = 10.0
"""From SIGTERM to the end, at most."""
LEAVE_SECONDS = 10.0
"""For the processes of a worker that was killed."""
RESTARTS = 10
"""Moments are where chance puts them, also several within one checkpoint's epochs."""
INTERRUPTED = 75
SCENARIOS = ("kills", "stops", "sizes")


@dataclass(frozen=True)
class Trial:
    """A session, and the run of it that nobody disturbs."""

    manifest: Path
    undisturbed: Path
    course: Course
    say: Callable[[str], None]

    @classmethod
    def of(
        cls, session: Path | None, folder: Path, shards: int, say: Callable[[str], None]
    ) -> Trial:
        """Copy the session, by default one of our own, and train it undisturbed."""
        manifest = _copy(session, folder / "session", shards)
        undisturbed = folder / "undisturbed"
        if shards > 1:
            train_alone(manifest, undisturbed)
        else:
            with Worker(manifest, undisturbed, PROCESSES, folder / "undisturbed.log") as worker:
                if worker.wait() != 0:
                    raise WorkerEnded(f"the undisturbed run failed; see {worker.log}")
        say("the undisturbed session has ended")
        training = next(yaml.safe_load_all(manifest.read_text()))["spec"]["training"]
        every = training.get("checkpoint", {}).get("everyEpochs", 1)
        return cls(manifest, undisturbed, Course.of(undisturbed, every), say)

    def check(self, directory: Path, outcome: Outcome) -> None:
        """Compare a finished run with the undisturbed one."""
        differing = differences(self.undisturbed, directory)
        outcome.check(not differing, f"{directory.name}: {', '.join(differing)} differ")
        log = directory.with_suffix(".log")
        lost = lost_epochs(log)
        most = self.course.checkpoint_epochs
        outcome.figures |= {"starts": len(lost) + 1, "lostEpochs": lost}
        outcome.check(max(lost, default=0) <= most, f"{max(lost, default=0)} epochs were lost")

    def phase(self, directory: Path, moment: Moment) -> Phase:
        """What the run is about, where `moment` was waited for."""
        if moment.phase in (Phase.STARTING, Phase.CHECKPOINT):
            return moment.phase
        return self.course.phases[min(last_epoch(directory) + 1, self.course.epochs)]


def train_alone(manifest: Path, directory: Path) -> None:
    """Train in one process, with `esper run`."""
    subprocess.run(
        [
            *(sys.executable, "-m", "esper", "run", str(manifest)),
            *("--output-dir", str(directory), "--quiet"),
        ],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        check=True,
    )


def kills(trial: Trial, folder: Path, number: int, chance: random.Random) -> Outcome:
    """`kill -9` of a rank at so many moments of one run."""
    outcome = Outcome()
    directory = folder / "killed"
    met: Counter[str] = Counter()
    moments = trial.course.moments(number, chance)
    with Worker(
        *(trial.manifest, directory, PROCESSES, folder / "killed.log"),
        *("--restarts", str(RESTARTS)),
    ) as worker:
        begun = 0
        for count, moment in enumerate(moments, start=1):
            ranks = reach(worker, moment, trial.course, PROCESSES, begun=begun)
            victim = chance.randrange(PROCESSES)
            _kill(ranks[victim], f"rank {victim}")
            phase = trial.phase(directory, moment)
            met[phase] += 1
            told = f"kill rank {victim} ({phase}, after epoch {last_epoch(directory)})"
            outcome.faults.append(told)
            trial.say(f"{count} of {number}: {told}")
            # The others are stopped by torchrun; only then is a start one of the next ranks.
            outcome.check(await_end(ranks.values(), 60.0), f"{told}: ranks are left")
            begun = worker.starts()
        outcome.check((status := worker.wait()) == 0, f"the worker ended with {status}")
        outcome.check(not worker.alive(), "processes are left behind")
    trial.check(directory, outcome)
    outcome.figures |= {"met": dict(met)}
    return outcome


def stops(trial: Trial, folder: Path, number: int, chance: random.Random) -> Outcome:
    """SIGTERM at moments of one run, each time started anew."""
    outcome = Outcome()
    directory, log = folder / "stopped", folder / "stopped.log"
    seconds: dict[str, list[float]] = {}
    phases = [phase for phase in Phase if phase is not Phase.STARTING]
    for moment in trial.course.moments(number, chance, phases):
        with Worker(trial.manifest, directory, PROCESSES, log) as worker:
            reach(worker, moment, trial.course, PROCESSES)
            phase = trial.phase(directory, moment)
            took = _stop(trial, worker, f"stop in {phase}", outcome)
        seconds.setdefault(phase, []).append(round(took, 2))
    _finish(trial, directory, log, PROCESSES, outcome)
    outcome.check(not any(outcome.figures["lostEpochs"]), "a stop has cost epochs")
    outcome.figures |= {"secondsToStop": seconds}
    return outcome


def sizes(trial: Trial, folder: Path, _: int, chance: random.Random) -> Outcome:
    """2, 1 and 4 ranks after each other; the worker and torchrun die, too."""
    outcome = Outcome()
    directory, log = folder / "resized", folder / "resized.log"
    course = trial.course
    third = course.latest // 3
    first, second, last = (
        Moment(chance.randint(start + 1, start + third - 1), chance.random(), Phase.TRAINING)
        for start in (0, third, 2 * third)
    )
    with Worker(trial.manifest, directory, 2, log) as worker:
        reach(worker, first, course, 2)
        _stop(trial, worker, "stop 2 ranks", outcome)
    with Worker(trial.manifest, directory, 1, log) as worker:
        reach(worker, second, course, 1)
        processes = worker.alive()
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait()
        _tell(trial, outcome, f"kill the worker of 1 rank after epoch {last_epoch(directory)}")
        outcome.check(len(processes) >= 3, f"only {len(processes)} processes were at work")
        outcome.check(await_end(processes, LEAVE_SECONDS), "a killed worker leaves processes")
        outcome.check(not worker.alive(), "a killed worker leaves processes")
    with Worker(trial.manifest, directory, 4, log) as worker:
        ranks = reach(worker, last, course, 4)
        agent = worker.agent()
        assert agent is not None
        os.kill(agent, signal.SIGKILL)
        _tell(trial, outcome, f"kill torchrun of 4 ranks after epoch {last_epoch(directory)}")
        outcome.check(await_end(ranks.values(), LEAVE_SECONDS), "a killed torchrun leaves ranks")
        outcome.check((status := worker.wait()) == 0, f"the worker ended with {status}")
        outcome.check(not worker.alive(), "processes are left behind")
    trial.check(directory, outcome)
    return outcome


def newest_epoch(directory: Path) -> tuple[int, Sequence[str]]:
    """The epoch of a run's newest complete checkpoint, and what was passed over."""
    manifest = parse_manifest((directory / "manifest.yaml").read_text(), "manifest.yaml")
    checkpoints = run_checkpoints(manifest, directory, EsperConfig())
    found = checkpoints.newest()
    return (-1, ()) if found is None else (found.snapshot.epoch, found.passed)


def _stop(trial: Trial, worker: Worker, what: str, outcome: Outcome) -> float:
    """SIGTERM for the worker; how many seconds it took."""
    asked = time.monotonic()
    worker.signal(signal.SIGTERM)
    status = worker.wait()
    took = time.monotonic() - asked
    epoch = last_epoch(worker.directory)
    what = f"{what} after epoch {epoch}: {status} in {took:.1f} s"
    _tell(trial, outcome, what)
    outcome.check(status == INTERRUPTED and took <= STOP_SECONDS, what)
    outcome.check(not worker.alive(), f"{what}; processes are left behind")
    newest, passed = newest_epoch(worker.directory)
    outcome.check(newest == epoch and not passed, f"{what}; the checkpoint is of epoch {newest}")
    return took


def _finish(trial: Trial, directory: Path, log: Path, processes: int, outcome: Outcome) -> None:
    with Worker(trial.manifest, directory, processes, log) as worker:
        outcome.check((status := worker.wait()) == 0, f"the worker ended with {status}")
    trial.check(directory, outcome)


def _kill(pid: int, what: str) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        raise WorkerEnded(f"{what} was to be killed, and has ended on its own") from None


def _tell(trial: Trial, outcome: Outcome, what: str) -> None:
    outcome.faults.append(what)
    trial.say(what)


def _copy(session: Path | None, folder: Path, shards: int) -> Path:
    """The session with logical shards; in a copy, as its own folder is somebody's."""
    if session is None:
        return write_session(folder, logicalShards=shards)
    manifest = shutil.copytree(session.parent, folder) / session.name
    documents = list(yaml.safe_load_all(manifest.read_text()))
    documents[0]["spec"]["training"]["logicalShards"] = shards
    manifest.write_text(yaml.safe_dump_all(documents))
    return manifest


def main(argv: Sequence[str] | None = None) -> int:
    """Run the scenarios, each told as a line of JSON; 0 where everything held."""
    parser = argparse.ArgumentParser(prog="make chaos-ranks", description=__doc__)
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0, help="what chance starts with")
    parser.add_argument("--shards", type=int, nargs="+", default=(SHARDS, 1), help="1: none")
    parser.add_argument("--session", type=Path, help="a manifest; by default a session of its own")
    parser.add_argument("--folder", type=Path, help="kept; by default a temporary one")
    arguments = parser.parse_args(argv)
    wanted = arguments.scenarios or SCENARIOS
    if unknown := set(wanted) - set(SCENARIOS):
        parser.error(f"{', '.join(sorted(unknown))}: the scenarios are {', '.join(SCENARIOS)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    broken = 0
    with tempfile.TemporaryDirectory(prefix="chaos-ranks-") as temporary:
        place = (arguments.folder or Path(temporary)).resolve()
        for shards in arguments.shards:
            folder = place / f"shards-{shards}"
            trial = Trial.of(arguments.session, folder, shards, _say)
            for scenario, number in (
                ("kills", arguments.kills),
                ("stops", arguments.stops),
                ("sizes", 0),
            ):
                if scenario not in wanted or (scenario == "sizes" and shards == 1):
                    continue
                started = time.monotonic()
                play = {"kills": kills, "stops": stops, "sizes": sizes}[scenario]
                try:
                    outcome = play(trial, folder, number, random.Random(arguments.seed))
                except WorkerEnded as error:
                    outcome = Outcome(broken=[str(error)])
                broken += len(outcome.broken)
                told = {
                    "scenario": scenario,
                    "logicalShards": shards,
                    "seconds": round(time.monotonic() - started, 1),
                    "faults": outcome.faults,
                    "figures": outcome.figures,
                    "broken": outcome.broken,
                }
                sys.stdout.write(json.dumps(told) + "\n")
                sys.stdout.flush()
    return 1 if broken else 0


def _say(line: str) -> None:
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {line}\n")


if __name__ == "__main__":
    sys.exit(main())
