"""What services say to each other over Urza's API: assets, cut down to what a caller needs."""

from __future__ import annotations

from typing import Self

from esper.contracts import assets
from esper.contracts.base import Contract
from esper.contracts.blueprints import BlueprintDocument, KernelTarget
from esper.contracts.enums import BlueprintState
from esper.contracts.ir import LayerKind
from esper.contracts.kernels import Count, Digest, KernelFigures, KernelId, KernelMetadata
from esper.errors import KernelError

__all__ = [
    "KernelFigures",
    "KernelMetadata",
    "KernelRequest",
    "SimpleBlueprintContract",
    "SimpleCompiledKernelContract",
]


class SimpleBlueprintContract(Contract):
    """A blueprint without its graph: what a list of blueprints shows."""

    name: str
    description: str
    digest: Digest
    hosts: tuple[LayerKind, ...]
    state: BlueprintState

    @classmethod
    def of(cls, blueprint: assets.Blueprint) -> Self:
        """The outline of a blueprint in the hub."""
        document = blueprint.document
        return cls(
            name=document.name,
            description=document.description,
            digest=blueprint.digest,
            hosts=document.hosts,
            state=blueprint.state,
        )


class SimpleCompiledKernelContract(Contract):
    """A compiled kernel, or one that was asked for: where it stands and where its bytes are."""

    kernel: KernelId
    blueprint: str
    blueprint_digest: Digest
    state: BlueprintState
    artifact_digest: Digest | None = None
    artifact_bytes: Count | None = None
    figures: KernelFigures | None = None
    error: str | None = None

    @classmethod
    def of(cls, kernel: assets.CompiledKernel, figures: KernelFigures | None = None) -> Self:
        """The outline of a kernel in the hub, with what was measured beside it."""
        return cls(
            kernel=kernel.kernel,
            blueprint=kernel.blueprint,
            blueprint_digest=kernel.blueprint_digest,
            state=kernel.state,
            artifact_digest=kernel.artifact_digest,
            artifact_bytes=kernel.artifact_bytes,
            figures=figures,
            error=kernel.error,
        )

    def metadata(self) -> KernelMetadata:
        """What a cache needs to fetch the artifact.

        Raises:
            KernelError: the kernel is not compiled, or its compilation failed.
        """
        if self.artifact_digest is None or self.artifact_bytes is None:
            reason = f": {self.error}" if self.error else ""
            raise KernelError(f"kernel {self.kernel}: no artifact in state {self.state}{reason}")
        return KernelMetadata(
            kernel=self.kernel,
            blueprint_digest=self.blueprint_digest,
            artifact_digest=self.artifact_digest,
            artifact_bytes=self.artifact_bytes,
            figures=self.figures,
        )


class KernelRequest(Contract):
    """A caller asks for `blueprint` compiled for `target`; asking again changes nothing."""

    blueprint: BlueprintDocument
    target: KernelTarget
