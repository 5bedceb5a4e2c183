"""The catalogue: what is in it, which arguments it takes, and what it costs."""

from __future__ import annotations

import pytest

from esper.contracts.blueprints import (
    BUILTIN_LABEL,
    CATALOGUE,
    BlueprintDocument,
    bind,
    builtin,
    folds,
    infer,
)
from esper.errors import BlueprintError
from tests.unit.esper.kernel_targets import conv_pair, linear_pair, linear_place

ALL = ("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d", "Embedding")


def test_the_catalogue_is_as_published() -> None:
    assert {entry.name: (entry.hosts, dict(entry.arguments)) for entry in CATALOGUE} == {
        "noop": (ALL, {}),
        "affine": (ALL, {}),
        "low-rank": (
            ("Linear", "Conv1d", "Conv2d", "Embedding"),
            {"rank": 8, "initialisation": "default"},
        ),
        "bottleneck-mlp": (
            ("Linear", "LayerNorm"),
            {"units": 36, "activation": "gelu", "initialisation": "default"},
        ),
        "bottleneck-conv": (
            ("Conv1d", "Conv2d", "BatchNorm2d"),
            {"channels": 16, "activation": "gelu", "initialisation": "default"},
        ),
        "depthwise-separable-conv": (("Conv1d", "Conv2d"), {"activation": "gelu"}),
        "squeeze-excitation": (ALL[:-1], {"units": 16, "activation": "relu"}),
        "attention": (ALL[:-1], {"channels": 32, "heads": 4}),
        "widen": (
            ("Linear", "Conv1d", "Conv2d"),
            {"units": 16, "initialisation": "default"},
        ),
    }


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry.name)
def test_an_entry_is_a_document_like_any_other(entry) -> None:
    document = entry.document
    assert document == builtin(entry.name, {})
    assert document.description == entry.description != ""
    assert entry.labels == {BUILTIN_LABEL: "true"}
    assert BlueprintDocument.model_validate(document.to_wire()).digest == document.digest


def test_no_two_entries_do_the_same() -> None:
    assert len({entry.document.digest for entry in CATALOGUE}) == len(CATALOGUE)


@pytest.mark.parametrize(
    ("name", "arguments", "parameters"),
    [
        ("noop", {}, 0),
        ("low-rank", {}, 40 * 8 + 8 * 16),
        ("low-rank", {"rank": 1}, 40 + 16),
        ("bottleneck-mlp", {}, 2068),
        ("bottleneck-mlp", {"units": 2, "activation": "relu"}, 40 * 2 + 2 + 2 * 16 + 16),
    ],
)
def test_parameters_on_a_linear_host(
    name: str, arguments: dict[str, int | float | str], parameters: int
) -> None:
    target = linear_place(40, 16).target
    assert infer(bind(builtin(name, arguments).graph, target), target).parameters == parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("noop", 0),
        ("low-rank", 8 * 8 * 9 + 8 * 6),
        ("bottleneck-conv", 8 * 16 + 16 + 16 * 6 * 9 + 6),
        ("widen", 3 * 16 * 9 + 16 + 16 * 6 * 9),
    ],
)
def test_parameters_on_a_convolution(name: str, parameters: int) -> None:
    target = conv_pair().target
    assert infer(bind(builtin(name, {}).graph, target), target).parameters == parameters


def test_widened_units_cost_what_wider_layers_would() -> None:
    target = linear_pair().target
    cost = infer(bind(builtin("widen", {"units": 5}).graph, target), target)
    assert cost.parameters == (40 * 5 + 5) + 5 * 10


def test_only_what_adds_no_function_class_folds() -> None:
    assert {entry.name for entry in CATALOGUE if folds(entry.document.graph)} == {
        "noop",
        "affine",
        "low-rank",
    }


def test_an_unknown_blueprint_is_told_the_catalogue() -> None:
    with pytest.raises(BlueprintError) as caught:
        builtin("transformer", {})
    assert caught.value.field == "spec.builtin"
    assert caught.value.allowed == ", ".join(entry.name for entry in CATALOGUE)


@pytest.mark.parametrize(
    ("name", "argument", "value", "allowed"),
    [
        ("noop", "units", 3, "no argument for noop"),
        ("bottleneck-mlp", "width", 3, "units, activation, initialisation for bottleneck-mlp"),
        ("bottleneck-mlp", "units", 0, "a whole number from 1 to 65536"),
        ("bottleneck-mlp", "units", 65_537, "a whole number from 1 to 65536"),
        ("bottleneck-mlp", "units", 3.0, "a whole number from 1 to 65536"),
        ("bottleneck-mlp", "units", True, "a whole number from 1 to 65536"),
        ("low-rank", "rank", "8", "a whole number from 1 to 65536"),
        ("low-rank", "initialisation", "zero", "default, gradient"),
        ("attention", "heads", 5, "a divisor of 32 channels"),
        (
            "bottleneck-conv",
            "activation",
            "traced",
            "relu, gelu, silu, tanh, sigmoid, leaky_relu, elu, identity",
        ),
    ],
)
def test_a_wrong_argument_is_named(
    name: str, argument: str, value: int | float | str, allowed: str
) -> None:
    with pytest.raises(BlueprintError) as caught:
        builtin(name, {argument: value})
    assert caught.value.field == f"spec.arguments.{argument}"
    assert caught.value.allowed == allowed


def test_the_catalogue_can_not_be_changed() -> None:
    with pytest.raises(TypeError):
        CATALOGUE[1].arguments["rank"] = 9  # type: ignore[index]
