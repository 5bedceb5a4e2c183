"""Timing whole requests: arms in rounds of shuffled order, by the clock, in several processes."""

from __future__ import annotations

import gc
import multiprocessing
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.execution_timing import Call, Ratio, Timings, collecting_no_garbage

Figures = dict[str, Any]
Bars = dict[str, dict[str, Any]]

PROCESSES = 5
"""Of a full run; a quick one has one, and so no interval."""


def rounds_of(arms: Mapping[str, Call], rounds: int, process: int) -> Timings:
    """Seconds that a call of each arm took, once a round; the first round is not kept."""
    order, shuffling = list(arms), random.Random(process)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with collecting_no_garbage():
        for number in range(rounds + 1):
            shuffling.shuffle(order)
            for name in order:
                began = time.perf_counter()
                arms[name]()
                ended = time.perf_counter()
                if number:
                    seconds[name].append(ended - began)
            gc.collect(0)
    return Timings(processes=(seconds,))


def in_processes(measured: Callable[..., Any], quick: bool, *arguments: Any) -> list[Any]:
    """What `measured(process, *arguments)` gives in each of several new processes.

    A quick run has one, and that is this one.
    """
    if quick:
        return [measured(0, *arguments)]
    context = multiprocessing.get_context("spawn")
    parts = []
    for process in range(PROCESSES):
        with context.Pool(1) as pool:
            parts.append(pool.apply(measured, (process, *arguments)))
    return parts


def at_least(ratio: Ratio, same: Ratio, limit: float) -> bool:
    """Whether "≥ limit" holds, `same` being the baseline against itself: DESIGN §7, turned."""
    return ratio.high >= limit and ratio.median >= min(limit, same.low)


def speed(timings: Timings, arm: str, base: str, again: str, limit: float) -> Figures:
    """How fast `arm` is relative to `base`; `again` is the baseline once more."""
    ratio, same = timings.ratio(base, arm), timings.ratio(base, again)
    return {
        **ratio.plain(),
        "baselineAgainstItself": same.plain(),
        "milliseconds": timings.microseconds(arm) / 1e3,
        "baselineMilliseconds": timings.microseconds(base) / 1e3,
        "rounds": timings.rounds,
        "bar": f">= {limit}",
        "holds": at_least(ratio, same, limit),
    }


def bars_of(figures: Mapping[str, Figures], prefix: str) -> Bars:
    """The bars of figures that carry one, by prefix and name."""
    return {
        prefix + name: {
            "figure": figure.get("ratio", figure.get("figure")),
            "bar": figure["bar"],
            "holds": bool(figure["holds"]),
        }
        for name, figure in figures.items()
        if "bar" in figure
    }


def below(figure: float, limit: float) -> Figures:
    """A figure that must stay below a limit."""
    return {"figure": round(figure, 3), "bar": f"< {limit:g}", "holds": figure < limit}


def best(values: Sequence[float]) -> float:
    """The best of the repeats: what else the machine does only ever adds."""
    return min(values)
