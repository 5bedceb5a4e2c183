"""What a container finds in its environment, from what its pod says."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Object = Mapping[str, Any]
Lookup = Callable[[str, str], Awaitable[Object | None]]
"""An object by kind (secrets, configmaps) and name, or None."""

_REFERENCE = re.compile(r"\$\$|\$\((?P<name>[-._a-zA-Z][-._a-zA-Z0-9]*)\)")
_LABELLED = re.compile(r"metadata\.(?P<field>labels|annotations)\['(?P<key>[^']+)'\]")
_SUFFIXES = {
    "": 1.0,
    "m": 1e-3,
    **{letter: 1000.0**n for n, letter in enumerate("kMGTPE", 1)},
    **{f"{letter}i": 1024.0**n for n, letter in enumerate("KMGTPE", 1)},
}


class UnresolvedError(Exception):
    """Something that an environment refers to is not there; the message is a kubelet's."""


def quantity(text: object) -> float:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it is none.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([a-zA-Z]*)", str(text))
    if found is None or found[2] not in _SUFFIXES:
        raise ValueError(f"got {text!r}; allowed: a quantity such as 500m or 4Gi")
    return float(found[1]) * _SUFFIXES[found[2]]


def expanded(text: str, values: Mapping[str, str]) -> str:
    """`text` with $(NAME) replaced where there is such a value; $$ stands for $."""

    def value(found: re.Match[str]) -> str:
        return "$" if found[0] == "$$" else values.get(found["name"], found[0])

    return _REFERENCE.sub(value, text)


def field(pod: Object, path: str) -> str:
    """What `fieldRef` names.

    Raises:
        UnresolvedError: a kubelet knows no such field.
    """
    labelled = _LABELLED.fullmatch(path)
    if labelled:
        return str(pod["metadata"].get(labelled["field"], {}).get(labelled["key"], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        entries = pod["metadata"].get(path.rsplit(".")[-1], {})
        return "\n".join(f'{key}="{value}"' for key, value in sorted(entries.items()))
    found = {
        "metadata.name": pod["metadata"].get("name"),
        "metadata.namespace": pod["metadata"].get("namespace"),
        "metadata.uid": pod["metadata"].get("uid"),
        "spec.nodeName": pod["spec"].get("nodeName"),
        "spec.serviceAccountName": pod["spec"].get("serviceAccountName"),
        "status.hostIP": pod.get("status", {}).get("hostIP"),
        "status.podIP": pod.get("status", {}).get("podIP"),
        "status.podIPs": pod.get("status", {}).get("podIP"),
    }
    if path not in found:
        raise UnresolvedError(f"unsupported fieldPath: {path}")
    return str(found[path] or "")


def resource(container: Object, reference: Object) -> str:
    """What `resourceFieldRef` names: a limit or a request, in units of its divisor, rounded up."""
    side, _, name = reference["resource"].partition(".")
    resources = container.get("resources", {})
    amount = resources.get(side, {}).get(name) or resources.get("limits", {}).get(name) or "0"
    divisor = quantity(reference.get("divisor") or "1") or 1.0
    return str(math.ceil(quantity(amount) / divisor))


async def environment_of(
    pod: Object, container: Object, lookup: Lookup, given: Mapping[str, str]
) -> dict[str, str]:
    """The variables of one container, on top of those `given` by its image and the node.

    Raises:
        UnresolvedError: an object or a key that must be there is not.
    """
    values = dict(given)
    for source in container.get("envFrom", ()):
        for key, value in (await _all_of(source, lookup)).items():
            values[source.get("prefix", "") + key] = value
    for variable in container.get("env", ()):
        if "valueFrom" in variable:
            found = await _value(pod, container, variable["valueFrom"], lookup)
            if found is not None:
                values[variable["name"]] = found
        else:
            values[variable["name"]] = expanded(variable.get("value", ""), values)
    return values


async def _all_of(source: Object, lookup: Lookup) -> dict[str, str]:
    for field_name, kind, singular in (
        ("secretRef", "secrets", "secret"),
        ("configMapRef", "configmaps", "configmap"),
    ):
        if field_name in source:
            reference = source[field_name]
            found = await lookup(kind, reference["name"])
            if found is None and not reference.get("optional"):
                raise UnresolvedError(f'{singular} "{reference["name"]}" not found')
            return texts(found or {})
    return {}


async def _value(pod: Object, container: Object, source: Object, lookup: Lookup) -> str | None:
    if "fieldRef" in source:
        return field(pod, source["fieldRef"]["fieldPath"])
    if "resourceFieldRef" in source:
        return resource(container, source["resourceFieldRef"])
    name, kind, singular, title = (
        ("secretKeyRef", "secrets", "secret", "Secret")
        if "secretKeyRef" in source
        else ("configMapKeyRef", "configmaps", "configmap", "ConfigMap")
    )
    reference = source[name]
    found = await lookup(kind, reference["name"])
    if found is not None and reference["key"] in (entries := texts(found)):
        return entries[reference["key"]]
    if reference.get("optional"):
        return None
    if found is None:
        raise UnresolvedError(f'{singular} "{reference["name"]}" not found')
    place = f"{pod['metadata']['namespace']}/{reference['name']}"
    raise UnresolvedError(f"couldn't find key {reference['key']} in {title} {place}")


def texts(found: Object) -> dict[str, str]:
    """The entries of a Secret or ConfigMap that are text."""
    return {key: value.decode(errors="surrogateescape") for key, value in contents(found).items()}


def contents(found: Object) -> dict[str, bytes]:
    """The entries of a Secret or ConfigMap."""
    plain = found.get("kind") == "ConfigMap"
    entries = {
        key: value.encode() if plain else base64.b64decode(value)
        for key, value in (found.get("data") or {}).items()
    }
    return entries | {
        key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()
    }
