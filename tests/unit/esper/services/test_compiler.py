"""The compiler lets through only what fits, learns, and leaves its host's function alone."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from esper.contracts.blueprints import (
    CATALOGUE,
    BlueprintDocument,
    Graph,
    KernelTarget,
    builtin,
    infer,
    kernel_id,
    lower,
)
from esper.contracts.ir import ActivationOp, DropoutOp, MaxPool2dOp
from esper.errors import BlueprintError, KernelError
from esper.execution.artifact import artifact_digest, unpack
from esper.services.tezzeret.compiler import compile_kernel
from tests.unit.esper.kernel_targets import (
    a_place_of_each_kind,
    conv_pair,
    linear_pair,
    linear_place,
    place,
)

LINEAR = linear_pair(ActivationOp(kind="relu"), DropoutOp(p=0.5)).target
CONV = conv_pair(ActivationOp(kind="relu"), MaxPool2dOp(kernel_size=2)).target
SEQUENCE = place(nn.Conv1d(4, 3, 3), (2, 9), producer=nn.Conv1d(2, 4, 1)).target


def document_of(*nodes: dict[str, object], hosts: tuple[str, ...] = ("Linear",)):
    graph = {"nodes": [{"op": "input", "id": "x"}, *nodes], "output": nodes[-1]["id"]}
    return BlueprintDocument.model_validate({"name": "mine", "hosts": hosts, "graph": graph})


def linear(name: str, source: str, features: object, **fields: object) -> dict[str, object]:
    return {"op": "linear", "id": name, "input": source, "features": features, **fields}


def refusal(document: BlueprintDocument, target: KernelTarget) -> str:
    with pytest.raises(KernelError) as caught:
        compile_kernel(document, target)
    assert str(caught.value).startswith(f"blueprint {document.name}: ")
    assert "\n" not in str(caught.value)
    return str(caught.value)


PLACES = {kind: spot.target for kind, spot in a_place_of_each_kind().items()}
PLACES |= {"fed Linear": LINEAR, "fed Conv2d": CONV, "fed Conv1d": SEQUENCE}


def fitting() -> list[tuple[str, str]]:
    """Every blueprint with each place where it has a meaning."""
    pairs = []
    for entry in CATALOGUE:
        for place_name, target in PLACES.items():
            with contextlib.suppress(BlueprintError):
                lower(entry.document, target)
                pairs.append((entry.name, place_name))
    return pairs


def test_every_blueprint_has_a_place_on_every_kind_that_it_names() -> None:
    found = {(name, PLACES[spot].layer.kind) for name, spot in fitting()}
    assert found == {(entry.name, kind) for entry in CATALOGUE for kind in entry.hosts}


@pytest.mark.parametrize(("name", "spot"), fitting())
def test_the_catalogue_compiles(name: str, spot: str) -> None:
    document, target = builtin(name, {}), PLACES[spot]
    compiled = compile_kernel(document, target)
    metadata, figures = compiled.metadata, compiled.metadata.figures
    template = unpack(compiled.data, metadata.artifact_digest)
    cost = infer(template.graph, template.target)
    assert metadata.kernel == compiled.manifest.kernel == kernel_id(document.digest, target)
    assert metadata.blueprint_digest == document.digest
    assert metadata.artifact_bytes == len(compiled.data)
    assert metadata.artifact_digest == artifact_digest(compiled.data)
    assert template.manifest == compiled.manifest
    assert (figures.parameters, figures.flops) == (cost.parameters, cost.flops)
    assert figures.parameter_bytes == 4 * cost.parameters
    assert figures.latency_microseconds > 0
    assert figures.device == "cpu"


def test_equal_inputs_give_equal_bytes_whatever_is_measured() -> None:
    first, again = (compile_kernel(builtin("widen", {}), LINEAR) for _ in range(2))
    assert first.data == again.data
    assert first.manifest == again.manifest


def test_the_producers_name_is_no_part_of_the_kernel() -> None:
    renamed = LINEAR.producer.model_copy(update={"name": "blocks.7.in"})
    other = LINEAR.model_copy(update={"producer": renamed})
    document = builtin("widen", {})
    assert compile_kernel(document, LINEAR).data == compile_kernel(document, other).data
    assert b"blocks.7.in" not in compile_kernel(document, other).data


def test_compiling_leaves_the_callers_random_stream_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    compile_kernel(builtin("widen", {}), LINEAR)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_other_dtypes(dtype: str) -> None:
    target = linear_place(6, 4).target.model_copy(update={"dtype": dtype})
    figures = compile_kernel(builtin("bottleneck-mlp", {}), target).metadata.figures
    assert figures.parameter_bytes == figures.parameters * (8 if dtype == "float64" else 2)


def test_a_blueprint_that_changes_its_host_at_birth() -> None:
    message = refusal(document_of(linear("y", "x", "out")), LINEAR)
    assert "at birth; allowed: exactly 0, as with init 'zero' on the last layer" in message


def test_a_blueprint_that_would_never_learn() -> None:
    document = document_of(
        linear("a", "x", 3, init="zero", bias=False),
        linear("y", "a", "out", init="zero", bias=False),
    )
    assert "it would never learn" in refusal(document, LINEAR)


def test_one_that_learns_through_its_bias_alone_at_first_is_let_through() -> None:
    document = document_of(linear("a", "x", 3, init="zero"), linear("y", "a", "out", init="zero"))
    assert compile_kernel(document, LINEAR).manifest.parameters == 24 * 3 + 3 + 3 * 10 + 10


def test_a_blueprint_that_overflows() -> None:
    squares = [
        {"op": "multiply", "id": f"m{i}", "inputs": [f"m{i - 1}" if i else "a"] * 16}
        for i in range(3)
    ]
    document = document_of(linear("a", "x", 64), *squares, linear("y", "m2", "out", init="zero"))
    assert "non-finite output" in refusal(document, LINEAR)


def test_a_host_that_the_document_does_not_name() -> None:
    assert "spec.hosts: got Conv2d" in refusal(builtin("bottleneck-mlp", {}), CONV)


def test_a_shape_that_does_not_fit() -> None:
    message = refusal(document_of(linear("y", "x", 11, init="zero")), LINEAR)
    assert "spec.graph.output: got 'y' of shape (11,)" in message


def test_a_blueprint_over_a_cap_is_never_built() -> None:
    document = document_of(linear("a", "x", 1_000_000), linear("y", "a", 1_000_000))
    assert "spec.graph" in refusal(document, LINEAR)


def test_a_device_that_is_not_there() -> None:
    target = LINEAR.model_copy(update={"device": "cuda:63"})
    assert refusal(builtin("low-rank", {}), target)


def test_a_graph_is_data_and_stays_so() -> None:
    document = document_of(linear("y", "x", "out", init="zero"))
    assert Graph.model_validate(document.graph.to_wire()) == document.graph
    assert compile_kernel(document, LINEAR).metadata.kernel == kernel_id(document.digest, LINEAR)


def test_the_bytes_are_the_same_in_every_process() -> None:
    code = (
        "from tests.unit.esper.services.test_compiler import *;"
        "print(compile_kernel(builtin('widen', {}), CONV).metadata.artifact_digest)"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    digest = compile_kernel(builtin("widen", {}), CONV).metadata.artifact_digest
    assert run.stdout.strip() == digest
