"""How long a checkpoint holds up training: real runs of two ranks, as `esper worker` has them."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import wraps
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.distributed_models import BATCH, manifest
from benchmarks.distributed_ranks import on_ranks
from benchmarks.services_timing import Bars, Figures, bars_of, best
from esper.cli.ranks import run_rank
from esper.configs import EsperConfig
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.trainer import TolariaTrainer

Documents = list[dict[str, Any]]
"""A manifest: the session, then its blueprints."""

RANKS = 2
REPEATS = 5
LIMIT = 0.05
EXAMPLE = Path(__file__).parents[1] / "examples" / "01-mnist1d-mlp" / "session.yaml"
RESNET_SAMPLES = 1024
"""Images of 40 by 40, in sixteen batches: an epoch far shorter than CIFAR's."""


@dataclass
class Clock:
    """What an epoch's end took on the training thread, in seconds, epoch by epoch.

    `stalls` has what is done for a checkpoint: the copy of everything, the proof that ranks are
    equal, and handing over, which waits for the checkpoint before if that is still written.
    """

    epochs: list[float] = field(default_factory=list)
    stalls: list[dict[str, float]] = field(default_factory=list)
    _now: dict[str, float] = field(default_factory=dict)
    _ended: float = 0.0

    def part(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """`work`, its time added to the epoch's as `name`."""

        @wraps(work)
        def timed(*arguments: Any, **named: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments, **named)
            finally:
                self._now[name] = self._now.get(name, 0.0) + time.perf_counter() - began

        return timed

    def end_epoch(self) -> None:
        """All of an epoch and of its boundary is done."""
        now, stall = time.perf_counter(), sum(self._now.values())
        if self._ended:
            self.epochs.append(now - self._ended - stall)
            self.stalls.append(self._now)
        self._ended, self._now = now, {}


def checkpoint(quick: bool) -> tuple[Figures, Bars]:
    """The stall as a share of the epoch, where every epoch has a checkpoint."""
    figures: Figures = {}
    for name, made in sessions(quick).items():
        repeats = [on_ranks(RANKS, run_session, made)[0] for _ in range(1 if quick else REPEATS)]
        figures[f"stall-{name}"] = stall_of([run["clock"] for run in repeats]) | {
            "checkpointBytes": repeats[-1]["bytes"],
            "epochWhileWriting": _slower(
                on_ranks(RANKS, run_session, without_growth(made))[0]["clock"]
            ),
        }
    return figures, bars_of(figures, "6.5.checkpoint-")


def sessions(quick: bool) -> dict[str, Documents]:
    """Example 01 as it is, but for its length, and a ResNet-18."""
    example = example_01(12 if quick else 40)
    resnet = manifest(
        "resnet18",
        train=2 * BATCH if quick else RESNET_SAMPLES,
        optimizer="adamw",
        epochs=3 if quick else 5,
    )
    return {"example-01": example, "resnet18": [resnet]}


def example_01(epochs: int) -> Documents:
    """The manifest of example 01, with so many epochs."""
    documents = list(yaml.safe_load_all(EXAMPLE.read_text()))
    documents[0]["spec"]["training"]["epochs"] = epochs
    return documents


def without_growth(made: Documents) -> Documents:
    """The session with fixed structure, a checkpoint every second epoch, and nine at least."""
    session = copy.deepcopy(made[0])
    training = session["spec"]["training"]
    training |= {"checkpoint": {"everyEpochs": 2}, "epochs": max(9, training["epochs"])}
    session["spec"]["growth"] = {"controller": {"policy": "none"}}
    return [session]


def run_session(ranks: Ranks, made: Documents) -> dict[str, Any]:
    """Train the session as one rank of `esper worker`; times, and the size of a checkpoint."""
    clock = Clock()
    for kind, name in (
        (TolariaTrainer, "_capture"),
        (TolariaTrainer, "_checkpoint"),
        (Engine, "prove_equal"),
    ):
        setattr(kind, name, clock.part(name.strip("_"), getattr(kind, name)))
    _ending_epochs(clock)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(ranks.told(temporary))
        size = train_in(folder, ranks, made)
        ranks.told(0)
    return {"clock": clock, "bytes": size}


def train_in(folder: Path, ranks: Ranks, made: Documents) -> int:
    """Train the session with its run in `folder`; the bytes of its last checkpoint."""
    path, run = folder / "session.yaml", folder / "run"
    if ranks.rank == 0:
        path.write_text(yaml.safe_dump_all(made))
    ranks.told(0)
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        run_rank(path, run, ranks, json_output=False, config=EsperConfig())
    if ranks.rank:
        return 0
    newest = max((run / "checkpoints").iterdir())
    return sum(part.stat().st_size for part in newest.iterdir())


def stall_of(clocks: list[Clock]) -> Figures:
    """The stall's share of a run's epochs, the best of the repeats, with its parts."""
    shares = [
        sum(sum(stall.values()) for stall in clock.stalls) / sum(clock.epochs) for clock in clocks
    ]
    stalls = [stall for clock in clocks for stall in clock.stalls]
    names = sorted({name for stall in stalls for name in stall})
    figure = best(shares)
    return {
        "figure": figure,
        "repeats": shares,
        "epochMilliseconds": _median([one for clock in clocks for one in clock.epochs]),
        "stallMilliseconds": {
            name: _median([stall.get(name, 0.0) for stall in stalls]) for name in names
        },
        "bar": f"<= {LIMIT}",
        "holds": figure <= LIMIT,
    }


def _ending_epochs(clock: Clock) -> None:
    """Let the clock's epoch end where the trainer begins the next one."""
    interval = TolariaTrainer._interval

    @wraps(interval)
    def began(self: TolariaTrainer, epochs: int) -> Any:
        clock.end_epoch()
        return interval(self, epochs)

    TolariaTrainer._interval = began  # type: ignore[method-assign]


def _slower(clock: Clock) -> float:
    """How much longer an epoch takes while a checkpoint is written than one beside it."""
    writing = [("checkpoint" in stall) for stall in clock.stalls]
    pairs = [
        clock.epochs[at + 1] / clock.epochs[at]
        for at in range(1, len(writing) - 1)
        if writing[at] and not writing[at - 1]
    ]
    return float(np.median(pairs)) if pairs else float("nan")


def _median(seconds: list[float]) -> float:
    return round(float(np.median(seconds)) * 1e3, 3)
