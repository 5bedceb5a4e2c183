"""Manifests that are wrong in one place, each with the field that whoever refuses it must name.

A row changes one of `BASES`, which are right: the kind of base, what is set (`GONE` takes it
away), and how the API server spells the field.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from dataclasses import field as item
from typing import Any


class _Gone:
    def __repr__(self) -> str:
        return "gone"  # the same in every process: tests are named after what they change


GONE = _Gone()
API = "esper.dev/v1alpha1"

BASES: Mapping[str, Any] = {
    "session": {
        "apiVersion": API,
        "kind": "TrainingSession",
        "metadata": {"name": "session"},
        "spec": {
            "model": {"entrypoint": "a.b:c", "arguments": {"width": 4}},
            "data": {"entrypoint": "d:e.f"},
        },
    },
    "builtin": {
        "apiVersion": API,
        "kind": "Blueprint",
        "metadata": {"name": "wide"},
        "spec": {"builtin": "widen", "arguments": {"units": 8}},
    },
    "graph": {
        "apiVersion": API,
        "kind": "Blueprint",
        "metadata": {"name": "graph"},
        "spec": {
            "hosts": ["Linear"],
            "graph": {
                "nodes": [
                    {"op": "input", "id": "x"},
                    {"op": "linear", "id": "y", "input": "x", "features": "out"},
                ],
                "output": "y",
            },
        },
    },
    "seed": {
        "apiVersion": API,
        "kind": "Seed",
        "metadata": {"name": "session-1a2b-0"},
        "spec": {"session": "session", "layer": "features.0", "slot": 0},
    },
    "kernel": {
        "apiVersion": API,
        "kind": "CompiledKernel",
        "metadata": {"name": "k-1a2b"},
        "spec": {
            "blueprint": "wide",
            "target": {
                "layer": {"kind": "Linear", "inputs": 4, "outputs": 8},
                "inputShape": [4],
                "outputShape": [8],
            },
        },
    },
}


@dataclass(frozen=True)
class Bad:
    """One row; `named` is what the refusal says of where, `field` where nothing else is given.

    `more` is set too, and right.
    """

    base: str
    field: str
    value: Any
    named: str = ""
    more: Mapping[str, Any] = item(default_factory=dict)

    @property
    def where(self) -> str:
        """What the refusal must say."""
        return self.named or self.field

    def manifest(self) -> dict[str, Any]:
        """The base with the change."""
        return changed(BASES[self.base], {**self.more, self.field: self.value})


def changed(base: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `base` with values set at dotted paths; numbers are positions of lists."""
    document: dict[str, Any] = copy.deepcopy(base)
    for field, value in changes.items():
        node: Any = document
        steps = field.split(".")
        for step, following in itertools.pairwise(steps):
            empty: Any = [] if following.isdecimal() else {}
            node = node[int(step)] if isinstance(node, list) else node.setdefault(step, empty)
        last = steps[-1]
        if value is GONE:
            del node[last]
        elif isinstance(node, list):
            node[int(last) :] = [value]
        else:
            node[last] = value
    return document


def _session(field: str, value: Any, named: str = "", **more: Any) -> Bad:
    return Bad("session", f"spec.{field}", value, named or f"spec.{field}", more)


def _pod(field: str, value: Any, named: str = "") -> Bad:
    """A field of a session's pod template."""
    place = f"workers.podTemplate.{field}"
    return _session(place, value, f"spec.workers.podTemplate.{named or field}")


def _volume(content: Mapping[str, Any], named: str = "") -> Bad:
    """A volume of a session's pods."""
    return _pod("volumes.0", {"name": "v", **content}, f"volumes[0]{named}")


def _projected(source: Mapping[str, Any], named: str = "") -> Bad:
    """A source of a projected volume."""
    named = f".projected.sources[0]{named}"
    return _volume({"projected": {"sources": [source]}}, named)


def _chained(op: str, fields: Mapping[str, Any]) -> Bad:
    """An operation behind a producer that has too much or too little."""
    producer = {
        "name": "fc1",
        "layer": {"kind": "Linear", "inputs": 2, "outputs": 4},
        "inputShape": [2],
        "chain": [{"op": op, **fields}],
    }
    return Bad("kernel", "spec.target.producer", producer, f"op {op} takes")


def _node(op: str, fields: Mapping[str, Any]) -> Bad:
    """A node of a graph that has too much or too little for its operation."""
    return Bad("graph", "spec.graph.nodes.1", {"op": op, **fields}, f"op {op} takes")


LONG = "x" * 2000
TYPES = [
    _session("model", "a.b:c"),
    _session("model.entrypoint", 3),
    _session("model.arguments", [1]),
    _session("data.entrypoint", ["a:b"]),
    _session("training", []),
    _session("training.epochs", "3"),
    _session("training.epochs", 1.5),
    _session("training.batchSize", True),
    _session("training.compile", "yes"),
    _session("training.precision", 32),
    _session("training.optimizer.learningRate", "0.1"),
    _session("training.optimizer.betas", 0.9),
    _session("training.schedule", "cosine"),
    _session("growth.layers.types", "Linear"),
    _session("growth.layers.include.0", 3, "spec.growth.layers.include"),
    _session("growth.blueprints.matchLabels", ["a"]),
    _session("growth.gates.confidenceLevel", "high"),
    _session("workers.replicas", "two"),
    _session("workers.resources.limits", "1"),
    _session("workers.podTemplate.env", {"A": "b"}),
    _session("runPolicy.suspend", 1),
    _session("runPolicy.backoffLimit", [3]),
    _session("storage", "s3://bucket"),
    Bad("builtin", "spec.builtin", 1),
    Bad("builtin", "spec.arguments", "units"),
    Bad("builtin", "spec.arguments.units", 1.5),
    Bad("builtin", "spec.arguments.units", True),
    Bad("graph", "spec.hosts", "Linear"),
    Bad("graph", "spec.graph", []),
    Bad("graph", "spec.graph.nodes", {}),
    Bad("graph", "spec.graph.nodes.1.features", 1.5, "spec.graph.nodes[1].features"),
    Bad("graph", "spec.graph.nodes.1.bias", "no", "spec.graph.nodes[1].bias"),
    Bad("seed", "spec.slot", "0"),
    Bad("seed", "spec.layer", 0),
    Bad("kernel", "spec.target", "Linear"),
    Bad("kernel", "spec.target.inputShape", 4),
    Bad("kernel", "spec.target.layer.bias", "true"),
]
RANGES = [
    _session("training.epochs", 0),
    _session("training.epochs", 100_001),
    _session("training.batchSize", 0),
    _session("training.seed", -1),
    _session("training.seed", 2**32),
    _session("training.threads", 1025),
    _session("training.logicalShards", 0),
    _session("training.optimizer.learningRate", 0),
    _session("training.optimizer.learningRate", 101),
    _session("training.optimizer.weightDecay", -0.1),
    _session("training.optimizer.momentum", 1),
    _session("training.optimizer.betas", [0.9, 1.0], "spec.training.optimizer.betas[1]"),
    _session("training.optimizer.maxGradientNorm", 0),
    _session("training.optimizer.accumulationSteps", 0),
    _session("training.schedule.finalShare", 1.1),
    _session("training.schedule.stepEpochs", 0),
    _session("training.schedule.stepFactor", 0),
    _session("training.checkpoint.everyEpochs", 0),
    _session("training.checkpoint.keep", 1001),
    _session("training.nonFinite.maxRollbacks", 101),
    _session("growth.seedsPerLayer", 65),
    _session("growth.budget.parametersPercent", -1),
    _session("growth.budget.activeSeeds", 0),
    _session("growth.controller.minimumConfidence", 1.1),
    _session("growth.controller.intervalEpochs", 0),
    _session("growth.controller.probeIntervalSteps", 0),
    _session("growth.controller.patienceSeconds", 0),
    _session("growth.gates.confidenceLevel", 0.5),
    _session("growth.gates.confidenceLevel", 1),
    _session("growth.gates.passes", 0),
    _session("growth.gates.dwellEpochs", -1),
    _session("growth.gates.rampEpochs", 100_001),
    _session("growth.gates.holdEpochs", -1),
    _session("growth.gates.embargoEpochs", -1),
    _session("growth.gates.rentPerMillionParameters", -1),
    _session("growth.gates.rentPerGigaflop", 1e7),
    _session("workers.replicas", 0),
    _session("workers.minReplicas", 0),
    _session("workers.processesPerWorker", 65),
    _session("workers.podTemplate.terminationGracePeriodSeconds", -1),
    _session("runPolicy.startupDeadlineSeconds", 0),
    _session("runPolicy.progressDeadlineSeconds", 2**31),
    _session("runPolicy.activeDeadlineSeconds", 0),
    _session("runPolicy.backoffLimit", -1),
    _session("runPolicy.ttlSecondsAfterFinished", -1),
    Bad("graph", "spec.graph.nodes.1.features", 0, "spec.graph.nodes[1].features"),
    Bad("seed", "spec.slot", 64),
    Bad("seed", "spec.slot", -1),
    Bad("kernel", "spec.target.layer.inputs", 0),
    Bad("kernel", "spec.target.layer.groups", 1_000_001),
    Bad("kernel", "spec.target.inputShape.0", 0, "spec.target.inputShape[0]"),
]
TEXTS = [
    _session("model.entrypoint", "no-colon"),
    _session("data.entrypoint", "a:"),
    _session("model.entrypoint", f"a:{LONG}"),
    _session("training.objective", "guess"),
    _session("training.checkpoint.resumeFrom", ""),
    _session("growth.layers.include.0", "", "spec.growth.layers.include[0]"),
    _session("growth.layers.exclude.0", LONG, "spec.growth.layers.exclude[0]"),
    _session("growth.blueprints.matchLabels.a", "b c"),
    _session("workers.image", ""),
    _session("workers.image", LONG),
    _session("workers.resources.limits.memory", "much"),
    _session("workers.resources.requests", {"cpu": -1}, "spec.workers.resources.requests.cpu"),
    _session("workers.podTemplate.sharedMemory", -1),
    _session("workers.podTemplate.sharedMemory", "-1Gi"),
    _session("workers.podTemplate.runtimeClassName", "Upper"),
    _session("workers.podTemplate.env.0", {"name": ""}, "spec.workers.podTemplate.env[0].name"),
    _session("runPolicy.managedBy", ""),
    _session("runPolicy.queueName", "Queue"),
    _session("runPolicy.queuePriorityClass", "-a"),
    _session("storage.uri", "http://bucket"),
    _session("storage.claimName", "a_b"),
    Bad("session", "metadata.name", "x" * 49),
    Bad("session", "metadata.name", "1st"),
    Bad("session", "metadata.name", "with.dot"),
    Bad("builtin", "metadata.name", "with.dot"),
    Bad("builtin", "spec.description", LONG),
    Bad("builtin", "spec.builtin", ""),
    Bad("graph", "spec.graph.output", "Y"),
    Bad("graph", "spec.graph.nodes.1.id", "1", "spec.graph.nodes[1].id"),
    Bad("seed", "metadata.name", "x" * 64),
    Bad("seed", "spec.session", "x" * 49),
    Bad("seed", "spec.layer", ""),
    Bad("kernel", "spec.blueprint", "Upper"),
    Bad("kernel", "spec.target.device", "GPU 0"),
]
NAMES = [
    Bad("session", "kind", "TrainingSessions", "TrainingSessions"),
    _session("training.precision", "float16"),
    _session("training.optimizer.name", "lion"),
    _session("training.schedule.name", "cosin"),
    _session("training.sharding", "tensor"),
    _session("growth.layers.types.0", "Conv3d", "spec.growth.layers.types[0]"),
    _session("growth.controller.policy", "gnn"),
    _session("workers.imagePullPolicy", "Sometimes"),
    _session("runPolicy.deletionPolicy", "Keep"),
    _session(
        "growth.blueprints.matchExpressions.0",
        {"key": "a", "operator": "Has"},
        "spec.growth.blueprints.matchExpressions[0].operator",
    ),
    Bad("graph", "spec.hosts.0", "Conv3d", "spec.hosts[0]"),
    Bad("graph", "spec.graph.schemaVersion", 2),
    Bad("graph", "spec.graph.nodes.1.op", "eval", "spec.graph.nodes[1].op"),
    Bad("graph", "spec.graph.nodes.1.init", "random", "spec.graph.nodes[1].init"),
    Bad("kernel", "spec.target.layer.kind", "Conv3d"),
    Bad("kernel", "spec.target.dtype", "int8"),
]
SHAPES = [
    Bad("session", "spec", GONE),
    _session("model", GONE),
    _session("data", GONE),
    _session("model.entrypoint", GONE),
    _session("epochs", 3),
    _session("training.learningRate", 0.1),
    _session("growth.gates.dwell", 3),
    _session("growth.controller.checkpoint", "s3://policy"),
    _session("workers.podTemplate.hostNetwork", True),
    _session("training.optimizer.betas", [0.9]),
    _session("training.optimizer.betas", [0.9, 0.9, 0.9]),
    _session("growth.layers.types", []),
    _session("growth.layers.types", ["Linear", "Linear"]),
    _session("growth.layers.include", ["a", "a"]),
    _session("growth.layers.exclude", [f"l{n}" for n in range(65)]),
    _session("growth.blueprints.matchLabels", {f"l{n}": "" for n in range(65)}),
    _session(
        "growth.blueprints.matchExpressions.0",
        {"operator": "Exists"},
        "spec.growth.blueprints.matchExpressions[0].key",
    ),
    _session("workers.podTemplate.env", [{"name": "A"}] * 129),
    _session("workers.podTemplate.env.0", {"value": "x"}, "spec.workers.podTemplate.env[0].name"),
    _session("workers.resources.limits", {f"r{n}": 1 for n in range(17)}),
    Bad("graph", "spec.hosts", []),
    Bad("graph", "spec.hosts", ["Linear", "Linear"]),
    Bad("graph", "spec.graph.nodes", []),
    Bad("graph", "spec.graph.nodes", [{"op": "input", "id": "x"}] * 65),
    Bad("graph", "spec.graph.output", GONE),
    Bad("graph", "spec.graph.nodes.1.op", GONE, "spec.graph.nodes[1].op"),
    Bad("graph", "spec.graph.nodes.1.code", "import os", "spec.graph.nodes[1].code"),
    Bad("builtin", "spec.arguments", {f"a{n}": n for n in range(17)}),
    Bad("seed", "spec.session", GONE),
    Bad("seed", "spec.cycle", 3),
    Bad("kernel", "spec.target.layer", GONE),
    Bad("kernel", "spec.target.outputShape", []),
    Bad("kernel", "spec.target.inputShape", [1] * 9),
]
TOKEN = {"serviceAccountToken": {"path": "token"}}
PODS = [
    _volume({"hostPath": {"path": "/"}}, ".hostPath"),
    _volume({"nfs": {"server": "s", "path": "/"}}, ".nfs"),
    _volume({"emptyDir": {}, "configMap": {"name": "c"}}),
    _projected(TOKEN, ".serviceAccountToken"),
    _projected({"podCertificate": {"keyType": "ED25519"}}, ".podCertificate"),
    _projected({"secret": {"name": "esper-tamiyo"}}, ".secret.name"),
    _volume({"secret": {"secretName": "others-esper"}}, ".secret.secretName"),
    _volume({"secret": {"secretName": "5f5f.esper"}}, ".secret.secretName"),
    _volume({"secret": {"secretName": "sh.helm.release.v1.esper.v1"}}, ".secret.secretName"),
    _volume({"csi": {"driver": "d", "nodePublishSecretRef": {"name": "a-esper"}}}, ".csi"),
    _pod("envFrom.0", {"secretRef": {"name": "a-esper"}}, "envFrom[0].secretRef.name"),
    _pod(
        "env.0",
        {"name": "A", "valueFrom": {"secretKeyRef": {"name": "a-esper", "key": "hub-token"}}},
        "env[0].valueFrom.secretKeyRef.name",
    ),
    _session("storage", {"uri": "s3://b", "secretName": "a-esper"}, "spec.storage.secretName"),
]
"""What would let a pod do more than the restricted standard, or read what is the operator's."""
GPU = {"nvidia.com/gpu": 2}
RULES = [
    _session("training.batchSize", 3, "training.batchSize", **{"spec.workers.replicas": 4}),
    _session("training.batchSize", 2, "batchSize", **{"spec.training.logicalShards": 4}),
    _session("training.sharding", "full", "training.sharding"),
    _session("training.logicalShards", 3, "logicalShards", **{"spec.workers.replicas": 2}),
    _session("training.optimizer", {"name": "adam", "momentum": 0.5}, "momentum"),
    _session("training.schedule.warmupEpochs", 11, "schedule.warmupEpochs"),
    _session("growth.layers", {"include": ["a", "b"], "exclude": ["b"]}, "include"),
    _session("growth.gates", {"dwellEpochs": 4, "ageEpochs": 3}, "ageEpochs"),
    _session("growth.gates", {"passes": 6, "dwellEpochs": 0, "ageEpochs": 5}, "passes"),
    _session(
        "growth.blueprints.matchExpressions.0",
        {"key": "a", "operator": "In"},
        "spec.growth.blueprints.matchExpressions[0]",
    ),
    _session("workers.minReplicas", 2, "minReplicas"),
    _session("workers.resources.limits", GPU, "resources.limits[nvidia.com/gpu]"),
    _session("storage", {"uri": "s3://b", "claimName": "c"}, "claimName"),
    _session("storage.secretName", "keys", "secretName"),
    _volume({}),
    _projected({}),
    _pod("volumes.0", {"name": "esper-tmp", "emptyDir": {}}, "volumes[0].name"),
    _pod("volumeMounts.0", {"name": "v", "mountPath": "/tmp/"}, "volumeMounts[0].mountPath"),
    _pod("env.0", {"name": "HOME", "value": "/root"}, "env[0].name"),
    _volume({"secret": {"secretName": "esper-tamiyo"}}),
    Bad("builtin", "spec.builtin", GONE, "graph"),
    Bad("graph", "spec.builtin", "widen", "graph"),
    Bad("graph", "spec.arguments", {"units": 8}, "arguments"),
    Bad("graph", "spec.hosts", GONE, "hosts"),
    _node("input", {"id": "y", "input": "x"}),
    _node("linear", {"id": "y", "input": "x"}),
    _node("conv1d", {"id": "y", "input": "x", "channels": 4, "rows": 3, "kernelSize": 1}),
    _node("conv2d", {"id": "y", "input": "x", "kernelSize": 1}),
    _node("embedding", {"id": "y", "input": "x", "features": 3, "bias": True}),
    _node("layer", {"id": "y", "input": "x", "outputs": 3}),
    _node("affine", {"id": "y", "input": "x", "p": 0.5}),
    _node("activation", {"id": "y", "input": "x"}),
    _node("dropout", {"id": "y", "input": "x"}),
    _node("max_pool2d", {"id": "y", "kernelSize": 2}),
    _node("avg_pool2d", {"id": "y", "input": "x", "kernelSize": 2, "heads": 1}),
    _node("add", {"id": "y", "input": "x"}),
    _node("multiply", {"id": "y", "input": "x", "inputs": ["x", "x"]}),
    _node("zeros", {"id": "y"}),
    _node("mean", {"id": "y", "input": "x", "kind": "relu"}),
    _node("gate", {"id": "y", "value": "x"}),
    _node("sequence", {"id": "y", "input": "x", "groups": 2}),
    _node("attention", {"input": "x"}),
    _node("spread", {"id": "y", "input": "x"}),
    _chained("activation", {"kind": "relu", "p": 0.5}),
    _chained("dropout", {}),
    _chained("max_pool2d", {"kernelSize": 2, "divisorOverride": 1}),
    _chained("avg_pool2d", {"kernelSize": 2, "kind": "relu"}),
]
TABLE = [*TYPES, *RANGES, *TEXTS, *NAMES, *SHAPES, *PODS, *RULES]
