"""The training engine: one epoch, one evaluation, one measurement, one snapshot.

It knows the model, its optimisers and what is learning; it decides nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from esper.contracts.enums import SeedState
from esper.contracts.operational import HealthSignal
from esper.core.compilation import uncompiled
from esper.core.model_wrapper import MorphableModel
from esper.errors import Interrupted
from esper.execution.isolation import (
    RandomState,
    borrowed_buffers,
    evaluating,
    preserved_buffers,
    preserved_randomness,
    writable,
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
    ordered_batches,
)
from esper.services.tolaria.flops import FlopMeter
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.telemetry import Telemetry, health_signals

Site = tuple[str, int]
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
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """`stopping` is asked before every batch; True raises Interrupted there."""
        self.config = config
        self.model = model
        self.datasets = datasets
        self.objective = objective
        self.book = book
        self.meter = FlopMeter(partial(uncompiled, model))
        self.learning_rate_scale = 1.0
        self.telemetry = Telemetry(model, config.growth.controller.probe_interval_steps)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._stopping = stopping
        self._excluded: Site | None = None
        self._subset = measured_subset(len(datasets.validation), config.training.seed)
        self._host_groups: list[list[str]] = [[name for name, _ in model.named_parameters()]]
        self.host_optimizer = self._make_optimizer(self._parameters_named(self._host_groups[0]))
        self.seed_optimizers: dict[Site, torch.optim.Optimizer] = {}
        self._shadow_buffers: dict[Site, dict[str, Tensor]] = {}

    # -- seeds ------------------------------------------------------------------------------

    def start_learning(self, site: Site) -> None:
        """Give a seed its own optimiser."""
        parameters = self.model.morphology.seed_parameters(*site)
        if parameters:
            self.seed_optimizers[site] = self._make_optimizer(parameters)

    def stop_learning(self, site: Site) -> None:
        """Forget a seed's optimiser."""
        self.seed_optimizers.pop(site, None)
        self._shadow_buffers.pop(site, None)

    def adopt(self, site: Site) -> None:
        """Move a fossilised seed's parameters and moments into the host's optimiser."""
        optimizer = self.seed_optimizers.pop(site, None)
        if optimizer is not None:
            optimization.adopt(self.host_optimizer, optimizer)
            wanted = {id(p) for p in self.model.morphology.seed_parameters(*site)}
            self._host_groups.append(
                [name for name, p in self.model.named_parameters() if id(p) in wanted]
            )

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
        optimization.set_learning_rate(self.host_optimizer, rate)
        for optimizer in self.seed_optimizers.values():
            optimization.set_learning_rate(optimizer, rate * optimization.SEED_RATE)
        self.model.train()
        learning = self.book.learning()
        grafting = [
            site
            for site in self.seed_optimizers
            if self.book.records[site].alpha > 0 and site != self._excluded
        ]
        structure = self.structure_key()
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        every, seen = training.optimizer.accumulation_steps, 0
        dataset = self.datasets.train
        pieces = epoch_order(len(dataset), training.batch_size, training.seed, epoch)
        for number, indices in enumerate(pieces, start=1):
            if self._stopping():
                raise Interrupted("stopped between two batches")
            inputs, targets = self._moved(gathered(dataset, indices))
            for record in learning:
                self._shadow_batch(record, inputs, targets, epoch, number, every)
            with self.meter.counting("train", structure, _shape(inputs), trial=trial):
                loss = self._loss(inputs, targets)
                (loss / every if every > 1 else loss).backward()
            total += loss.detach().double() * len(targets)
            seen += len(targets)
            if number % every == 0 or number == len(pieces):
                self.telemetry.count_step(last=number == len(pieces))
                self._step(grafting, [record.site for record in learning])
        return float(total) / seen

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
        self, record: SeedRecord, inputs: Any, targets: Tensor, epoch: int, number: int, every: int
    ) -> None:
        """Add one batch's shadow gradients to a learning seed."""
        morphology = self.model.morphology
        parameters = morphology.seed_parameters(*record.site)
        if not parameters:
            return
        key = ("shadow", self.structure_key(), record.site, record.kernel, _shape(inputs))
        draw = stable_seed(
            self.config.training.seed, record.layer, record.slot, record.cycle, epoch, number
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
            share = gradient / every if every > 1 else gradient
            parameter.grad = share if parameter.grad is None else parameter.grad + share

    # -- measuring --------------------------------------------------------------------------

    def evaluate(self, dataset: Any, *, key: str, trial: bool = False) -> Quality:
        """Mean loss and metric of the model, in eval mode; a "validation" leaves samples."""
        loss = metric = 0.0
        count = 0
        structure = self.structure_key()
        # Hooks inside compiled blocks would compile them anew.
        asked = key == "validation" and self.telemetry.due and not self.config.training.compile
        with evaluating(self.model), torch.no_grad():
            for batch in ordered_batches(dataset, EVALUATION_BATCH):
                inputs, targets = self._moved(batch)
                shape = _shape(inputs)
                with (
                    self.meter.counting(key, structure, shape, trial=trial, monitoring=not trial),
                    self.telemetry.sampling(asked and not count),
                ):
                    outputs = self._forward(inputs)
                loss += float(self.objective.loss(outputs.float(), targets)) * len(targets)
                metric += self.objective.metric_sum(outputs, targets)
                count += len(targets)
        return Quality(loss=loss / count, metric=metric / count)

    def sample_nats(self, *, trying: Site | None = None) -> list[float]:
        """Per-sample loss in nats on the scored half of the fixed validation samples.

        `trying` adds that seed at full strength; its samples pair with those of the call without.
        """
        structure = self.structure_key()
        kernel = self.book.records[trying].kernel if trying else ""
        outputs, targets = [], []
        with self._untouched(), torch.no_grad():
            for indices in self._subset.split(EVALUATION_BATCH):
                inputs, target = self._moved(gathered(self.datasets.validation, indices))
                key = ("measure", structure, trying, kernel, _shape(inputs))
                with self.meter.counting(*key, trial=True):
                    if trying is None:
                        outputs.append(self._forward(inputs))
                    else:
                        own = dict(self._shadow_buffers.get(trying, {}))
                        with (
                            borrowed_buffers(self.model, own),
                            self.model.morphology.trialling(*trying),
                        ):
                            outputs.append(self._forward(inputs))
                targets.append(target)
            output, target = torch.cat(outputs), torch.cat(targets)
            half = len(target) // 2
            nats = self.objective.nats(output, target, slice(0, half), slice(half, None))
        return [float(value) for value in nats.tolist()]

    def probe(self, epoch: int) -> tuple[HealthSignal, ...]:
        """Health signals of every host layer, from a validation and the gradients before it.

        Where no probe is due they are the last ones again, of their epoch; see `Telemetry`.
        """
        if self.telemetry.due:
            self._read(epoch)
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
                self.meter.counting(*key, trial=True),
            ):
                self._forward(inputs)
        seeds = tuple((record.site, record.kernel) for record in self.book.in_state(*ACTIVE))
        with self.meter.counting("probe", self.structure_key(), seeds, trial=True):
            self.telemetry.read(epoch)

    # -- snapshots --------------------------------------------------------------------------

    def capture(self, epoch: int, state: dict[str, Any]) -> Snapshot:
        """Everything that a continuation needs; `state` is the trainer's own part."""
        tensors = {f"model/{name}": tensor for name, tensor in self._model_tensors().items()}
        names = self._names()
        for name, tensor in optimization.optimizer_tensors(self.host_optimizer, names).items():
            tensors[f"host/{name}"] = tensor
        for optimizer in self.seed_optimizers.values():
            for name, tensor in optimization.optimizer_tensors(optimizer, names).items():
                tensors[f"seeds/{name}"] = tensor
        for (layer, slot), buffers in self._shadow_buffers.items():
            for name, tensor in buffers.items():
                tensors[f"shadow/{slot}/{layer}//{name}"] = tensor
        return Snapshot(
            epoch=epoch,
            tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
            structure=self.model.morphology.structure(),
            state=state
            | {
                "hostGroups": [list(group) for group in self._host_groups],
                "seedOptimizers": [list(site) for site in self.seed_optimizers],
                "emptyBuffers": [name for name, one in _buffers(self.model).items() if one is None],
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
        self._restore_model(snapshot)
        self.telemetry.restore(snapshot.state["telemetry"])
        self._host_groups = [list(group) for group in snapshot.state["hostGroups"]]
        self.host_optimizer = self._make_optimizer(self._parameters_named(self._host_groups[0]))
        for group in self._host_groups[1:]:
            self.host_optimizer.add_param_group({"params": self._parameters_named(group)})
        names = self._names()
        self._load(self.host_optimizer, "host/", snapshot, names)
        self.seed_optimizers = {}
        for layer, slot in snapshot.state["seedOptimizers"]:
            self.start_learning((layer, slot))
            self._load(self.seed_optimizers[layer, slot], "seeds/", snapshot, names)
        self._shadow_buffers = {}
        for key, tensor in snapshot.tensors.items():
            if key.startswith("shadow/"):
                slot, rest = key.removeprefix("shadow/").split("/", 1)
                layer, name = rest.split("//")
                site = (layer, int(slot))
                self._shadow_buffers.setdefault(site, {})[name] = tensor.clone()
        self.learning_rate_scale = snapshot.state["learningRateScale"]
        if not keep_flops:
            self.meter.total = snapshot.state["flops"]
            self.meter.trials = snapshot.state["flopsTrials"]
            self.meter.monitoring = snapshot.state["flopsMonitoring"]
            self.meter.known = dict(snapshot.state["flopsKnown"])
        self.model.zero_grad(set_to_none=True)
        snapshot.randomness.apply()

    # -- parts ------------------------------------------------------------------------------

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

    @torch.no_grad()
    def _restore_model(self, snapshot: Snapshot) -> None:
        """Parameters and buffers; a forward may have made, replaced or resized a buffer."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(snapshot.tensors[f"model/{name}"])
        found = _buffers(self.model)
        saved = {
            name.removeprefix("model/"): tensor
            for name, tensor in snapshot.tensors.items()
            if name.startswith("model/")
        }
        buffers = {name for name, _ in self.model.named_buffers()}
        parameters = {name for name, _ in self.model.named_parameters()}
        for name in (buffers | set(saved)) - parameters:
            path, _, key = name.rpartition(".")
            table, buffer, value = self.model.get_submodule(path)._buffers, found.get(name), None
            if name in saved:
                value = saved[name]
                if buffer is not None and buffer.shape == value.shape and writable(buffer):
                    buffer.copy_(value)
                else:
                    table[key] = value.to(self.device, copy=True)
            elif name in snapshot.state["emptyBuffers"]:
                table[key] = None
            else:
                del table[key]

    def _load(
        self,
        optimizer: torch.optim.Optimizer,
        prefix: str,
        snapshot: Snapshot,
        names: dict[int, str],
    ) -> None:
        own = {
            name.removeprefix(prefix): tensor
            for name, tensor in snapshot.tensors.items()
            if name.startswith(prefix)
        }
        optimization.load_optimizer_tensors(optimizer, own, names)

    def _forward(self, inputs: Any) -> Tensor:
        bfloat16 = self.config.training.precision == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bfloat16):
            return forwarded(self.model, inputs)

    def loss_of(self, indices: Tensor) -> Tensor:
        """The model's mean loss, 0-d, on the training samples at `indices` [B]."""
        return self._loss(*self._moved(gathered(self.datasets.train, indices)))

    def _loss(self, inputs: Any, targets: Tensor) -> Tensor:
        return self.objective.loss(self._forward(inputs).float(), targets)

    def _moved(self, batch: Batch) -> Batch:
        if self.device.type == "cpu":
            return batch
        return moved(batch[0], self.device), batch[1].to(self.device)

    def _make_optimizer(self, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
        config = self.config.training.optimizer
        return optimization.make_optimizer(config, parameters, config.learning_rate)

    def _parameters_named(self, names: Sequence[str]) -> list[nn.Parameter]:
        by_name = dict(self.model.named_parameters())
        return [by_name[name] for name in names]

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.model.named_parameters()}

    def _model_tensors(self) -> dict[str, Tensor]:
        return dict(self.model.named_parameters()) | dict(self.model.named_buffers())


def _buffers(model: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name, with the places that hold none yet."""
    return {
        f"{path}.{key}" if path else key: buffer
        for path, module in model.named_modules()
        for key, buffer in module._buffers.items()
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


def stable_seed(*parts: object) -> int:
    """A seed in [0, 2**63) that depends on `parts` alone, the same in every process."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def lifecycle(state: str) -> SeedLifecycleState:
    """The integer twin of a seed state."""
    return SeedLifecycleState[state.upper()]


def _shape(inputs: Any) -> object:
    if isinstance(inputs, dict):
        return tuple((key, tuple(value.shape)) for key, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return tuple(tuple(value.shape) for value in inputs)
    return tuple(inputs.shape)
