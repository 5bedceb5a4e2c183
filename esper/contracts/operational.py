"""What flows while a session trains: health, snapshots, decisions, transitions."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from esper.contracts.base import Contract, digest_of
from esper.contracts.enums import (
    ControllerPolicy,
    DecisionAction,
    SeedState,
    SessionOutcome,
    SystemHealth,
)
from esper.contracts.resources.common import Count as WholeNumber
from esper.contracts.resources.common import DecimalText, Percent, ResourceModel, Text, Time
from esper.contracts.resources.seed import SeedStatus, SeedTransitionStatus
from esper.contracts.resources.session import (
    MAX_SUMMARIES,
    CheckpointStatus,
    LayerSummary,
    RefusedLayer,
    SeedCounts,
)

MAX_SNAPSHOT_SEEDS = 64
MAX_SNAPSHOT_TRANSITIONS = 32
MAX_SNAPSHOT_BYTES = 256 * 2**10
"""Of a snapshot as JSON; `esper.services.tolaria.reporting` cuts one down to it."""

Count = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
LayerName = Annotated[str, Field(min_length=1, max_length=512)]
Slot = Annotated[int, Field(ge=0)]


class HealthSignal(Contract):
    """One layer's condition at an interval boundary.

    `gradient_norm` is the L2 norm of the layer's parameter gradients, `gradient_variance` the
    variance of their entries, `gradient_to_weight_ratio` that norm over the parameters' norm;
    `activation_rank` the effective rank of the layer's output over its width (the participation
    ratio of its covariance's spectrum, estimated from few rows), `dead_fraction` the share of
    probed output units that never rise above zero on the rows sampled.
    """

    session: str
    epoch: Count
    layer: LayerName
    gradient_norm: float
    gradient_variance: float
    gradient_to_weight_ratio: float
    activation_rank: float
    dead_fraction: float

    def health_score(self) -> float:
        """How well the layer works, in [0, 1]; 0 where an input is not finite.

        The mean of three shares: the activation rank, the share of units alive, and a gradient
        share g = r / (r + 1e-4) with r the gradient-to-weight ratio, which falls to 0 as the
        gradient vanishes and is 0.5 at a ratio of 1e-4; r above 1 (an exploding gradient) divides
        g by r.
        """
        inputs = (
            self.gradient_norm,
            self.gradient_variance,
            self.gradient_to_weight_ratio,
            self.activation_rank,
            self.dead_fraction,
        )
        if not all(math.isfinite(value) for value in inputs):
            return 0.0
        ratio = max(self.gradient_to_weight_ratio, 0.0)
        gradient = ratio / (ratio + 1e-4) / max(ratio, 1.0)
        rank = min(max(self.activation_rank, 0.0), 1.0)
        alive = 1.0 - min(max(self.dead_fraction, 0.0), 1.0)
        return (rank + alive + gradient) / 3.0


class Measurement(Contract):
    """A paired measurement of what a seed contributes, in nats per sample (higher is better).

    `lower` and `upper` bound the mean, one-sided each at the session's confidence level;
    `rent` is the price of the seed's parameters and FLOPs in the same unit.
    """

    mean: float
    lower: float
    upper: float
    rent: float
    samples: Count

    def passes(self) -> bool:
        """Whether the lower bound is finite and above the rent; a gate opens on nothing less."""
        return math.isfinite(self.lower) and self.lower > self.rent


class SeedObservation(Contract):
    """One seed that has left dormancy, as the controller sees it.

    `age_epochs` counts epochs since the state was entered; `ready` says that the trial is over
    and its gate open, so that a graft decision would be carried out.
    """

    layer: LayerName
    slot: Slot
    state: SeedState
    blueprint: str | None = None
    kernel: str | None = None
    alpha: Share = 0.0
    age_epochs: Count = 0
    cycle: Count = 0
    parameters: Count = 0
    passes: Count = 0
    ready: bool = False
    measurement: Measurement | None = None


class TrialRecord(Contract):
    """One candidate that was, or is being, tried: the memory of the search for growth."""

    layer: LayerName
    slot: Slot
    blueprint: str
    cycle: Count
    started_epoch: Count
    ended_epoch: Count | None = None
    state: SeedState
    measurement: Measurement | None = None


class Candidate(Contract):
    """One thing that could grow: a blueprint at a layer that can host it, and its price.

    `flops` is per sample, forward and backward. `folds` marks a kernel that folds into its host's
    own layer and so adds no function class.
    """

    layer: LayerName
    blueprint: str
    parameters: Count
    flops: Count
    folds: bool


class ControllerSettings(Contract):
    """What a controller must know of a session's spec, so that one controller serves many."""

    policy: ControllerPolicy
    seed: int
    interval_epochs: Annotated[int, Field(ge=1)]
    minimum_confidence: Share
    active_seeds: Annotated[int, Field(ge=1)]
    passes: Annotated[int, Field(ge=1)]
    dwell_epochs: Count
    age_epochs: Count
    ramp_epochs: Count
    hold_epochs: Count


class LayerDescription(Contract):
    """One host layer: its kind ("Linear", "Conv2d"), size, and how many seeds it may hold."""

    name: LayerName
    kind: str
    parameters: Count
    slots: Count


class SystemStatePacket(Contract):
    """A full snapshot of a session at an interval boundary; a lost one costs nothing.

    `edges` are dataflow pairs (producer layer, consumer layer).
    """

    session: str
    sequence: Count
    epoch: Count
    epochs: Count
    train_loss: float
    validation_loss: float
    parameters_base: Count
    parameters: Count
    remaining_parameters: Count
    remaining_epochs: Count
    settings: ControllerSettings
    layers: tuple[LayerDescription, ...]
    edges: tuple[tuple[str, str], ...] = ()
    signals: tuple[HealthSignal, ...] = ()
    seeds: tuple[SeedObservation, ...] = ()
    candidates: tuple[Candidate, ...] = ()
    trials: tuple[TrialRecord, ...] = ()
    health: SystemHealth


class LayerNode(Contract):
    """A layer in the analysed graph, with its smoothed health and the direction it moves in."""

    name: LayerName
    kind: str
    parameters: Count
    health: Share
    trend: float
    active_seeds: Count


class GraphTopology(Contract):
    """Layers and the dataflow edges between them, as indices into `nodes`."""

    nodes: tuple[LayerNode, ...]
    edges: tuple[tuple[int, int], ...]


class ProblemLayer(Contract):
    """A layer that needs attention, and why."""

    layer: LayerName
    reason: str


class ModelGraphState(Contract):
    """What the analyzer makes of a packet: the graph, its trends, and the layers with problems."""

    session: str
    epoch: Count
    topology: GraphTopology
    problems: tuple[ProblemLayer, ...]
    health: SystemHealth
    loss_trend: float


class AdaptationDecision(Contract):
    """One decision of the controller. Equal inputs give an equal id, so it is applied once."""

    id: str
    session: str
    epoch: Count
    action: DecisionAction
    layer: LayerName | None = None
    slot: Slot | None = None
    blueprint: str | None = None
    confidence: Share
    reason: str

    @classmethod
    def make(
        cls,
        packet: SystemStatePacket,
        action: DecisionAction,
        reason: str,
        *,
        confidence: float = 1.0,
        layer: str | None = None,
        slot: int | None = None,
        blueprint: str | None = None,
    ) -> AdaptationDecision:
        """A decision about `packet`, its id the hash of the session, the epoch and the packet."""
        inputs = digest_of(packet.model_dump_json(by_alias=True))
        identity = [packet.session, packet.epoch, inputs, action.value, layer, slot, blueprint]
        return cls(
            id=digest_of(identity)[:32],
            session=packet.session,
            epoch=packet.epoch,
            action=action,
            layer=layer,
            slot=slot,
            blueprint=blueprint,
            confidence=confidence,
            reason=reason,
        )


class SeedTransition(Contract):
    """A seed moved from one state to another."""

    session: str
    epoch: Count
    layer: LayerName
    slot: Slot
    cycle: Count
    previous: SeedState
    current: SeedState
    blueprint: str | None = None
    kernel: str | None = None
    reason: str
    measurement: Measurement | None = None


class SessionEvent(Contract):
    """Something worth telling that is no seed transition; `reason` is a constant."""

    session: str
    epoch: Count
    reason: str
    message: str


class SeedSnapshot(ResourceModel):
    """One slot that has left dormancy, with all that its Seed object shows."""

    layer: LayerName
    slot: Annotated[int, Field(ge=0, le=63)]
    state: Annotated[SeedState, Field(strict=False)]
    blueprint: Annotated[str, Field(max_length=253)] | None = None
    kernel: Annotated[str, Field(max_length=253)] | None = None
    alpha_percent: Percent = 0
    health_percent: Percent | None = None
    """The layer's health, as last observed."""
    contribution: DecimalText | None = None
    """Gain in nats a sample, as last measured."""
    cycle: WholeNumber = 0
    transitions: Annotated[
        tuple[SeedTransitionStatus, ...], Field(strict=False, max_length=MAX_SNAPSHOT_TRANSITIONS)
    ] = ()
    """The newest, oldest first."""

    def status(self) -> SeedStatus:
        """What this says of the status of its Seed object."""
        return SeedStatus(
            state=self.state,
            blueprint=self.blueprint,
            kernel=self.kernel,
            alpha_percent=self.alpha_percent,
            health_percent=self.health_percent,
            contribution=self.contribution,
            cycle=self.cycle,
            transitions=self.transitions,
        )


class SessionSnapshot(ResourceModel):
    """How a session stands: all that the status of it and of its seeds says of its training.

    Every message is whole, so one that is lost costs nothing. One of a later attempt is newer, and
    within an attempt the one with the greater `sequence`. It is sent while the session goes on: at
    its start, at every boundary, with each checkpoint, at its end, and now and then between while
    steps are done; a session that stands still sends nothing.
    """

    session: Annotated[str, Field(min_length=1, max_length=253)]
    attempt: WholeNumber = 0
    """Which attempt of the operator's this is; 0: none of its."""
    sequence: WholeNumber
    """Grows with each message, over restarts too: the time in ms, or the last one's plus 1."""
    time: Time
    outcome: Annotated[SessionOutcome, Field(strict=False)] = SessionOutcome.RUNNING
    message: Text = ""
    """The last event of the whole session, or how it ended."""
    epoch: WholeNumber = 0
    epochs: WholeNumber
    metrics: Annotated[dict[str, DecimalText], Field(max_length=32)] = Field(default_factory=dict)
    parameters_base: WholeNumber = 0
    parameters: WholeNumber = 0
    flops: WholeNumber = 0
    seed_counts: SeedCounts = Field(default_factory=SeedCounts)
    seeds: Annotated[
        tuple[SeedSnapshot, ...], Field(strict=False, max_length=MAX_SNAPSHOT_SEEDS)
    ] = ()
    """Those that live first, then the newest."""
    seeds_left_out: WholeNumber = 0
    layers: Annotated[tuple[LayerSummary, ...], Field(strict=False, max_length=MAX_SUMMARIES)] = ()
    refused_layers: Annotated[
        tuple[RefusedLayer, ...], Field(strict=False, max_length=MAX_SUMMARIES)
    ] = ()
    checkpoint: CheckpointStatus | None = None
    threads: WholeNumber = 0
    processes: WholeNumber = 0

    def observed(self) -> dict[str, object]:
        """What this says of the fields of a `TrainingSessionStatus`, by their names."""
        return {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "metrics": self.metrics,
            "parameters_base": self.parameters_base,
            "parameters": self.parameters,
            "flops": self.flops,
            "seeds": self.seed_counts,
            "layers": self.layers,
            "refused_layers": self.refused_layers,
            "checkpoint": self.checkpoint,
            "threads": self.threads,
            "last_heartbeat_time": self.time,
        }
