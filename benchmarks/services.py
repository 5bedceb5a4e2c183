"""What do the services cost? The bus, the object store, the hub and the log beside plain libraries.

python -m benchmarks.services [--quick] [--cases NAME…]

Redis, Postgres and the S3 server are started for it, on the loopback, and stopped again.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from importlib import import_module
from pathlib import Path

from benchmarks.bars import commit, read_figures, write_results
from benchmarks.services_timing import Bars, Figures

CASES = ("bus", "store", "hub", "log")
"""Each is measured by `measure(quick)` of `benchmarks.services_<case>`: figures, and bars."""


def main() -> int:
    """Measure the cases asked for, print and write the results."""
    arguments = options().parse_args()
    name = "services-quick" if arguments.quick else "services"
    # A run of some cases leaves the others' figures as they were, each with its own commit.
    figures = {case: found for case, found in read_figures(name).items() if case in CASES}
    bars = found_bars(figures)
    for case in arguments.cases:
        began = time.monotonic()
        measured, case_bars = measure(case, arguments.quick)
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


def measure(case: str, quick: bool) -> tuple[Figures, Bars]:
    """Figures and bars of one case."""
    found: tuple[Figures, Bars] = import_module(f"benchmarks.services_{case}").measure(quick)
    return found


def found_bars(figures: Figures) -> Bars:
    """The bars of all cases measured so far."""
    return {name: bar for found in figures.values() for name, bar in found["bars"].items()}


def options() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a look at every case, not a figure")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=CASES)
    return parser


if __name__ == "__main__":
    sys.exit(main())
