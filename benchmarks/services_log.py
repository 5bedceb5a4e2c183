"""An enabled log call, on its caller's side, beside the standard library's queue and structlog.

Every arm writes the same facts to a file of its own: Esper's logger as the command line starts it;
stdlib's QueueHandler, with a QueueListener and a plain formatter behind it; and structlog rendering
JSON as its guide shows, which writes before it returns. The ratio is of processor time in blocks of
calls; the percentiles are of single calls by the clock, back to back and a thousand a second.
"""

from __future__ import annotations

import logging
import logging.handlers
import queue
import random
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from benchmarks.execution_timing import (
    Timings,
    collecting_no_garbage,
    comparison,
    joined,
    processor_seconds,
)
from benchmarks.services_timing import Bars, Figures, bars_of, below, best, in_processes
from esper.utils.logging import AsyncEsperLogger, tracing

LogCall = Callable[[], None]

LIMIT = 1.0
LIMIT_MICROSECONDS = 100.0
CALLS = 100
"""Of one block; few enough that no queue fills."""
ROUNDS, QUICK_ROUNDS = 100, 30
REPEATS = 5
SINGLE_CALLS, QUICK_SINGLE_CALLS = 2000, 500
PACES = {"burst": 0.0, "paced": 0.001}
"""Seconds between the starts of single calls."""

_DRAIN_SECONDS = 0.03
"""After which what is queued has been written, so that no arm pays for another's lines."""


def measure(quick: bool) -> tuple[Figures, Bars]:
    """Figures and bars of one log call with a number, a layer and a trace id."""
    parts = in_processes(
        _measured,
        quick,
        QUICK_ROUNDS if quick else ROUNDS,
        QUICK_SINGLE_CALLS if quick else SINGLE_CALLS,
    )
    timings = joined([{"call": blocks} for blocks, _ in parts])["call"]
    figures: Figures = {
        "cost": comparison(timings, "esper", "queueHandler", "queueHandlerAgain", LIMIT),
        "structlog": comparison(timings, "structlog", "queueHandler", "queueHandlerAgain"),
    }
    singles = [repeat for _, repeats in parts for repeat in repeats]
    for pace in PACES:
        p99 = {arm: best([each[pace][arm] for each in singles]) for arm in singles[0][pace]}
        figures[f"p99-{pace}-microseconds"] = {
            **below(p99["esper"], LIMIT_MICROSECONDS),
            "arms": p99,
            "worst": max(each[pace]["esper"] for each in singles),
        }
    return figures, bars_of(figures, "5.3.log-")


def _measured(
    process: int, rounds: int, single_calls: int
) -> tuple[Timings, list[dict[str, dict[str, float]]]]:
    """Seconds a call in blocks, and the 99th percentiles of single calls in microseconds."""
    draw = random.Random(process)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as open_logs:
        arms = {
            name: open_logs.enter_context(log(Path(folder) / name)) for name, log in _LOGS.items()
        }
        open_logs.enter_context(tracing("0af7651916cd43dd8448eb211c80319c"))
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        with collecting_no_garbage():
            for number in range(rounds + 1):
                for name in draw.sample(list(arms), len(arms)):
                    took = processor_seconds(arms[name], CALLS) / CALLS
                    time.sleep(_DRAIN_SECONDS)
                    if number:
                        seconds[name].append(took)
        percentiles = [
            {pace: _p99(arms, single_calls, wait, draw) for pace, wait in PACES.items()}
            for _ in range(REPEATS)
        ]
    return Timings(processes=(seconds,)), percentiles


def _p99(
    arms: Mapping[str, LogCall], calls: int, wait: float, draw: random.Random
) -> dict[str, float]:
    found = {}
    for name in draw.sample(list(arms), len(arms)):
        call, clock = arms[name], time.perf_counter_ns
        times = []
        for _ in range(calls):
            began = clock()
            call()
            times.append(clock() - began)
            if wait:
                time.sleep(wait)
        time.sleep(_DRAIN_SECONDS)
        found[name] = round(float(np.percentile(times, 99)) / 1e3, 2)
    return found


@contextmanager
def _esper(path: Path) -> Iterator[LogCall]:
    with AsyncEsperLogger("bench", level="info", file=path):
        yield partial(_say, logging.getLogger("esper.services.tolaria.bench"))
    _written(path)


@contextmanager
def _queue_handler(path: Path) -> Iterator[LogCall]:
    records: queue.Queue[Any] = queue.Queue()
    back = logging.FileHandler(path)
    back.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
    listener = logging.handlers.QueueListener(records, back)
    front = logging.handlers.QueueHandler(records)
    logger = logging.getLogger(f"stdlib.{path.name}")
    logger.setLevel("INFO")
    logger.propagate = False
    logger.addHandler(front)
    listener.start()
    yield partial(_say, logger)
    listener.stop()
    back.close()
    _written(path)


@contextmanager
def _structlog(path: Path) -> Iterator[LogCall]:
    with path.open("w") as file:
        logger = structlog.wrap_logger(
            structlog.WriteLogger(file),
            processors=[
                structlog.contextvars.merge_contextvars,
                structlog.processors.add_log_level,
                structlog.processors.TimeStamper(fmt="iso", utc=True),
                structlog.processors.JSONRenderer(),
            ],
            wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
        ).bind(logger="tolaria")
        yield lambda: logger.info("epoch %d of %d", 3, 20, layer="fc1", loss=0.25)
    _written(path)


_LOGS: Mapping[str, Any] = {
    "esper": _esper,
    "queueHandler": _queue_handler,
    "queueHandlerAgain": _queue_handler,
    "structlog": _structlog,
}


def _say(logger: logging.Logger) -> None:
    logger.info("epoch %d of %d", 3, 20, extra={"layer": "fc1", "loss": 0.25})


def _written(path: Path) -> None:
    """An arm that writes nothing, or loses lines, is no arm."""
    text = path.read_text()
    assert text.count("epoch 3 of 20") > CALLS
    assert "records lost" not in text
