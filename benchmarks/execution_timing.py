"""Timing arms against each other, and DESIGN §7's rule for ratios.

Absolute times say little on a machine that others use. So every round runs each arm once, in an
order drawn anew, and only ratios within a round are kept. Where models and classes happen to lie
in memory is worth up to a percent, round after round. So all is measured in several processes, and
the interval is that of a bootstrap over them.
"""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import torch

Call = Callable[[], object]
Timer = Callable[[Call, int], float]
"""Runs a call so many times and says how many seconds that took."""

# Short blocks: what else the machine does then hits all arms of a round alike.
BLOCK_SECONDS = 0.0005
MAX_BLOCK = 200
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Where and for how long one process measures a comparison.

    `timer` fits the torch `device`; a comparison takes `seconds`, but at least `rounds` rounds.
    `process` is the number of the process, from 0; it decides the order in which arms are made.
    """

    device: str
    timer: Timer
    seconds: float
    rounds: int
    process: int = 0


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """A paired ratio: its median over the rounds, with a bootstrap interval."""

    median: float
    low: float
    high: float

    def plain(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"ratio": self.median, "interval": [self.low, self.high]}


@dataclass(frozen=True, kw_only=True)
class Timings:
    """Seconds a call: for each process and arm one number a round, a process's rounds in step."""

    processes: tuple[Mapping[str, Sequence[float]], ...]

    @property
    def rounds(self) -> int:
        """How many rounds were run, over all processes."""
        return sum(len(next(iter(process.values()))) for process in self.processes)

    def ratio(self, arm: str, base: str) -> Ratio:
        """How much longer `arm` takes than `base`."""
        return pooled_median([np.divide(p[arm], p[base]) for p in self.processes])

    def microseconds(self, arm: str) -> float:
        """The median of an arm, in microseconds a call."""
        return float(np.median(np.concatenate([p[arm] for p in self.processes]))) * 1e6


def joined(parts: Sequence[Mapping[str, Timings]]) -> dict[str, Timings]:
    """The timings of several processes as one, by name."""
    return {
        name: Timings(processes=sum((part[name].processes for part in parts), ()))
        for name in parts[0]
    }


def pooled_median(groups: Sequence[np.ndarray[Any, Any]]) -> Ratio:
    """The median of all values, with the percentile interval of a bootstrap over the groups.

    What a process adds is common to its values, so whole groups are drawn (the cluster bootstrap:
    Davison and Hinkley 1997, "Bootstrap methods and their application", section 3.8). Equal values
    give equal intervals; one group alone gives none, its median twice.
    """
    draws = np.random.default_rng(0).integers(len(groups), size=(RESAMPLES, len(groups)))
    # The order of the groups drawn does not count, so few draws differ.
    draws, numbers = np.unique(np.sort(draws, axis=1), axis=0, return_counts=True)
    medians = [np.median(np.concatenate([groups[index] for index in draw])) for draw in draws]
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.repeat(medians, numbers), [tail, 1 - tail])
    median = np.median(np.concatenate(groups))
    return Ratio(median=float(median), low=float(low), high=float(high))


def at_most(ratio: Ratio, same: Ratio, limit: float) -> bool:
    """Whether "≤ limit" holds, `same` being the baseline against itself (DESIGN §7)."""
    return ratio.low <= limit and ratio.median <= max(limit, same.high)


def comparison(
    timings: Timings, arm: str, base: str, same: str, limit: float | None = None
) -> dict[str, Any]:
    """The figures of `arm` against `base`, whose second run is `same`; with a bar, if `limit`."""
    ratio, scatter = timings.ratio(arm, base), timings.ratio(same, base)
    figures = ratio.plain() | {
        "baselineAgainstItself": scatter.plain(),
        "microseconds": timings.microseconds(arm),
        "baselineMicroseconds": timings.microseconds(base),
        "rounds": timings.rounds,
    }
    if limit is not None:
        figures |= {"bar": f"<= {limit}", "holds": at_most(ratio, scatter, limit)}
    return figures


def processor_seconds(call: Call, count: int) -> float:
    """Processor time of this thread: what else runs here, or waits for a core, does not count."""
    started = time.thread_time_ns()
    for _ in repeat(None, count):
        call()
    return (time.thread_time_ns() - started) / 1e9


def wall_seconds(call: Call, count: int) -> float:
    """Time by the clock, for work that several threads share."""
    started = time.perf_counter_ns()
    for _ in repeat(None, count):
        call()
    return (time.perf_counter_ns() - started) / 1e9


def cuda_seconds(call: Call, count: int) -> float:
    """Time between two events on the current stream, all work before them done."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    before.record()
    for _ in repeat(None, count):
        call()
    after.record()
    after.synchronize()
    return before.elapsed_time(after) / 1e3


def timer_for(device: str, threads: int) -> Timer:
    """The timer that fits the device and the number of threads."""
    if device.startswith("cuda"):
        return cuda_seconds
    return processor_seconds if threads == 1 else wall_seconds


def timed(arms: Mapping[str, Call], bench: Bench) -> Timings:
    """Every arm in rounds of shuffled order, in this process.

    An arm's part of a round is a block of as many calls as take about BLOCK_SECONDS, the same for
    all arms; a block of several follows a call that warms the caches and is not timed.
    """
    timer = bench.timer
    for call in arms.values():
        timer(call, 3)
    longest = max(timer(call, 3) / 3 for call in arms.values())
    block = max(1, min(MAX_BLOCK, round(BLOCK_SECONDS / longest)))
    order, shuffling = list(arms), random.Random(bench.process)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    ends, done = time.monotonic() + bench.seconds, 0
    with collecting_no_garbage():
        while done < bench.rounds or time.monotonic() < ends:
            shuffling.shuffle(order)
            for name in order:
                if block > 1:
                    arms[name]()
                seconds[name].append(timer(arms[name], block) / block)
            gc.collect(0)
            done += 1
    return Timings(processes=(seconds,))


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """No garbage collection of its own accord inside: it would hit one arm by chance."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
