"""What do several ranks cost? Their steps, grafted seeds, checkpoints, shards, and messages.

python -m benchmarks.distributed [--quick] [--cases NAME…]

Two ranks over gloo on the loopback, one thread each: it wants two cores to itself.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from benchmarks import distributed_checkpoint, distributed_counts, distributed_steps
from benchmarks.bars import commit, read_figures, write_results
from benchmarks.services_timing import Bars, Figures

MEASURES: Mapping[str, Callable[[bool], tuple[Figures, Bars]]] = {
    "dormant": distributed_steps.dormant,
    "grafting": distributed_steps.grafting,
    "checkpoint": distributed_checkpoint.checkpoint,
    "shards": distributed_steps.shards,
    "counts": distributed_counts.counts,
}
"""Each takes whether to be quick; gives figures, and bars."""


def main() -> int:
    """Measure the cases asked for, print and write the results."""
    arguments = options().parse_args()
    name = "distributed-quick" if arguments.quick else "distributed"
    # A run of some cases leaves the others' figures as they were, each with its own commit.
    figures = {case: found for case, found in read_figures(name).items() if case in MEASURES}
    bars = found_bars(figures)
    for case in arguments.cases:
        began = time.monotonic()
        measured, case_bars = MEASURES[case](arguments.quick)
        seconds = round(time.monotonic() - began, 1)
        figures[case] = {
            "measured": measured,
            "bars": case_bars,
            "seconds": seconds,
            "commit": commit(),
        }
        sys.stderr.write(f"{case}: {seconds} s\n")
        bars = found_bars(figures)
        # After every case: who stops a long run keeps what it has measured.
        path = write_results(name, figures, bars)
    sys.stdout.write(json.dumps({"results": str(path.relative_to(Path.cwd())), "bars": bars}))
    sys.stdout.write("\n")
    return 0


def found_bars(figures: Figures) -> Bars:
    """The bars of all cases measured so far."""
    return {name: bar for found in figures.values() for name, bar in found["bars"].items()}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at every case, not a figure")
    parser.add_argument("--cases", nargs="+", choices=MEASURES, default=tuple(MEASURES))
    return parser


if __name__ == "__main__":
    sys.exit(main())
