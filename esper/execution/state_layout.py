"""Where every seed stands: eight tensors for the whole model, and the host twin that code reads.

L = host layers, S = slots a layer. Each tensor is (L, S) and lies on the model's device, so that
kernels can read it; Python branches on the twin alone, because reading the device would stall it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import MappingProxyType

import torch
from torch import Tensor

from esper.contracts.enums import SeedState
from esper.errors import BadInput

FAULT_LIMIT = 3
"""Faults in a row that open a seed's circuit."""


class SeedLifecycleState(IntEnum):
    """`SeedState` as the integer that the lifecycle tensor holds."""

    DORMANT = 0
    GERMINATED = 1
    TRAINING = 2
    GRAFTING = 3
    FOSSILIZED = 4
    CULLED = 5

    @property
    def seed_state(self) -> SeedState:
        """The state as it is written on the wire."""
        return SeedState(self.name.lower())

    @classmethod
    def of(cls, state: SeedState) -> SeedLifecycleState:
        """The integer twin of `state`."""
        return cls[state.name]


TRANSITIONS: Mapping[SeedLifecycleState, frozenset[SeedLifecycleState]] = MappingProxyType(
    {
        SeedLifecycleState.DORMANT: frozenset({SeedLifecycleState.GERMINATED}),
        SeedLifecycleState.GERMINATED: frozenset(
            {SeedLifecycleState.TRAINING, SeedLifecycleState.CULLED}
        ),
        SeedLifecycleState.TRAINING: frozenset(
            {SeedLifecycleState.GRAFTING, SeedLifecycleState.CULLED}
        ),
        SeedLifecycleState.GRAFTING: frozenset(
            {SeedLifecycleState.FOSSILIZED, SeedLifecycleState.CULLED}
        ),
        SeedLifecycleState.FOSSILIZED: frozenset(),
        SeedLifecycleState.CULLED: frozenset({SeedLifecycleState.DORMANT}),
    }
)
"""From each state, the states that may follow it."""

ACTIVE_STATES = frozenset(
    {SeedLifecycleState.GERMINATED, SeedLifecycleState.TRAINING, SeedLifecycleState.GRAFTING}
)
"""States of a seed that is on trial: it has a module, and its fate is open."""

GROWN_STATES = ACTIVE_STATES | {SeedLifecycleState.FOSSILIZED}
"""States of a seed that has a module."""


def check_transition(previous: SeedLifecycleState, current: SeedLifecycleState) -> None:
    """Refuse a step that the lifecycle does not have.

    Raises:
        BadInput: `current` may not follow `previous`.
    """
    if current not in TRANSITIONS[previous]:
        allowed = ", ".join(state.seed_state for state in sorted(TRANSITIONS[previous]))
        raise BadInput(
            f"a {previous.seed_state} seed's next state", current.seed_state, allowed or "nothing"
        )


@dataclass(slots=True)
class SlotRecord:
    """The host twin of one slot.

    `alpha` in [0, 1]; `health` and `contribution` (nats per sample) are smoothed, NaN until first
    observed; `age` counts epochs in this state; `errors` faults in a row, `fallbacks` faults in
    all, each of which the host's own output answered; `fault` says what the last one was; `cycle`
    counts the lives of the slot.
    """

    state: SeedLifecycleState = SeedLifecycleState.DORMANT
    kernel: str | None = None
    alpha: float = 0.0
    health: float = math.nan
    age: int = 0
    contribution: float = math.nan
    errors: int = 0
    fallbacks: int = 0
    fault: str | None = None
    cycle: int = 0

    @property
    def circuit_open(self) -> bool:
        """Whether the seed has failed so often that the host answers alone."""
        return self.errors >= FAULT_LIMIT


class KasminaStateLayout:
    """The state of all slots, L layers with S slots each, as a structure of arrays.

    `write` is the only method that changes anything, and it changes tensor and twin together;
    the others call it. Call them at transitions and interval boundaries, never in a forward.

    Args:
        layers: how many host layers, at least 0.
        slots: how many slots a layer, at least 1.
        device: where the tensors lie.
        decay: the share of the old value that the moving averages keep, in [0, 1).
    """

    TENSORS = (
        "lifecycle",
        "kernel_id",
        "alpha",
        "health",
        "age",
        "contribution",
        "error_count",
        "fallback",
    )

    def __init__(
        self,
        layers: int,
        slots: int,
        *,
        device: torch.device | str = "cpu",
        decay: float = 0.7,
    ) -> None:
        if not 0.0 <= decay < 1.0:
            raise BadInput("decay", decay, "a number from 0 to below 1")
        shape = (layers, slots)
        self.decay = decay
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            self.lifecycle = torch.zeros(shape, dtype=torch.int8, device=device)
            self.kernel_id = torch.zeros(shape, dtype=torch.int64, device=device)
            self.alpha = torch.zeros(shape, dtype=torch.float32, device=device)
            self.health = torch.full(shape, math.nan, dtype=torch.float32, device=device)
            self.age = torch.zeros(shape, dtype=torch.int32, device=device)
            self.contribution = torch.full(shape, math.nan, dtype=torch.float32, device=device)
            self.error_count = torch.zeros(shape, dtype=torch.int32, device=device)
            self.fallback = torch.zeros(shape, dtype=torch.int32, device=device)
        self.active = 0
        self.transitions = 0
        self.noted: dict[tuple[int, int], str] | None = None
        """Where set, what seeds on trial fail at is noted here, by layer and slot, not counted."""
        self._twin = [[SlotRecord() for _ in range(slots)] for _ in range(layers)]

    @property
    def layers(self) -> int:
        """How many host layers."""
        return len(self._twin)

    @property
    def slots(self) -> int:
        """How many slots a layer."""
        return int(self.lifecycle.shape[1])

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.alpha.device

    def tensors(self) -> dict[str, Tensor]:
        """The eight tensors by name, each (L, S)."""
        return {name: getattr(self, name) for name in self.TENSORS}

    def record(self, layer: int, slot: int) -> SlotRecord:
        """The host twin of a slot: read it, never write it.

        Raises:
            BadInput: there is no such slot.
        """
        if isinstance(slot, bool) or not isinstance(slot, int) or not 0 <= slot < self.slots:
            raise BadInput("slot", slot, f"0 to {self.slots - 1}")
        return self._twin[layer][slot]

    def records(self) -> Iterator[tuple[int, int, SlotRecord]]:
        """Every slot as (layer, slot, twin), in order."""
        for layer, slots in enumerate(self._twin):
            for slot, record in enumerate(slots):
                yield layer, slot, record

    def write(
        self,
        layer: int,
        slot: int,
        *,
        state: SeedLifecycleState | None = None,
        kernel: str | None = None,
        alpha: float | None = None,
        health: float | None = None,
        age: int | None = None,
        contribution: float | None = None,
        errors: int | None = None,
        fallbacks: int | None = None,
        fault: str | None = None,
        cycle: int | None = None,
    ) -> SlotRecord:
        """Set the fields given, on the device and in the twin.

        An empty `kernel` or `fault` clears it; `fault` and `cycle` are the twin's alone.

        Raises:
            BadInput: there is no such slot, or `alpha` is not within [0, 1].
        """
        record = self.record(layer, slot)
        at = (layer, slot)
        if alpha is not None:
            if not 0.0 <= alpha <= 1.0:
                raise BadInput("alpha", alpha, "a number from 0 to 1")
            record.alpha = float(alpha)
            # A new tensor: a graph that was not walked back yet has saved views of the old one.
            with torch.inference_mode(False):
                self.alpha = self.alpha.clone()
            self.alpha[at] = record.alpha
        if state is not None:
            self.active += (state in ACTIVE_STATES) - (record.state in ACTIVE_STATES)
            record.state = state
            self.lifecycle[at] = int(state)
        if kernel is not None:
            record.kernel = kernel or None
            self.kernel_id[at] = kernel_number(record.kernel)
        if health is not None:
            record.health = health
            self.health[at] = health
        if age is not None:
            record.age = age
            self.age[at] = age
        if contribution is not None:
            record.contribution = contribution
            self.contribution[at] = contribution
        if errors is not None:
            record.errors = errors
            self.error_count[at] = errors
        if fallbacks is not None:
            record.fallbacks = fallbacks
            self.fallback[at] = fallbacks
        if fault is not None:
            record.fault = fault or None
        if cycle is not None:
            record.cycle = cycle
        return record

    def transition(
        self, layer: int, slot: int, state: SeedLifecycleState, *, alpha: float = 0.0
    ) -> SlotRecord:
        """Take one step of the lifecycle; the age starts again.

        Raises:
            BadInput: the lifecycle has no such step.
        """
        record = self.record(layer, slot)
        check_transition(record.state, state)
        self.transitions += 1
        if state is SeedLifecycleState.DORMANT:
            return self.write(
                layer,
                slot,
                state=state,
                kernel="",
                alpha=0.0,
                health=math.nan,
                age=0,
                contribution=math.nan,
                errors=0,
                fault="",
                cycle=record.cycle + 1,
            )
        return self.write(layer, slot, state=state, alpha=alpha, age=0)

    def observe(self, layer_index: int, slot: int, health: float) -> float:
        """Fold a health score in [0, 1] into the moving average, which is returned.

        A score that is not finite counts as 0: such a layer is not well.
        """
        score = health if math.isfinite(health) else 0.0
        record = self.record(layer_index, slot)
        smoothed = self._smoothed(record.health, score)
        return self.write(layer_index, slot, health=smoothed).health

    def observe_contribution(self, layer: int, slot: int, contribution: float) -> float:
        """Fold a measured contribution (nats per sample) into the average, which is returned.

        One that is not finite makes the average NaN: a missing measurement opens no gate.
        """
        if not math.isfinite(contribution):
            return self.write(layer, slot, contribution=math.nan).contribution
        record = self.record(layer, slot)
        smoothed = self._smoothed(record.contribution, contribution)
        return self.write(layer, slot, contribution=smoothed).contribution

    def advance(self, epochs: int = 1) -> None:
        """Epochs have passed: every slot that is not dormant grows that much older."""
        for layer, slot, record in self.records():
            if record.state is not SeedLifecycleState.DORMANT:
                self.write(layer, slot, age=record.age + epochs)

    def record_fault(self, layer: int, slot: int, reason: str) -> bool:
        """Count a fault of a seed; True when it was the third in a row, so its circuit is open."""
        record = self.record(layer, slot)
        errors, fallbacks = record.errors + 1, record.fallbacks + 1
        self.write(layer, slot, errors=errors, fallbacks=fallbacks, fault=reason)
        return record.circuit_open

    def clear_faults(self, layer: int, slot: int) -> None:
        """The seed has worked again: faults are counted from 0."""
        self.write(layer, slot, errors=0)

    def note_fault(self, layer: int, slot: int, reason: str) -> None:
        """A seed has failed in a forward: counted, unless faults are noted to be counted later."""
        if self.noted is None:
            self.record_fault(layer, slot, reason)
        else:
            self.noted[layer, slot] = reason

    def note_recovery(self, layer: int, slot: int) -> None:
        """A seed works again in a forward: as `note_fault`."""
        if self.noted is None:
            self.clear_faults(layer, slot)

    def counts(self) -> dict[SeedState, int]:
        """How many slots are in each state."""
        counts = dict.fromkeys(SeedState, 0)
        for _, _, record in self.records():
            counts[record.state.seed_state] += 1
        return counts

    def to(self, device: torch.device | str) -> KasminaStateLayout:
        """Move the tensors to `device`, keeping their types; returns self."""
        with torch.inference_mode(False):
            for name in self.TENSORS:
                setattr(self, name, getattr(self, name).to(device))
        return self

    def _smoothed(self, old: float, new: float) -> float:
        return new if math.isnan(old) else self.decay * old + (1.0 - self.decay) * new


def kernel_number(kernel: str | None) -> int:
    """A kernel id as the integer in the tensor: 63 bits of its SHA-256; 0 for none."""
    if kernel is None:
        return 0
    return int.from_bytes(hashlib.sha256(kernel.encode()).digest()[:8], "big") >> 1
