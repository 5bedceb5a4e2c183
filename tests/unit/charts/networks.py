"""What NetworkPolicies let through, as the API says that a network enforces them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tests.unit.charts.objects import Object, of_kind, selects


@dataclass(frozen=True)
class Pod:
    """A pod by what policies know of it."""

    namespace: str
    labels: dict[str, str] = field(default_factory=dict)
    address: str = "10.244.0.9"


@dataclass(frozen=True)
class Outside:
    """An address that is no pod's."""

    address: str


def lets(
    policies: list[Object], source: Pod, target: Pod | Outside, port: int, protocol: str = "TCP"
) -> bool:
    """Whether `source` may connect to `target`: its own policies and the target's let it."""
    leaving = _allowed(policies, "Egress", source, target, port, protocol)
    if isinstance(target, Outside):
        return leaving
    return leaving and _allowed(policies, "Ingress", target, source, port, protocol)


def _allowed(
    policies: list[Object], way: str, own: Pod, other: Pod | Outside, port: int, protocol: str
) -> bool:
    about = [
        policy
        for policy in of_kind(policies, "NetworkPolicy")
        if way in policy["spec"]["policyTypes"]
        and policy["metadata"]["namespace"] == own.namespace
        and selects(policy["spec"]["podSelector"], own.labels)
    ]
    if not about:
        return True  # whom no policy selects may do anything
    peers = "from" if way == "Ingress" else "to"
    return any(
        _at(rule.get("ports"), port, protocol)
        and _among(rule.get(peers), other, policy["metadata"]["namespace"])
        for policy in about
        for rule in policy["spec"].get(way.lower(), ())
    )


def _at(ports: list[Any] | None, port: int, protocol: str) -> bool:
    if not ports:
        return True
    return any(
        each.get("port") in {None, port} and each.get("protocol", "TCP") == protocol
        for each in ports
    )


def _among(peers: list[Object] | None, other: Pod | Outside, namespace: str) -> bool:
    return not peers or any(_is(peer, other, namespace) for peer in peers)


def _is(peer: Object, other: Pod | Outside, namespace: str) -> bool:
    if "ipBlock" in peer:
        block = ipaddress.ip_network(peer["ipBlock"]["cidr"])
        return ipaddress.ip_address(other.address) in block
    if isinstance(other, Outside):
        return False
    if "namespaceSelector" in peer:
        labels = {"kubernetes.io/metadata.name": other.namespace}
        placed = selects(peer["namespaceSelector"], labels)
    else:
        placed = other.namespace == namespace
    return placed and selects(peer.get("podSelector", {}), other.labels)
