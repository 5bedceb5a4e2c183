"""What is known of a compiled kernel: the manifest inside its artifact, and figures beside it."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field

from esper.contracts.base import Contract, digest_of
from esper.contracts.blueprints import Graph, GraphCost, KernelTarget

Count = Annotated[int, Field(ge=0, strict=True)]
KernelId = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class KernelManifest(Contract):
    """What an artifact says of itself; it follows from the graph and the target alone.

    `graph_digest` and `target_digest` are the SHA-256 of the canonical JSON of either.
    """

    schema_version: Literal[1] = 1
    kernel: KernelId
    blueprint_digest: Digest
    graph_digest: Digest
    target_digest: Digest
    parameters: Count
    flops: Count
    activation_elements: Count

    @classmethod
    def describing(
        cls,
        kernel: str,
        blueprint_digest: str,
        graph: Graph,
        target: KernelTarget,
        cost: GraphCost,
    ) -> Self:
        """The manifest of a bound graph, whose cost `infer` has counted."""
        return cls(
            kernel=kernel,
            blueprint_digest=blueprint_digest,
            graph_digest=digest_of(graph.to_wire()),
            target_digest=digest_of(target.to_wire()),
            parameters=cost.parameters,
            flops=cost.flops,
            activation_elements=cost.activation_elements,
        )


class KernelFigures(Contract):
    """What was measured when the kernel was compiled. It advises people and decides nothing.

    `latency_microseconds` is the median of a forward and backward pass at batch size
    `latency_batch` on `device`, with `threads` threads of the compiling process.
    """

    parameters: Count
    flops: Count
    parameter_bytes: Count
    latency_microseconds: Annotated[float, Field(ge=0)]
    latency_batch: Annotated[int, Field(ge=1)]
    device: str
    threads: Annotated[int, Field(ge=1)]


class KernelMetadata(Contract):
    """What a cache needs before it fetches an artifact: its digest and its size."""

    kernel: KernelId
    blueprint_digest: Digest
    artifact_digest: Digest
    artifact_bytes: Count
    figures: KernelFigures | None = None


def artifact_key(digest: str) -> str:
    """Where the artifact with that SHA-256 lies in the object store."""
    return f"kernels/{digest}.safetensors"
