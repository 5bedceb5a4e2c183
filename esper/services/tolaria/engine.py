"""The training engine: one epoch, one evaluation, one measurement.

It knows the model, its optimisers and what is learning; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.core.compilation import uncompiled
from esper.core.model_wrapper import MorphableModel
from esper.errors import Interrupted
from esper.execution.isolation import (
    borrowed_buffers,
    evaluating,
    preserved_buffers,
    preserved_parameters,
    preserved_randomness,
)
from esper.execution.kasmina_layer import KasminaLayer
from esper.execution.state_layout import SeedLifecycleState
from esper.execution.trials import shadow_gradients
from esper.services.tolaria import optimization
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import (
    Batch,
    Datasets,
    epoch_order,
    forwarded,
    gathered,
    measured_subset,
    moved_batch,
    shape_of,
    wide,
)
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.learning import Site
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.parallel import Passing, Shard, Trained
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.services.tolaria.shard_buffers import Buffers, held_buffers
from esper.services.tolaria.telemetry import health_signals
from esper.services.tolaria.training_state import TrainingState
from esper.services.tolaria.ways import refuse_unlike

EVALUATION_BATCH = 512
ACTIVE = (SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A model on a dataset: the mean loss and the mean metric."""

    loss: float
    metric: float


class Engine(TrainingState):
    """Trains a wrapped model and the seeds in it, and measures both."""

    def __init__(
        self,
        config: TolariaConfig,
        model: MorphableModel,
        datasets: Datasets,
        objective: Objective,
        book: SeedBook,
        ranks: Ranks | None = None,
    ) -> None:
        """`ranks` are the session's processes, this one alone by default.

        Before a batch they agree whether to stop; Interrupted is raised there.

        Raises:
            BadInput: batches or data can't be cut into as many shards as the session asks for.
        """
        ranks = ranks or Alone()
        if ranks.size > 1:
            refuse_unlike(ranks, model, datasets)
        super().__init__(config, model, ranks, len(datasets.train))
        self.datasets = datasets
        self.objective = objective
        self.book = book
        self._excluded: Site | None = None
        self._subset = measured_subset(len(datasets.validation), config.training.seed)
        self.parallel.learn_of(self._passing)

    # -- training ---------------------------------------------------------------------------

    @contextmanager
    def without(self, site: Site) -> Iterator[None]:
        """Inside, a grafting seed neither contributes nor learns."""
        self._excluded = site
        try:
            with self.model.morphology.without(*site):
                yield
        finally:
            self._excluded = None

    def train_epoch(self, epoch: int, *, trial: bool = False) -> float:
        """Train one epoch (1-based); returns the mean training loss per sample.

        `trial` books the FLOPs as spent on evidence.

        Raises:
            Interrupted: the run was asked to stop; the epoch is incomplete.
        """
        training = self.config.training
        rate = training.optimizer.learning_rate * self.learning_rate_scale
        rate *= optimization.learning_rate_share(training.schedule, epoch, training.epochs)
        self.learning.set_rate(rate)
        self.model.train()
        learning = self.book.learning()
        grafting = [
            site
            for site in self.seed_optimizers
            if self.book.records[site].alpha > 0 and site != self._excluded
        ]
        structure, parallel = self.structure_key(), self.parallel
        totals: dict[int, Tensor] = {}
        every, seen = training.optimizer.accumulation_steps, 0
        dataset = self.datasets.train
        pieces = epoch_order(
            len(dataset), training.batch_size, training.seed, epoch, shards=parallel.count
        )
        with parallel.epoch(epoch, self._trained(learning)):
            for number, indices in enumerate(pieces, start=1):
                if self.ranks.agree_to_stop():
                    raise Interrupted("stopped between two batches")
                final = number % every == 0 or number == len(pieces)
                for shard in parallel.shards(indices):
                    with parallel.computing(shard, number, final=final):
                        inputs, targets = self._moved(gathered(dataset, shard.indices))
                        for record in learning:
                            self._shadow_batch(record, inputs, targets, epoch, number, shard)
                        with self.meter.counting("train", structure, shape_of(inputs), trial=trial):
                            loss = self._loss(inputs, targets, parallel.module)
                            self._share_of(loss, shard).backward()
                    total = loss.detach().double() * len(targets)
                    totals[shard.number] = totals.get(shard.number, 0) + total
                seen += len(indices)
                parallel.finish_batch(final=final)
                if final:
                    self.telemetry.count_step(last=number == len(pieces))
                    self._step(grafting, [record.site for record in learning])
        return parallel.summed_losses(torch.stack(list(totals.values()))) / seen

    def _trained(self, learning: Sequence[SeedRecord]) -> Trained:
        return Trained(
            model=self.model,
            host=self.learning.host_parameters(),
            seeds=self.learning.seed_parameters(),
            shadows=[self.shadow_buffers.setdefault(record.site, {}) for record in learning],
            trials=[
                *self._contributing(),
                *(r.site for r in learning if self.model.morphology.seed_parameters(*r.site)),
            ],
        )

    def _contributing(self) -> list[Site]:
        """The seeds on trial that take part in the forward pass."""
        grafting = self.book.in_state(SeedState.GRAFTING)
        return [r.site for r in grafting if r.alpha > 0 and r.site != self._excluded]

    def _share_of(self, value: Tensor, shard: Shard) -> Tensor:
        """What the mean over a shard counts in the step that it is for."""
        scale, every = self.parallel.scale(shard), self.config.training.optimizer.accumulation_steps
        if scale != 1.0:
            value = value * scale
        return value / every if every > 1 else value

    def _step(self, grafting: Sequence[Site], learning: Sequence[Site]) -> None:
        limit = self.config.training.optimizer.max_gradient_norm
        host = [p for group in self.host_optimizer.param_groups for p in group["params"]]
        optimization.step(self.host_optimizer, host, limit)
        for site in (*grafting, *learning):
            optimizer = self.seed_optimizers.get(site)
            if optimizer is not None:
                own = [p for group in optimizer.param_groups for p in group["params"]]
                optimization.step(optimizer, own, limit)

    def _shadow_batch(
        self,
        record: SeedRecord,
        inputs: Any,
        targets: Tensor,
        epoch: int,
        number: int,
        shard: Shard,
    ) -> None:
        """Add one shard's shadow gradients to a learning seed."""
        morphology = self.model.morphology
        parameters = morphology.seed_parameters(*record.site)
        if not parameters:
            return
        key = ("shadow", self.structure_key(), record.site, record.kernel, shape_of(inputs))
        place = (number,) if self.parallel.count == 1 else (number, shard.number)
        draw = stable_seed(
            self.config.training.seed, record.layer, record.slot, record.cycle, epoch, *place
        )
        with (
            uncompiled(self.model),
            morphology.trialling(*record.site),
            self.meter.counting(*key, trial=True),
        ):
            _, gradients = shadow_gradients(
                self.model,
                parameters,
                lambda: self._loss(inputs, targets),
                random_seed=draw,
                buffers=self.shadow_buffers.setdefault(record.site, {}),
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if gradient is None:
                continue
            share = self._share_of(gradient, shard)
            parameter.grad = share if parameter.grad is None else parameter.grad + share

    # -- measuring --------------------------------------------------------------------------

    def evaluate(self, dataset: Any, *, key: str, trial: bool = False) -> Quality:
        """Mean loss and metric of the model, in eval mode; a "validation" leaves samples."""
        structure = self.structure_key()
        # Hooks inside compiled blocks would compile them anew.
        asked = key == "validation" and self.telemetry.due and not self.config.training.compile
        pieces = torch.arange(len(dataset)).split(EVALUATION_BATCH)
        found: list[tuple[float, float]] = []
        with evaluating(self.model), torch.no_grad():
            for number in self._own_turns(len(pieces)):
                looked_at = asked and number == self.ranks.rank
                if number >= len(pieces):
                    if self.parallel.joint:
                        with (
                            self.parallel.looking(self.model, number),
                            self.telemetry.sampling(looked_at),
                        ):
                            self._forward(self._moved(gathered(dataset, pieces[-1]))[0])
                    found.append((0.0, 0.0))
                    continue
                with self.parallel.looking(self.model, number):
                    inputs, targets = self._moved(gathered(dataset, pieces[number]))
                    work = (key, structure, shape_of(inputs))
                    with (
                        self.meter.counting(*work, trial=trial, monitoring=not trial),
                        self.telemetry.sampling(looked_at),
                    ):
                        outputs = self._forward(inputs)
                loss = float(self.objective.loss(wide(outputs), targets)) * len(targets)
                found.append((loss, self.objective.metric_sum(outputs, targets)))
        own = range(self.ranks.rank, len(pieces), self.ranks.size)
        self.parallel.count_faults(self.model, self._contributing(), own)
        turns = self.ranks.gathered(torch.tensor(found, dtype=torch.float64))
        loss = metric = 0.0
        for one_loss, one_metric in turns.transpose(0, 1).flatten(0, 1).tolist():
            loss += one_loss
            metric += one_metric
        return Quality(loss=loss / len(dataset), metric=metric / len(dataset))

    def _own_turns(self, turns: int) -> range:
        """The turns that this rank takes, as many on every rank: the last may be beyond the end."""
        size = self.ranks.size
        return range(self.ranks.rank, -(-turns // size) * size, size)

    def sample_nats(self, *, trying: Site | None = None) -> list[float]:
        """Per-sample loss in nats on the scored half of the fixed validation samples.

        `trying` adds that seed at full strength; its samples pair with those of the call without.
        """
        outputs, targets = [], []
        pieces = self._subset.split(EVALUATION_BATCH)
        with self._untouched(), torch.no_grad():
            for number, indices in enumerate(pieces):
                turn = number % self.ranks.size
                output = target = None
                if turn == self.ranks.rank or self.parallel.joint:
                    with self.parallel.looking(self.model, number):
                        inputs, target = self._moved(gathered(self.datasets.validation, indices))
                        output = self._measured_outputs(inputs, trying)
                outputs.append(self.ranks.relayed(output, turn))
                targets.append(self.ranks.relayed(target, turn))
            output, target = torch.cat(outputs), torch.cat(targets)
            half = len(target) // 2
            nats = self.objective.nats(output, target, slice(0, half), slice(half, None))
        own = range(self.ranks.rank, len(pieces), self.ranks.size)
        sites = [*self._contributing(), *([trying] if trying else [])]
        self.parallel.count_faults(self.model, sites, own)
        # The gates must see the same numbers everywhere, to the last bit.
        return [float(value) for value in self.ranks.told(nats.tolist())]

    def _measured_outputs(self, inputs: Any, trying: Site | None) -> Tensor:
        kernel = self.book.records[trying].kernel if trying else ""
        key = ("measure", self.structure_key(), trying, kernel, shape_of(inputs))
        with self.metered_once(*key):
            if trying is None:
                return self._forward(inputs)
            own = dict(self.shadow_buffers.get(trying, {}))
            with borrowed_buffers(self.model, own), self.model.morphology.trialling(*trying):
                return self._forward(inputs)

    def probe(self, epoch: int) -> tuple[HealthSignal, ...]:
        """Health signals of every host layer, from a validation and the gradients before it.

        Where no probe is due they are the last ones again, of their epoch; see `Telemetry`.
        """
        if self.telemetry.due:
            if self.ranks.rank == 0 or self.parallel.joint:
                self._read(epoch)
            self.telemetry.share(self.ranks)
        return health_signals(self.config.session, self.telemetry.epoch, self.telemetry.reading)

    def _read(self, epoch: int) -> None:
        if not self.telemetry.sampled:
            indices = torch.arange(min(EVALUATION_BATCH, len(self.datasets.validation)))
            inputs, _ = self._moved(gathered(self.datasets.validation, indices))
            key = ("sampling", self.structure_key(), shape_of(inputs))
            with (
                self._untouched(),
                torch.no_grad(),
                self.telemetry.sampling(),
                self.metered_once(*key),
            ):
                self._forward(inputs)
        seeds = tuple((record.site, record.kernel) for record in self.book.in_state(*ACTIVE))
        with (
            self.metered_once("probe", self.structure_key(), seeds),
            self.parallel.weights_at_hand(self.model),
        ):
            self.telemetry.read(epoch)

    # -- parts ------------------------------------------------------------------------------

    def _passing(self) -> Passing:
        """What passes over a piece of the first batch do; every rank sees the same piece."""
        training = self.config.training
        order = epoch_order(len(self.datasets.train), training.batch_size, training.seed, 1)
        indices = order[0].tensor_split(self.parallel.count)[0]
        parameters = [p for p in self.learning.host_parameters() if p.requires_grad]
        before = {name: buffer.shape for name, buffer in held_buffers(self.model).items()}
        became: Buffers = {}
        self.model.train()
        with uncompiled(self.model), preserved_parameters(self.model):
            _, gradients = shadow_gradients(
                self.model,
                parameters,
                lambda: self.loss_of(indices),
                random_seed=training.seed,
                buffers=became,
            )
        return Passing(
            unused=any(gradient is None for gradient in gradients),
            reshaped=[name for name, one in became.items() if one.shape != before.get(name)],
        )

    def metered_once(self, *key: Hashable) -> AbstractContextManager[None]:
        """Counts a trial's work; where every rank does the same, it counts on rank 0."""
        if self.parallel.joint and self.ranks.rank:
            return nullcontext()
        return self.meter.counting(*key, trial=True)

    def structure_key(self) -> tuple[tuple[str, int, str], ...]:
        """The seeds that take part in the forward pass: what its FLOPs depend on."""
        return tuple(
            (record.layer, record.slot, record.kernel)
            for record in self.book.records.values()
            if record.alpha > 0 and record.site != self._excluded
        )

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        """Eval mode; buffers and random streams are put back: an extra look leaves no trace.

        Measurements run eager: arms are compared to the last bit, and hooks are seen.
        """
        with (
            uncompiled(self.model),
            evaluating(self.model),
            preserved_buffers(self.model),
            preserved_randomness(),
        ):
            yield

    def _forward(self, inputs: Any, module: nn.Module | None = None) -> Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return forwarded(module or self.model, inputs)

    def loss_of(self, indices: Tensor) -> Tensor:
        """The model's mean loss, 0-d, on the training samples at `indices` [B]."""
        return self._loss(*self._moved(gathered(self.datasets.train, indices)))

    def _loss(self, inputs: Any, targets: Tensor, module: nn.Module | None = None) -> Tensor:
        return self.objective.loss(wide(self._forward(inputs, module)), targets)

    def _moved(self, batch: Batch) -> Batch:
        return batch if self.device.type == "cpu" else moved_batch(batch, self.device)


def layer_kind(layer: KasminaLayer) -> str:
    """The host's own layer type, e.g. "Linear"."""
    return layer.host_class.__name__


def lifecycle(state: str) -> SeedLifecycleState:
    """The integer twin of a seed state."""
    return SeedLifecycleState[state.upper()]
