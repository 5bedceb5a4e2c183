"""What a session trains, and how: entry points, optimiser, schedule, checkpoints."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from esper.contracts.resources.common import (
    ENTRY_POINT_PATTERN,
    Arguments,
    EntryPoint,
    ResourceModel,
    immutable,
    refusal,
    rules,
)

OBJECTIVE_PATTERN = f"^(classification|regression|{ENTRY_POINT_PATTERN[1:-1]})$"
Beta = Annotated[float, Field(ge=0, lt=1)]


class ModelSpec(ResourceModel):
    """The model: a callable that returns an `nn.Module`."""

    entrypoint: EntryPoint
    """`module.path:attribute`, importable where the session runs."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of the call; any JSON values."""


class DataSpec(ResourceModel):
    """The data: a callable that returns a dict of map-style datasets of (input, target).

    `train` is learnt from, gates and controller see only `validation`, `test` is read once at the
    end.
    """

    entrypoint: EntryPoint
    """`module.path:attribute`, importable where the session runs."""
    arguments: Arguments = Field(default_factory=dict)
    """Keyword arguments of the call; any JSON values."""


class OptimizerSpec(ResourceModel):
    """One of torch's optimisers; names and meanings of the settings are torch's."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.momentum == 0.0 || self.name in ['sgd', 'rmsprop']",
                "momentum: 0 unless name is sgd or rmsprop",
            )
        )
    )

    name: Literal["adamw", "adam", "sgd", "rmsprop"] = "adamw"
    """Which of torch's optimisers."""
    learning_rate: Annotated[float, Field(gt=0, le=100)] = 0.001
    """At its highest, after the warm-up."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Decoupled from the gradient with adamw, added to it otherwise."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """For sgd and rmsprop."""
    betas: Annotated[tuple[Beta, ...], Field(strict=False, min_length=2, max_length=2)] = (
        0.9,
        0.999,
    )
    """For adam and adamw: decay of the first and the second moment."""
    max_gradient_norm: Annotated[float, Field(gt=0, le=1e9)] | None = None
    """Clip the gradient's L2 norm to this; absent: no clipping."""
    accumulation_steps: Annotated[int, Field(ge=1, le=65536)] = 1
    """Batches whose gradients are summed into one optimiser step."""

    @model_validator(mode="after")
    def _momentum_is_used(self) -> OptimizerSpec:
        if self.momentum and self.name not in {"sgd", "rmsprop"}:
            raise refusal("momentum", self.momentum, f"0 with {self.name}; sgd and rmsprop use it")
        return self


class ScheduleSpec(ResourceModel):
    """The learning rate over the epochs: a linear warm-up, then the named course."""

    name: Literal["constant", "cosine", "linear", "step"] = "constant"
    """The course after the warm-up."""
    warmup_epochs: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Epochs over which the learning rate rises."""
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """For cosine and linear: the last learning rate over the first."""
    step_epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """For step: epochs between two drops."""
    step_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """For step: the factor of one drop."""


class CheckpointSpec(ResourceModel):
    """When snapshots are written, how many stay, and which one to start from."""

    every_epochs: Annotated[int, Field(ge=1, le=100_000)] = 1
    """Epochs between two checkpoints."""
    keep: Annotated[int, Field(ge=1, le=1000)] = 2
    """How many of the newest stay."""
    resume_from: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """A checkpoint of another session: a folder or an object-store address."""


class NonFiniteSpec(ResourceModel):
    """What happens when the loss stops being finite."""

    max_rollbacks: Annotated[int, Field(ge=0, le=100)] = 3
    """Rollbacks to the last good snapshot before the session fails."""


class TrainingSpec(ResourceModel):
    """How the model is trained."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "self.schedule.warmupEpochs <= self.epochs",
                "schedule.warmupEpochs: at most epochs",
            )
        )
    )

    epochs: Annotated[int, Field(ge=1, le=100_000)] = 10
    """Passes over the training data."""
    batch_size: Annotated[int, Field(ge=1, le=1_048_576)] = 64
    """Samples in a batch, over all processes together."""
    seed: Annotated[
        int,
        Field(ge=0, le=2**32 - 1, json_schema_extra=immutable("training.seed")),
    ] = 0
    """Every random draw of the session derives from it."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads a process computes with; part of what makes a run repeatable."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What forward and backward compute in; parameters stay in float32."""
    objective: Annotated[str, Field(max_length=253, pattern=OBJECTIVE_PATTERN)] = "classification"
    """`classification`, `regression`, or an entry point for loss and metrics."""
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    schedule: ScheduleSpec = Field(default_factory=ScheduleSpec)
    sharding: Literal["none", "data", "full"] = "none"
    """Several processes always share out each batch. `full`: parameters and optimiser state too
    (FSDP2); `none` and `data`: each has the whole model (DistributedDataParallel)."""
    logical_shards: Annotated[int, Field(ge=1, le=65536)] = 1
    """Parts that a batch is cut into, whatever the number of processes, which divides them; their
    sums are made in one order, so that any number gives the same bits. 1: off."""
    compile: bool = False
    """Whether the blocks of the model are compiled one by one, by torch.compile."""
    checkpoint: CheckpointSpec = Field(default_factory=CheckpointSpec)
    non_finite: NonFiniteSpec = Field(default_factory=NonFiniteSpec)

    @model_validator(mode="after")
    def _warm_up_fits(self) -> TrainingSpec:
        if self.schedule.warmup_epochs > self.epochs:
            raise refusal(
                "schedule.warmupEpochs",
                self.schedule.warmup_epochs,
                f"at most epochs, {self.epochs}",
            )
        return self
