"""The other kinds: Blueprint, Seed, CompiledKernel."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from esper.contracts.enums import SeedState
from esper.contracts.resources import Blueprint, CompiledKernel, Seed
from esper.errors import BlueprintError


def _blueprint(**spec: object) -> Blueprint:
    return Blueprint.model_validate(
        {
            "apiVersion": "esper.dev/v1alpha1",
            "kind": "Blueprint",
            "metadata": {"name": "mine"},
            "spec": spec,
        }
    )


GRAPH = {
    "nodes": [
        {"op": "input", "id": "x"},
        {"op": "linear", "id": "y", "input": "x", "features": "out"},
    ],
    "output": "y",
}
TARGET = {
    "layer": {"kind": "Linear", "inputs": 4, "outputs": 3},
    "inputShape": [4],
    "outputShape": [3],
}


def test_a_blueprint_of_its_own_becomes_a_document() -> None:
    document = _blueprint(description="mine", hosts=["Linear"], graph=GRAPH).document()
    assert (document.name, document.description, document.hosts) == ("mine", "mine", ("Linear",))
    assert document.graph.output == "y"


def test_a_built_in_blueprint_is_expanded_under_its_own_name() -> None:
    narrow = _blueprint(builtin="low-rank", arguments={"rank": 2}, hosts=["Conv2d"]).document()
    assert (narrow.name, narrow.hosts) == ("mine", ("Conv2d",))
    assert narrow.description
    wide = _blueprint(builtin="low-rank", description="own words").document()
    assert (wide.hosts, wide.description) == (
        ("Linear", "Conv1d", "Conv2d", "Embedding"),
        "own words",
    )
    assert narrow.digest != wide.digest


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"builtin": "nothing-such"}, "spec.builtin"),
        ({"builtin": "low-rank", "arguments": {"rank": 0}}, "spec.arguments.rank"),
        ({"builtin": "low-rank", "arguments": {"units": 1}}, "spec.arguments.units"),
        ({"builtin": "bottleneck-mlp", "hosts": ["Conv2d"]}, "spec.hosts"),
    ],
)
def test_an_unknown_built_in_is_refused(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(BlueprintError) as caught:
        _blueprint(**spec).document()
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        ({"builtin": "noop", "graph": GRAPH, "hosts": ["Linear"]}, "builtin"),
        ({}, "graph"),
        ({"graph": GRAPH, "hosts": ["Linear"], "arguments": {"rank": 1}}, "arguments"),
        ({"graph": GRAPH}, "hosts"),
        ({"graph": GRAPH, "hosts": ["Linear", "Linear"]}, "hosts"),
    ],
)
def test_a_blueprint_has_one_source(spec: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        _blueprint(**spec)
    (error,) = caught.value.errors()
    assert error["ctx"]["field"] == field


def test_seeds_and_kernels_are_resources_too() -> None:
    header = {"apiVersion": "esper.dev/v1alpha1"}
    seed = Seed.model_validate(
        {
            **header,
            "kind": "Seed",
            "metadata": {"name": "mnist1d-0a1b2c-0", "labels": {"esper.dev/session": "mnist1d"}},
            "spec": {"session": "mnist1d", "layer": "fc1", "slot": 0},
            "status": {
                "state": "training",
                "contribution": "0.01",
                "transitions": [
                    {
                        "time": "2026-01-31T12:00:00Z",
                        "epoch": 1,
                        "previous": "dormant",
                        "current": "germinated",
                    }
                ],
            },
        }
    )
    assert seed.status is not None
    assert seed.status.state is SeedState.TRAINING
    kernel = CompiledKernel.model_validate(
        {
            **header,
            "kind": "CompiledKernel",
            "metadata": {"name": "0a1b2c"},
            "spec": {"blueprint": "low-rank", "target": TARGET},
            "status": {"digest": "0" * 64, "bytes": 10, "latencyMicroseconds": 3},
        }
    )
    assert kernel.spec.target.layer.inputs == 4
    for resource in (seed, kernel):
        assert type(resource).model_validate(resource.to_wire()) == resource
