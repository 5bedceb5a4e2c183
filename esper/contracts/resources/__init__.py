"""What kubectl applies: the four resources of group esper.dev, spec and status.

The same models check a manifest for `esper run` and generate the CustomResourceDefinitions.
"""

from esper.contracts.resources.blueprint import (
    Blueprint,
    BlueprintSpec,
    BlueprintStatus,
    CompiledKernel,
    CompiledKernelSpec,
    CompiledKernelStatus,
)
from esper.contracts.resources.cluster import (
    Resources,
    RunPolicySpec,
    StorageSpec,
    WorkersSpec,
)
from esper.contracts.resources.common import (
    API_VERSION,
    GROUP,
    VERSION,
    Condition,
    LabelSelector,
    LabelSelectorRequirement,
    ObjectMeta,
    Resource,
    decimal_text,
)
from esper.contracts.resources.growth import (
    BudgetSpec,
    ControllerSpec,
    GatesSpec,
    GrowthSpec,
    LayersSpec,
)
from esper.contracts.resources.pod_template import PodTemplate
from esper.contracts.resources.seed import Seed, SeedSpec, SeedStatus, SeedTransitionStatus
from esper.contracts.resources.session import (
    CheckpointStatus,
    Failure,
    LayerSummary,
    RefusedLayer,
    SeedCounts,
    TrainingSession,
    TrainingSessionSpec,
    TrainingSessionStatus,
)
from esper.contracts.resources.training import (
    CheckpointSpec,
    DataSpec,
    ModelSpec,
    NonFiniteSpec,
    OptimizerSpec,
    ScheduleSpec,
    TrainingSpec,
)

KINDS: tuple[type[Resource], ...] = (TrainingSession, Seed, Blueprint, CompiledKernel)
"""Every kind of the group."""

__all__ = [
    "API_VERSION",
    "GROUP",
    "KINDS",
    "VERSION",
    "Blueprint",
    "BlueprintSpec",
    "BlueprintStatus",
    "BudgetSpec",
    "CheckpointSpec",
    "CheckpointStatus",
    "CompiledKernel",
    "CompiledKernelSpec",
    "CompiledKernelStatus",
    "Condition",
    "ControllerSpec",
    "DataSpec",
    "Failure",
    "GatesSpec",
    "GrowthSpec",
    "LabelSelector",
    "LabelSelectorRequirement",
    "LayerSummary",
    "LayersSpec",
    "ModelSpec",
    "NonFiniteSpec",
    "ObjectMeta",
    "OptimizerSpec",
    "PodTemplate",
    "RefusedLayer",
    "Resource",
    "Resources",
    "RunPolicySpec",
    "ScheduleSpec",
    "Seed",
    "SeedCounts",
    "SeedSpec",
    "SeedStatus",
    "SeedTransitionStatus",
    "StorageSpec",
    "TrainingSession",
    "TrainingSessionSpec",
    "TrainingSessionStatus",
    "TrainingSpec",
    "WorkersSpec",
    "decimal_text",
]
