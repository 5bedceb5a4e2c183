"""What a session does in each of its epochs, and how a worker is met in the middle of it."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import psutil

from esper.contracts.enums import SeedState
from tools.chaos_checks import lines
from tools.rank_worker import LOOK_SECONDS, Worker, last_epoch, writing

RECOVERY_TRIAL = "recovery trial"
START_SECONDS = 4.0
"""About what ranks take from their birth to their first batch."""
END_SECONDS = 2.0
"""What a run must still have before it: on a busy machine a look comes a second late."""


class Phase(StrEnum):
    """What is going on at a moment."""

    TRAINING = "training"
    TRIALS = "trials"
    GRAFTING = "grafting"
    RECOVERY = "recovery"
    CHECKPOINT = "checkpoint"
    STARTING = "starting"


@dataclass(frozen=True, order=True)
class Moment:
    """In the middle of an epoch, `share` of its time after its beginning.

    With a checkpoint it is while the one of the epoch's end is written; while the ranks start,
    the epoch counts for the order of moments alone.
    """

    epoch: int
    share: float
    phase: Phase


@dataclass(frozen=True)
class Course:
    """What an undisturbed run did: the phase and the seconds of each epoch, from 1 on."""

    phases: Mapping[int, Phase]
    seconds: Mapping[int, float]
    checkpoint_epochs: int

    @classmethod
    def of(cls, directory: Path, checkpoint_epochs: int) -> Course:
        """That of the finished run in `directory`, with a decision at the end of each epoch."""
        rows = lines(directory / "metrics.jsonl")
        moved: dict[int, list[dict[str, Any]]] = {}
        for line in lines(directory / "events.jsonl"):
            if line["type"] == "transition":
                moved.setdefault(line["epoch"], []).append(line)
        states: dict[tuple[object, object], object] = {}
        phases: dict[int, Phase] = {}
        for row in rows:
            epoch = row["epoch"]
            at_its_end = moved.get(epoch, [])
            if any(str(line["reason"]).startswith(RECOVERY_TRIAL) for line in at_its_end):
                phases[epoch] = Phase.RECOVERY
            elif SeedState.GRAFTING in states.values():
                phases[epoch] = Phase.GRAFTING
            elif SeedState.TRAINING in states.values():
                phases[epoch] = Phase.TRIALS
            else:
                phases[epoch] = Phase.TRAINING
            for line in at_its_end:
                states[line["layer"], line["slot"]] = SeedState(str(line["current"]))
        return cls(phases, {row["epoch"]: row["seconds"] for row in rows}, checkpoint_epochs)

    @property
    def epochs(self) -> int:
        """How many it trained."""
        return len(self.phases)

    @property
    def latest(self) -> int:
        """The last epoch in which ranks are met, soon after which they end; in the last quarter."""
        epoch, left = self.epochs, 0.0
        while epoch > 1 and left < END_SECONDS and 4 * epoch > 3 * self.epochs:
            left += self.seconds[epoch]
            epoch -= 1
        return epoch

    def epochs_of(self, phase: Phase) -> list[int]:
        """Where `phase` can be met."""
        inner = range(1, self.latest + 1)
        if phase is Phase.STARTING:
            return list(inner)
        if phase is Phase.CHECKPOINT:
            return [epoch for epoch in inner if epoch % self.checkpoint_epochs == 0]
        return [epoch for epoch in inner if self.phases[epoch] is phase]

    def moments(
        self, number: int, chance: random.Random, phases: Sequence[Phase] = tuple(Phase)
    ) -> list[Moment]:
        """So many in their order, of each phase equally often where the session has them all."""
        there = [phase for phase in phases if self.epochs_of(phase)]
        wanted = [there[index % len(there)] for index in range(number)]
        return sorted(
            Moment(chance.choice(self.epochs_of(phase)), chance.random(), phase) for phase in wanted
        )


def reach(
    worker: Worker, moment: Moment, course: Course, processes: int, *, begun: int = 0
) -> dict[int, int]:
    """Wait for a moment; returns the ranks' process ids.

    Args:
        worker: it is met in its run.
        moment: what is waited for.
        course: what the same session did undisturbed.
        processes: how many ranks the worker has.
        begun: how often its ranks had begun to train when they were met before.

    Raises:
        WorkerEnded: it did not come.
    """
    ranks: dict[int, int] = {}

    def born() -> bool:
        ranks.clear()
        ranks.update(worker.ranks())
        return len(ranks) == processes

    worker.until(born, 0.2)  # a look at every process of the machine
    if moment.phase is Phase.STARTING:
        time.sleep(moment.share * START_SECONDS)
        return ranks
    # Only then are the metrics cut back to where they go on from.
    worker.until(lambda: worker.starts() > begun, 0.01)
    if moment.phase is Phase.CHECKPOINT:
        made = worker.directory / "checkpoints" / f"epoch-{moment.epoch:06d}"
        worker.until(_reaching(worker.directory, moment.epoch))
        end = time.monotonic() + 1.0
        while not (writing(worker.directory) or made.exists() or time.monotonic() > end):
            pass  # it takes milliseconds
        return ranks
    worker.until(_reaching(worker.directory, moment.epoch - 1))
    time.sleep(moment.share * course.seconds[moment.epoch])
    return ranks


def _reaching(directory: Path, epoch: int) -> Callable[[], bool]:
    """Whether the run's metrics have come so far; they are read only when they have grown."""
    metrics, read = directory / "metrics.jsonl", -1

    def reached() -> bool:
        nonlocal read
        size = metrics.stat().st_size if metrics.exists() else 0
        if size == read:
            return False
        read = size
        return last_epoch(directory) >= epoch

    return reached


def await_end(pids: Iterable[int], seconds: float) -> bool:
    """Whether no process of these ids is left within so many seconds."""
    end = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(LOOK_SECONDS)
    return True
