"""Tolaria's training loop: intervals of training, and a rendezvous at each boundary.

    interval of epochs  →  gates  →  packet → decision → applied (until the controller waits)
                        →  snapshot  →  checkpoint

The end of a grafted seed's hold turns the next interval into its recovery trial: the interval is
trained twice on the same batches, with and without the seed, and the better model goes on.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from esper.contracts.base import utc_now
from esper.contracts.blueprints import BlueprintDocument
from esper.contracts.enums import DecisionAction, SystemHealth
from esper.contracts.operational import (
    AdaptationDecision,
    ControllerSettings,
    HealthSignal,
    SeedTransition,
    SessionEvent,
    SystemStatePacket,
)
from esper.core.model_wrapper import MorphableModel
from esper.errors import Interrupted, LossNotFinite
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.data import Datasets
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.engine import Engine, Quality
from esper.services.tolaria.gates import Verdict
from esper.services.tolaria.growth import Growth, KernelSupply
from esper.services.tolaria.news import News, Numbering, packet_trace
from esper.services.tolaria.objective import Objective
from esper.services.tolaria.optimization import learning_rate_share
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.services.tolaria.snapshots import Snapshot
from esper.utils.logging import current_trace_id, tracing

Row = dict[str, Any]

_log = logging.getLogger(__name__)


class Controller(Protocol):
    """The other end of the bus: who answers a packet, and hears what came of it."""

    async def decide(self, packet: SystemStatePacket) -> AdaptationDecision:
        """The decision about `packet`."""

    async def tell(self, news: Sequence[News]) -> None:
        """Publish what happened since the last boundary, in order."""


class Observer(Protocol):
    """Who is told what happens: the run's log, the live view, the status."""

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is over; `row` is a line of metrics.jsonl."""

    def transition(self, transition: SeedTransition) -> None:
        """A seed changed its state."""

    def decision(self, decision: AdaptationDecision, applied: bool, outcome: str) -> None:
        """A decision was carried out, or refused."""

    def event(self, epoch: int, reason: str, message: str) -> None:
        """Something else worth telling; `reason` is a constant."""

    def checkpoint(self, snapshot: Snapshot) -> None:
        """A boundary at which a checkpoint is due."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """What a finished training run came to. `test` was read once, after everything else.

    `seeds` counts every seed that lived by the state it ended in, and the slots left dormant.
    `model` is the grown model, whole.
    """

    test: Quality
    epochs: int
    parameters_base: int
    parameters: int
    flops: int
    flops_trials: int
    flops_monitoring: int
    seconds: float
    seeds: dict[str, int]
    grown: tuple[SeedRecord, ...]
    model: MorphableModel


class TolariaTrainer:
    """Trains one session from its first epoch, or from a snapshot, to its last."""

    def __init__(
        self,
        config: TolariaConfig,
        model: MorphableModel,
        datasets: Datasets,
        objective: Objective,
        documents: Sequence[BlueprintDocument],
        *,
        controller: Controller,
        kernels: KernelSupply,
        observers: Sequence[Observer] = (),
        recorded: Sequence[AdaptationDecision] = (),
        ranks: Ranks | None = None,
        positions: Callable[[], Mapping[str, int]] = dict,
        scope: str = "",
    ) -> None:
        """`recorded` are decisions made before an interruption: replayed rather than asked again.

        `ranks` are the session's processes, by default this one, which nobody asks to stop; all
        of them run a trainer alike, and the observers are rank 0's.
        `model` has been wrapped and probed. `positions` says how long each file of the run is,
        for checkpoints; `scope` is the session's uid, empty where it has none.
        """
        self.config = config
        self._positions = positions
        self._scope = scope
        self.epoch = 0
        self._observers = tuple(observers)
        self._controller = controller
        self._recorded: dict[int, list[AdaptationDecision]] = {}
        for decision in recorded:
            self._recorded.setdefault(decision.epoch, []).append(decision)
        self.engine = Engine(config, model, datasets, objective, SeedBook(), ranks)
        self.growth = Growth(
            config, self.engine, documents, kernels, self._tell_transition, self._tell_event
        )
        self._sequence = 0
        self._failures = 0
        self._applied: list[str] = []
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._last: Snapshot | None = None
        self._news: list[News] = []
        self._numbering = Numbering()

    # -- the loop ---------------------------------------------------------------------------

    async def run(self) -> TrainingResult:
        """Train to the last epoch and read the test set.

        Raises:
            LossNotFinite: every configured rollback was used up.
            Interrupted: asked to stop; observers were given the last boundary as a checkpoint.
            WorkFailed: the ranks' models are no longer equal.
        """
        epochs = self.config.training.epochs
        interval = self.config.growth.controller.interval_epochs
        self._last = self._last or self._capture()
        try:
            await self._publish_news()  # what an interrupted run may not have got out
            while self.epoch < epochs:
                before = self.epoch
                rows = self._interval(min(interval, epochs - self.epoch))
                if rows is None:
                    self._roll_back()
                    continue
                self._failures = 0
                self.epoch += len(rows)
                await self._boundary(rows)
                await self._publish_news()
                self._last = self._capture()
                every = self.config.training.checkpoint.every_epochs
                if self.epoch // every > before // every or self.epoch == epochs:
                    self.engine.prove_equal()
                    await self._checkpoint()
        except Interrupted:
            await self._checkpoint()
            raise
        result = self._finish()
        await self._publish_news()
        return result

    def restore(
        self, snapshot: Snapshot, told: Sequence[SeedTransition | SessionEvent] = ()
    ) -> None:
        """Continue from `snapshot`; the model's structure has been rebuilt from it.

        `told` is all that was told before it, in order. It is published once more, under the same
        ids: what an interrupted run had not got out is not lost.
        """
        state = snapshot.state
        self.engine.book = SeedBook.from_state(state["book"])
        self.engine.restore(snapshot)
        self.epoch = snapshot.epoch
        self._sequence = state["sequence"]
        self._failures = state["failures"]
        self._applied = list(state["applied"])
        self._seconds_before = state["seconds"]
        for item in told:
            self._add_news(item, self.growth.book.trace_of(item))
        self._last = self._capture()

    def _interval(self, epochs: int) -> list[Row] | None:
        """Train `epochs` epochs, as a recovery trial where one is due; None: not finite."""
        record = self.growth.recovery_due()
        rows = self._train(epochs) if record is None else self._recovery_trial(record, epochs)
        return rows if all(_finite(row) for row in rows) else None

    def _train(self, epochs: int, *, trial: bool = False) -> list[Row]:
        rows = []
        for epoch in range(self.epoch + 1, self.epoch + epochs + 1):
            started = time.monotonic()
            train_loss = self.engine.train_epoch(epoch, trial=trial)
            quality = self.engine.evaluate(
                self.engine.datasets.validation, key="validation", trial=trial
            )
            rows.append(self._row(epoch, train_loss, quality, time.monotonic() - started))
            if not _finite(rows[-1]):
                break
        return rows

    def _recovery_trial(self, record: SeedRecord, epochs: int) -> list[Row]:
        """Train the interval with and without the seed; the better arm becomes the model.

        Nothing is judged where the loss without the seed is not finite.
        """
        before = self._boundary_snapshot()
        end = self.epoch + epochs
        with_rows = self._train(epochs)
        with_nats = self.engine.sample_nats() if all(map(_finite, with_rows)) else []
        with_seed = self._capture(end)
        self.engine.restore(before, keep_flops=True)
        with self.engine.without(record.site):
            rows = self._train(epochs, trial=True)
            if not all(map(_finite, rows)):
                return rows  # no model to go on with: the rollback culls the seed
            nats = self.engine.sample_nats()
        judgement = self.growth.judge_recovery(record, nats, with_nats)
        if judgement.verdict is Verdict.FOSSILIZE:
            self.engine.restore(with_seed, keep_flops=True)
            self.growth.fossilize(record, end, judgement.reason)
            rows = with_rows
        else:
            self.growth.cull(record, end, judgement.reason)
        rows[-1] |= self._costs()
        return rows

    def _roll_back(self) -> None:
        """Back to the last boundary; active seeds go first, then the learning rate is halved."""
        allowed = self.config.training.max_rollbacks
        snapshot = self._boundary_snapshot()
        if self._failures >= allowed:
            self.engine.restore(snapshot, keep_flops=True)
            raise LossNotFinite(
                f"the loss was not finite after epoch {self.epoch}, also after {allowed} "
                "rollbacks; lower spec.training.optimizer.learningRate or raise "
                "spec.training.nonFinite.maxRollbacks"
            )
        self._failures += 1
        self.engine.book = SeedBook.from_state(snapshot.state["book"])
        self.engine.restore(snapshot, keep_flops=True)
        active = self.growth.active()
        for record in active:
            self.growth.cull(record, self.epoch, "the loss was not finite")
        if not active:
            self.engine.learning_rate_scale /= 2
        done = (
            f"{len(active)} active seeds were culled"
            if active
            else f"the learning rate is now {self.engine.learning_rate_scale:g} of the configured"
        )
        self._tell_event(
            "RolledBack",
            f"the loss was not finite after epoch {self.epoch}; back to its end, {done} "
            f"({self._failures} of {allowed} tries)",
        )
        self._last = self._capture()

    # -- the boundary -----------------------------------------------------------------------

    async def _boundary(self, rows: list[Row]) -> None:
        self.growth.agree_on_faults()
        self.growth.grow_older(len(rows))
        self.growth.judge_trials(self.epoch)
        self.growth.reopen(self.epoch)
        signals = self.engine.probe(self.epoch)
        scores = [signal.health_score() for signal in signals]
        by_layer = dict(zip((signal.layer for signal in signals), scores, strict=True))
        self.growth.agree_on_faults()  # measurements and probes are not every rank's
        self.growth.watch(by_layer, self.engine.telemetry.reading.seeds, self.epoch)
        health = SystemHealth.of(sum(scores) / len(scores) if scores else 0.0)
        rows[-1] |= self._costs() | {
            "health": health.value,
            "layers": [
                signal.to_wire() | {"healthScore": score}
                for signal, score in zip(signals, scores, strict=True)
            ],
            "active": [
                record.observation().to_wire() | {"reason": record.reason}
                for record in self.growth.book.records.values()
            ],
        }
        for row in rows:
            self._each(lambda observer, row=row: observer.epoch(row))  # type: ignore[misc]
        if self.epoch < self.config.training.epochs:
            await self._decide(rows[-1], signals, health)
        self.growth.begin_trials(self.epoch)
        self.growth.blend()

    async def _decide(
        self, row: Row, signals: tuple[HealthSignal, ...], health: SystemHealth
    ) -> None:
        """Ask and apply, until the controller waits; every answer is to a fresh snapshot."""
        recorded = self._recorded.pop(self.epoch, [])
        layers = self.growth.layer_descriptions()
        most = 2 * sum(layer.slots for layer in layers) + 1
        for _ in range(most):
            packet = self._packet(row, signals, health)
            with tracing(packet_trace(self._scope, packet.session, packet.sequence)):
                decision = recorded.pop(0) if recorded else await self._asked(packet)
                if decision.id in self._applied:
                    return
                applied, outcome = await self.growth.apply(decision, self.epoch)
                _log.info("decision %s, %s: %s", decision.id, decision.action.value, outcome)
            self._applied.append(decision.id)
            self._each(
                lambda observer, d=decision, a=applied, o=outcome: observer.decision(d, a, o)  # type: ignore[misc]
            )
            if decision.action is DecisionAction.WAIT or not applied:
                return

    async def _asked(self, packet: SystemStatePacket) -> AdaptationDecision:
        _log.info(
            "packet %d of epoch %d: health signals of %d layers, %s",
            *(packet.sequence, packet.epoch, len(packet.signals), packet.health.value),
        )
        return await self._controller.decide(packet)

    def _packet(
        self, row: Row, signals: tuple[HealthSignal, ...], health: SystemHealth
    ) -> SystemStatePacket:
        growth, gates = self.config.growth, self.config.growth.gates
        self._sequence += 1
        return SystemStatePacket(
            session=self.config.session,
            sequence=self._sequence,
            epoch=self.epoch,
            epochs=self.config.training.epochs,
            train_loss=row["trainLoss"],
            validation_loss=row["validationLoss"],
            parameters_base=self.growth.parameters_base,
            parameters=self.growth.parameters(),
            remaining_parameters=self.growth.remaining_parameters(),
            remaining_epochs=self.config.training.epochs - self.epoch,
            settings=ControllerSettings(
                policy=growth.controller.policy,
                seed=self.config.training.seed,
                interval_epochs=growth.controller.interval_epochs,
                minimum_confidence=growth.controller.minimum_confidence,
                active_seeds=growth.active_seeds,
                passes=gates.passes,
                dwell_epochs=gates.dwell_epochs,
                age_epochs=gates.age_epochs,
                ramp_epochs=gates.ramp_epochs,
                hold_epochs=gates.hold_epochs,
            ),
            layers=self.growth.layer_descriptions(),
            edges=self.engine.model.morphology.edges,
            signals=signals,
            seeds=tuple(r.observation() for r in self.growth.book.records.values()),
            candidates=self.growth.candidates,
            trials=tuple(self.growth.book.trials),
            health=health,
        )

    # -- parts ------------------------------------------------------------------------------

    def _finish(self) -> TrainingResult:
        for record in self.growth.active():
            self.growth.cull(record, self.epoch, "the session ended before its trial did")
        test = self.engine.evaluate(self.engine.datasets.test, key="test")
        self.engine.settle()
        return TrainingResult(
            test=test,
            epochs=self.epoch,
            parameters_base=self.growth.parameters_base,
            parameters=self.growth.parameters(),
            flops=self.engine.meter.total,
            flops_trials=self.engine.meter.trials,
            flops_monitoring=self.engine.meter.monitoring,
            seconds=self.seconds,
            seeds=self.growth.book.lives(
                sum(layer.slots for layer in self.growth.layer_descriptions())
            ),
            grown=tuple(
                record
                for record in self.growth.book.records.values()
                if record.fossilized_epoch is not None
            ),
            model=self.engine.whole_model(),
        )

    @property
    def seconds(self) -> float:
        """Wall time spent in training, over all resumptions."""
        return self._seconds_before + time.monotonic() - self._started

    def _row(self, epoch: int, train_loss: float, quality: Quality, seconds: float) -> Row:
        training = self.config.training
        share = learning_rate_share(training.schedule, epoch, training.epochs)
        return {
            "epoch": epoch,
            "time": utc_now().isoformat(),
            "seconds": round(seconds, 4),
            "trainLoss": train_loss,
            "validationLoss": quality.loss,
            "validationMetric": quality.metric,
            "learningRate": training.optimizer.learning_rate
            * share
            * self.engine.learning_rate_scale,
        } | self._costs()

    def _costs(self) -> Row:
        self.engine.settle()
        return {
            "parameters": self.growth.parameters(),
            "flops": self.engine.meter.total,
            "flopsTrials": self.engine.meter.trials,
            "seeds": self.growth.book.counts(),
        }

    def _capture(self, epoch: int | None = None) -> Snapshot:
        self.engine.settle()
        return self.engine.capture(
            self.epoch if epoch is None else epoch,
            {
                "book": self.growth.book.to_state(),
                "sequence": self._sequence,
                "failures": self._failures,
                "applied": self._applied[-64:],
                "seconds": self.seconds,
                "lengths": dict(self._positions()),
            },
        )

    async def _checkpoint(self) -> None:
        """Hand over the last boundary; where the checkpoint before is not written yet, it waits."""
        snapshot, ranks = self.engine.whole(self._boundary_snapshot()), self.engine.ranks

        def hand_over() -> None:
            self._each(lambda observer: observer.checkpoint(snapshot))

        if ranks.size == 1:
            hand_over()
        else:
            await ranks.awaited(lambda: asyncio.to_thread(hand_over))

    def _boundary_snapshot(self) -> Snapshot:
        assert self._last is not None, "run() captures before it trains"
        return self._last

    async def _publish_news(self) -> None:
        news, self._news = self._news, []
        await self._controller.tell(news)

    def _tell_event(self, reason: str, message: str) -> None:
        event = SessionEvent(
            session=self.config.session, epoch=self.epoch, reason=reason, message=message
        )
        self._add_news(event, current_trace_id())
        _log.info("event %s: %s", reason, message)
        self._each(lambda observer: observer.event(self.epoch, reason, message))

    def _tell_transition(self, transition: SeedTransition) -> None:
        self._add_news(transition, current_trace_id())
        _log.info(
            "seed %s[%d] %s → %s: %s",
            *(transition.layer, transition.slot, transition.previous.value),
            *(transition.current.value, transition.reason),
        )
        self._each(lambda observer: observer.transition(transition))

    def _add_news(self, item: SeedTransition | SessionEvent, trace_id: str | None) -> None:
        self._news.append(self._numbering.news(item, trace_id))

    def _each(self, tell: Callable[[Observer], None]) -> None:
        for observer in self._observers:
            tell(observer)


def _finite(row: Row) -> bool:
    return math.isfinite(row["trainLoss"]) and math.isfinite(row["validationLoss"])
