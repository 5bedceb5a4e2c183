"""A step of Tolaria's on several ranks: against bare DDP, with grafted seeds, in logical shards."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.distributed_models import (
    BATCH,
    EPOCH_STEPS,
    engine,
    manifest,
    plain,
    prepared,
    trained,
)
from benchmarks.distributed_ranks import on_ranks
from benchmarks.distributed_turns import turns
from benchmarks.execution_grafting import germinate
from benchmarks.execution_timing import Timings, comparison, pooled_median
from benchmarks.services_timing import Bars, Figures, bars_of
from esper.contracts.enums import SeedState
from esper.execution.state_layout import SeedLifecycleState
from esper.services.tolaria import parallel
from esper.services.tolaria.distribution import CHECK_SECONDS, Ranks
from esper.services.tolaria.engine import Engine
from esper.services.tolaria.seeds import SeedRecord

RANKS = 2
PROCESSES = 5
"""Groups of ranks of a full run, one after another; a quick one has one, and so no interval."""
SECONDS = {"mlp": 6.0, "cnn": 6.0, "resnet18": 14.0, "mlp-1024": 8.0}
"""How long each group measures a model."""
QUICK_SECONDS = 2.0

DORMANT = ("mlp", "cnn", "resnet18")
DORMANT_LIMIT = 1.01
GRAFTED = ("mlp-1024", "resnet18")
SEEDS = 8
ALPHA = 0.5
SHARE_LIMIT = 0.05
SHARDS = 4
SHARDED = ("mlp", "cnn", "resnet18")


def dormant(quick: bool) -> tuple[Figures, Bars]:
    """Tolaria's step of a wrapped model in Replicas, against the plain loop over bare DDP."""
    figures: Figures = {}
    for name in _some(DORMANT, quick):
        found = _groups(quick, RANKS, _dormant, name)
        timings = Timings(processes=tuple(group["timings"] for group in found))
        figures[f"step-{name}"] = comparison(timings, "dormant", "bare", "again", DORMANT_LIMIT) | {
            "againstBareWithViews": timings.ratio("dormant", "views").plain(),
            "questionMicroseconds": float(np.median([group["question"] for group in found])) * 1e6,
            "epochExtraMilliseconds": float(np.median([group["extra"] for group in found])) * 1e3,
        }
    return figures, bars_of(figures, "6.5.dormant-")


def grafting(quick: bool) -> tuple[Figures, Bars]:
    """The reduction of 8 grafted seeds' gradients, as a share of the step that it is part of."""
    figures: Figures = {}
    for name in _some(GRAFTED, quick):
        found = _groups(quick, RANKS, _grafting, name)
        groups = [group["timings"] for group in found]
        figures[f"reduction-{name}"] = share_of(groups, SHARE_LIMIT) | found[0]["sizes"]
    return figures, bars_of(figures, "6.5.grafting-")


def shards(quick: bool) -> tuple[Figures, Bars]:
    """The step in 4 logical shards against the step without; no bar."""
    figures: Figures = {}
    for size in (RANKS, 1):
        for name in _some(SHARDED, quick):
            groups = [group["timings"] for group in _groups(quick, size, _shards, name)]
            timings = Timings(processes=tuple(groups))
            figures[f"step-{name}-ranks-{size}"] = comparison(timings, "shards", "without", "again")
    return figures, {}


def share_of(groups: list[dict[str, list[float]]], limit: float) -> Figures:
    """The reduction's share of the step, with a bar."""
    share = pooled_median([np.divide(one["reduction"], one["step"]) for one in groups])
    timings = Timings(processes=tuple(groups))
    return {
        "figure": share.median,
        "interval": [share.low, share.high],
        "stepMicroseconds": timings.microseconds("step"),
        "reductionMicroseconds": timings.microseconds("reduction"),
        "rounds": timings.rounds,
        "bar": f"<= {limit}",
        "holds": share.median <= limit,
    }


def with_questions(seconds: list[float], question: float) -> list[float]:
    """Steps of so many seconds with their share of the question whether to stop.

    It is asked every CHECK_SECONDS, so most blocks have none, and a median over them would not see
    it.
    """
    return [one * (1 + question / CHECK_SECONDS) for one in seconds]


def _some(names: Sequence[str], quick: bool) -> Sequence[str]:
    """The models that are measured; a quick run takes the first."""
    return names[:1] if quick else names


def _groups(quick: bool, size: int, work: Any, name: str) -> list[Any]:
    seconds = QUICK_SECONDS if quick else SECONDS[name]
    return [
        on_ranks(size, work, name, seconds, process)[0]
        for process in range(1 if quick else PROCESSES)
    ]


def _dormant(ranks: Ranks, name: str, seconds: float, process: int) -> dict[str, Any]:
    loops = {
        "bare": plain(ranks, name),
        "again": plain(ranks, name),
        "views": plain(ranks, name, views=True),
        "dormant": trained(ranks, manifest(name)),
    }
    found = dict(turns(ranks, loops, EPOCH_STEPS, seconds, process).processes[0])
    question = _question(ranks)
    found["dormant"] = with_questions(list(found["dormant"]), question)
    return {"timings": found, "question": question, "extra": _epoch_extra(ranks, name)}


def _question(ranks: Ranks) -> float:
    """Seconds that ranks take to ask each other whether to stop, once."""
    taken = []
    for _ in range(100):
        ranks.gathered(torch.zeros(1))
        began = time.perf_counter()
        seen = torch.tensor([float(ranks.stopping()), 0.0], dtype=torch.float64)
        ranks.summed(seen)
        seen.tolist()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def _epoch_extra(ranks: Ranks, name: str) -> float:
    """Seconds that an epoch takes beyond its steps: DDP is made anew, statistics are spread."""
    own = engine(ranks, prepared(manifest(name, train=2 * BATCH)))
    taken = []
    for epoch in range(1, 7):
        ranks.gathered(torch.zeros(1))
        began = time.perf_counter()
        with own.parallel.epoch(epoch, own._trained([])):
            pass
        taken.append(time.perf_counter() - began)
    return min(taken)


def _grafting(ranks: Ranks, name: str, seconds: float, process: int) -> dict[str, Any]:
    spent = [0.0]
    average = parallel.average_gradients

    def metered(*arguments: Any) -> None:
        began = time.perf_counter()
        average(*arguments)
        spent[0] += time.perf_counter() - began

    parallel.average_gradients = metered
    sizes: dict[str, int] = {}

    def graft(own: Engine) -> None:
        graft_seeds(own)
        sizes["hostParameters"] = sum(p.numel() for p in own.learning.host_parameters())
        sizes["seedParameters"] = sum(p.numel() for p in own.learning.seed_parameters())

    loops = {"step": trained(ranks, manifest(name), graft)}
    timings = turns(ranks, loops, EPOCH_STEPS, seconds, process, {"reduction": lambda: spent[0]})
    return {"timings": dict(timings.processes[0]), "sizes": sizes}


def graft_seeds(own: Engine) -> None:
    """Put low-rank seeds, of rank 8, into the first 8 layers of an engine's model, at ALPHA."""
    layers = [name for name, layer in own.model.morphology.layers.items() if _fits(layer)]
    for layer in layers[:SEEDS]:
        germinate(own.model, layer, "low-rank")
        own.model.morphology.transition(layer, 0, SeedLifecycleState.TRAINING)
        own.start_learning((layer, 0))
        own.model.morphology.transition(layer, 0, SeedLifecycleState.GRAFTING, alpha=ALPHA)
        record = SeedRecord(
            layer=layer,
            slot=0,
            state=SeedState.GRAFTING,
            cycle=0,
            alpha=ALPHA,
            kernel="low-rank",
        )
        own.book.records[record.site] = record


def _fits(layer: Any) -> bool:
    return layer.host_class.__name__ in ("Linear", "Conv2d")


def _shards(ranks: Ranks, name: str, seconds: float, process: int) -> dict[str, Any]:
    loops = {
        "without": trained(ranks, manifest(name)),
        "again": trained(ranks, manifest(name)),
        "shards": trained(ranks, manifest(name, logicalShards=SHARDS)),
    }
    return {"timings": dict(turns(ranks, loops, EPOCH_STEPS, seconds, process).processes[0])}
