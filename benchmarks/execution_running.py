"""The ways a model is run to be timed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.execution_models import CLASSES
from benchmarks.execution_timing import Bench, Call, Timings, timed

Makers = Mapping[str, Callable[[], nn.Module]]
"""How each arm is made."""

WAYS = ("forward", "step")
"""A forward pass in eval mode under no_grad; forward, backward and optimiser step in training."""

BATCHES = (1, 64)
# So small that no weight runs away, however often a step is repeated.
LEARNING_RATE = 1e-5


def timed_ways(makers: Makers, x: Tensor, bench: Bench) -> dict[str, Timings]:
    """Arms that share their parameters, run both ways on the inputs `x`.

    The optimiser is the plainest there is, so that what a layer adds weighs most.
    """
    arms = built(makers, bench)
    optimizer = torch.optim.SGD(next(iter(arms.values())).parameters(), lr=LEARNING_RATE)
    found = {}
    for way in WAYS:
        calls = {
            name: partial(model, x) if way == "forward" else step(model, optimizer, x)
            for name, model in arms.items()
        }
        with running(way, arms):
            found[way] = timed(calls, bench)
    return found


def built(makers: Makers, bench: Bench) -> dict[str, nn.Module]:
    """The arms, made in another order in each process: the first may get the better place."""
    order = list(makers)
    random.Random(bench.process).shuffle(order)
    made = {name: makers[name]() for name in order}
    return {name: made[name] for name in makers}


@contextmanager
def running(way: str, arms: Mapping[str, nn.Module]) -> Iterator[None]:
    """Inside, the arms are in the mode of `way`, and gradients are kept where it needs them."""
    for model in arms.values():
        model.train(way == "step")
    with torch.set_grad_enabled(way == "step"):
        yield


def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Call:
    """Forward, backward and optimiser step; the model gives CLASSES numbers a sample, or more."""
    targets = torch.arange(len(x), device=x.device) % CLASSES

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x).flatten(1), targets).backward()
        optimizer.step()

    return run
