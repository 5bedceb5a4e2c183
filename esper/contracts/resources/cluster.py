"""How a session runs in a cluster: workers, run policy, storage. One process carries it along."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator

from esper.contracts.resources.common import (
    LabelValue,
    ObjectName,
    Quantity,
    ResourceModel,
    Seconds,
    Subdomain,
    refusal,
    rules,
    without_nulls,
)
from esper.contracts.resources.pod_template import PodTemplate, SecretName

GPU = "nvidia.com/gpu"
Quantities = Annotated[dict[str, Quantity], Field(max_length=16), BeforeValidator(without_nulls)]


class Resources(ResourceModel):
    """corev1.ResourceRequirements of one worker."""

    requests: Quantities = Field(default_factory=dict)
    """What a node must have free for it."""
    limits: Quantities = Field(default_factory=dict)
    """What it may use at most; nvidia.com/gpu is equal to processesPerWorker."""


class WorkersSpec(ResourceModel):
    """The pods that train."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "!has(self.minReplicas) || self.minReplicas <= self.replicas",
                "minReplicas: at most replicas",
            ),
            (
                f"!('{GPU}' in self.resources.limits) || "
                f"string(self.resources.limits['{GPU}']) == string(self.processesPerWorker)",
                f"resources.limits[{GPU}]: equal to processesPerWorker",
            ),
        )
    )

    replicas: Annotated[int, Field(ge=1, le=4096)] = 1
    """Pods, each of which is one worker."""
    min_replicas: Annotated[int, Field(ge=1, le=4096)] | None = None
    """The fewest workers an elastic session goes on with; absent: not elastic."""
    processes_per_worker: Annotated[int, Field(ge=1, le=64)] = 1
    """Ranks in each pod; with GPUs one for each."""
    image: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    """Image with Esper and the entry points; absent: the operator's default."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When a node pulls the image."""
    resources: Resources = Field(default_factory=Resources)
    pod_template: PodTemplate = Field(default_factory=PodTemplate)

    @property
    def processes(self) -> int:
        """Processes over all workers."""
        return self.replicas * self.processes_per_worker

    @model_validator(mode="after")
    def _sizes_fit(self) -> WorkersSpec:
        if self.min_replicas is not None and self.min_replicas > self.replicas:
            raise refusal("minReplicas", self.min_replicas, f"at most replicas, {self.replicas}")
        gpus = self.resources.limits.get(GPU)
        if gpus is not None and gpus != str(self.processes_per_worker):
            raise refusal(
                f"resources.limits[{GPU}]",
                gpus,
                f"equal to processesPerWorker, {self.processes_per_worker}",
            )
        return self


class RunPolicySpec(ResourceModel):
    """When a session runs, how long, how often it is tried again, and what stays of it."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            (
                "has(self.managedBy) == has(oldSelf.managedBy) && "
                "(!has(self.managedBy) || self.managedBy == oldSelf.managedBy)",
                "managedBy is immutable",
            )
        )
    )

    suspend: bool = False
    """Whether it pauses: no pod is left, and training goes on from the newest checkpoint
    once it is unset."""
    managed_by: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Another controller that runs this session; the operator then leaves it alone."""
    startup_deadline_seconds: Seconds = 900
    """From the workers' creation to the first step."""
    progress_deadline_seconds: Seconds = 3600
    """Between two signs of progress."""
    active_deadline_seconds: Seconds | None = None
    """For the whole session, suspensions not counted; absent: no limit."""
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Attempts after a failure; a disruption is no failure."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    """Seconds until a finished session is deleted; absent: never."""
    deletion_policy: Literal["Retain", "Delete"] = "Retain"
    """What happens to checkpoints and results when the session is deleted."""
    queue_name: ObjectName | None = None
    """The LocalQueue of Kueue that decides when the workers run."""
    queue_priority_class: LabelValue | None = None
    """The WorkloadPriorityClass of Kueue with which they wait."""


class StorageSpec(ResourceModel):
    """Where checkpoints and results go; empty: through the hub."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            ("!(has(self.uri) && has(self.claimName))", "claimName: not together with uri"),
            ("!has(self.secretName) || has(self.uri)", "secretName: only with uri"),
        )
    )

    uri: Annotated[str, Field(max_length=1024, pattern="^(s3|file)://.+")] | None = None
    """A bucket (s3://bucket/folder), or a folder that all workers see (file:///folder)."""
    claim_name: Subdomain | None = None
    """A PersistentVolumeClaim of the session's namespace."""
    secret_name: SecretName | None = None
    """The Secret with the credentials for `uri`."""

    @model_validator(mode="after")
    def _one_place(self) -> StorageSpec:
        if self.uri is not None and self.claim_name is not None:
            raise refusal("claimName", self.claim_name, "nothing together with uri")
        if self.secret_name is not None and self.uri is None:
            raise refusal("secretName", self.secret_name, "nothing without uri")
        return self
