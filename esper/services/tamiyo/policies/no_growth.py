"""The policy `none`: seeds stay dormant, which makes the run a control without growth."""

from __future__ import annotations

from esper.contracts.operational import AdaptationDecision, ModelGraphState, SystemStatePacket
from esper.services.tamiyo.policies.room import wait


def decide(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision:
    """Always wait."""
    return wait(packet, "The policy is none, so nothing grows in this session.")
