"""Which way a session computes its batches, and whether its ranks are alike."""

from __future__ import annotations

from torch import nn

from esper.errors import DataError, EntryPointError, ManifestError
from esper.services.tolaria.config import TrainingConfig
from esper.services.tolaria.data import SPLITS, Datasets
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.parallel import LogicalShards, Replicas, Whole
from esper.services.tolaria.randomness import stable_seed


def refuse_unlike(ranks: Ranks, model: nn.Module, datasets: Datasets) -> None:
    """Refuse ranks that were given other data or another model than the first.

    They would take other steps, and wait for each other in vain.

    Raises:
        DataError: a split has more samples on one rank than on another.
        EntryPointError: the models' parameters or buffers differ by name, type or shape.
    """
    sizes = [len(getattr(datasets, split)) for split in SPLITS]
    tensors = [
        [name, str(tensor.dtype), list(tensor.shape)]
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    ]
    told = ranks.exchanged([sizes, stable_seed(tensors)])
    for split, of_ranks in zip(SPLITS, zip(*(one[0] for one in told), strict=True), strict=True):
        if len(set(of_ranks)) > 1:
            raise DataError(
                f"data.{split}",
                f"{', '.join(map(str, of_ranks))} samples on the ranks",
                "as many on every rank",
            )
    if len({one[1] for one in told}) > 1:
        raise EntryPointError(
            "spec.model.entrypoint",
            "a model with other parameters or buffers on one rank than on another",
            "the same on every rank",
        )


def shards_of(training: TrainingConfig, processes: int, samples: int) -> int:
    """Into how many shards `processes` cut each batch of `samples` of training data.

    Raises:
        ManifestError: they can't share the logical shards, or a batch is too small for them.
        DataError: the training data is.
    """
    shards, batch = training.logical_shards, training.batch_size
    count = shards if shards > 1 else processes
    if count % processes:
        raise ManifestError(
            "spec.training.logicalShards",
            shards,
            f"a multiple of the number of processes, {processes}",
        )
    if batch < count:
        raise ManifestError("spec.training.batchSize", batch, f"at least {count}, a sample a shard")
    if count > 1 and samples < 2 * count:
        raise DataError(
            "data.train",
            f"{samples} samples",
            f"at least {2 * count}, two for each of {count} shards",
        )
    return count


def parallel_for(training: TrainingConfig, ranks: Ranks, samples: int) -> Whole:
    """The way that a session of `ranks` computes its batches, from `samples` of training data.

    Raises:
        BadInput: as `shards_of`, or a way that the other settings do not go with.
    """
    shards = training.logical_shards
    count = shards_of(training, ranks.size, samples)
    if training.sharding == "full" and ranks.size > 1:
        if training.compile:
            raise ManifestError("spec.training.compile", True, "false with sharding full")
        # Its part of torch takes longer to import than a small session needs to begin.
        from esper.services.tolaria.sharding import FullySharded

        return FullySharded(ranks, training.seed, count)
    if shards > 1:
        return LogicalShards(ranks, training.seed, shards)
    return Replicas(ranks, training.seed) if ranks.size > 1 else Whole(ranks, training.seed)
