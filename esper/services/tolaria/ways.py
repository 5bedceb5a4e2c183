"""Which way a session computes its batches."""

from __future__ import annotations

from esper.errors import DataError, ManifestError
from esper.services.tolaria.config import TrainingConfig
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.parallel import LogicalShards, Replicas, Whole


def parallel_for(training: TrainingConfig, ranks: Ranks, samples: int) -> Whole:
    """The way that a session of `ranks` computes its batches, from `samples` of training data.

    Raises:
        ManifestError: the ranks can't share the logical shards, or a batch is too small for them.
        DataError: the training data is.
    """
    shards, batch = training.logical_shards, training.batch_size
    count = shards if shards > 1 else ranks.size
    if count % ranks.size:
        raise ManifestError(
            "spec.training.logicalShards",
            shards,
            f"a multiple of the number of processes, {ranks.size}",
        )
    if batch < count:
        raise ManifestError("spec.training.batchSize", batch, f"at least {count}, a sample a shard")
    if count > 1 and samples < 2 * count:
        raise DataError(
            "data.train",
            f"{samples} samples",
            f"at least {2 * count}, two for each of {count} shards",
        )
    if training.sharding == "full" and ranks.size > 1:
        if training.compile:
            raise ManifestError("spec.training.compile", True, "false with sharding full")
        # Its part of torch takes longer to import than a small session needs to begin.
        from esper.services.tolaria.sharding import FullySharded

        return FullySharded(ranks, training.seed, count)
    if shards > 1:
        return LogicalShards(ranks, training.seed, shards)
    return Replicas(ranks, training.seed) if ranks.size > 1 else Whole(ranks, training.seed)
