"""Which way a session computes its batches, and what can't be cut."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from esper.errors import DataError, EntryPointError, ManifestError
from esper.services.tolaria.config import TrainingConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.distribution import Alone
from esper.services.tolaria.parallel import LogicalShards, Replicas, Whole
from esper.services.tolaria.sharding import FullySharded
from esper.services.tolaria.ways import parallel_for, refuse_unlike
from tests.unit.esper.services.tolaria.sessions import config


class OneOf(Alone):
    """A rank among several, asked for nothing but its place."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__()
        self.rank, self.size = rank, size


def training(**changes: Any) -> TrainingConfig:
    return dataclasses.replace(config().training, **changes)


@pytest.mark.parametrize(
    ("size", "changes", "kind", "count"),
    [
        (1, {}, Whole, 1),
        (1, {"sharding": "full"}, Whole, 1),
        (1, {"logical_shards": 4}, LogicalShards, 4),
        (4, {"logical_shards": 4}, LogicalShards, 4),
        (3, {}, Replicas, 3),
        (3, {"sharding": "data"}, Replicas, 3),
        (2, {"sharding": "full"}, FullySharded, 2),
        (2, {"sharding": "full", "logical_shards": 4}, FullySharded, 4),
    ],
)
def test_the_way_is_the_sessions(
    size: int, changes: dict[str, Any], kind: type[Whole], count: int
) -> None:
    found = parallel_for(training(**changes), OneOf(0, size), 48)
    assert type(found) is kind
    assert found.count == count


@pytest.mark.parametrize(
    ("size", "changes", "samples", "error", "message"),
    [
        (3, {"logical_shards": 4}, 48, ManifestError, "logicalShards: got 4; allowed: a multiple"),
        (2, {"batch_size": 1}, 48, ManifestError, "batchSize: got 1; allowed: at least 2"),
        (4, {}, 7, DataError, "data.train: got 7 samples; allowed: at least 8"),
        (2, {"sharding": "full", "compile": True}, 48, ManifestError, "compile: got True"),
    ],
)
def test_what_can_not_be_cut_is_refused(
    size: int, changes: dict[str, Any], samples: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        parallel_for(training(**changes), OneOf(0, size), samples)


@pytest.mark.parametrize("samples", [32, 33, 17, 9])
def test_ranks_share_a_batch_without_rest(samples: int) -> None:
    batch = torch.randperm(samples)
    shards = [
        shard
        for rank in range(2)
        for shard in parallel_for(training(logical_shards=4), OneOf(rank, 2), 48).shards(batch)
    ]
    assert [shard.number for shard in shards] == [0, 1, 2, 3]
    assert torch.equal(torch.cat([shard.indices for shard in shards]), batch)
    assert sum(shard.share for shard in shards) == pytest.approx(1.0)
    sizes = [len(shard.indices) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


class Unlike(Alone):
    """The first of two ranks, the other of which says something else."""

    size = 2

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place

    def exchanged(self, value: Any) -> list[Any]:
        other = list(value)
        other[self._place] = [149, 40, 40] if self._place == 0 else 0
        return [value, other]


@pytest.mark.parametrize(
    ("place", "error", "message"),
    [
        (0, DataError, "data.train: got 150, 149 samples on the ranks; allowed: as many"),
        (1, EntryPointError, "spec.model.entrypoint: got a model with other parameters"),
    ],
)
def test_ranks_that_are_not_alike_are_refused(
    place: int, error: type[Exception], message: str
) -> None:
    datasets = Datasets(train=range(150), validation=range(40), test=range(40))
    with pytest.raises(error, match=message):
        refuse_unlike(Unlike(place), nn.Linear(2, 2), datasets)
    refuse_unlike(Alone(), nn.Linear(2, 2), datasets)
