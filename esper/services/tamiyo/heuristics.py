"""The decision policies by the name a session gives them."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from esper.contracts.enums import ControllerPolicy
from esper.contracts.operational import AdaptationDecision, ModelGraphState, SystemStatePacket
from esper.services.tamiyo.policies import no_growth, periodic, random_growth, survey
from esper.services.tamiyo.policies.room import Policy

__all__ = ["POLICIES", "Policy", "decide"]

POLICIES: Mapping[ControllerPolicy, Policy] = MappingProxyType(
    {
        ControllerPolicy.HEURISTIC: survey.decide,
        ControllerPolicy.PERIODIC: periodic.decide,
        ControllerPolicy.RANDOM: random_growth.decide,
        ControllerPolicy.NONE: no_growth.decide,
    }
)


def decide(packet: SystemStatePacket, state: ModelGraphState) -> AdaptationDecision:
    """The decision of the policy that the packet's session names."""
    return POLICIES[packet.settings.policy](packet, state)
