"""What Urza's API says of blueprints and kernels."""

from __future__ import annotations

import pytest

from esper.contracts import assets
from esper.contracts.blueprints import builtin, kernel_id
from esper.contracts.enums import BlueprintState
from esper.contracts.kernels import KernelFigures
from esper.errors import KernelError
from esper.services.contracts import (
    SimpleBlueprintContract,
    SimpleCompiledKernelContract,
)
from tests.unit.esper.kernel_targets import linear_place

DOCUMENT = builtin("low-rank", {})
TARGET = linear_place().target
FIGURES = KernelFigures(
    parameters=448,
    flops=2048,
    parameter_bytes=1792,
    latency_microseconds=12.5,
    latency_batch=2,
    device="cpu",
    threads=1,
)


def kernel(**fields: object) -> assets.CompiledKernel:
    return assets.CompiledKernel.model_validate(
        {
            "kernel": kernel_id(DOCUMENT.digest, TARGET),
            "blueprint_digest": DOCUMENT.digest,
            "blueprint": DOCUMENT.name,
            "target": TARGET,
            **fields,
        }
    )


def compiled() -> assets.CompiledKernel:
    return kernel(state=BlueprintState.CHARACTERIZED, artifact_digest="a" * 64, artifact_bytes=1024)


def test_a_blueprint_is_outlined() -> None:
    outline = SimpleBlueprintContract.of(assets.Blueprint.proposed(DOCUMENT))
    assert outline.to_wire() == {
        "name": "low-rank",
        "description": DOCUMENT.description,
        "digest": DOCUMENT.digest,
        "hosts": ["Linear", "Conv1d", "Conv2d", "Embedding"],
        "state": "proposed",
    }
    assert SimpleBlueprintContract.model_validate(outline.to_wire()) == outline


def test_a_compiled_kernel_is_outlined_with_its_figures() -> None:
    outline = SimpleCompiledKernelContract.of(compiled(), FIGURES)
    assert outline.state is BlueprintState.CHARACTERIZED
    assert outline.figures == FIGURES
    assert SimpleCompiledKernelContract.model_validate(outline.to_wire()) == outline


def test_metadata_is_there_once_there_is_an_artifact() -> None:
    metadata = SimpleCompiledKernelContract.of(compiled(), FIGURES).metadata()
    assert metadata.kernel == kernel_id(DOCUMENT.digest, TARGET)
    assert (metadata.artifact_digest, metadata.artifact_bytes) == ("a" * 64, 1024)
    assert metadata.figures == FIGURES


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state": BlueprintState.COMPILING}, "no artifact in state compiling$"),
        (
            {"state": BlueprintState.FAILED, "error": "not zero at birth"},
            "no artifact in state failed: not zero at birth$",
        ),
    ],
)
def test_without_an_artifact_the_reason_is_given(fields: dict[str, object], message: str) -> None:
    with pytest.raises(KernelError, match=message):
        SimpleCompiledKernelContract.of(kernel(**fields)).metadata()
