"""The policy `random`: the heuristic's budget spent on candidates drawn by lot.

The control for the choice itself: whatever the survey gains over it comes from measuring, not
from having more parameters.
"""

from __future__ import annotations

from esper.contracts.base import digest_of
from esper.contracts.operational import AdaptationDecision, ModelGraphState, SystemStatePacket
from esper.services.tamiyo.policies.room import germinate, openings, wait
from esper.services.tamiyo.policies.unsurveyed import grafting_at_once, obstacle


def decide(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision:
    """Graft what is ready, else germinate a candidate drawn uniformly from those that fit.

    The draw is the SHA-256 of the session's seed, the epoch and the number of trials so far,
    modulo the number of candidates: the same on every machine and Python version, with a bias
    below 2**-200. The trials tell apart the draws of one epoch, at which several seats may fill.
    """
    if graft := grafting_at_once(packet):
        return graft
    if reason := obstacle(packet):
        return wait(packet, reason)
    fitting = openings(packet)
    draw = int(digest_of([packet.settings.seed, packet.epoch, len(packet.trials)]), 16)
    candidate = fitting[draw % len(fitting)]
    return germinate(
        packet,
        candidate,
        f"Drawn by lot: {candidate.blueprint} at {candidate.layer}, one of {len(fitting)}"
        f" candidates that fit the {packet.remaining_parameters} parameters left.",
    )
