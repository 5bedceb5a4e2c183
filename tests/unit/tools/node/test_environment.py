"""A container's variables: plain, expanded, from fields, Secrets and ConfigMaps."""

import asyncio
import base64

import pytest

from tools.cluster.node.environment import (
    UnresolvedError,
    environment_of,
    expanded,
    field,
    quantity,
    resource,
)

POD = {
    "metadata": {
        "name": "one-0",
        "namespace": "lab",
        "uid": "u1",
        "labels": {"batch.kubernetes.io/job-completion-index": "3", "a": "b"},
        "annotations": {"note": "n"},
    },
    "spec": {"nodeName": "node-1", "serviceAccountName": "default"},
    "status": {"podIP": "127.9.9.9", "hostIP": "127.0.0.1"},
}
OBJECTS = {
    ("secrets", "keys"): {
        "kind": "Secret",
        "data": {"token": base64.b64encode(b"abc").decode(), "user": "bWU="},
    },
    ("configmaps", "settings"): {"kind": "ConfigMap", "data": {"level": "info", "user": "you"}},
}


async def lookup(kind, name):
    return OBJECTS.get((kind, name))


def found(container, given=None):
    return asyncio.run(environment_of(POD, container, lookup, given or {}))


def reference(kind, name, key, **more):
    return {"env": [{"name": "X", "valueFrom": {kind: {"name": name, "key": key, **more}}}]}


def test_later_sources_and_variables_win_and_see_what_came_before():
    container = {
        "envFrom": [
            {"secretRef": {"name": "keys"}},
            {"configMapRef": {"name": "settings"}},
            {"configMapRef": {"name": "settings"}, "prefix": "P_"},
            {"secretRef": {"name": "none", "optional": True}},
        ],
        "env": [
            {"name": "token", "value": "$(user)-$(level)-$(later)-$$(user)"},
            {"name": "later", "value": "now"},
            {"name": "bare"},
        ],
    }
    assert found(container, {"PATH": "/bin", "user": "image"}) == {
        "PATH": "/bin",
        "user": "you",
        "token": "you-info-$(later)-$(user)",
        "level": "info",
        "P_level": "info",
        "P_user": "you",
        "later": "now",
        "bare": "",
    }


def test_keys_of_secrets_and_config_maps():
    assert found(reference("secretKeyRef", "keys", "token")) == {"X": "abc"}
    assert found(reference("configMapKeyRef", "settings", "level")) == {"X": "info"}
    assert found(reference("configMapKeyRef", "settings", "no", optional=True)) == {}
    assert found(reference("secretKeyRef", "no", "no", optional=True)) == {}


@pytest.mark.parametrize(
    ("container", "message"),
    [
        (reference("secretKeyRef", "no", "a"), 'secret "no" not found'),
        (reference("configMapKeyRef", "no", "a"), 'configmap "no" not found'),
        (
            reference("secretKeyRef", "keys", "no"),
            "couldn't find key no in Secret lab/keys",
        ),
        ({"envFrom": [{"secretRef": {"name": "no"}}]}, 'secret "no" not found'),
        ({"envFrom": [{"configMapRef": {"name": "no"}}]}, 'configmap "no" not found'),
    ],
)
def test_what_is_not_there_is_named_as_a_kubelet_does(container, message):
    with pytest.raises(UnresolvedError) as missing:
        found(container)
    assert str(missing.value) == message


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("metadata.name", "one-0"),
        ("metadata.namespace", "lab"),
        ("metadata.uid", "u1"),
        ("metadata.labels['batch.kubernetes.io/job-completion-index']", "3"),
        ("metadata.labels['none']", ""),
        ("metadata.annotations['note']", "n"),
        ("metadata.annotations", 'note="n"'),
        ("spec.nodeName", "node-1"),
        ("status.podIP", "127.9.9.9"),
        ("status.hostIP", "127.0.0.1"),
    ],
)
def test_fields(path, value):
    assert field(POD, path) == value


def test_an_unknown_field_is_refused():
    with pytest.raises(UnresolvedError, match=r"unsupported fieldPath: spec\.hostname"):
        field(POD, "spec.hostname")


def test_resources_are_rounded_up_in_units_of_the_divisor():
    container = {"resources": {"limits": {"cpu": "1500m", "memory": "1Gi"}}}
    assert resource(container, {"resource": "limits.cpu"}) == "2"
    assert resource(container, {"resource": "limits.cpu", "divisor": "1m"}) == "1500"
    assert resource(container, {"resource": "requests.memory", "divisor": "1Mi"}) == "1024"
    assert resource(container, {"resource": "limits.nvidia.com/gpu"}) == "0"


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("500m", 0.5), ("4Gi", 4 * 2**30), ("1.5G", 1.5e9), ("1e3", 1000), (3, 3)],
)
def test_quantities(text, number):
    assert quantity(text) == pytest.approx(number)


@pytest.mark.parametrize("text", ["", "x", "1Q", "-1"])
def test_what_is_no_quantity_is_refused(text):
    with pytest.raises(ValueError, match="a quantity such as"):
        quantity(text)


def test_unknown_references_stay():
    assert expanded("$(A) $(B) $$(A) $A", {"A": "1"}) == "1 $(B) $(A) $A"
