"""What every policy asks of a packet: where there is room, in slots, in budget and in time.

The control arms share these rules with the heuristic. They differ from it in what they choose,
never in what they know about the clock or the budget, so that a comparison is about the choice.
"""

from __future__ import annotations

from collections.abc import Callable

from esper.contracts.enums import DecisionAction, SeedState
from esper.contracts.operational import (
    AdaptationDecision,
    Candidate,
    ControllerSettings,
    ModelGraphState,
    SeedObservation,
    SystemStatePacket,
)
from esper.services.tamiyo.analyzer import ACTIVE_STATES

Policy = Callable[[SystemStatePacket, ModelGraphState], AdaptationDecision]
"""One decision for one packet; equal arguments give an equal decision."""


def free_slot(packet: SystemStatePacket, layer: str) -> int | None:
    """The lowest slot of `layer` that a seed may germinate in, or None.

    A slot is free when no seed has left dormancy there; a fossilized seed stays for good, and a
    culled one until its embargo ends.
    """
    taken = {
        seed.slot
        for seed in packet.seeds
        if seed.layer == layer and seed.state is not SeedState.DORMANT
    }
    for description in packet.layers:
        if description.name == layer:
            return next((slot for slot in range(description.slots) if slot not in taken), None)
    return None


def affordable(packet: SystemStatePacket, candidate: Candidate) -> bool:
    """Whether the parameter budget has room for `candidate`."""
    return candidate.parameters <= packet.remaining_parameters


def openings(packet: SystemStatePacket) -> list[Candidate]:
    """The candidates that are affordable and have a free slot, in the packet's order."""
    return [
        candidate
        for candidate in packet.candidates
        if affordable(packet, candidate) and free_slot(packet, candidate.layer) is not None
    ]


def active_seeds(packet: SystemStatePacket) -> list[SeedObservation]:
    """The seeds that are germinated, training or grafting, in the packet's order."""
    return [seed for seed in packet.seeds if seed.state in ACTIVE_STATES]


def ready_seeds(packet: SystemStatePacket) -> list[SeedObservation]:
    """The seeds whose trial is over and whose gate is open, in the packet's order."""
    return [seed for seed in packet.seeds if seed.state is SeedState.TRAINING and seed.ready]


def trial_epochs(settings: ControllerSettings) -> int:
    """The shortest trial that can open the gate: the dwell, or the passes one interval each."""
    return max(settings.dwell_epochs, settings.passes * settings.interval_epochs)


def graft_epochs(settings: ControllerSettings) -> int:
    """Epochs from a graft decision to its verdict: ramp, hold, and the recovery interval."""
    return settings.ramp_epochs + settings.hold_epochs + settings.interval_epochs


def growth_epochs(settings: ControllerSettings) -> int:
    """Epochs a germination needs to be worth its FLOPs.

    A trial, a graft, and then at least as long as the trial to repay what the trial cost.
    """
    return 2 * trial_epochs(settings) + graft_epochs(settings)


def counted(count: int, noun: str) -> str:
    """`count` with `noun` in singular or plural."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def describe(seed: SeedObservation) -> str:
    """The seed as a sentence names it."""
    return f"{seed.blueprint or 'an unnamed blueprint'} at {seed.layer}"


def outgrown(packet: SystemStatePacket, seed: SeedObservation) -> str:
    """Why a seed is culled that was affordable once, as a sentence."""
    return (
        f"{describe(seed)} takes {counted(seed.parameters, 'parameter')}, and growth elsewhere has"
        f" left {packet.remaining_parameters}."
    )


def wait(packet: SystemStatePacket, reason: str) -> AdaptationDecision:
    """Change nothing at this boundary."""
    return AdaptationDecision.make(packet, DecisionAction.WAIT, reason)


def germinate(packet: SystemStatePacket, candidate: Candidate, reason: str) -> AdaptationDecision:
    """Plant `candidate` in its layer's lowest free slot, which must exist."""
    return AdaptationDecision.make(
        packet,
        DecisionAction.GERMINATE,
        reason,
        layer=candidate.layer,
        slot=free_slot(packet, candidate.layer),
        blueprint=candidate.blueprint,
    )


def change(
    packet: SystemStatePacket,
    action: DecisionAction,
    seed: SeedObservation,
    reason: str,
    *,
    confidence: float = 1.0,
) -> AdaptationDecision:
    """Graft or cull `seed`."""
    return AdaptationDecision.make(
        packet,
        action,
        reason,
        confidence=confidence,
        layer=seed.layer,
        slot=seed.slot,
        blueprint=seed.blueprint,
    )
