"""The policy `periodic`: grow on a clock, whatever the measurements say.

A plain clock is the control that matters most. Published growth triggers that wait for a plateau
lose to it, so a heuristic that can't beat a clock has learned nothing about where growth pays.
"""

from __future__ import annotations

from esper.contracts.operational import (
    AdaptationDecision,
    Candidate,
    ModelGraphState,
    SystemStatePacket,
)
from esper.services.tamiyo.policies.room import germinate, openings, wait
from esper.services.tamiyo.policies.unsurveyed import grafting_at_once, obstacle


def decide(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision:
    """Graft what is ready, else germinate the next candidate when its time has come.

    Germinations are at least `dwell_epochs` (and at least 1) epochs apart. Candidates come in
    round robin over the packet's order; the number of trials so far is the cursor, and one that
    does not fit is passed over.
    """
    if graft := grafting_at_once(packet):
        return graft
    period = max(packet.settings.dwell_epochs, 1)
    last = max((trial.started_epoch for trial in packet.trials), default=0)
    if packet.epoch - last < period:
        due = last + period
        return wait(packet, f"The next germination is due at epoch {due}, one every {period}.")
    if reason := obstacle(packet):
        return wait(packet, reason)
    candidate = _next(packet)
    turn = len(packet.trials) + 1
    return germinate(
        packet,
        candidate,
        f"Turn {turn}: {candidate.blueprint} at {candidate.layer} is next in round robin over"
        f" {len(packet.candidates)} candidates, one every {period} epochs.",
    )


def _next(packet: SystemStatePacket) -> Candidate:
    fitting = openings(packet)
    cursor = len(packet.trials) % len(packet.candidates)
    rotated = packet.candidates[cursor:] + packet.candidates[:cursor]
    return next(candidate for candidate in rotated if candidate in fitting)
