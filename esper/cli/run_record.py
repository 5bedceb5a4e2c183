"""What a run's directory holds, as data: the lines of its files, and the lives of its seeds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from pydantic import BeforeValidator, ConfigDict, Field

from esper.contracts.base import Contract
from esper.contracts.enums import SeedState, SessionOutcome
from esper.contracts.operational import (
    AdaptationDecision,
    Count,
    Measurement,
    SeedTransition,
    SessionEvent,
)

_TOLERANT = ConfigDict(extra="ignore")


class LayerHealth(Contract):
    """One layer's health score in [0, 1] at the end of an epoch."""

    model_config = _TOLERANT

    layer: str
    health_score: float | None = None


class EpochRecord(Contract):
    """One line of metrics.jsonl. FLOPs are cumulative, trials included."""

    model_config = _TOLERANT

    epoch: Count
    seconds: float = 0.0
    train_loss: float | None = None
    validation_loss: float | None = None
    validation_metric: float | None = None
    parameters: Count = 0
    flops: Count = 0
    flops_trials: Count = 0
    layers: tuple[LayerHealth, ...] = ()


class TransitionRecord(SeedTransition):
    """A transition of events.jsonl."""

    model_config = _TOLERANT


class EventRecord(SessionEvent):
    """Another event of events.jsonl."""

    model_config = _TOLERANT

    session: str = ""


class DecisionRecord(AdaptationDecision):
    """One line of decisions.jsonl: the decision, whether it was applied, and what came of it."""

    model_config = _TOLERANT

    applied: bool = True
    outcome: str = ""


class GrownContribution(Contract):
    """What a grown part contributes, in nats per sample: the mean and its lower bound."""

    model_config = _TOLERANT

    mean: float
    lower: float


class GrownPart(Contract):
    """A fossilized seed, as result.json tells it."""

    model_config = _TOLERANT

    layer: str
    slot: Count
    blueprint: str
    epoch: Count
    contribution: GrownContribution | None = None
    rent: float | None = None
    samples: Count | None = None


def _counts(value: object) -> object:
    """Seeds by state; anything else that stands there is left out."""
    if not isinstance(value, dict):
        return {}
    return {key: n for key, n in value.items() if isinstance(n, int) and not isinstance(n, bool)}


class ResultRecord(Contract):
    """result.json, written when the run ends."""

    model_config = _TOLERANT

    outcome: str = ""
    accuracy: float | None = None
    parameters_base: Count | None = None
    parameters: Count | None = None
    flops: Count | None = None
    epochs: Count | None = None
    seconds: float | None = None
    seeds: Annotated[dict[str, int], BeforeValidator(_counts)] = Field(default_factory=dict)
    grown: tuple[GrownPart, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Span:
    """A stretch of epochs that a seed spent in one state."""

    state: SeedState
    start: int
    end: int


@dataclass(frozen=True, kw_only=True)
class Life:
    """One seed from germination to its end, or to where the run stands: one trial."""

    number: int
    layer: str
    slot: int
    blueprint: str
    spans: tuple[Span, ...]
    state: SeedState
    """The last state before dormancy."""
    grafted: bool
    reason: str
    measurement: Measurement | None

    @property
    def started(self) -> int:
        """The epoch it germinated at."""
        return self.spans[0].start

    @property
    def decided(self) -> int | None:
        """The epoch of its verdict; None while it is still tried."""
        last = next((span for span in self.spans if span.state is self.state), None)
        over = self.state in (SeedState.FOSSILIZED, SeedState.CULLED)
        return last.start if over and last is not None else None


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its directory tells it."""

    name: str
    outcome: SessionOutcome
    message: str
    epochs: int
    """How many epochs the session asks for."""
    classification: bool
    manifest: str
    rows: tuple[EpochRecord, ...]
    lives: tuple[Life, ...]
    events: tuple[EventRecord, ...]
    decisions: tuple[DecisionRecord, ...]
    refused: tuple[tuple[str, str], ...]
    grown: tuple[GrownPart, ...]
    result: ResultRecord | None
    parameters_base: int | None
    exported: bool
    layers: tuple[str, ...]
    """Host layers in execution order."""

    @property
    def reached(self) -> int:
        """The last epoch that ended."""
        return self.rows[-1].epoch if self.rows else 0


def lives_of(transitions: Iterable[SeedTransition], reached: int) -> Iterator[Life]:
    """The seeds' lives, in the order in which they germinated.

    Args:
        transitions: in the order in which they happened.
        reached: the last epoch of the run so far, where lives that go on are cut.
    """
    open_lives: dict[tuple[str, int], list[SeedTransition]] = {}
    told: list[list[SeedTransition]] = []
    ends: dict[int, int] = {}
    for transition in transitions:
        key = (transition.layer, transition.slot)
        born = transition.current is SeedState.GERMINATED
        if born and key in open_lives:
            ends[id(open_lives[key])] = transition.epoch
        if born or (key not in open_lives and transition.current is not SeedState.DORMANT):
            open_lives[key] = []
            told.append(open_lives[key])
        if key in open_lives:
            open_lives[key].append(transition)
        if transition.current is SeedState.DORMANT:
            open_lives.pop(key, None)
    for index, life in enumerate(told, start=1):
        yield _life(index, life, ends.get(id(life), reached))


def _life(number: int, transitions: list[SeedTransition], until: int) -> Life:
    """One life from its transitions, of which the first is no return to dormancy."""
    ends = [transition.epoch for transition in transitions[1:]] + [until]
    spans = tuple(
        Span(state=step.current, start=step.epoch, end=max(end, step.epoch))
        for step, end in zip(transitions, ends, strict=True)
        if step.current is not SeedState.DORMANT
    )
    awake = [step for step in transitions if step.current is not SeedState.DORMANT]
    measured = [step.measurement for step in awake if step.measurement is not None]
    return Life(
        number=number,
        layer=awake[0].layer,
        slot=awake[0].slot,
        blueprint=next((step.blueprint for step in reversed(awake) if step.blueprint), ""),
        spans=spans,
        state=awake[-1].current,
        grafted=any(step.current is SeedState.GRAFTING for step in awake),
        reason=awake[-1].reason,
        measurement=measured[-1] if measured else None,
    )


def grown_from(lives: Iterable[Life]) -> Iterator[GrownPart]:
    """What has grown so far, for a run that has not written its result yet."""
    for life in lives:
        if life.state is SeedState.FOSSILIZED:
            measured = life.measurement
            yield GrownPart(
                layer=life.layer,
                slot=life.slot,
                blueprint=life.blueprint,
                epoch=life.spans[-1].start,
                contribution=GrownContribution(mean=measured.mean, lower=measured.lower)
                if measured
                else None,
                rent=measured.rent if measured else None,
                samples=measured.samples if measured else None,
            )
