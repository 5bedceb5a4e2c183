"""Ranges and cross-field rules of a TrainingSession, each at its bound and just beyond."""

from __future__ import annotations

import math
from typing import Any

import pytest
from pydantic import ValidationError

from esper.contracts.resources import TrainingSession


def _session(**spec: object) -> dict[str, Any]:
    return {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": "mnist1d"},
        "spec": {"model": {"entrypoint": "a.b:c"}, "data": {"entrypoint": "d:e.f"}, **spec},
    }


def _parse(data: dict[str, Any]) -> TrainingSession:
    return TrainingSession.model_validate(data, by_alias=True, by_name=False)


RANGES = [
    ("training.epochs", 1, 100_000, 1),
    ("training.batchSize", 1, 1_048_576, 1),
    ("training.seed", 0, 2**32 - 1, 1),
    ("training.threads", 1, 1024, 1),
    ("training.logicalShards", 1, 65536, 1),
    ("training.optimizer.weightDecay", 0, 10, 0.1),
    ("training.optimizer.accumulationSteps", 1, 65536, 1),
    ("training.schedule.finalShare", 0, 1, 0.01),
    ("training.schedule.stepEpochs", 1, 100_000, 1),
    ("training.checkpoint.everyEpochs", 1, 100_000, 1),
    ("training.checkpoint.keep", 1, 1000, 1),
    ("training.nonFinite.maxRollbacks", 0, 100, 1),
    ("growth.seedsPerLayer", 1, 64, 1),
    ("growth.budget.parametersPercent", 0, 100_000, 1),
    ("growth.budget.activeSeeds", 1, 64, 1),
    ("growth.controller.minimumConfidence", 0, 1, 0.01),
    ("growth.controller.intervalEpochs", 1, 100_000, 1),
    ("growth.controller.probeIntervalSteps", 1, 1_000_000_000, 200),
    ("growth.gates.rampEpochs", 0, 100_000, 1),
    ("growth.gates.holdEpochs", 0, 100_000, 1),
    ("growth.gates.embargoEpochs", 0, 100_000, 1),
    ("growth.gates.rentPerMillionParameters", 0, 1e6, 0.1),
    ("growth.gates.rentPerGigaflop", 0, 1e6, 0.1),
    ("runPolicy.backoffLimit", 0, 1000, 1),
    ("runPolicy.ttlSecondsAfterFinished", 0, 2**31 - 1, 1),
    ("runPolicy.activeDeadlineSeconds", 1, 2**31 - 1, 1),
    ("workers.podTemplate.terminationGracePeriodSeconds", 0, 86_400, 1),
]


def _at(path: str, value: object) -> dict[str, Any]:
    data: dict[str, Any] = _session()
    # Large enough that only the field under test is at its bound.
    data["spec"]["training"] = {"batchSize": 65536}
    node = data["spec"]
    *above, last = path.split(".")
    for step in above:
        node = node.setdefault(step, {})
    node[last] = value
    return data


@pytest.mark.parametrize(("path", "low", "high", "step"), RANGES, ids=[row[0] for row in RANGES])
def test_ranges_hold_at_both_ends(path: str, low: float, high: float, step: float) -> None:
    for value in (low, high):
        assert _parse(_at(path, value))
    for value in (low - step, high + step):
        with pytest.raises(ValidationError):
            _parse(_at(path, value))


OPEN_RANGES = [
    ("training.optimizer.learningRate", (1e-12, 100), (0, 100.1)),
    ("training.optimizer.maxGradientNorm", (1e-12, 1e9), (0, 1.1e9)),
    ("training.schedule.stepFactor", (1e-12, 1), (0, 1.1)),
    ("growth.controller.patienceSeconds", (1e-3, 86_400), (0, 86_401)),
    ("growth.gates.confidenceLevel", (0.50001, 0.9999), (0.5, 0.99991)),
]


@pytest.mark.parametrize(("path", "good", "bad"), OPEN_RANGES, ids=[row[0] for row in OPEN_RANGES])
def test_open_ranges_hold_at_both_ends(
    path: str, good: tuple[float, float], bad: tuple[float, float]
) -> None:
    for value in good:
        assert _parse(_at(path, value))
    for value in bad:
        with pytest.raises(ValidationError):
            _parse(_at(path, value))


RULES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "momentum",
        {"training": {"optimizer": {"name": "adam", "momentum": 0.1}}},
        {"training": {"optimizer": {"name": "rmsprop", "momentum": 0.1}}},
    ),
    (
        "schedule.warmupEpochs",
        {"training": {"epochs": 3, "schedule": {"warmupEpochs": 4}}},
        {"training": {"epochs": 3, "schedule": {"warmupEpochs": 3}}},
    ),
    (
        "include",
        {"growth": {"layers": {"include": ["a", "b"], "exclude": ["b"]}}},
        {"growth": {"layers": {"include": ["a"], "exclude": ["b"]}}},
    ),
    (
        "include",
        {"growth": {"layers": {"include": ["a", "a"]}}},
        {"growth": {"layers": {"include": ["a", "b"]}}},
    ),
    (
        "types",
        {"growth": {"layers": {"types": ["Linear", "Linear"]}}},
        {"growth": {"layers": {"types": ["Linear"]}}},
    ),
    (
        "ageEpochs",
        {"growth": {"gates": {"dwellEpochs": 4, "ageEpochs": 3}}},
        {"growth": {"gates": {"dwellEpochs": 4, "ageEpochs": 4}}},
    ),
    (
        "passes",
        {"growth": {"gates": {"passes": 6, "ageEpochs": 5}}},
        {"growth": {"gates": {"passes": 5, "ageEpochs": 5}}},
    ),
    (
        "values",
        {"growth": {"blueprints": {"matchExpressions": [{"key": "a", "operator": "In"}]}}},
        {"growth": {"blueprints": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}},
    ),
    (
        "values",
        {
            "growth": {
                "blueprints": {
                    "matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]
                }
            }
        },
        {
            "growth": {
                "blueprints": {
                    "matchExpressions": [{"key": "a", "operator": "In", "values": ["b"]}]
                }
            }
        },
    ),
    (
        "minReplicas",
        {"workers": {"replicas": 2, "minReplicas": 3}},
        {"workers": {"replicas": 2, "minReplicas": 2}},
    ),
    (
        "resources.limits[nvidia.com/gpu]",
        {"workers": {"processesPerWorker": 2, "resources": {"limits": {"nvidia.com/gpu": 1}}}},
        {"workers": {"processesPerWorker": 2, "resources": {"limits": {"nvidia.com/gpu": "2"}}}},
    ),
    (
        "training.batchSize",
        {"training": {"batchSize": 7}, "workers": {"replicas": 4, "processesPerWorker": 2}},
        {"training": {"batchSize": 8}, "workers": {"replicas": 4, "processesPerWorker": 2}},
    ),
    (
        "training.logicalShards",
        {"training": {"logicalShards": 3}, "workers": {"replicas": 2}},
        {"training": {"logicalShards": 4}, "workers": {"replicas": 2}},
    ),
    (
        "training.batchSize",
        {"training": {"logicalShards": 16, "batchSize": 15}},
        {"training": {"logicalShards": 16, "batchSize": 16}},
    ),
    (
        "training.sharding",
        {"training": {"sharding": "full"}},
        {"training": {"sharding": "full"}, "workers": {"processesPerWorker": 2}},
    ),
    (
        "claimName",
        {"storage": {"uri": "s3://a", "claimName": "b"}},
        {"storage": {"claimName": "b"}},
    ),
    (
        "secretName",
        {"storage": {"secretName": "b"}},
        {"storage": {"uri": "s3://a", "secretName": "b"}},
    ),
]


@pytest.mark.parametrize(("field", "bad", "good"), RULES, ids=[row[0] for row in RULES])
def test_fields_fit_one_another(field: str, bad: dict[str, Any], good: dict[str, Any]) -> None:
    assert _parse(_session(**good))
    with pytest.raises(ValidationError) as caught:
        _parse(_session(**bad))
    (error,) = caught.value.errors()
    assert error["type"] == "cross_field"
    assert error["ctx"]["field"] == field


@pytest.mark.parametrize(
    "name", ["a", "a-1", "a" * 48, pytest.param("mnist1d-low-label", id="words")]
)
def test_a_session_name_is_a_dns_label(name: str) -> None:
    data = _session()
    data["metadata"]["name"] = name
    assert _parse(data).metadata.name == name


@pytest.mark.parametrize("name", ["", "A", "1a", "-a", "a-", "a.b", "a_b", "a" * 49, "ä", 3, "a\n"])
def test_a_bad_session_name_is_refused(name: object) -> None:
    data = _session()
    data["metadata"]["name"] = name
    with pytest.raises(ValidationError):
        _parse(data)


@pytest.mark.parametrize(
    "entrypoint",
    ["", "a", "a.b", ":a", "a:", "a b:c", "a:b:c", "1a:b", "a..b:c", "a.py/b:c", "a:b()"],
)
def test_a_bad_entry_point_is_refused(entrypoint: str) -> None:
    data = _session()
    data["spec"]["model"]["entrypoint"] = entrypoint
    with pytest.raises(ValidationError):
        _parse(data)


@pytest.mark.parametrize("objective", ["classification", "regression", "a.b:c"])
def test_objectives(objective: str) -> None:
    assert _parse(_session(training={"objective": objective})).spec.training.objective == objective


@pytest.mark.parametrize("objective", ["ranking", "classification:", "", "a.b"])
def test_a_bad_objective_is_refused(objective: str) -> None:
    with pytest.raises(ValidationError):
        _parse(_session(training={"objective": objective}))


def test_the_learned_policy_is_refused() -> None:
    with pytest.raises(ValidationError, match="'heuristic', 'periodic', 'random' or 'none'"):
        _parse(_session(growth={"controller": {"policy": "gnn"}}))


@pytest.mark.parametrize(
    "arguments", [{"a": math.inf}, {"a": {"b": [math.nan]}}, {"a": "x" * 70_000}, {"a": object()}]
)
def test_arguments_are_json_of_bounded_size(arguments: dict[str, object]) -> None:
    data = _session()
    data["spec"]["model"]["arguments"] = arguments
    with pytest.raises(ValidationError):
        _parse(data)


@pytest.mark.parametrize(
    "path",
    [
        "growth.blueprints.matchLabels.a",
        "workers.podTemplate.nodeSelector.a",
        "workers.resources.limits.memory",
        "training.epochs",
        "runPolicy.queueName",
    ],
)
def test_null_counts_as_absent_as_it_does_for_the_api_server(path: str) -> None:
    assert _parse(_at(path, None)).spec == _parse(_at("training.batchSize", 65536)).spec


def test_null_is_a_value_for_an_argument() -> None:
    spec = _parse(_at("model.arguments.depth", None)).spec
    assert spec.model.arguments == {"depth": None}
