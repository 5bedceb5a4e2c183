"""The training engine: one epoch, one evaluation, one measurement, one snapshot.

It knows the model, its optimisers and what is learning; it decides nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.core.compilation import uncompiled
from esper.core.model_wrapper import MorphableModel
from esper.errors import Interrupted, WorkFailed
from esper.execution.isolation import (
    RandomState,
    borrowed_buffers,
    evaluating,
    preserved_buffers,
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
    gathered,
    measured_subset,
)
from esper.services.tolaria.distribution import Alone, Ranks
from esper.services.tolaria.flat import module_digest
from esper.services.tolaria.flops import FlopMeter
from esper.services.tolaria.learning import Learning, Site
from esper.services.tolaria.model_state import (
    empty_buffers,
    is_shared_out,
    model_tensors,
    restore_model,
    whole,
)
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.parallel import Shard, Trained
from esper.services.tolaria.randomness import stable_seed
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.telemetry import Telemetry, health_signals
from esper.services.tolaria.ways import parallel_for

if TYPE_CHECKING:
    from esper.services.tolaria.sharding import FullySharded

EVALUATION_BATCH = 512
ACTIVE = (SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING)


@dataclass(frozen=True, kw_only=True)
class Quality:
    """A model on a dataset: the mean loss and the mean metric."""

    loss: float
    metric: float


class Engine:
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
        self.config = config
        self.ranks = ranks or Alone()
        self.parallel = parallel_for(config.training, self.ranks, len(datasets.train))
        self.model = self.parallel.place(model)
        self.datasets = datasets
        self.objective = objective
        self.book = book
        self.meter = FlopMeter(lambda: uncompiled(self.model))
        self.learning_rate_scale = 1.0
        self.telemetry = Telemetry(model, config.growth.controller.probe_interval_steps)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._excluded: Site | None = None
        self._subset = measured_subset(len(datasets.validation), config.training.seed)
        self.learning = Learning(config.training.optimizer, model)
        self._shadow_buffers: dict[Site, dict[str, Tensor]] = {}

    # -- seeds ------------------------------------------------------------------------------

    @property
    def host_optimizer(self) -> torch.optim.Optimizer:
        """Steps the host, fossilised seeds included."""
        return self.learning.host

    @property
    def seed_optimizers(self) -> dict[Site, torch.optim.Optimizer]:
        """By site, what steps the seeds in training and grafting."""
        return self.learning.seeds

    def start_learning(self, site: Site) -> None:
        """Give a seed its own optimiser."""
        self.learning.start(site)

    def stop_learning(self, site: Site) -> None:
        """Forget a seed's optimiser and its statistics."""
        self.learning.stop(site)
        self._shadow_buffers.pop(site, None)

    def adopt(self, site: Site) -> None:
        """Make a fossilised seed's parameters the host optimiser's."""
        self.learning.adopt(site)
        self._share_out_fossils()

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
                        with self.meter.counting("train", structure, _shape(inputs), trial=trial):
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
            shadows=[self._shadow_buffers.setdefault(record.site, {}) for record in learning],
        )

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
        key = ("shadow", self.structure_key(), record.site, record.kernel, _shape(inputs))
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
                buffers=self._shadow_buffers.setdefault(record.site, {}),
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
                        inputs, _ = self._moved(gathered(dataset, pieces[-1]))
                        with self.telemetry.sampling(looked_at):
                            self._forward(inputs)
                    found.append((0.0, 0.0))
                    continue
                inputs, targets = self._moved(gathered(dataset, pieces[number]))
                shape = _shape(inputs)
                with (
                    self.meter.counting(key, structure, shape, trial=trial, monitoring=not trial),
                    self.telemetry.sampling(looked_at),
                ):
                    outputs = self._forward(inputs)
                loss = float(self.objective.loss(wide(outputs), targets)) * len(targets)
                found.append((loss, self.objective.metric_sum(outputs, targets)))
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
                    inputs, target = self._moved(gathered(self.datasets.validation, indices))
                    output = self._measured_outputs(inputs, trying)
                outputs.append(self.ranks.relayed(output, turn))
                targets.append(self.ranks.relayed(target, turn))
            output, target = torch.cat(outputs), torch.cat(targets)
            half = len(target) // 2
            nats = self.objective.nats(output, target, slice(0, half), slice(half, None))
        # The gates must see the same numbers everywhere, to the last bit.
        return [float(value) for value in self.ranks.told(nats.tolist())]

    def _measured_outputs(self, inputs: Any, trying: Site | None) -> Tensor:
        kernel = self.book.records[trying].kernel if trying else ""
        key = ("measure", self.structure_key(), trying, kernel, _shape(inputs))
        with self.metered_once(*key):
            if trying is None:
                return self._forward(inputs)
            own = dict(self._shadow_buffers.get(trying, {}))
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
            key = ("sampling", self.structure_key(), _shape(inputs))
            with (
                self._untouched(),
                torch.no_grad(),
                self.telemetry.sampling(),
                self.metered_once(*key),
            ):
                self._forward(inputs)
        seeds = tuple((record.site, record.kernel) for record in self.book.in_state(*ACTIVE))
        with self.metered_once("probe", self.structure_key(), seeds):
            self.telemetry.read(epoch)

    # -- ranks ------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count what the other ranks have worked, too."""
        self.meter.settle(self.ranks)

    def prove_equal(self) -> None:
        """Return if every rank has the same model.

        Raises:
            WorkFailed: one has another; the ranks' digests are in the log.
        """
        if self.ranks.size == 1 or self.parallel.joint:
            return
        digests = self.ranks.exchanged(module_digest(self.model)[:16])
        if len(set(digests)) > 1:
            raise WorkFailed(
                f"the ranks' models: got digests {', '.join(digests)}; allowed: equal ones; "
                "a layer or a dataset that draws or counts outside of torch, numpy and random "
                "may be the cause"
            )

    # -- snapshots --------------------------------------------------------------------------

    def capture(self, epoch: int, state: dict[str, Any]) -> Snapshot:
        """Everything that a continuation needs; `state` is the trainer's own part."""
        tensors = {f"model/{name}": tensor for name, tensor in model_tensors(self.model).items()}
        tensors |= self.learning.tensors()
        for (layer, slot), buffers in self._shadow_buffers.items():
            for name, tensor in buffers.items():
                tensors[f"shadow/{slot}/{layer}//{name}"] = tensor
        return Snapshot(
            epoch=epoch,
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            structure=self.model.morphology.structure(),
            state=state
            | self.learning.to_state()
            | {
                "emptyBuffers": empty_buffers(self.model),
                "learningRateScale": self.learning_rate_scale,
                "flops": self.meter.total,
                "flopsTrials": self.meter.trials,
                "flopsMonitoring": self.meter.monitoring,
                "flopsKnown": dict(self.meter.known),
                "telemetry": self.telemetry.to_state(),
            },
            randomness=RandomState.capture(),
        )

    def restore(self, snapshot: Snapshot, *, keep_flops: bool = False) -> None:
        """Continue from `snapshot`; the model must already have its structure.

        `keep_flops` leaves the meter alone: work undone was work all the same.
        """
        restore_model(
            self.model, _model_part(snapshot), snapshot.state["emptyBuffers"], self.device
        )
        self.telemetry.restore(snapshot.state["telemetry"])
        self.learning.restore(snapshot.state, snapshot.tensors)
        self._shadow_buffers = {}
        for key, tensor in snapshot.tensors.items():
            if key.startswith("shadow/"):
                slot, rest = key.removeprefix("shadow/").split("/", 1)
                layer, name = rest.split("//")
                site = (layer, int(slot))
                self._shadow_buffers.setdefault(site, {})[name] = tensor.clone()
        self.learning_rate_scale = snapshot.state["learningRateScale"]
        if not keep_flops:
            state = snapshot.state
            self.meter.restart(
                state["flops"], state["flopsTrials"], state["flopsMonitoring"], state["flopsKnown"]
            )
        self.model.zero_grad(set_to_none=True)
        snapshot.randomness.apply()
        self._share_out_fossils()

    def whole(self, snapshot: Snapshot) -> Snapshot:
        """`snapshot` as any number of ranks can go on from; all ranks must ask for it together."""
        return whole(snapshot) if self.parallel.joint else snapshot

    def whole_model(self) -> MorphableModel:
        """The model with all its weights, to be exported; all ranks must ask for it together."""
        if not self.parallel.joint:
            return self.model
        snapshot = whole(self.capture(0, {}))
        model = cast("FullySharded", self.parallel).whole_model(snapshot.structure)
        restore_model(model, _model_part(snapshot), snapshot.state["emptyBuffers"], self.device)
        return model

    def _share_out_fossils(self) -> None:
        """Share out what has become part of the model, where the rest of it is shared out."""
        host = self.learning.host_parameters()
        if not self.parallel.joint or all(map(is_shared_out, host)):
            return
        snapshot = whole(self.capture(0, {}))
        self.model = cast("FullySharded", self.parallel).placed_anew(snapshot.structure)
        self.telemetry.attend(self.model)
        self.learning = Learning(self.config.training.optimizer, self.model)
        restore_model(
            self.model, _model_part(snapshot), snapshot.state["emptyBuffers"], self.device
        )
        self.learning.restore(snapshot.state, snapshot.tensors)

    # -- parts ------------------------------------------------------------------------------

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
        if self.device.type == "cpu":
            return batch
        return moved(batch[0], self.device), batch[1].to(self.device)


def _model_part(snapshot: Snapshot) -> dict[str, Tensor]:
    return {
        name.removeprefix("model/"): tensor
        for name, tensor in snapshot.tensors.items()
        if name.startswith("model/")
    }


def forwarded(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output: a tuple or list of inputs is spread, a dict gives keyword arguments."""
    if isinstance(inputs, dict):
        output: Tensor = model(**inputs)
    elif isinstance(inputs, (tuple, list)):
        output = model(*inputs)
    else:
        output = model(inputs)
    return output


def wide(outputs: Tensor) -> Tensor:
    """`outputs` as the loss is computed on them: in single precision at least."""
    return outputs if outputs.dtype is torch.float64 else outputs.float()


def moved(inputs: Any, device: torch.device) -> Any:
    """`inputs`, a tensor or a tuple, list or dict of tensors, on `device`."""
    if isinstance(inputs, dict):
        return {key: value.to(device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(value.to(device) for value in inputs)
    return inputs.to(device)


def layer_kind(layer: KasminaLayer) -> str:
    """The host's own layer type, e.g. "Linear"."""
    return layer.host_class.__name__


def lifecycle(state: str) -> SeedLifecycleState:
    """The integer twin of a seed state."""
    return SeedLifecycleState[state.upper()]


def _shape(inputs: Any) -> object:
    if isinstance(inputs, dict):
        return tuple((key, tuple(value.shape)) for key, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return tuple(tuple(value.shape) for value in inputs)
    return tuple(inputs.shape)
