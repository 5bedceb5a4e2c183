"""Every value does something, and nothing else is taken."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import reduce
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.unit.charts.objects import BUCKET, EXTERNAL, OTHERS, POSTGRES, RELEASES, leaves
from tools import chart, helm
from tools.helm import HelmError

DEFAULTS: dict[str, Any] = yaml.safe_load((helm.CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((helm.CHART / "values.schema.json").read_text())
# A Secret would be made anew by each rendering, and all of them would differ; the definitions are
# long.
BASE: dict[str, Any] = {"credentials": {"existingSecret": "own"}, "crds": {"install": False}}
WITH: dict[str, dict[str, Any]] = {
    "urza.database": {"urza": {"database": POSTGRES}},
    "urza.storage": {"urza": {"storage": BUCKET}},
    "urza.replicas": {"urza": {"database": POSTGRES, "storage": BUCKET}},
    "redis.external": {"redis": EXTERNAL},
    "metrics.serviceMonitor.": {"metrics": {"serviceMonitor": {"enabled": True}}},
}
"""What must be set for those that begin so to mean anything."""
TOLERATIONS = [{"key": "pool", "operator": "Exists"}]
EGRESS = [{"ports": [{"port": 443, "protocol": "TCP"}]}]
OTHER: dict[str, Any] = {
    "images.control.pullPolicy": "Never",
    "images.runtime.pullPolicy": "Never",
    "images.redis.pullPolicy": "Never",
    "images.control.digest": f"sha256:{'1' * 64}",
    "images.runtime.digest": f"sha256:{'1' * 64}",
    "images.redis.digest": f"sha256:{'1' * 64}",
    "imagePullSecrets": [{"name": "pull"}],
    "operator.tolerations": TOLERATIONS,
    "urza.tolerations": TOLERATIONS,
    "redis.tolerations": TOLERATIONS,
    "networkPolicy.hubEgress": EGRESS,
    "networkPolicy.workerEgress": EGRESS,
    "operator.logLevel": "debug",
    "urza.logLevel": "debug",
    "operator.settings": {"operator": {"workers": 3}},
    "urza.settings": {"urza": {"lease_seconds": 90}},
    "urza.storage.checksum": "none",
    "urza.storage.endpointUrl": "https://other",
    "redis.bundled": EXTERNAL,
    "redis.external.url": "rediss://other",
    "redis.maxMemory": "1gb",
    "redis.maxMessage": "2mb",
    "redis.appendFsync": "no",
    "networkPolicy.apiServer.cidrs": ["10.0.0.0/8"],
    "networkPolicy.apiServer.ports": [1],
    "metrics.serviceMonitor.interval": "5s",
}
"""Values of another form than `changed` would give."""
PATHS = sorted(".".join(path) for path in leaves(DEFAULTS))


def changed(path: str) -> Any:
    default = reduce(lambda at, name: at[name], path.split("."), DEFAULTS)
    if path in OTHER:
        return OTHER[path]
    if isinstance(default, bool):
        return path == "crds.install" or not default
    if isinstance(default, int):
        return default + 1
    if path.endswith(("cpu", "memory", "size")):
        return "3Gi"
    if isinstance(default, str):
        return "other"
    if isinstance(default, list):
        return ["other"] if path.lower().endswith("namespaces") else [{"podSelector": {}}]
    return {"podAffinity": {}} if path.endswith("affinity") else {"other": "value"}


def laid(path: str, value: Any) -> dict[str, Any]:
    """Values with that one at that path; a mapping for a switch takes its section's place."""
    names = path.split(".")
    if path == "redis.bundled":
        names = names[:1]
    return reduce(lambda inner, name: {name: inner}, reversed(names), value)


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    both = {name: merged(one[name], other[name]) for name in one.keys() & other.keys()
            if isinstance(one[name], dict) and isinstance(other[name], dict)}  # fmt: skip
    return {**one, **other, **both}


@pytest.mark.parametrize("path", PATHS)
def test_every_value_changes_what_is_rendered_to_something_valid(path: str) -> None:
    given = [
        values
        for start, values in WITH.items()
        if path.startswith(start) and path != "metrics.serviceMonitor.enabled"
    ]
    base = reduce(merged, given, BASE)
    if path == "operator.namespaces":
        base = merged(base, {"operator": {"namespaced": True}})
    before, after = helm.render(base), helm.render(merged(base, laid(path, changed(path))))
    assert after != before
    for each in after:
        if each not in before and each["apiVersion"] not in OTHERS:
            for release in (RELEASES[0], RELEASES[-1]):
                kubernetes_validate.validate(each, release, strict=True)


def test_the_schema_knows_the_values_and_no_others() -> None:
    assert sorted(_described(SCHEMA)) == sorted(_named(DEFAULTS))


def _resolved(schema: dict[str, Any]) -> dict[str, Any]:
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return SCHEMA["$defs"][name] if name else schema


def _described(schema: dict[str, Any], at: str = "") -> Iterator[str]:
    for name, inner in _resolved(schema).get("properties", {}).items():
        path = f"{at}.{name}".removeprefix(".")
        # Helm's own for subcharts; and what the pods' resources may have besides.
        if path == "global" or path.endswith("resources.claims"):
            continue
        yield path
        yield from _described(inner, path)


def _named(values: dict[str, Any], at: str = "") -> Iterator[str]:
    for name, inner in values.items():
        path = f"{at}.{name}".removeprefix(".")
        yield path
        if isinstance(inner, dict) and not path.endswith((".requests", ".limits")):
            yield from _named(inner, path)


SECTIONS = sorted({path.rpartition(".")[0] for path in _described(SCHEMA)})


@pytest.mark.parametrize("section", SECTIONS)
def test_a_key_that_is_none_is_refused(section: str) -> None:
    names = [*filter(None, section.split(".")), "surprise"]
    with pytest.raises(HelmError, match="additional properties 'surprise' not allowed"):
        helm.render(laid(".".join(names), 1))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"operator": {"replicas": "2"}}, "/operator/replicas"),
        ({"operator": {"namespaces": ["Team"]}}, "/operator/namespaces/0"),
        ({"operator": {"settings": {"operators": {}}}}, "invalid propertyName 'operators'"),
        ({"operator": {"settings": {"operator": {"workers": [1]}}}}, "settings/operator/workers"),
        ({"images": {"redis": {"tag": "a:b"}}}, "/images/redis/tag"),
        ({"imagePullSecrets": ["name"]}, "/imagePullSecrets/0"),
        ({"redis": {"bundled": False}}, "/redis/external/url"),
        ({"redis": {"external": {"url": "redis://user:secret@host"}}}, "/redis/external/url"),
        ({"redis": {"maxMemory": "1Gi"}}, "/redis/maxMemory"),
        ({"urza": {"storage": {"endpointUrl": "minio:9000"}}}, "/urza/storage/endpointUrl"),
        ({"networkPolicy": {"apiServer": {"cidrs": ["everywhere"]}}}, "/apiServer/cidrs/0"),
        ({"urza": {"resources": {"requests": {"cpu": "much"}}}}, "/urza/resources/requests/cpu"),
    ],
)
def test_a_wrong_value_is_named(values: dict[str, Any], said: str) -> None:
    with pytest.raises(HelmError, match=said):
        helm.render(values)


def test_every_value_is_explained() -> None:
    explained = {name for name, _, _ in chart.values()}
    closed = {path for path in PATHS if ".resources." not in path}
    closed |= {f"{name}.resources" for name in ("operator", "urza", "redis")}
    assert closed <= explained
    assert all(said.endswith(".") or "`" in said for _, _, said in chart.values())
