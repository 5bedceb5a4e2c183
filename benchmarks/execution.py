"""What does execution cost? Sleeping, watched, grafted and training seeds, the cache, wrapping.

python -m benchmarks.execution [--quick] [--cases NAME…] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import execution_cache
from benchmarks.bars import commit, read_figures, write_results
from benchmarks.execution_dormant import (
    dormant,
    dormant_figures,
    many_seeds,
    many_seeds_figures,
    monitored,
    monitored_figures,
)
from benchmarks.execution_grafting import grafting, grafting_figures, shadow, shadow_figures
from benchmarks.execution_timing import Bench, Timings, joined, timer_for
from benchmarks.execution_wrapping import wrapping

Figures = dict[str, Any]
Measure = Callable[[str, bool], Figures]
"""Takes a torch device and whether to be quick; gives figures by name."""

PROCESSES = 8
LEAST_ROUNDS = 3
QUICK_SECONDS = 0.2

FLAGGED = ("mlp-forward-1", "mlp-step-1")
"""Where wrapper modules cost so much that a bench which does not flag them is blind."""

PREFIXES = {
    "dormant": "4.1.",
    "wrapper": "4.1.wrapper-flagged-",
    "seeds": "4.1.seeds-",
    "telemetry": "4.1.telemetry-",
    "grafting": "4.2.",
    "wrapping": "4.4.",
}
"""What the names of a case's bars begin with; the cache names its own."""


def main() -> int:
    """Measure on the processor, print and write the results."""
    return report("execution", "cpu", options(__doc__, MEASURES).parse_args(), MEASURES, PREFIXES)


@dataclass(frozen=True)
class Comparing:
    """A case that compares arms: how one process measures it, and what its timings say.

    Each comparison takes `seconds` in each process.
    """

    measure: Callable[[Bench], dict[str, Timings]]
    figures: Callable[[str, Timings], Figures]
    seconds: float

    def __call__(self, device: str, quick: bool) -> Figures:
        """The figures by name; quickly means briefly, and in this process."""
        if quick:
            parts = [self.measured(device, QUICK_SECONDS, 1, torch.get_num_threads(), 0)]
        else:
            arguments = (device, self.seconds, LEAST_ROUNDS, torch.get_num_threads())
            context = multiprocessing.get_context("spawn")
            parts = []
            for number in range(PROCESSES):
                with context.Pool(1) as pool:
                    parts.append(pool.apply(self.measured, (*arguments, number)))
        return {name: self.figures(name, timings) for name, timings in joined(parts).items()}

    def measured(
        self, device: str, seconds: float, rounds: int, threads: int, number: int
    ) -> dict[str, Timings]:
        """What process `number` measures."""
        torch.set_num_threads(threads)
        timer = timer_for(device, threads)
        return self.measure(
            Bench(device=device, timer=timer, seconds=seconds, rounds=rounds, process=number)
        )


def _wrapping(device: str, quick: bool) -> Figures:
    del quick  # it takes a second
    return wrapping(device)


def _cache(device: str, quick: bool) -> Figures:
    del device  # templates without fixed weights lie on none
    figures, own_bars = execution_cache.measure(quick)
    return {"figures": figures, "bars": own_bars}


COMPARISONS: Mapping[str, Measure] = {
    "dormant": Comparing(dormant, dormant_figures, 2.0),
    "seeds": Comparing(many_seeds, many_seeds_figures, 2.0),
    "telemetry": Comparing(monitored, monitored_figures, 2.0),
    "grafting": Comparing(grafting, grafting_figures, 1.0),
    "shadow": Comparing(shadow, shadow_figures, 1.0),
    "wrapping": _wrapping,
}
MEASURES: Mapping[str, Measure] = {**COMPARISONS, "cache": _cache}


def report(
    name: str,
    device: str,
    arguments: argparse.Namespace,
    measures: Mapping[str, Measure],
    prefixes: Mapping[str, str],
) -> int:
    """Measure the cases asked for on `device`, print and write the results under `name`."""
    torch.set_num_threads(arguments.threads)
    name = f"{name}-quick" if arguments.quick else name
    # A run of some cases leaves the others' figures as they were, each with its own commit.
    figures = {case: found for case, found in read_figures(name).items() if case in measures}
    for case in arguments.cases:
        started = time.monotonic()
        found = measures[case](device, arguments.quick)
        seconds = round(time.monotonic() - started, 1)
        figures[case] = {
            "measured": found,
            "seconds": seconds,
            "threads": arguments.threads,
            "commit": commit(),
        }
        sys.stderr.write(f"{case}: {seconds} s\n")
        # After every case: who stops a long run keeps what it has measured.
        measured = {case: entry["measured"] for case, entry in figures.items()}
        found_bars = bars(measured, prefixes)
        path = write_results(name, figures, found_bars)
    sys.stdout.write(json.dumps({"results": str(path.relative_to(Path.cwd())), "bars": found_bars}))
    sys.stdout.write("\n")
    return 0


def bars(figures: Mapping[str, Figures], prefixes: Mapping[str, str]) -> dict[str, dict[str, Any]]:
    """The bars of the measured cases, by `<issue>.<line>.<case>`."""
    found = {
        prefix + name: {
            "figure": figure.get("ratio", figure.get("figure")),
            "bar": figure["bar"],
            "holds": bool(figure["holds"]),
        }
        for case, prefix in prefixes.items()
        for name, figure in figures.get(case, {}).items()
        if "bar" in figure
    }
    for name in FLAGGED:
        if name in figures.get("dormant", {}):
            wrapper = figures["dormant"][name]["wrapper"]
            found[prefixes["wrapper"] + name] = {
                "figure": wrapper["ratio"],
                "bar": "> 1.01",
                "holds": bool(wrapper["flagged"]),
            }
    own: dict[str, dict[str, Any]] = figures.get("cache", {}).get("bars", {})
    return found | own


def options(description: str | None, measures: Mapping[str, Measure]) -> argparse.ArgumentParser:
    """The command line of a benchmark of execution."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="a look at every case, not a figure")
    parser.add_argument("--cases", nargs="+", choices=list(measures), default=list(measures))
    parser.add_argument("--threads", type=int, default=1)
    return parser


if __name__ == "__main__":
    sys.exit(main())
