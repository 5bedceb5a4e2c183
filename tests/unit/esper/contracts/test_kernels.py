"""A kernel's manifest follows from the kernel alone; figures stand beside it."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from esper.contracts.base import digest_of
from esper.contracts.blueprints import builtin, infer, kernel_id, lower
from esper.contracts.kernels import KernelFigures, KernelManifest, KernelMetadata
from tests.unit.esper.kernel_targets import linear_place

FIGURES = {
    "parameters": 2068,
    "flops": 9216,
    "parameterBytes": 8272,
    "latencyMicroseconds": 41.5,
    "latencyBatch": 2,
    "device": "cpu",
    "threads": 1,
}


def manifest() -> KernelManifest:
    document, target = builtin("bottleneck-mlp", {}), linear_place().target
    graph = lower(document, target)
    identity = kernel_id(document.digest, target)
    return KernelManifest.describing(identity, document.digest, graph, target, infer(graph, target))


def test_a_manifest_counts_and_names_its_parts() -> None:
    document, target = builtin("bottleneck-mlp", {}), linear_place().target
    found = manifest()
    assert found.parameters == 2068
    assert found.flops == 9216
    assert found.activation_elements == 40 + 36 + 36 + 16
    assert found.kernel == kernel_id(document.digest, target)
    assert found.graph_digest == digest_of(lower(document, target).to_wire())
    assert found.target_digest == digest_of(target.to_wire())


def test_a_manifest_survives_the_wire() -> None:
    assert KernelManifest.model_validate(manifest().to_wire()) == manifest()


@pytest.mark.parametrize(
    "fields",
    [{"kernel": "abc"}, {"graphDigest": "A" * 64}, {"parameters": -1}, {"flops": 1.0}, {"new": 1}],
)
def test_a_manifest_is_strict(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KernelManifest.model_validate({**manifest().to_wire(), **fields})


def test_metadata_goes_with_figures_and_without() -> None:
    wire = {
        "kernel": "0" * 40,
        "blueprintDigest": "1" * 64,
        "artifactDigest": "2" * 64,
        "artifactBytes": 1024,
    }
    bare = KernelMetadata.model_validate(wire)
    assert bare.to_wire() == wire
    measured = KernelMetadata.model_validate({**wire, "figures": FIGURES})
    assert measured.to_wire() == {**wire, "figures": FIGURES}


@pytest.mark.parametrize("fields", [{"latencyMicroseconds": -1.0}, {"threads": 0}])
def test_figures_that_nothing_measures(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        KernelFigures.model_validate({**FIGURES, **fields})
