"""How one batch is computed: in one piece, in logical shards, or by replicas of the model.

A batch is always the whole session's. It is cut into shards of equal size but for one sample; each
rank computes the shards that are its own, in order, and what they come to is brought together
before the optimiser's step:

- `Whole`: one shard, one process; what a plain training loop does.
- `LogicalShards`: the same shards whatever the number of ranks. Their gradients are summed in
  their order, normalisation statistics are each shard's own and merged in that order, and each
  shard draws from a random stream of its own. So 1, 2 and 4 ranks come to the same bits.
- `Replicas`: one shard a rank, the host's gradients averaged by DistributedDataParallel (Li et al.
  2020, "PyTorch Distributed") while the backward pass still runs. Seeds live outside of it, for
  it knows only the parameters it was made with: theirs are averaged in one reduction.

Shapes: N shards, W ranks, B samples of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from esper.core.model_wrapper import MorphableModel
from esper.execution.isolation import (
    borrowed_buffers,
    preserved_buffers,
    preserved_randomness,
    seed_everything,
)
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.flat import Flat
from esper.services.tolaria.learning import Site
from esper.services.tolaria.model_state import buffer_places
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.shard_buffers import Buffers, assign, held_buffers, merged, spread
from esper.services.tolaria.shard_faults import NotedFaults


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One piece of a batch: its number from 0 over all ranks, its samples [b], and their share."""

    number: int
    indices: Tensor
    share: float


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What an epoch trains: the model, the host optimiser's parameters, and those of each seed.

    `shadows` are the statistics that seeds on trial gather, by seed; passes write to them. `trials`
    are the seeds on trial that every pass calls.
    """

    model: MorphableModel
    host: Sequence[nn.Parameter]
    seeds: Sequence[nn.Parameter]
    shadows: Sequence[Buffers] = field(default_factory=list)
    trials: Sequence[Site] = ()


@dataclass(frozen=True, kw_only=True)
class Passing:
    """What a forward and a backward pass over a piece of a batch did.

    `unused`: they left parameters out, so that DDP has to look for them in every pass. `reshaped`
    are the buffers that they made, or left in another shape: those may differ from rank to rank,
    and so can't be sent before each forward as others are.
    """

    unused: bool
    reshaped: Sequence[str]


class Whole:
    """A batch in one piece, in one process."""

    count = 1
    """Shards a batch is cut into."""
    joint = False
    """Whether every rank must take part in every forward."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        """`seed` is the session's."""
        self.ranks = ranks
        self.seed = seed
        self.module: nn.Module | None = None
        """What a training forward calls; None: the model itself."""

    def place(self, model: MorphableModel) -> MorphableModel:
        """The model as it is trained: rank 0's, on every rank."""
        return model

    def learn_of(self, passing: Callable[[], Passing]) -> None:
        """Ask for what this way must know of the model."""
        del passing

    @contextmanager
    def epoch(self, epoch: int, trained: Trained) -> Iterator[None]:
        """Inside, `trained` is trained for this epoch."""
        del epoch, trained
        yield

    def weights_at_hand(self, model: nn.Module) -> AbstractContextManager[None]:
        """Inside, a layer of `model` can be run alone."""
        del model
        return nullcontext()

    def looking(self, model: MorphableModel, number: int) -> AbstractContextManager[None]:
        """Inside, one rank or all look at what `model` says to piece `number` of a dataset."""
        del model, number
        return nullcontext()

    def count_faults(
        self, model: MorphableModel, sites: Sequence[Site], own: Iterable[int]
    ) -> None:
        """Count what seeds at `sites` failed at while pieces were looked at, `own` by this rank.

        Here they were counted as they came.
        """
        del model, sites, own

    def shards(self, indices: Tensor) -> list[Shard]:
        """The shards of the batch [B] that this rank computes."""
        return [Shard(number=0, indices=indices, share=1.0)]

    @contextmanager
    def computing(self, shard: Shard, number: int, *, final: bool) -> Iterator[None]:
        """Inside, the shard of batch `number` is computed; `final`: a step follows the batch."""
        del shard, number, final
        yield

    def scale(self, shard: Shard) -> float:
        """What the mean over a shard counts in the batch."""
        return shard.share

    def finish_batch(self, *, final: bool) -> None:
        """Every shard of the batch was computed; with `final`, gradients are brought together."""

    def summed_losses(self, totals: Tensor) -> float:
        """The sum of an epoch's losses from those of this rank's shards, float64 [N / W]."""
        return float(totals.sum())


class Sharded(Whole):
    """What all ways to cut a batch have in common."""

    def __init__(self, ranks: Ranks, seed: int, count: int) -> None:
        """`count` is a multiple of the number of ranks."""
        super().__init__(ranks, seed)
        self.count = count
        self.own = count // ranks.size
        """How many shards of a batch are this rank's."""
        self._epoch = 0

    def place(self, model: MorphableModel) -> MorphableModel:
        """The model, with rank 0's weights and statistics on every rank."""
        tensors = [*model.parameters(), *model.buffers()]
        flat = Flat.of(tensors)
        held = flat.bytes_of(tensors)
        self.ranks.spread(held)
        flat.write(held, tensors)
        return model

    @contextmanager
    def epoch(self, epoch: int, trained: Trained) -> Iterator[None]:
        """Inside, `trained` is trained; afterwards every rank's random streams are alike."""
        self._epoch = epoch
        try:
            yield
        finally:
            seed_everything(stable_seed(self.seed, "after epoch", epoch))

    @contextmanager
    def looking(self, model: MorphableModel, number: int) -> Iterator[None]:
        """Inside, what is drawn depends on the piece alone; nothing of it stays.

        So it is the same whichever rank looks, and leaves the ranks alike.
        """
        drawn = stable_seed(self.seed, "piece", number)
        with preserved_randomness(drawn), preserved_buffers(model):
            yield

    def shards(self, indices: Tensor) -> list[Shard]:
        """This rank's shards of the batch [B]."""
        first = self.ranks.rank * self.own
        return [
            Shard(number=number, indices=piece, share=len(piece) / len(indices))
            for number in range(first, first + self.own)
            for piece in (indices[piece_of(len(indices), self.count, number)],)
        ]

    def summed_losses(self, totals: Tensor) -> float:
        """The sum of all shards' losses, in their order."""
        total = 0.0
        for loss in self.ranks.gathered(totals).flatten().tolist():
            total += loss
        return total


def piece_of(size: int, count: int, number: int) -> slice:
    """Where piece `number` of `count` lies in `size` samples, as torch's tensor_split has it.

    Found without the other pieces, which would be work for each rank, in each step.
    """
    least, more = divmod(size, count)
    start = number * least + min(number, more)
    return slice(start, start + least + (number < more))


class OwnStatistics(Sharded):
    """Shards with random streams, normalisation statistics and faults of their own."""

    def __init__(self, ranks: Ranks, seed: int, count: int) -> None:
        """`count` is a multiple of the number of ranks."""
        super().__init__(ranks, seed, count)
        self.trained: Trained | None = None
        self._became: dict[int, list[Buffers]] = {}
        self._faults = NotedFaults(ranks)

    def place(self, model: MorphableModel) -> MorphableModel:
        """The model, with rank 0's weights and statistics on every rank."""
        model.morphology.layout.noted = {}
        return super().place(model)

    @contextmanager
    def looking(self, model: MorphableModel, number: int) -> Iterator[None]:
        """Inside, what is drawn depends on the piece alone; what seeds fail at is noted."""
        with super().looking(model, number), self._faults.passing(model, number):
            yield

    def count_faults(
        self, model: MorphableModel, sites: Sequence[Site], own: Iterable[int]
    ) -> None:
        """Count what was noted, in the order of the pieces."""
        self._faults.count(model, sites, own)

    @contextmanager
    def epoch(self, epoch: int, trained: Trained) -> Iterator[None]:
        """Inside, `trained` is trained."""
        self.trained, self._became = trained, {}
        try:
            with super().epoch(epoch, trained):
                yield
        finally:
            self.trained = None

    @contextmanager
    def computing(self, shard: Shard, number: int, *, final: bool) -> Iterator[None]:
        """Inside, the shard begins with the batch's statistics and draws from its own stream."""
        del final
        assert self.trained is not None
        seed_everything(stable_seed(self.seed, "shard", self._epoch, number, shard.number))
        before = [dict(shadow) for shadow in self.trained.shadows]
        own: Buffers = {}
        model = self.trained.model
        with borrowed_buffers(model, own), self._faults.passing(model, shard.number):
            yield
        became = [own]
        for shadow, was in zip(self.trained.shadows, before, strict=True):
            became.append(dict(shadow))
            shadow.clear()
            shadow.update(was)
        self._became[shard.number] = became

    def finish_batch(self, *, final: bool) -> None:
        """Merge the shards' statistics, and count their faults, in the shards' order."""
        del final
        assert self.trained is not None
        self.count_faults(self.trained.model, self.trained.trials, sorted(self._became))
        own = [became for _, became in sorted(self._became.items())]
        self._became = {}
        model = self.trained.model
        if not buffer_places(model):
            return
        assign(model, merged(self.ranks, held_buffers(model), [became[0] for became in own]))
        for place, shadow in enumerate(self.trained.shadows, start=1):
            shadow.update(merged(self.ranks, dict(shadow), [became[place] for became in own]))


class LogicalShards(OwnStatistics):
    """The same N shards whatever the number of ranks, with sums in one order."""

    def __init__(self, ranks: Ranks, seed: int, count: int) -> None:
        """`count` is a multiple of the number of ranks."""
        super().__init__(ranks, seed, count)
        self._gradients: dict[int, list[Tensor | None]] = {}

    @contextmanager
    def epoch(self, epoch: int, trained: Trained) -> Iterator[None]:
        """Inside, `trained` is trained; its parameters hold gradients only before a step."""
        self._gradients = {}
        with super().epoch(epoch, trained):
            yield

    @contextmanager
    def computing(self, shard: Shard, number: int, *, final: bool) -> Iterator[None]:
        """Inside, the shard is computed; afterwards its gradients are kept, apart from others'."""
        with super().computing(shard, number, final=final):
            yield
        parameters = self._parameters
        found = self._gradients.setdefault(shard.number, [None] * len(parameters))
        for place, parameter in enumerate(parameters):
            gradient, parameter.grad = parameter.grad, None
            earlier = found[place]
            if gradient is not None:
                found[place] = gradient if earlier is None else earlier.add_(gradient)

    def finish_batch(self, *, final: bool) -> None:
        """Merge the shards' statistics; before a step, sum their gradients into `.grad`."""
        super().finish_batch(final=final)
        if final:
            self._sum_gradients()

    @property
    def _parameters(self) -> list[nn.Parameter]:
        assert self.trained is not None
        return [*self.trained.host, *self.trained.seeds]

    def _sum_gradients(self) -> None:
        parameters = self._parameters
        own = [found for _, found in sorted(self._gradients.items())]
        self._gradients = {}
        flat = Flat.of(parameters)
        given = torch.tensor(
            [[gradient is not None for gradient in found] for found in own], dtype=torch.uint8
        )
        given = self.ranks.gathered(given).flatten(0, 1).any(dim=0)
        rows = torch.stack([flat.bytes_of(found) for found in own])
        rows = self.ranks.gathered(rows).flatten(0, 1)
        total = flat.zeros()
        for row in rows:
            flat.add(total, row)
        gradients = flat.tensors_in(total)
        for parameter, gradient, there in zip(parameters, gradients, given.tolist(), strict=True):
            parameter.grad = gradient if there else None


class Replicas(Sharded):
    """One shard a rank; the host in DistributedDataParallel, its seeds beside it."""

    def __init__(self, ranks: Ranks, seed: int) -> None:
        """One shard for each of `ranks`."""
        super().__init__(ranks, seed, ranks.size)
        self._trained: Trained | None = None
        self._passing = Passing(unused=False, reshaped=[])

    def learn_of(self, passing: Callable[[], Passing]) -> None:
        """Ask for what DDP must know of the model."""
        own = passing()
        told = self.ranks.exchanged([own.unused, list(own.reshaped)])
        self._passing = Passing(
            unused=any(unused for unused, _ in told),
            reshaped=sorted({name for _, reshaped in told for name in reshaped}),
        )

    @contextmanager
    def epoch(self, epoch: int, trained: Trained) -> Iterator[None]:
        """Inside, `module` averages the host's gradients.

        It is made anew each time: it knows the parameters it was made with alone, so that a seed
        that has become part of the host is among them from the next epoch on; and in what order
        it adds depends on how long it has lived, which a resumed run could not repeat.
        """
        self._trained = trained
        seed_everything(stable_seed(self.seed, "rank", epoch, self.ranks.rank))
        replica = _replica(trained, self._passing)
        self.module = replica
        try:
            with super().epoch(epoch, trained):
                yield
                self._spread_buffers(trained)
        finally:
            self.module = self._trained = None
            dismiss(replica)

    @contextmanager
    def computing(self, shard: Shard, number: int, *, final: bool) -> Iterator[None]:
        """Inside, gradients are averaged in the backward pass, if a step follows."""
        del shard, number
        assert isinstance(self.module, DistributedDataParallel)
        with nullcontext() if final else self.module.no_sync():
            yield

    def finish_batch(self, *, final: bool) -> None:
        """Before a step, average the seeds' gradients over the ranks, in one reduction."""
        assert self._trained is not None
        seeds = self._trained.seeds
        if not final or not seeds:
            return
        average_gradients(self.ranks, seeds)

    def scale(self, shard: Shard) -> float:
        """What a shard's loss counts: DDP takes the mean over ranks, whatever their samples."""
        return shard.share * self.ranks.size

    def _spread_buffers(self, trained: Trained) -> None:
        """Rank 0's statistics on every rank; within the epoch DDP has spread them each forward."""
        if not buffer_places(trained.model):
            return
        assign(trained.model, spread(self.ranks, held_buffers(trained.model)))
        for shadow in trained.shadows:
            shadow.update(spread(self.ranks, shadow))


def average_gradients(ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
    """Average `.grad` over the ranks in one reduction; one that no rank has stays None.

    Each rank's gradients are scaled so that their mean is the batch's: a rank without one counts
    as zero.
    """
    by_type: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for dtype, group in by_type.items():
        flat = Flat.of(group)
        values = flat.bytes_of([p.grad for p in group]).view(dtype)
        given = torch.tensor([float(p.grad is not None) for p in group], dtype=dtype)
        total = ranks.summed(torch.cat([values, given.to(values.device)]))
        # Weighted by their samples already, as a mean over ranks would have them.
        mean = total[: len(values)] / ranks.size
        for parameter, gradient, there in zip(
            group, flat.tensors_in(mean.view(torch.uint8)), total[len(values) :], strict=True
        ):
            parameter.grad = gradient if there > 0 else None


def _replica(trained: Trained, passing: Passing) -> DistributedDataParallel:
    model, own = trained.model, {id(parameter) for parameter in trained.host}
    ignored = [name for name, p in model.named_parameters() if id(p) not in own]
    ignored += passing.reshaped
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    try:
        # Ranks are alike already: nothing has to be sent first. Gradients stay where they were
        # averaged, which saves a copy of all of them each step; a step drops them afterwards.
        return DistributedDataParallel(
            model,
            find_unused_parameters=passing.unused,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
    finally:
        del model._ddp_params_and_buffers_to_ignore


def dismiss(replica: DistributedDataParallel) -> None:
    """Take DDP's hooks off the parameters: they go with its reducer, which its logger holds too."""
    for name in ("logger", "reducer"):
        replica.__dict__.pop(name, None)
