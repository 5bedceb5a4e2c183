"""Blueprint: something that can grow, as data. CompiledKernel: one made ready for one target."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from esper.contracts.blueprints import BlueprintDocument, Graph, KernelTarget, builtin
from esper.contracts.enums import BlueprintState
from esper.contracts.ir import LayerKind
from esper.contracts.resources.common import (
    DIGEST_PATTERN,
    Conditions,
    Count,
    LabelledMeta,
    ObjectMeta,
    ObjectName,
    Resource,
    ResourceModel,
    immutable,
    refusal,
    rules,
    without_nulls,
)
from esper.errors import BlueprintError

ArgumentName = Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-z][A-Za-z0-9_]*$")]
Argument = int | Annotated[str, Field(max_length=256)]


class BlueprintSpec(ResourceModel):
    """What the blueprint does: its own graph, or a built-in one with arguments."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("self == oldSelf", "spec is immutable"),
            ("has(self.graph) != has(self.builtin)", "graph: exactly one of graph and builtin"),
            ("!has(self.arguments) || has(self.builtin)", "arguments: only with builtin"),
            ("has(self.builtin) || has(self.hosts)", "hosts: required with graph"),
        )
    )

    description: Annotated[str, Field(max_length=1024)] = ""
    hosts: (
        Annotated[
            tuple[LayerKind, ...],
            Field(
                strict=False,
                min_length=1,
                max_length=6,
                json_schema_extra={"x-kubernetes-list-type": "set"},
            ),
        ]
        | None
    ) = None
    """Kinds of layer that may host it; for a built-in one absent: all that it can do."""
    graph: Annotated[Graph | None, BeforeValidator(without_nulls)] = None
    builtin: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """The name of a built-in blueprint."""
    arguments: (
        Annotated[
            dict[ArgumentName, Argument], Field(max_length=16), BeforeValidator(without_nulls)
        ]
        | None
    ) = None
    """Sizes and kinds of the built-in one that differ from its defaults."""

    @model_validator(mode="after")
    def _one_source(self) -> BlueprintSpec:
        if self.graph is not None and self.builtin is not None:
            raise refusal("builtin", self.builtin, "nothing together with graph")
        if self.graph is None and self.builtin is None:
            raise refusal("graph", "nothing", "a graph, or builtin with the name of a built-in one")
        if self.arguments is not None and self.builtin is None:
            raise refusal("arguments", self.arguments, "nothing without builtin")
        if self.graph is not None and self.hosts is None:
            raise refusal("hosts", "nothing", "a list of layer types, beside graph")
        if self.hosts is not None and len(set(self.hosts)) < len(self.hosts):
            raise refusal("hosts", list(self.hosts), "each entry once")
        return self


class BlueprintStatus(ResourceModel):
    """How far the blueprint is."""

    observed_generation: Count | None = None
    conditions: Conditions = ()
    state: Annotated[BlueprintState, Field(strict=False)] = BlueprintState.PROPOSED
    parameters: Count | None = None
    """Of its smallest kernel."""
    kernels: Count = 0
    """Kernels compiled from it."""


class Blueprint(Resource):
    """Something that can grow at a layer."""

    plural: ClassVar[str] = "blueprints"
    singular: ClassVar[str] = "blueprint"
    short_names: ClassVar[tuple[str, ...]] = ("bp",)
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("State", "string", ".status.state"),
        ("Builtin", "string", ".spec.builtin"),
        ("Params", "integer", ".status.parameters"),
        ("Kernels", "integer", ".status.kernels"),
        ("Age", "date", ".metadata.creationTimestamp"),
    )

    kind: Literal["Blueprint"]
    metadata: LabelledMeta
    spec: BlueprintSpec
    status: BlueprintStatus | None = None

    def document(self) -> BlueprintDocument:
        """The blueprint as the forge takes it, a built-in one expanded, under this object's name.

        Raises:
            BlueprintError: no such built-in blueprint or argument, or `hosts` has a kind of layer
                that the built-in one can't serve.
        """
        spec = self.spec
        if spec.graph is not None:
            return BlueprintDocument(
                name=self.metadata.name,
                description=spec.description,
                hosts=spec.hosts or (),
                graph=spec.graph,
            )
        expanded = builtin(spec.builtin or "", spec.arguments or {})
        hosts = spec.hosts or expanded.hosts
        beyond = [host for host in hosts if host not in expanded.hosts]
        if beyond:
            raise BlueprintError("spec.hosts", beyond[0], f"{', '.join(expanded.hosts)}")
        return expanded.model_copy(
            update={
                "name": self.metadata.name,
                "description": spec.description or expanded.description,
                "hosts": hosts,
            }
        )


class CompiledKernelSpec(ResourceModel):
    """Which blueprint, for which layer."""

    model_config = ConfigDict(json_schema_extra=immutable("spec"))

    blueprint: ObjectName
    target: Annotated[KernelTarget, BeforeValidator(without_nulls)]


class CompiledKernelStatus(ResourceModel):
    """The artifact, and what was measured of it; latency advises people and decides nothing."""

    observed_generation: Count | None = None
    conditions: Conditions = ()
    artifact: Annotated[str, Field(max_length=1024)] | None = None
    """Its key in the object store."""
    digest: Annotated[str, Field(max_length=64, pattern=DIGEST_PATTERN)] | None = None
    """SHA-256 of the artifact's bytes."""
    bytes: Count | None = None
    parameters: Count | None = None
    latency_microseconds: Count | None = None
    failed_attempts: Count = 0
    """Jobs that have failed to compile it though it was not at fault."""


class CompiledKernel(Resource):
    """A blueprint compiled for one target; named by the hash of both, owned by its blueprint."""

    plural: ClassVar[str] = "compiledkernels"
    singular: ClassVar[str] = "compiledkernel"
    short_names: ClassVar[tuple[str, ...]] = ("ck",)
    columns: ClassVar[tuple[tuple[str, str, str], ...]] = (
        ("Blueprint", "string", ".spec.blueprint"),
        ("Layer", "string", ".spec.target.layer.kind"),
        ("Ready", "string", '.status.conditions[?(@.type=="Ready")].status'),
        ("Bytes", "integer", ".status.bytes"),
        ("Params", "integer", ".status.parameters"),
        ("Age", "date", ".metadata.creationTimestamp"),
    )

    kind: Literal["CompiledKernel"]
    metadata: ObjectMeta
    spec: CompiledKernelSpec
    status: CompiledKernelStatus | None = None
