"""Growing: decisions carried out, gates applied, every transition told once.

Tolaria alone writes the model's structure. This is where it does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from esper.contracts.blueprints import BlueprintDocument, Graph, KernelTarget, folds, infer, lower
from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.ir import GraphSource
from esper.contracts.operational import (
    AdaptationDecision,
    Candidate,
    LayerDescription,
    Measurement,
    SeedTransition,
)
from esper.core.morphology import Morphology
from esper.errors import BlueprintError, EsperError, StorageFull, one_line
from esper.execution.blending import ramped_alpha
from esper.services.tolaria import gates as rules
from esper.services.tolaria.births import give_birth
from esper.services.tolaria.config import TolariaConfig
from esper.services.tolaria.engine import Engine, layer_kind, lifecycle
from esper.services.tolaria.seeds import SeedBook, SeedRecord
from esper.utils.logging import current_trace_id, tracing

Tell = Callable[[SeedTransition], None]
TellEvent = Callable[[str, str], None]

NOT_FINITE = "its output is not finite"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuiltSeed:
    """A kernel built for one slot: its module, its id, and the bound graph it was built from."""

    module: nn.Module
    kernel: str
    graph: Graph
    source: GraphSource


class KernelSupply(Protocol):
    """Where Tolaria gets the module for a seed."""

    async def build(
        self, document: BlueprintDocument, target: KernelTarget, layer: str, slot: int
    ) -> BuiltSeed:
        """The seed's module, its weights drawn from the session's seed, the slot and the IR.

        Raises:
            KernelError: the kernel failed to compile or to verify.
            Unavailable: a service did not answer within the configured patience.
        """


def refuse_misfit(document: BlueprintDocument, morphology: Morphology, *, builtin: bool) -> None:
    """Refuse a blueprint of the manifest that no layer of the model can host.

    A built-in one with other arguments (`builtin`) was not written for this model and may fit
    nowhere, as the catalogue's own; over a size cap wherever it fits, it is refused too.

    Raises:
        BlueprintError: it fits no layer of its kinds; the first layer's reason.
    """
    misfits: list[tuple[str, BlueprintError]] = []
    too_large: list[tuple[str, BlueprintError]] = []
    kinds = {name: layer_kind(layer) for name, layer in morphology.layers.items()}
    for layer in (name for name, kind in kinds.items() if kind in document.hosts):
        refusals = misfits
        try:
            graph = lower(document, morphology.target(layer))
            morphology.refuse_misplaced(layer, graph)
            refusals = too_large
            infer(graph, morphology.target(layer))
        except BlueprintError as refusal:
            refusals.append((layer, refusal))
        else:
            return
    if not too_large and (builtin or not kinds):
        return
    if not too_large + misfits:
        raise BlueprintError(
            "spec.hosts",
            ", ".join(document.hosts),
            f"a kind of the model's host layers: {', '.join(sorted(set(kinds.values())))} "
            f"(Blueprint {document.name})",
        )
    layer, error = (too_large + misfits)[0]
    raise BlueprintError(
        "spec.arguments" if builtin else error.field,
        error.came,
        f"{error.allowed} (Blueprint {document.name} at layer {layer}, and no other layer fits)",
    ) from error


class Growth:
    """Carries out decisions and gates on an engine's model."""

    def __init__(
        self,
        config: TolariaConfig,
        engine: Engine,
        documents: Sequence[BlueprintDocument],
        kernels: KernelSupply,
        tell: Tell,
        tell_event: TellEvent,
    ) -> None:
        """`tell` hears of every transition after it happened.

        `tell_event` hears, as a reason and a message, of what went wrong with a seed.
        """
        self._config = config
        self._gates = config.growth.gates
        self._engine = engine
        self._documents = {document.name: document for document in documents}
        self._kernels = kernels
        self._tell = tell
        self._tell_event = tell_event
        self.parameters_base = sum(p.numel() for p in engine.model.parameters())
        self.candidates = self._find_candidates()

    # -- what the controller sees -----------------------------------------------------------

    @property
    def book(self) -> SeedBook:
        """The records that the engine works from."""
        return self._engine.book

    def parameters(self) -> int:
        """The parameters in the forward pass: the host's and those of grafted seeds."""
        grown = self.book.in_state(SeedState.GRAFTING, SeedState.FOSSILIZED)
        return self.parameters_base + sum(record.parameters for record in grown)

    def remaining_parameters(self) -> int:
        """What the budget leaves."""
        percent = self._config.growth.parameters_percent
        limit = self.parameters_base + int(self.parameters_base * percent / 100)
        return max(0, limit - self.parameters())

    def layer_descriptions(self) -> tuple[LayerDescription, ...]:
        """The host layers in execution order."""
        base = dict.fromkeys(self._engine.model.morphology.layers, 0)
        for name, layer in self._engine.model.morphology.layers.items():
            own = (p for key, p in layer.named_parameters() if not key.startswith("grown."))
            base[name] = sum(p.numel() for p in own)
        return tuple(
            LayerDescription(
                name=name,
                kind=layer_kind(layer),
                parameters=base[name],
                slots=self._config.growth.seeds_per_layer,
            )
            for name, layer in self._engine.model.morphology.layers.items()
        )

    def _find_candidates(self) -> tuple[Candidate, ...]:
        found = []
        for layer in self._engine.model.morphology.layers:
            target = self._engine.model.morphology.target(layer)
            for document in self._documents.values():
                if target.layer.kind not in document.hosts:
                    continue
                try:
                    graph = lower(document, target)
                    self._engine.model.morphology.refuse_misplaced(layer, graph)
                    cost = infer(graph, target)
                except BlueprintError:
                    continue  # e.g. widen at a layer without a traced producer
                found.append(
                    Candidate(
                        layer=layer,
                        blueprint=document.name,
                        parameters=cost.parameters,
                        flops=cost.flops,
                        folds=folds(graph, target.layer),
                    )
                )
        return tuple(found)

    # -- decisions --------------------------------------------------------------------------

    async def apply(self, decision: AdaptationDecision, epoch: int) -> tuple[bool, str]:
        """Carry out `decision`; returns whether that was possible, and what came of it."""
        if decision.action is DecisionAction.WAIT:
            return True, "waited"
        if decision.layer is None or decision.slot is None:
            return False, "refused: the decision names no layer and slot"
        least = self._config.growth.controller.minimum_confidence
        if decision.confidence < least:
            return False, f"refused: confidence {decision.confidence:.3f}, asked for {least:.3f}"
        if decision.action is DecisionAction.GERMINATE:
            return await self._germinate(decision, decision.layer, decision.slot, epoch)
        record = self.book.records.get((decision.layer, decision.slot))
        if record is None:
            return False, f"refused: no seed at {decision.layer}/{decision.slot}"
        if decision.action is DecisionAction.GRAFT:
            return self._graft(record, epoch, decision.reason)
        if record.state in (SeedState.GERMINATED, SeedState.TRAINING):
            self.cull(record, epoch, decision.reason)
            return True, "culled"
        return False, f"refused: a {record.state.value} seed is not culled by decision"

    async def _germinate(
        self, decision: AdaptationDecision, layer: str, slot: int, epoch: int
    ) -> tuple[bool, str]:
        candidate = next(
            (
                found
                for found in self.candidates
                if (found.layer, found.blueprint) == (layer, decision.blueprint)
            ),
            None,
        )
        if candidate is None:
            return False, f"refused: {decision.blueprint} is no candidate at {layer}"
        if not 0 <= slot < self._config.growth.seeds_per_layer:
            return False, f"refused: {layer} has no slot {slot}"
        old = self.book.records.get((layer, slot))
        if old is not None and old.state is not SeedState.DORMANT:
            return False, f"refused: slot {slot} of {layer} is {old.state.value}"
        if candidate.parameters > self.remaining_parameters():
            return False, (
                f"refused: {candidate.parameters} parameters, "
                f"the budget leaves {self.remaining_parameters()}"
            )
        record = SeedRecord(
            layer=layer,
            slot=slot,
            state=SeedState.GERMINATED,
            cycle=old.cycle if old else 0,
            blueprint=candidate.blueprint,
            parameters=candidate.parameters,
            flops=candidate.flops,
            rent=rules.rent_of(candidate.parameters, candidate.flops, self._gates),
            trace_id=current_trace_id() or "",
        )
        morphology = self._engine.model.morphology
        record.faults = morphology.record(layer, slot).fallbacks
        document = self._documents[candidate.blueprint]
        try:
            seed = await self._kernels.build(document, morphology.target(layer), layer, slot)
            record.kernel = seed.kernel
            give_birth(self._engine, record, seed.module, seed.graph)
        except StorageFull:
            raise  # says nothing about the blueprint; the run ends here and can be resumed
        except Exception as error:
            # Whatever goes wrong with a kernel, the host can be trained without it.
            if not isinstance(error, EsperError):
                _log.exception("%s[%d]: %s", layer, slot, candidate.blueprint)
            reason = str(error) if isinstance(error, EsperError) else _unexpected(error)
            if isinstance(error, EsperError) and not error.permanent:
                self._tell_event("KernelPutOff", f"{layer}[{slot}]: {reason}")
                record.state, record.reason = SeedState.DORMANT, reason
                self.book.records[record.site] = record
                return False, f"put off: {reason}"
            self._tell_event("KernelFailed", f"{layer}[{slot}]: {reason}")
            # Remembered as a failed trial, so that the search goes on elsewhere.
            self.book.open_trial(record, epoch)
            record.state = SeedState.CULLED
            record.opens_epoch = epoch + rules.embargo_epochs(record.cycle, self._gates)
            self.book.records[record.site] = record
            self.book.update_trial(record, epoch)
            self._told(record, SeedState.DORMANT, epoch, reason)
            return False, f"failed: {reason}"
        morphology.germinate(
            layer,
            slot,
            seed.module,
            kernel=seed.kernel,
            source=seed.source,
            graph=seed.graph,
        )
        self.book.records[record.site] = record
        self.book.open_trial(record, epoch)
        self._told(record, SeedState.DORMANT, epoch, decision.reason)
        return True, f"germinated {record.blueprint} ({record.parameters} parameters)"

    def _graft(self, record: SeedRecord, epoch: int, reason: str) -> tuple[bool, str]:
        if not record.ready:
            return False, f"refused: the gate of {record.layer}/{record.slot} is not open"
        if record.parameters > self.remaining_parameters():
            return False, f"refused: the budget leaves {self.remaining_parameters()} parameters"
        needed = self._gates.ramp_epochs + self._gates.hold_epochs
        needed += self._config.growth.controller.interval_epochs
        left = self._config.training.epochs - epoch
        if left < needed:
            return False, f"refused: ramp, hold and recovery need {needed} epochs, {left} are left"
        self._move(record, SeedState.GRAFTING, epoch, reason)
        record.ready = False
        record.grafted_epoch = epoch
        self._blend(record)
        return True, f"grafting {record.blueprint}"

    # -- gates ------------------------------------------------------------------------------

    def grow_older(self, epochs: int) -> None:
        """Every seed is `epochs` older."""
        for record in self.book.records.values():
            record.age_epochs += epochs
        self._engine.model.morphology.layout.advance(epochs)

    def agree_on_faults(self) -> None:
        """Every rank counts the faults of the one that saw the most of them, seed by seed."""
        ranks, active = self._engine.ranks, self.active()
        if ranks.size == 1 or not active:
            return
        morphology = self._engine.model.morphology
        own = [morphology.record(*record.site) for record in active]
        seen = ranks.exchanged([[slot.errors, slot.fallbacks, slot.fault or ""] for slot in own])
        for place, record in enumerate(active):
            errors, fallbacks, fault = max((one[place] for one in seen), key=lambda one: one[:2])
            layer = morphology.layers[record.layer]
            layer.count_faults(record.slot, errors, fallbacks, fault)

    def watch(
        self, health: Mapping[str, float], finite: Mapping[tuple[str, int], bool], epoch: int
    ) -> None:
        """Take over what the probes saw of each live seed: its layer's health, and its faults.

        `health` is by layer, in [0, 1]; `finite` says by site whether the seed's own output was
        finite. The third fault in a row culls the seed: the host answers alone.
        """
        morphology = self._engine.model.morphology
        for record in self.active():
            slot = morphology.record(*record.site)
            morphology.observe(*record.site, health.get(record.layer, math.nan))
            raised = slot.fallbacks > record.faults
            if not finite.get(record.site, True) and not raised:
                morphology.record_fault(*record.site, NOT_FINITE)
            elif slot.fault == NOT_FINITE and not raised:
                morphology.clear_faults(*record.site)
            if slot.fallbacks > record.faults:
                record.faults, record.reason = slot.fallbacks, str(slot.fault)
                self._tell_event("SeedFault", f"{record.layer}[{record.slot}]: {slot.fault}")
            if slot.circuit_open:
                reason = f"{slot.errors} faults in a row, the last: {slot.fault}"
                self._tell_event("CircuitOpened", f"{record.layer}[{record.slot}]: {reason}")
                self.cull(record, epoch, reason)

    def begin_trials(self, epoch: int) -> None:
        """Germinated seeds take their turn, as many at once as the budget allows."""
        free = self._config.growth.active_seeds - len(self.book.learning())
        for record in self.book.in_state(SeedState.GERMINATED)[: max(0, free)]:
            self._move(record, SeedState.TRAINING, epoch, "its turn for a shadow trial")
            self._engine.start_learning(record.site)

    def judge_trials(self, epoch: int) -> None:
        """Measure every learning seed against one shared baseline and apply the shadow gate."""
        learning = self.book.learning()
        if not learning:
            return
        baseline = self._engine.sample_nats()
        for record in learning:
            nats = self._engine.sample_nats(trying=record.site)
            record.measurement = self._measured(baseline, nats, record)
            gain = math.nan if record.measurement is None else record.measurement.mean
            self._engine.model.morphology.observe_contribution(*record.site, gain)
            judgement = rules.judge_shadow(
                age_epochs=record.age_epochs,
                passes=record.passes,
                measurement=record.measurement,
                gates=self._gates,
            )
            record.passes = judgement.passes
            if judgement.verdict is rules.Verdict.CULL:
                self.cull(record, epoch, judgement.reason)
            else:
                record.ready = judgement.verdict is rules.Verdict.READY
                self.book.update_trial(record, epoch)

    def blend(self) -> None:
        """Move the blending factor of every grafting seed along its ramp."""
        for record in self.book.in_state(SeedState.GRAFTING):
            self._blend(record)

    def recovery_due(self) -> SeedRecord | None:
        """The grafting seed whose ramp and hold are over, if there is one."""
        for record in self.book.in_state(SeedState.GRAFTING):
            if rules.recovery_due(record.age_epochs, self._gates):
                return record
        return None

    def judge_recovery(
        self, record: SeedRecord, without: Sequence[float], with_seed: Sequence[float]
    ) -> rules.Judgement:
        """The recovery gate over the two arms' per-sample losses."""
        record.measurement = self._measured(without, with_seed, record)
        return rules.judge_recovery(record.measurement)

    def fossilize(self, record: SeedRecord, epoch: int, reason: str) -> None:
        """Make the seed part of the model."""
        record.alpha = 1.0
        self._move(record, SeedState.FOSSILIZED, epoch, reason)
        record.fossilized_epoch = epoch
        self._engine.adopt(record.site)
        self.book.update_trial(record, epoch)

    def cull(self, record: SeedRecord, epoch: int, reason: str) -> None:
        """Drop the seed's module and close its slot for the embargo."""
        previous = record.state
        morphology = self._engine.model.morphology
        morphology.transition(*record.site, lifecycle(SeedState.CULLED.value))
        morphology.remove(*record.site)
        self._engine.stop_learning(record.site)
        record.state = SeedState.CULLED
        record.alpha, record.age_epochs, record.ready = 0.0, 0, False
        record.opens_epoch = epoch + rules.embargo_epochs(record.cycle, self._gates)
        self.book.update_trial(record, epoch)
        self._told(record, previous, epoch, reason)

    def reopen(self, epoch: int) -> None:
        """Culled slots whose embargo is over become dormant, one cycle on."""
        for record in self.book.in_state(SeedState.CULLED):
            if epoch >= record.opens_epoch:
                morphology = self._engine.model.morphology
                if morphology.state(*record.site) is lifecycle("culled"):
                    morphology.transition(*record.site, lifecycle("dormant"))
                record.state = SeedState.DORMANT
                record.age_epochs, record.passes, record.measurement = 0, 0, None
                self._told(record, SeedState.CULLED, epoch, "the embargo is over")
                record.cycle += 1

    def active(self) -> list[SeedRecord]:
        """Live seeds whose fate is open."""
        return self.book.in_state(SeedState.GERMINATED, SeedState.TRAINING, SeedState.GRAFTING)

    # -- parts ------------------------------------------------------------------------------

    def _measured(
        self, without: Sequence[float], with_seed: Sequence[float], record: SeedRecord
    ) -> Measurement | None:
        return rules.paired_measurement(
            without,
            with_seed,
            rent=record.rent,
            confidence_level=self._gates.confidence_level,
        )

    def _blend(self, record: SeedRecord) -> None:
        record.alpha = ramped_alpha(record.age_epochs, self._gates.ramp_epochs)
        self._engine.model.morphology.set_alpha(record.layer, record.slot, record.alpha)

    def _move(self, record: SeedRecord, state: SeedState, epoch: int, reason: str) -> None:
        previous = record.state
        self._engine.model.morphology.transition(
            record.layer, record.slot, lifecycle(state.value), alpha=record.alpha
        )
        record.state, record.age_epochs = state, 0
        self.book.update_trial(record, epoch)
        self._told(record, previous, epoch, reason)

    def _told(self, record: SeedRecord, previous: SeedState, epoch: int, reason: str) -> None:
        record.reason = reason
        transition = SeedTransition(
            session=self._config.session,
            epoch=epoch,
            layer=record.layer,
            slot=record.slot,
            cycle=record.cycle,
            previous=previous,
            current=record.state,
            blueprint=record.blueprint or None,
            kernel=record.kernel or None,
            reason=reason,
            measurement=record.measurement,
        )
        # A seed's whole life is told under the trace of the health signals it began with.
        with tracing(record.trace_id) if record.trace_id else nullcontext():
            self._tell(transition)


def _unexpected(error: Exception) -> str:
    return f"unexpected {type(error).__name__}: {one_line(str(error))}"
