"""Models that are shared out, built anew, or refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from esper.core.model_wrapper import MorphableModel, wrap
from esper.errors import ManifestError
from esper.services.tolaria.sharding import FullySharded, Skeleton
from tests.unit.esper.services.tolaria.test_ways import OneOf


class Tied(nn.Module):
    """One weight, and one buffer, at two places each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("one", torch.ones(2))
        self.head.register_buffer("other", self.one)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.embedding(tokens).mean(1))
        return found


def test_what_lies_at_two_places_stays_one_when_a_model_is_built_anew() -> None:
    model = wrap(Tied(), torch.zeros(2, 3, dtype=torch.int64))
    found: Any = Skeleton(model).revived()
    assert found.head.weight is found.embedding.weight
    assert found.head.other is found.one
    assert found.head.weight.shape == (7, 4)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name, _ in found.named_parameters()] == names


class Uncopied(nn.Linear):
    """Has something that belongs to its process."""

    def __deepcopy__(self, memo: object) -> None:
        raise TypeError("cannot pickle a lock")


def convolutional() -> MorphableModel:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 2))
    return wrap(model.to(memory_format=torch.channels_last), torch.zeros(2, 2, 5, 5))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (convolutional, r"full with 0.weight in strides .* allowed: none or data, or contiguous"),
        (
            lambda: wrap(nn.Sequential(Uncopied(2, 2), nn.Linear(2, 2)), torch.zeros(2, 2)),
            "can't be copied: TypeError: cannot pickle a lock; allowed: none or data",
        ),
    ],
)
def test_what_can_not_be_shared_out_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ManifestError, match=message):
        FullySharded(OneOf(0, 2), 1, 2).place(make())
