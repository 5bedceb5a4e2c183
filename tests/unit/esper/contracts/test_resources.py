"""The resource models: defaults frozen, types strict, every rule held on both of its sides."""

from __future__ import annotations

import json
import math
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from esper.contracts import resources
from esper.contracts.enums import ControllerPolicy, SeedState
from esper.contracts.resources import (
    KINDS,
    LabelSelector,
    LabelSelectorRequirement,
    SeedCounts,
    TrainingSession,
    TrainingSessionStatus,
    decimal_text,
)
from esper.contracts.resources.common import rules


def _session(**spec: object) -> dict[str, Any]:
    return {
        "apiVersion": "esper.dev/v1alpha1",
        "kind": "TrainingSession",
        "metadata": {"name": "mnist1d"},
        "spec": {"model": {"entrypoint": "a.b:c"}, "data": {"entrypoint": "d:e.f"}, **spec},
    }


def _parse(data: dict[str, Any]) -> TrainingSession:
    return TrainingSession.model_validate(data, by_alias=True, by_name=False)


DEFAULTS = {
    "model": {"entrypoint": "a.b:c", "arguments": {}},
    "data": {"entrypoint": "d:e.f", "arguments": {}},
    "training": {
        "epochs": 10,
        "batchSize": 64,
        "seed": 0,
        "threads": 1,
        "precision": "float32",
        "objective": "classification",
        "optimizer": {
            "name": "adamw",
            "learningRate": 0.001,
            "weightDecay": 0.0,
            "momentum": 0.0,
            "betas": [0.9, 0.999],
            "accumulationSteps": 1,
        },
        "schedule": {
            "name": "constant",
            "warmupEpochs": 0,
            "finalShare": 0.0,
            "stepEpochs": 10,
            "stepFactor": 0.1,
        },
        "sharding": "none",
        "logicalShards": 1,
        "compile": False,
        "checkpoint": {"everyEpochs": 1, "keep": 2},
        "nonFinite": {"maxRollbacks": 3},
    },
    "growth": {
        "layers": {"types": ["Linear", "Conv2d"], "include": [], "exclude": []},
        "seedsPerLayer": 1,
        "blueprints": {"matchLabels": {}, "matchExpressions": []},
        "budget": {"parametersPercent": 100, "activeSeeds": 1},
        "controller": {
            "policy": "heuristic",
            "dedicated": False,
            "minimumConfidence": 0.8,
            "intervalEpochs": 1,
            "probeIntervalSteps": 200,
        },
        "gates": {
            "confidenceLevel": 0.95,
            "passes": 2,
            "dwellEpochs": 5,
            "ageEpochs": 10,
            "rampEpochs": 3,
            "holdEpochs": 2,
            "embargoEpochs": 5,
            "rentPerMillionParameters": 1.0,
            "rentPerGigaflop": 0.0,
        },
    },
    "workers": {
        "replicas": 1,
        "processesPerWorker": 1,
        "imagePullPolicy": "IfNotPresent",
        "resources": {"requests": {}, "limits": {}},
        "podTemplate": {
            "env": [],
            "envFrom": [],
            "volumes": [],
            "volumeMounts": [],
            "nodeSelector": {},
            "tolerations": [],
            "imagePullSecrets": [],
        },
    },
    "runPolicy": {
        "suspend": False,
        "startupDeadlineSeconds": 900,
        "progressDeadlineSeconds": 3600,
        "backoffLimit": 3,
        "deletionPolicy": "Retain",
    },
    "storage": {},
}


def test_defaults_are_frozen() -> None:
    assert _parse(_session()).to_wire()["spec"] == DEFAULTS


def test_the_package_exports_what_it_lists() -> None:
    assert set(resources.__all__) <= set(dir(resources))
    assert [kind.__name__ for kind in KINDS] == [
        "TrainingSession",
        "Seed",
        "Blueprint",
        "CompiledKernel",
    ]


FULL = _session(
    training={
        "epochs": 30,
        "batchSize": 128,
        "seed": 2**32 - 1,
        "threads": 2,
        "precision": "bfloat16",
        "objective": "mine.losses:dice",
        "optimizer": {
            "name": "sgd",
            "learningRate": 1,
            "weightDecay": 0,
            "momentum": 0.9,
            "betas": [0, 0.5],
            "maxGradientNorm": 1,
            "accumulationSteps": 4,
        },
        "schedule": {"name": "step", "warmupEpochs": 30, "stepEpochs": 3, "stepFactor": 0.5},
        "sharding": "full",
        "logicalShards": 8,
        "compile": True,
        "checkpoint": {"everyEpochs": 2, "keep": 3, "resumeFrom": "runs/a/checkpoints/x"},
        "nonFinite": {"maxRollbacks": 0},
    },
    growth={
        "layers": {"types": ["Conv2d"], "include": ["body.*"], "exclude": ["body.0"]},
        "seedsPerLayer": 64,
        "blueprints": {
            "matchLabels": {"esper.dev/builtin": "true"},
            "matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["a"]}],
        },
        "budget": {"parametersPercent": 0, "activeSeeds": 64},
        "controller": {"policy": "none", "dedicated": True, "patienceSeconds": 2.5},
        "gates": {"confidenceLevel": 0.9999, "passes": 5, "dwellEpochs": 5, "ageEpochs": 5},
    },
    workers={
        "replicas": 4,
        "minReplicas": 2,
        "processesPerWorker": 2,
        "image": "registry.example.com/me/model:1",
        "imagePullPolicy": "Always",
        "resources": {"limits": {"nvidia.com/gpu": 2, "memory": "4Gi"}, "requests": {"cpu": "1.5"}},
        "podTemplate": {
            "env": [
                {"name": "A", "value": "1"},
                {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            ],
            "tolerations": [{"operator": "Exists"}],
            "affinity": {"nodeAffinity": {}},
            "sharedMemory": "1Gi",
            "terminationGracePeriodSeconds": 30,
            "extra": {"hostname": "x"},
        },
    },
    runPolicy={
        "suspend": True,
        "managedBy": "kueue.x-k8s.io/multikueue",
        "activeDeadlineSeconds": 60,
        "ttlSecondsAfterFinished": 0,
        "deletionPolicy": "Delete",
        "queueName": "research",
        "queuePriorityClass": "high",
    },
    storage={"uri": "s3://bucket/path", "secretName": "credentials"},
)


def test_every_field_survives_the_wire() -> None:
    session = _parse(FULL)
    wire = session.to_wire()
    assert _parse(json.loads(json.dumps(wire))) == session
    assert session.spec.training.optimizer.learning_rate == 1.0
    assert isinstance(session.spec.training.optimizer.learning_rate, float)
    assert session.spec.growth.controller.policy is ControllerPolicy.NONE
    assert session.spec.workers.processes == 8
    assert session.spec.workers.resources.limits["nvidia.com/gpu"] == "2"


def test_resources_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        _parse(_session()).spec.training.epochs = 3  # type: ignore[misc]


def test_null_counts_as_absent_but_not_within_arguments() -> None:
    data = _session(growth=None, training={"epochs": None, "optimizer": None})
    data["spec"]["model"]["arguments"] = {"dropout": None, "sizes": [None]}
    data["metadata"]["labels"] = None
    spec = _parse(data).spec
    assert spec.training.epochs == 10
    assert spec.model.arguments == {"dropout": None, "sizes": [None]}
    assert spec.growth.seeds_per_layer == 1


@pytest.mark.parametrize("value", [True, "3", 3.0, 3.5, [3], {"a": 3}])
def test_an_integer_is_nothing_but_an_integer(value: object) -> None:
    with pytest.raises(ValidationError):
        _parse(_session(training={"epochs": value}))


@pytest.mark.parametrize("value", [True, "0.1", math.nan, math.inf, -math.inf, [0.1]])
def test_a_decimal_is_a_finite_number(value: object) -> None:
    with pytest.raises(ValidationError):
        _parse(_session(training={"optimizer": {"learningRate": value}}))


@pytest.mark.parametrize("value", ["true", 1, 0, "yes"])
def test_a_switch_is_true_or_false(value: object) -> None:
    with pytest.raises(ValidationError):
        _parse(_session(training={"compile": value}))


@pytest.mark.parametrize("kind", KINDS)
def test_every_object_in_every_kind_is_closed(kind: type[resources.Resource]) -> None:
    definitions = kind.model_json_schema()["$defs"]
    open_objects = [
        name
        for name, schema in definitions.items()
        if "properties" in schema and schema.get("additionalProperties") is not False
    ]
    assert open_objects == []


def test_no_status_holds_a_float() -> None:
    for kind in KINDS:
        definitions = kind.model_json_schema()["$defs"]
        for name, schema in definitions.items():
            if name.endswith(("Status", "Counts", "Summary", "Layer", "Failure", "Condition")):
                assert '"number"' not in json.dumps(schema), name


def test_seed_counts_by_state() -> None:
    counts = SeedCounts.of({SeedState.TRAINING: 1, SeedState.GRAFTING: 2, SeedState.CULLED: 3})
    assert counts.to_wire() == {
        "dormant": 0,
        "germinated": 0,
        "training": 1,
        "grafting": 2,
        "fossilized": 0,
        "culled": 3,
        "active": 3,
    }


def test_a_status_survives_the_wire() -> None:
    now = datetime(2026, 1, 31, 12, tzinfo=UTC)
    status = TrainingSessionStatus.model_validate(
        {
            "observedGeneration": 1,
            "conditions": [
                {
                    "type": "Succeeded",
                    "status": "Unknown",
                    "reason": "Running",
                    "message": "",
                    "lastTransitionTime": now,
                }
            ],
            "failures": [{"pod": "a-0", "exitCode": 137, "reason": "OOMKilled"}],
            "metrics": {"validationLoss": decimal_text(0.125), "trainLoss": decimal_text(math.nan)},
            "flops": 2**60,
            "seeds": SeedCounts(dormant=3),
            "layers": [{"name": "fc1", "kind": "Linear", "seeds": 1, "healthPercent": 71}],
            "refusedLayers": [{"name": "head", "reason": "never called"}],
            "checkpoint": {"name": "checkpoints/epoch-000003", "epoch": 3},
            "startTime": now,
        }
    )
    session = _parse(_session()).model_copy(update={"status": status})
    wire = json.loads(json.dumps(session.to_wire()))
    assert wire["status"]["startTime"] == "2026-01-31T12:00:00Z"
    assert _parse(wire) == session


@pytest.mark.parametrize(
    "status",
    [
        {"startTime": "2026-01-31T12:00:00"},
        {"metrics": {"loss": 0.5}},
        {"metrics": {"loss": "low"}},
        {"layers": [{"name": "a", "kind": "Linear"}] * 65},
        {"failures": [{"pod": "a", "exitCode": 256, "reason": "x"}]},
        {"conditions": [{"type": "A", "status": "Maybe", "reason": "B"}]},
        {"epoch": -1},
        {"flops": 2**63},
    ],
    ids=str,
)
def test_a_bad_status_is_refused(status: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TrainingSessionStatus.model_validate(status)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.5, "0.5"),
        (-1.25, "-1.25"),
        (1 / 3, "0.333333"),
        (1e-9, "1e-09"),
        (3e20, "3e+20"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
    ],
)
def test_decimals_in_status_are_text(value: float, text: str) -> None:
    assert decimal_text(value) == text


@given(st.floats())
def test_every_float_has_a_text_that_status_takes(value: float) -> None:
    text = decimal_text(value)
    assert TrainingSessionStatus(metrics={"loss": text}).metrics == {"loss": text}
    if math.isfinite(value):
        assert float(text) == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize(
    ("operator", "values", "labels", "matches"),
    [
        ("In", ("a", "b"), {"k": "a"}, True),
        ("In", ("a",), {"k": "c"}, False),
        ("In", ("a",), {}, False),
        ("NotIn", ("a",), {"k": "c"}, True),
        ("NotIn", ("a",), {"k": "a"}, False),
        ("NotIn", ("a",), {}, True),
        ("Exists", (), {"k": ""}, True),
        ("Exists", (), {"j": "a"}, False),
        ("DoesNotExist", (), {"k": ""}, False),
        ("DoesNotExist", (), {"j": "a"}, True),
    ],
)
def test_requirements_match_as_kubernetes_has_them(
    operator: Any, values: tuple[str, ...], labels: dict[str, str], matches: bool
) -> None:
    requirement = LabelSelectorRequirement(key="k", operator=operator, values=values)
    assert requirement.matches(labels) is matches
    assert LabelSelector(match_expressions=(requirement,)).matches(labels) is matches


def test_a_selector_needs_all_its_parts() -> None:
    selector = LabelSelector.model_validate(
        {"matchLabels": {"a": "1"}, "matchExpressions": [{"key": "b", "operator": "Exists"}]}
    )
    assert selector.matches({"a": "1", "b": "2"})
    assert not selector.matches({"a": "1"})
    assert not selector.matches({"a": "2", "b": "2"})
    assert LabelSelector().matches({})


def test_metadata_takes_what_kubectl_prints() -> None:
    data = _session()
    data["metadata"] |= {
        "namespace": "team-a",
        "uid": "0c9f",
        "generation": 2,
        "resourceVersion": "17",
        "creationTimestamp": "2026-01-31T12:00:00Z",
        "finalizers": ["a/b"],
        "ownerReferences": [{"apiVersion": "v1", "kind": "A", "name": "b", "uid": "c"}],
        "managedFields": [{"manager": "kubectl", "fieldsV1": {"f:spec": {}}}],
        "labels": {"app.kubernetes.io/name": "x"},
        "annotations": {"note": "anything goes\nhere"},
    }
    assert _parse(data).metadata.namespace == "team-a"


def test_a_rule_needs_a_message() -> None:
    with pytest.raises(ValueError, match="message"):
        rules(("self == oldSelf", ""))
