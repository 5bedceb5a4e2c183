"""What a training run consists of between two batches, and its snapshots.

A snapshot is everything that a continuation needs: the model and its seeds, optimisers, statistics
that seeds on trial gather, what was spent, and the random streams.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from esper.core.compilation import uncompiled
from esper.core.model_wrapper import MorphableModel
from esper.errors import WorkFailed
from esper.execution.isolation import RandomState
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.distribution import Ranks
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
from esper.services.tolaria.snapshots import Snapshot
from esper.services.tolaria.telemetry import Telemetry
from esper.services.tolaria.ways import parallel_for

if TYPE_CHECKING:
    from esper.services.tolaria.sharding import FullySharded


class TrainingState:
    """A model in training, with all that learns and counts beside it."""

    def __init__(
        self, config: TolariaConfig, model: MorphableModel, ranks: Ranks, samples: int
    ) -> None:
        """`samples` are those of the training data.

        Raises:
            BadInput: they, or a batch, can't be cut into as many shards as the session asks for.
        """
        self.config = config
        self.ranks = ranks
        self.parallel = parallel_for(config.training, ranks, samples)
        self.model = self.parallel.place(model)
        self.meter = FlopMeter(
            (lambda: uncompiled(self.model)) if config.training.compile else nullcontext,
            shared=self.parallel.count > 1,
        )
        self.learning_rate_scale = 1.0
        self.telemetry = Telemetry(self.model, config.growth.controller.probe_interval_steps)
        self.device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        self.learning = Learning(config.training.optimizer, self.model)
        self.shadow_buffers: dict[Site, dict[str, Tensor]] = {}

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
        self.shadow_buffers.pop(site, None)

    def adopt(self, site: Site) -> None:
        """Make a fossilised seed's parameters the host optimiser's."""
        self.learning.adopt(site)
        self._share_out_fossils()

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
        for (layer, slot), buffers in self.shadow_buffers.items():
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
        self.shadow_buffers = {}
        for key, tensor in snapshot.tensors.items():
            if key.startswith("shadow/"):
                slot, rest = key.removeprefix("shadow/").split("/", 1)
                layer, name = rest.split("//")
                site = (layer, int(slot))
                self.shadow_buffers.setdefault(site, {})[name] = tensor.clone()
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


def _model_part(snapshot: Snapshot) -> dict[str, Tensor]:
    return {
        name.removeprefix("model/"): tensor
        for name, tensor in snapshot.tensors.items()
        if name.startswith("model/")
    }
