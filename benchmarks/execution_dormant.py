"""What sleeping seeds cost: dormant models against bare ones, with and without telemetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.execution_models import CASES, Case, flag_wrapped, twin
from benchmarks.execution_running import (
    BATCHES,
    LEARNING_RATE,
    built,
    running,
    step,
    timed_ways,
)
from benchmarks.execution_timing import Bench, Call, Timings, comparison, timed
from esper.contracts.resources.growth import ControllerSpec
from esper.core import wrap
from esper.core.model_wrapper import MorphableModel
from esper.execution import probes
from esper.execution.isolation import evaluating

LIMIT = 1.01
SEEDS = 10_000
EPOCH_STEPS = 50
PROBE_INTERVAL = ControllerSpec().probe_interval_steps


def dormant(bench: Bench, cases: Sequence[Case] = CASES) -> dict[str, Timings]:
    """Every model, way and batch size: bare, wrapped, and with wrapper modules."""
    found: dict[str, Timings] = {}
    for case in cases:
        for batch in BATCHES:
            bare, x = case.seeded().to(bench.device), case.inputs(batch).to(bench.device)
            names = tuple(wrap(twin(bare), x).morphology.layers)
            makers = {
                "bare": partial(twin, bare),
                "again": partial(twin, bare),
                "dormant": partial(wrapped_twin, bare, x),
                "wrapper": partial(boxed_twin, bare, names),
            }
            for way, timings in timed_ways(makers, x, bench).items():
                found[f"{case.name}-{way}-{batch}"] = timings
    return found


def dormant_figures(name: str, timings: Timings) -> dict[str, Any]:
    """Of `dormant`: wrapped against bare, and whether the wrapper modules are seen."""
    del name
    wrapper = timings.ratio("wrapper", "bare")
    figures = comparison(timings, "dormant", "bare", "again", LIMIT)
    return figures | {"wrapper": wrapper.plain() | {"flagged": wrapper.low > LIMIT}}


def many_seeds(bench: Bench, cases: Sequence[Case] = CASES[:1]) -> dict[str, Timings]:
    """10,000 dormant seeds and none at all."""
    found: dict[str, Timings] = {}
    for case in cases:
        for batch in BATCHES:
            bare, x = case.seeded().to(bench.device), case.inputs(batch).to(bench.device)
            hosts = len(wrap(twin(bare), x).morphology.layers)
            makers = {
                "bare": partial(twin, bare),
                "again": partial(twin, bare),
                "crowded": partial(wrapped_twin, bare, x, -(-SEEDS // hosts)),
            }
            for way, timings in timed_ways(makers, x, bench).items():
                found[f"{case.name}-{way}-{batch}"] = timings
    return found


def many_seeds_figures(name: str, timings: Timings) -> dict[str, Any]:
    """Of `many_seeds`: with against without."""
    del name
    return comparison(timings, "crowded", "bare", "again", LIMIT)


def monitored(bench: Bench, cases: Sequence[Case] = CASES) -> dict[str, Timings]:
    """A training step of each arm, bare and wrapped, and a validation with and without probes."""
    found: dict[str, Timings] = {}
    for case in cases:
        for batch in BATCHES:
            bare, x = case.seeded().to(bench.device), case.inputs(batch).to(bench.device)
            makers = {
                "bare": partial(twin, bare),
                "again": partial(twin, bare),
                "dormant": partial(wrapped_twin, bare, x),
            }
            arms = built(makers, bench)
            # The optimiser that a session has by default.
            optimizer = torch.optim.AdamW(bare.parameters(), lr=LEARNING_RATE, fused=True)
            calls = {name: step(model, optimizer, x) for name, model in arms.items()}
            calls |= validating(arms["dormant"], case)
            with running("step", arms):
                found[f"{case.name}-{batch}"] = timed(calls, bench)
    return found


def monitored_figures(name: str, timings: Timings) -> dict[str, Any]:
    """Of `monitored`: an epoch of 50 steps with its share of the probes against 50 bare steps.

    A dormant model is probed once in so many steps, by default PROBE_INTERVAL; `everyBoundary` is
    the ratio where every epoch is probed, as with a seed on trial. An epoch is put together from
    steps and probes timed in the same rounds: timed whole it is too long to be compared with one
    beside it.
    """
    del name
    share = EPOCH_STEPS / PROBE_INTERVAL
    figures = comparison(_epochs(timings, share), "dormant", "bare", "again", LIMIT)
    watched = _epochs(timings, 1.0).ratio("dormant", "bare")
    probe = timings.microseconds("watched") - timings.microseconds("validation")
    return figures | {"everyBoundary": watched.plain(), "probeMicroseconds": probe}


def _epochs(timings: Timings, share: float) -> Timings:
    """Seconds an epoch, from seconds a step and a validation; `share` of a probe is taken."""
    return Timings(processes=tuple(_epoch(process, share) for process in timings.processes))


def _epoch(process: Mapping[str, Sequence[float]], share: float) -> dict[str, list[float]]:
    arms = ("bare", "again", "dormant")
    epochs = {name: [EPOCH_STEPS * one for one in process[name]] for name in arms}
    rounds = zip(epochs["dormant"], process["watched"], process["validation"], strict=True)
    return epochs | {"dormant": [steps + share * (more - less) for steps, more, less in rounds]}


def wrapped_twin(bare: nn.Module, x: Tensor, seeds_per_layer: int = 1) -> MorphableModel:
    """A dormant model with the tensors of `bare`."""
    return wrap(twin(bare), x, seeds_per_layer=seeds_per_layer)


def boxed_twin(bare: nn.Module, names: Sequence[str]) -> nn.Module:
    """A model with wrapper modules and the tensors of `bare`."""
    return flag_wrapped(twin(bare), names)


def validating(model: nn.Module, case: Case) -> dict[str, Call]:
    """A validation as it is, and as Tolaria has it where a probe is due, gradients included."""
    assert isinstance(model, MorphableModel)
    layers = model.morphology.layers
    device = next(model.parameters()).device
    inputs = case.inputs(probes.PROBE_SAMPLES, seed=1).to(device)

    def validation() -> None:
        with evaluating(model), torch.no_grad():
            model(inputs)

    def watched() -> None:
        gradients = probes.gradient_sums(layers)
        with evaluating(model), torch.no_grad(), probes.sampling(layers) as samples:
            model(inputs)
        probes.read(layers, samples, gradients)

    return {"validation": validation, "watched": watched}
