"""Buffers of shards brought together, whatever a forward has done to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.shard_buffers import assign, merged, spread
from tests.ranks import run_ranks

BASE = {"mean": torch.tensor([1.0, 2.0]), "count": torch.tensor(3), "empty": torch.zeros(0)}


def became(number: int) -> dict[str, Tensor]:
    """The usual buffers after shard `number`."""
    return BASE | {"mean": BASE["mean"] + number, "count": torch.tensor(4)}


def brought_together(ranks: Ranks) -> list[dict[str, Any]]:
    """Four shards: usual ones, then some with buffers that are new or of another size."""
    own = range(ranks.rank * 4 // ranks.size, (ranks.rank + 1) * 4 // ranks.size)
    usual = merged(ranks, BASE, [became(number) for number in own])
    new = {number: {"made": torch.full((2,), float(number))} for number in own}
    sized = {number: {"rows": torch.full((2 + number // 3, 1), float(number))} for number in own}
    late = {number: {"late": torch.tensor([True])} if number == 3 else {} for number in own}
    others = [became(number) | new[number] | sized[number] | late[number] for number in own]
    unusual = merged(ranks, BASE, others)
    first = spread(ranks, {"rows": torch.full((2 + ranks.rank,), 7.0 + ranks.rank)})
    alike = spread(ranks, {"mean": torch.tensor([5.0 + ranks.rank])})
    return [
        {name: one.tolist() for name, one in found.items()}
        for found in (usual, unusual, first, alike)
    ]


def test_any_number_of_ranks_brings_the_same_together() -> None:
    usual = {"mean": [2.5, 3.5], "count": 4, "empty": []}
    unusual = usual | {"made": [1.5, 1.5], "rows": [[0.0], [0.0]], "late": [True]}
    expected = [usual, unusual, {"rows": [7.0, 7.0]}, {"mean": [5.0]}]
    assert brought_together(Alone()) == expected
    assert run_ranks(2, brought_together) == [expected] * 2


def test_a_model_gets_the_buffers_as_they_are() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].register_buffer("made", None)
    model[0].register_buffer("gone", torch.ones(1))
    kept = model[0].running_mean
    values = {f"0.{name}": one for name, one in model[0].named_buffers() if name != "gone"}
    assign(model, values | {"0.running_mean": torch.ones(2), "0.made": torch.zeros(3)})
    assert model[0].running_mean is kept
    assert kept is not None
    assert kept.tolist() == [1.0, 1.0]
    assert model[0].made.tolist() == [0.0] * 3
    assert model[0].gone is None
