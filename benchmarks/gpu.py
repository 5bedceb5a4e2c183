"""What does execution cost on a GPU? The cases of `benchmarks.execution`, timed by CUDA events.

python -m benchmarks.gpu [--quick] [--cases NAME…]

Without a CUDA device it says so, measures nothing and leaves earlier results alone.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.execution import COMPARISONS, Figures, Measure, options, report
from benchmarks.execution_models import CASES
from benchmarks.execution_running import WAYS, running
from benchmarks.execution_timing import Call
from esper.core import wrap

NOT_RUN = "no CUDA device"

# What the host waits in; an item() is a copy and a wait.
WAITING = ("Synchronize", "aten::_local_scalar_dense", "Memcpy DtoH")
BATCH = 64
_SPAN = "watched call"


def main() -> int:
    """Measure on the current CUDA device, print and write the results."""
    arguments = options(__doc__, MEASURES).parse_args()
    if not torch.cuda.is_available():
        sys.stderr.write(f"gpu: not run: {NOT_RUN}\n")
        sys.stdout.write(json.dumps({"results": None, "notRun": NOT_RUN}) + "\n")
        return 0
    return report("gpu", "cuda", arguments, MEASURES, PREFIXES)


def synchronising(device: str, quick: bool) -> Figures:
    """How often the host waits for the device in one forward pass of each dormant model."""
    del quick  # one pass tells
    figures: Figures = {"device": {"name": torch.cuda.get_device_name(device)}}
    for case in CASES:
        x = case.inputs(BATCH).to(device)
        model = wrap(case.seeded().to(device), x)
        for way in WAYS:
            with running(way, {"dormant": model}):
                waits = waits_in(partial(model, x))
            figures[f"{case.name}-{'train' if way == 'step' else 'eval'}"] = {
                "figure": len(waits),
                "waits": waits,
                "bar": "0",
                "holds": not waits,
            }
    return figures


MEASURES: Mapping[str, Measure] = {"synchronising": synchronising, **COMPARISONS}
PREFIXES = {case: f"4.7.{case}-" for case in (*MEASURES, "wrapper")}


def waits_in(call: Call) -> list[str]:
    """The names of what made the host wait for the device during a call, from torch.profiler."""
    call()  # what is set up once is no part of it
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities) as recorded, record_function(_SPAN):
        call()
    events: Any = recorded.events()
    span = next(event.time_range for event in events if event.name == _SPAN)
    # The profiler's own wait, at its end, lies behind the span.
    return [
        event.name
        for event in events
        if any(name in event.name for name in WAITING)
        and span.start <= event.time_range.start <= span.end
    ]


if __name__ == "__main__":
    sys.exit(main())
