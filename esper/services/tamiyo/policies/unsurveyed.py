"""What the control policies share: they graft whatever passes its gate, without comparing."""

from __future__ import annotations

from esper.contracts.enums import DecisionAction
from esper.contracts.operational import AdaptationDecision, SystemStatePacket
from esper.services.tamiyo.policies.room import (
    active_seeds,
    change,
    counted,
    describe,
    graft_epochs,
    growth_epochs,
    openings,
    outgrown,
    ready_seeds,
)


def grafting_at_once(packet: SystemStatePacket) -> AdaptationDecision | None:
    """The graft of the first ready seed, or None without one or without time for its verdict.

    A ready seed that the budget has no room for any more is culled, so that it holds no seat.
    """
    ready = ready_seeds(packet)
    if not ready or packet.remaining_epochs < graft_epochs(packet.settings):
        return None
    seed = ready[0]
    if seed.parameters > packet.remaining_parameters:
        return change(packet, DecisionAction.CULL, seed, outgrown(packet, seed))
    gain = f" at {seed.measurement.mean:.3f} nats" if seed.measurement else ""
    return change(
        packet,
        DecisionAction.GRAFT,
        seed,
        f"{describe(seed)} has passed its gate{gain}; this policy grafts whatever is ready.",
    )


def obstacle(packet: SystemStatePacket) -> str | None:
    """Why nothing can germinate now, as a sentence, or None when there is room."""
    settings = packet.settings
    active = len(active_seeds(packet))
    if active >= settings.active_seeds:
        return f"All seats are taken: {active} active seeds of {settings.active_seeds} allowed."
    needed = growth_epochs(settings)
    if packet.remaining_epochs < needed:
        return (
            f"A trial with its graft and payback takes {counted(needed, 'epoch')} and"
            f" {packet.remaining_epochs} are left."
        )
    if not openings(packet):
        return (
            f"None of {counted(len(packet.candidates), 'candidate')} has a free slot and fits the"
            f" {counted(packet.remaining_parameters, 'parameter')} left."
        )
    return None
