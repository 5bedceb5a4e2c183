"""An artifact's bytes are its kernel's alone, and nothing that contradicts itself is loaded."""

from __future__ import annotations

import gc
import json
import struct
import subprocess
import sys
import tracemalloc

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.contracts.base import canonical_json
from esper.contracts.blueprints import (
    CATALOGUE,
    BlueprintDocument,
    KernelTarget,
    builtin,
    infer,
    kernel_id,
    lower,
)
from esper.contracts.ir import ActivationOp
from esper.contracts.kernels import KernelManifest
from esper.errors import KernelError
from esper.execution import artifact
from esper.execution.artifact import artifact_digest, check_target, pack, unpack
from esper.execution.builders import parameter_shapes
from tests.unit.esper.kernel_targets import conv_pair, linear_pair, linear_place, place

LINEAR = linear_place(40, 16).target


def parts(name: str = "bottleneck-mlp", target: KernelTarget = LINEAR):
    document = builtin(name, {})
    graph = lower(document, target)
    identity = kernel_id(document.digest, target)
    cost = infer(graph, target)
    return graph, target, KernelManifest.describing(identity, document.digest, graph, target, cost)


def packed(name: str = "bottleneck-mlp", target: KernelTarget = LINEAR, **tensors: torch.Tensor):
    fixed = {key.replace("__", "."): tensor for key, tensor in tensors.items()}
    return pack(*parts(name, target), fixed)


def header_of(data: bytes) -> dict[str, object]:
    (length,) = struct.unpack_from("<Q", data)
    return json.loads(data[8 : 8 + length])


def with_metadata(data: bytes, **changes: object) -> bytes:
    """The artifact with parts of its metadata replaced, as someone else would write it."""
    header = header_of(data)
    metadata = {**header["__metadata__"], **changes}
    metadata = {name: value for name, value in metadata.items() if value is not None}
    (length,) = struct.unpack_from("<Q", data)
    text = json.dumps({**header, "__metadata__": metadata}).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def refusal(data: bytes) -> str:
    with pytest.raises(KernelError) as caught:
        unpack(data, artifact_digest(data))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "target"),
    [("bottleneck-mlp", LINEAR), ("noop", LINEAR), ("widen", conv_pair().target)],
)
def test_what_was_packed_comes_back(name: str, target: KernelTarget) -> None:
    graph, _, manifest = parts(name, target)
    data = packed(name, target)
    template = unpack(data, artifact_digest(data))
    assert (template.graph, template.target, template.manifest) == (graph, target, manifest)
    assert template.digest == artifact_digest(data)
    assert not template.tensors
    parameters = dict(template.skeleton.named_parameters())
    assert {name: tuple(p.shape) for name, p in parameters.items()} == parameter_shapes(
        graph, target
    )
    assert all(parameter.is_meta for parameter in parameters.values())


def test_an_artifact_is_a_safetensors_file() -> None:
    weight = torch.randn(16, 36)
    data = packed(op_up__weight=weight)
    assert torch.equal(safetensors.torch.load(data)["op_up.weight"], weight)
    assert set(header_of(data)["__metadata__"]) == {"graph", "manifest", "target"}
    (length,) = struct.unpack_from("<Q", data)
    assert length % 8 == 0


def test_equal_kernels_give_equal_bytes() -> None:
    weights = {"op_up__weight": torch.ones(16, 36), "op_down__bias": torch.zeros(36)}
    assert len({packed(**weights) for _ in range(20)}) == 1
    assert packed(**weights) == packed(**dict(reversed(weights.items())))


def test_equal_kernels_give_equal_bytes_in_every_process() -> None:
    code = (
        "from tests.unit.esper.execution.test_artifact import packed, artifact_digest;"
        "print(artifact_digest(packed()))"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert run.stdout.strip() == artifact_digest(packed())


def test_fixed_weights_come_back_and_count() -> None:
    weight = torch.randn(16, 36)
    data = packed(op_up__weight=weight)
    template = unpack(data, artifact_digest(data))
    assert torch.equal(template.tensors["op_up.weight"], weight)
    bare = packed()
    assert template.nbytes == unpack(bare, artifact_digest(bare)).nbytes + weight.nbytes


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"op_up__scale": torch.ones(1)}, "got tensor 'op_up.scale'; allowed: op_down.weight"),
        ({"op_up__bias": torch.ones(17)}, r"got tensor 'op_up.bias' of \(17,\)"),
        ({"op_up__bias": torch.ones(16, dtype=torch.float64)}, r"torch.float64; allowed: \(16,\)"),
    ],
)
def test_a_tensor_that_is_no_parameter(tensors: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        packed(**tensors)


def test_foreign_tensors_are_refused_on_the_way_in_too() -> None:
    metadata = header_of(packed())["__metadata__"]
    data = safetensors.torch.save({"op_up.other": torch.ones(1)}, metadata)
    assert "got tensor 'op_up.other'" in refusal(data)


def chain(length: int, *, wide: bool) -> BlueprintDocument:
    """So many nodes in a row; wide ones add their input to itself sixteen times."""
    nodes: list[dict[str, object]] = [{"op": "input", "id": "n0"}]
    for index in range(length):
        node: dict[str, object] = {"id": f"n{index + 1}"}
        if wide:
            node |= {"op": "add", "inputs": [f"n{index}"] * 16}
        else:
            node |= {"op": "linear", "input": f"n{index}", "features": 8}
        nodes.append(node)
    graph = {"nodes": nodes, "output": f"n{length}"}
    return BlueprintDocument.model_validate({"name": "chain", "hosts": ["Linear"], "graph": graph})


SQUARE = linear_place(8, 8).target
POSITIONS = place(nn.Linear(24, 10), (5, 40), producer=nn.Linear(40, 24)).target


@pytest.mark.parametrize(
    ("document", "target"),
    [
        (builtin(entry.name, {}), target)
        for entry in CATALOGUE
        for target in (POSITIONS, conv_pair().target)
        if target.layer.kind in entry.hosts
    ]
    + [(chain(length, wide=wide), SQUARE) for length in (1, 20) for wide in (False, True)],
    ids=lambda value: value.name if isinstance(value, BlueprintDocument) else value.layer.kind,
)
def test_a_template_takes_no_more_memory_than_it_says(
    document: BlueprintDocument, target: KernelTarget
) -> None:
    graph = lower(document, target)
    identity = kernel_id(document.digest, target)
    cost = infer(graph, target)
    manifest = KernelManifest.describing(identity, document.digest, graph, target, cost)
    data = pack(graph, target, manifest)
    digest = artifact_digest(data)
    unpack(data, digest)  # what the first one leaves in caches is not the template's
    gc.freeze()  # what is there already is not counted, and need not be gone through
    tracemalloc.start()
    try:
        template = unpack(data, digest)
        gc.collect()
        taken, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        gc.unfreeze()
    assert taken <= template.nbytes <= 4 * taken


TARGETS = {
    "layer": {"layer": LINEAR.layer.model_copy(update={"bias": False})},
    "inputShape": {"input_shape": (3, 40)},
    "outputShape": {"output_shape": (3, 16)},
    "dtype": {"dtype": "float64"},
    "device": {"device": "cuda:1"},
}


@pytest.mark.parametrize("field", TARGETS)
def test_a_kernel_for_another_layer_is_refused_by_field(field: str) -> None:
    data = packed()
    template = unpack(data, artifact_digest(data))
    check_target(template, LINEAR)
    with pytest.raises(KernelError, match=f"kernel {template.manifest.kernel}: {field}: got ") as e:
        check_target(template, LINEAR.model_copy(update=TARGETS[field]))
    assert "the host layer's" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_producer_counts_for_a_kernel_that_reads_its_input() -> None:
    fed = linear_pair(ActivationOp(kind="relu")).target
    renamed = fed.producer.model_copy(update={"name": "elsewhere"})
    other = fed.producer.model_copy(update={"chain": ()})
    for name, reads in (("widen", True), ("bottleneck-mlp", False)):
        data = packed(name, fed)
        template = unpack(data, artifact_digest(data))
        check_target(template, fed.model_copy(update={"producer": renamed}))
        if reads:
            with pytest.raises(KernelError, match="producer: got "):
                check_target(template, fed.model_copy(update={"producer": other}))
            with pytest.raises(KernelError, match=r"producer: got .* allowed: None"):
                check_target(template, fed.model_copy(update={"producer": None}))
        else:
            check_target(template, fed.model_copy(update={"producer": other}))
            check_target(template, fed.model_copy(update={"producer": None}))


def test_other_bytes_are_another_kernel() -> None:
    data = packed()
    with pytest.raises(KernelError, match=r"got SHA-256 .* allowed: 0000"):
        unpack(data, "0" * 64)


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_no_changed_byte_gets_through(data: st.DataObject) -> None:
    whole = packed()
    position = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[position] ^= data.draw(st.integers(1, 255))
    with pytest.raises(KernelError, match="got SHA-256"):
        unpack(bytes(changed), artifact_digest(whole))


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=64) | st.binary(max_size=64).map(lambda tail: packed()[:-20] + tail))
def test_bytes_that_are_no_artifact_are_refused_in_words(data: bytes) -> None:
    assert refusal(data).startswith("artifact ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"graph": None}, "allowed: graph, manifest, target"),
        ({"code": "import os"}, "allowed: graph, manifest, target"),
        ({"graph": "{}"}, "Field required"),
        ({"target": "{}"}, "Field required"),
        ({"manifest": "{}"}, "Field required"),
        ({"graph": 3}, "artifact"),
    ],
)
def test_metadata_that_is_no_kernels(changes: dict[str, object], message: str) -> None:
    assert message in refusal(with_metadata(packed(), **changes))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("parameters", 1),
        ("flops", 1),
        ("activationElements", 1),
        ("kernel", "0" * 40),
        ("blueprintDigest", "0" * 64),
        ("graphDigest", "0" * 64),
        ("targetDigest", "0" * 64),
    ],
)
def test_a_manifest_that_tells_another_story(field: str, value: object) -> None:
    data = packed()
    manifest = json.loads(header_of(data)["__metadata__"]["manifest"])
    changed = canonical_json({**manifest, field: value}).decode()
    assert "does not describe its graph" in refusal(with_metadata(data, manifest=changed))


def test_a_graph_over_a_cap_is_refused_before_it_is_built() -> None:
    data = packed()
    graph = header_of(data)["__metadata__"]["graph"].replace('"features":36', '"features":1000000')
    assert "57000016 parameters; allowed: at most 50000000" in refusal(
        with_metadata(data, graph=graph)
    )


def test_a_graph_of_another_target_is_refused() -> None:
    other = header_of(packed("widen", conv_pair().target))["__metadata__"]["target"]
    assert "linear on a Conv2d host" in refusal(with_metadata(packed(), target=other))


def test_a_header_that_nests_without_end_is_refused() -> None:
    text = b"[" * 200_000
    assert refusal(struct.pack("<Q", len(text)) + text).startswith("artifact ")


def test_sizes_are_capped_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    data = packed()
    monkeypatch.setattr(artifact, "MAX_ARTIFACT_BYTES", len(data))
    assert unpack(data, artifact_digest(packed())).digest == artifact_digest(data)
    monkeypatch.setattr(artifact, "MAX_ARTIFACT_BYTES", len(data) - 1)
    assert f"got {len(data)} bytes; allowed: at most {len(data) - 1}" in refusal(data)
    with pytest.raises(KernelError, match="allowed: at most"):
        packed()
