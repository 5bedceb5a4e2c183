"""Whether a pod may run on this node. A pure function, and no scheduler: the first node takes it.

What counts: schedulability, node selector, required node affinity by In, NotIn, Exists and
DoesNotExist, taints, and requests of resources. Priorities, preemption, spreading and affinity
between pods do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tools.cluster.node.environment import quantity

Object = Mapping[str, Any]

REPELLING = ("NoSchedule", "NoExecute")


def refusal(pod: Object, node: Object, placed: Iterable[Object]) -> str | None:
    """Why the pod can't run here, in a scheduler's words, or None."""
    spec, labels = pod["spec"], node["metadata"].get("labels", {})
    if node["spec"].get("unschedulable"):
        return "node(s) were unschedulable"
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    selected = spec.get("nodeSelector", {}).items() <= labels.items()
    if not selected or (required and not _is_met(required, labels)):
        return "node(s) didn't match Pod's node affinity/selector"
    for taint in node["spec"].get("taints", ()):
        if taint["effect"] in REPELLING and not _is_tolerated(taint, spec.get("tolerations", ())):
            return f"node(s) had untolerated taint(s) {{{taint['key']}: {taint.get('value', '')}}}"
    used = [requests(other) for other in placed]
    for name, wanted in requests(pod).items():
        there = quantity(node["status"].get("allocatable", {}).get(name, "0"))
        if wanted > there - sum(other.get(name, 0.0) for other in used):
            return f"Insufficient {name}"
    return None


def requests(pod: Object) -> dict[str, float]:
    """What a pod asks for: its containers together, or its hungriest init container."""
    spec = pod["spec"]
    total: dict[str, float] = {"pods": 1.0}
    for container in spec["containers"]:
        for name, amount in _requests(container).items():
            total[name] = total.get(name, 0.0) + amount
    for container in spec.get("initContainers", ()):
        for name, amount in _requests(container).items():
            total[name] = max(total.get(name, 0.0), amount)
    return total


def _requests(container: Object) -> dict[str, float]:
    resources = container.get("resources", {})
    asked = {**resources.get("limits", {}), **resources.get("requests", {})}
    return {name: quantity(amount) for name, amount in asked.items()}


def _is_met(required: Object, labels: Mapping[str, str]) -> bool:
    return any(
        all(_holds(one, labels) for one in term.get("matchExpressions", ()))
        for term in required["nodeSelectorTerms"]
    )


def _holds(one: Object, labels: Mapping[str, str]) -> bool:
    value, values = labels.get(one["key"]), one.get("values", ())
    return {
        "In": value in values,
        "NotIn": value not in values,
        "Exists": value is not None,
        "DoesNotExist": value is None,
    }.get(one["operator"], False)


def _is_tolerated(taint: Object, tolerations: Iterable[Object]) -> bool:
    for one in tolerations:
        if one.get("effect") not in (None, "", taint["effect"]):
            continue
        exists = one.get("operator", "Equal") == "Exists"
        if exists and one.get("key") in (None, "", taint["key"]):
            return True
        if one.get("key") == taint["key"] and one.get("value", "") == taint.get("value", ""):
            return True
    return False
