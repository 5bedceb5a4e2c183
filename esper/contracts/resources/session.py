"""TrainingSession: a model that trains and grows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, model_validator

from esper.contracts.enums import SeedState
from esper.contracts.resources.cluster import RunPolicySpec, StorageSpec, WorkersSpec
from esper.contracts.resources.common import (
    Conditions,
    Count,
    DecimalText,
    Percent,
    Resource,
    ResourceModel,
    SessionMeta,
    Text,
    Time,
    immutable,
    refusal,
    rules,
)
from esper.contracts.resources.growth import GrowthSpec
from esper.contracts.resources.training import DataSpec, ModelSpec, TrainingSpec

_PROCESSES = "self.workers.replicas * self.workers.processesPerWorker"

MAX_SUMMARIES = 64
MAX_FAILURES = 5
MAX_INTERRUPTED_PODS = 64


def _kept_while_it_runs(field: str) -> tuple[str, str]:
    """The rule that no attempt that runs is given another value of `field`, which is always there.

    Its ranks read the manifest again whenever they are launched.
    """
    return (
        f"self.{field} == oldSelf.{field} || oldSelf.runPolicy.suspend",
        f"{field} is immutable unless suspended",
    )


class TrainingSessionSpec(ResourceModel):
    """What a person asks for; only `model` and `data` are required."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                f"self.training.batchSize >= {_PROCESSES}",
                "training.batchSize: at least the number of processes",
            ),
            (
                f"self.training.sharding != 'full' || {_PROCESSES} > 1",
                "training.sharding: full needs more than one process",
            ),
            (
                "self.training.logicalShards == 1 || "
                f"self.training.logicalShards % ({_PROCESSES}) == 0",
                "training.logicalShards: 1 or a multiple of the number of processes",
            ),
            (
                "self.training.batchSize >= self.training.logicalShards",
                "training.batchSize: at least training.logicalShards",
            ),
            (
                "has(self.runPolicy.queueName) == has(oldSelf.runPolicy.queueName) && "
                "(!has(self.runPolicy.queueName) || "
                "self.runPolicy.queueName == oldSelf.runPolicy.queueName) || "
                "oldSelf.runPolicy.suspend",
                "runPolicy.queueName is immutable unless suspended",
            ),
            (
                "self.workers.replicas == oldSelf.workers.replicas || oldSelf.runPolicy.suspend || "
                "has(self.workers.minReplicas)",
                "workers.replicas is immutable unless suspended or elastic (minReplicas)",
            ),
            *map(_kept_while_it_runs, ("training", "growth", "storage")),
            *(
                _kept_while_it_runs(f"workers.{field}")
                for field in ("processesPerWorker", "imagePullPolicy", "resources", "podTemplate")
            ),
            (
                "has(self.workers.image) == has(oldSelf.workers.image) && "
                "(!has(self.workers.image) || self.workers.image == oldSelf.workers.image) || "
                "oldSelf.runPolicy.suspend",
                "workers.image is immutable unless suspended",
            ),
        )
    )

    model: Annotated[ModelSpec, Field(json_schema_extra=immutable("model"))]
    data: Annotated[DataSpec, Field(json_schema_extra=immutable("data"))]
    training: TrainingSpec = Field(default_factory=TrainingSpec)
    growth: GrowthSpec = Field(default_factory=GrowthSpec)
    workers: WorkersSpec = Field(default_factory=WorkersSpec)
    run_policy: RunPolicySpec = Field(default_factory=RunPolicySpec)
    storage: StorageSpec = Field(default_factory=StorageSpec)

    @model_validator(mode="after")
    def _processes_fit(self) -> TrainingSessionSpec:
        processes = self.workers.processes
        if self.training.batch_size < processes:
            raise refusal(
                "training.batchSize",
                self.training.batch_size,
                f"at least the number of processes, {processes}",
            )
        shards = self.training.logical_shards
        if shards > 1 and shards % processes:
            raise refusal(
                "training.logicalShards",
                shards,
                f"1 or a multiple of the number of processes, {processes}",
            )
        if self.training.batch_size < shards:
            raise refusal(
                "training.batchSize",
                self.training.batch_size,
                f"at least training.logicalShards, {shards}",
            )
        if self.training.sharding == "full" and processes == 1:
            raise refusal("training.sharding", "full", "none or data with one process")
        return self


class SeedCounts(ResourceModel):
    """Slots by the state of their seed."""

    dormant: Count = 0
    """Slots that nothing grows in."""
    germinated: Count = 0
    """Waiting for their trial."""
    training: Count = 0
    """Learning in the shadow of their host."""
    grafting: Count = 0
    """Being blended in."""
    fossilized: Count = 0
    """Part of the model."""
    culled: Count = 0
    """Given up; the slot rests."""
    active: Count = 0
    """Germinated, training and grafting together."""

    @classmethod
    def of(cls, counts: Mapping[SeedState, int]) -> SeedCounts:
        """The counts from a mapping; states that it lacks count 0."""
        by_name = {state.value: counts.get(state, 0) for state in SeedState}
        active = sum(by_name[name] for name in ("germinated", "training", "grafting"))
        return cls(**by_name, active=active)


class LayerSummary(ResourceModel):
    """One host layer as last observed."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    """As the model calls it."""
    kind: Annotated[str, Field(max_length=64)]
    """Its type."""
    seeds: Count = 0
    """Seeds of the layer that have left dormancy."""
    health_percent: Percent | None = None
    """Health when it was last probed; 100 is best."""


class RefusedLayer(ResourceModel):
    """A layer of a hostable type that hosts nothing, and why."""

    name: Annotated[str, Field(min_length=1, max_length=512)]
    """As the model calls it."""
    reason: Text
    """Why it hosts nothing."""


class Failure(ResourceModel):
    """How one worker failed."""

    pod: Annotated[str, Field(max_length=253)]
    """The worker's pod."""
    exit_code: Annotated[int, Field(ge=0, le=255)]
    """That of its container."""
    reason: Text
    """What the worker, or the node, said."""
    time: Time | None = None
    """When it ended."""


class CheckpointStatus(ResourceModel):
    """The newest complete checkpoint."""

    name: Annotated[str, Field(min_length=1, max_length=1024)]
    """Where it lies, relative to the session's storage, such as `checkpoints/epoch-000012`."""
    epoch: Count
    """Epochs completed in it."""
    time: Time | None = None
    """When it was written."""


class TrainingSessionStatus(ResourceModel):
    """What was observed. Decimals are strings, shares whole percents."""

    observed_generation: Count | None = None
    """The generation of the spec that this is about."""
    conditions: Conditions = ()
    """`Succeeded` sums up; `Suspended`, `WorkersReady`, `ControllerReady`, `Checkpointed`."""
    attempt: Count = 0
    """Every Job of the session is one; one that is suspended, resized or disrupted is followed by
    the next as one that failed is."""
    attempt_time: Time | None = None
    """When the attempt was decided on."""
    failed_attempts: Count = 0
    """Those that failed, which `runPolicy.backoffLimit` bounds."""
    fruitless_attempts: Count = 0
    """Those before this one, in a row, that ended uncounted before they had reported anything."""
    replicas: Count = 0
    """Workers that the attempt is made of."""
    job: Annotated[str, Field(max_length=63)] | None = None
    """The attempt's Job, once it is there."""
    disruptions: Count = 0
    """Pods that were ended from outside, as by a preemption."""
    interrupted_pods: Annotated[
        tuple[Annotated[str, Field(max_length=253)], ...],
        Field(strict=False, max_length=MAX_INTERRUPTED_PODS),
    ] = ()
    """Those of this attempt."""
    failures: Annotated[tuple[Failure, ...], Field(strict=False, max_length=MAX_FAILURES)] = ()
    """The last five."""
    epoch: Count = 0
    """Epochs completed."""
    epochs: Count = 0
    """Epochs to complete."""
    metrics: Annotated[dict[str, DecimalText], Field(max_length=32)] = Field(default_factory=dict)
    """The last epoch's: `trainLoss`, `validationLoss`, `validationMetric`; at the end `test`."""
    parameters_base: Count = 0
    """Parameters of the model as it was given."""
    parameters: Count = 0
    """Those of the model as it has grown."""
    flops: Count = 0
    """Spent so far, trials included; 2 per multiply-add, forward and backward."""
    seeds: SeedCounts = Field(default_factory=SeedCounts)
    """Slots by the state of their seed."""
    layers: Annotated[tuple[LayerSummary, ...], Field(strict=False, max_length=MAX_SUMMARIES)] = ()
    """The first 64 layers that host seeds."""
    refused_layers: Annotated[
        tuple[RefusedLayer, ...], Field(strict=False, max_length=MAX_SUMMARIES)
    ] = ()
    """Layers of a hostable type that host nothing."""
    checkpoint: CheckpointStatus | None = None
    workers: Count = 0
    """Workers that are ready."""
    selector: Annotated[str, Field(max_length=512)] | None = None
    """Selects the workers' pods, for whoever scales the session."""
    threads: Count = 0
    """CPU threads that each process computes with."""
    last_heartbeat_time: Time | None = None
    """When the operator heard the last report of training, by its own clock."""
    report_sequence: Count = 0
    """The number of that report: what is told again is no sign of life."""
    start_time: Time | None = None
    """When the first Job began."""
    active_since: Time | None = None
    """Since when it has been neither suspended nor in a queue; absent while it is."""
    active_seconds: Count = 0
    """How long it was active before that."""
    completion_time: Time | None = None
    """When the session ended."""


class TrainingSession(Resource):
    """A model that trains and grows on measured evidence."""

    plural: ClassVar[str] = "trainingsessions"
    singular: ClassVar[str] = "trainingsession"
    short_names: ClassVar[tuple[str, ...]] = ("ts",)
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("State", "string", '.status.conditions[?(@.type=="Succeeded")].reason'),
        ("Epoch", "integer", ".status.epoch"),
        ("Metric", "string", ".status.metrics.validationMetric"),
        ("Params", "integer", ".status.parameters"),
        ("Seeds", "integer", ".status.seeds.active"),
        ("Fossilized", "integer", ".status.seeds.fossilized"),
        ("Workers", "integer", ".status.workers"),
        ("Age", "date", ".metadata.creationTimestamp"),
    )
    scale: ClassVar[dict[str, str] | None] = {
        "specReplicasPath": ".spec.workers.replicas",
        "statusReplicasPath": ".status.workers",
        "labelSelectorPath": ".status.selector",
    }

    kind: Literal["TrainingSession"]
    metadata: SessionMeta
    spec: TrainingSessionSpec
    status: TrainingSessionStatus | None = None
