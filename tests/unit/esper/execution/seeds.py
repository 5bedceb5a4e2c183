"""Small models with seeds in them, brought to a state."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from esper.core import wrap
from esper.execution.state_layout import SeedLifecycleState as S

DORMANT_TO_GRAFTING = (S.TRAINING, S.GRAFTING)
TO_FOSSIL = (S.TRAINING, S.GRAFTING, S.FOSSILIZED)


class Scaling(nn.Module):
    """A seed for a Linear host: a random linear map with weights that are far from zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.map = nn.Linear(inputs, outputs)
        nn.init.normal_(self.map.weight, std=3.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.map(x)


def linear_pair(
    inputs: int = 5, outputs: int = 4, bias: bool = True
) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.ReLU(), nn.Linear(outputs, 3))
    wrapped = wrap(bare, torch.randn(2, inputs), copy=True)
    return bare, wrapped


def grow(wrapped, layer: str, seed: nn.Module, states=(), slot: int = 0, **arguments) -> None:
    wrapped.morphology.germinate(layer, slot, seed, kernel="test", **arguments)
    for state in states:
        wrapped.morphology.transition(layer, slot, state)


@contextmanager
def no_collection() -> Iterator[None]:
    """No garbage is collected inside: what others' callbacks do then would be counted."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
