"""What a session may say of its workers' pods.

A pod can do no more than the restricted Pod Security Standard lets it: volumes are of its types
alone, nothing gives a service account's token, and no Secret that the operator has made is read
where the operator does not mount it. Nor can it name what the operator sets itself: that is
refused, not passed over.
"""

from __future__ import annotations

import re
from typing import Annotated

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    JsonValue,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from esper.contracts.resources.common import (
    Labels,
    Quantity,
    ResourceModel,
    Subdomain,
    rules,
)

Free = dict[str, JsonValue]
Passed = Annotated[
    Free, WithJsonSchema({"type": "object", "x-kubernetes-preserve-unknown-fields": True})
]
"""As free, but a rule can see whether it is there."""
FreeItems = Annotated[tuple[Free, ...], Field(strict=False, max_length=64)]

OWN_SECRETS = ("esper-tamiyo",)
OWN_SECRET_ENDINGS = ("-esper", ".esper")
"""The names of Secrets that the operator makes, and how those end that it makes for an object."""
HELM_PREFIX = "sh.helm.release."
"""How the names of Secrets begin in which Helm keeps releases, with all of their Secrets."""
_ANOTHER_SECRET = (
    "a Secret that is neither the operator's nor Helm's: not esper-tamiyo, not ending with -esper "
    f"or .esper, not beginning with {HELM_PREFIX}"
)


def _not_ours(name: str) -> str:
    if name in OWN_SECRETS or name.endswith(OWN_SECRET_ENDINGS) or name.startswith(HELM_PREFIX):
        raise PydanticCustomError("reserved", _ANOTHER_SECRET)
    return name


SecretName = Annotated[
    Subdomain,
    AfterValidator(_not_ours),
    Field(
        json_schema_extra=rules(
            (
                f"!(self in {list(OWN_SECRETS)} || "
                + " || ".join(f"self.endsWith('{ending}')" for ending in OWN_SECRET_ENDINGS)
                + f" || self.startsWith('{HELM_PREFIX}'))",
                _ANOTHER_SECRET,
            )
        )
    ),
]
"""A Secret of the user's."""


OWN_VARIABLES = (
    *("HOME", "TMPDIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME", "POD_IP"),
    *("ESPER_TOLARIA__ATTEMPT", "ESPER_TOLARIA__STORAGE"),
)
_ANOTHER_VARIABLE = f"a variable that the operator does not set: not {', '.join(OWN_VARIABLES)}"
OWN_VOLUME_PREFIX = "esper-"
_ANOTHER_VOLUME = (
    f"a name that does not begin with {OWN_VOLUME_PREFIX}, as the operator's volumes do"
)
OWN_PLACES_PATTERN = (
    r"^/*(tmp|dev/+shm|var/+lib/+esper(-claim)?|etc/+esper(/.*)?)/*$|(^|/)[.][.]?(/|$)"
)
_ANOTHER_PLACE = (
    "a place that is not the operator's: not /tmp, /dev/shm, /var/lib/esper or "
    "/var/lib/esper-claim, not in /etc/esper, and without . and .."
)


def _variable(name: str) -> str:
    if name in OWN_VARIABLES:
        raise PydanticCustomError("reserved", _ANOTHER_VARIABLE)
    return name


def _volume(name: str) -> str:
    if name.startswith(OWN_VOLUME_PREFIX):
        raise PydanticCustomError("reserved", _ANOTHER_VOLUME)
    return name


def _place(path: str) -> str:
    if re.search(OWN_PLACES_PATTERN, path):
        raise PydanticCustomError("reserved", _ANOTHER_PLACE)
    return path


VariableName = Annotated[
    str,
    AfterValidator(_variable),
    Field(
        min_length=1,
        max_length=253,
        json_schema_extra=rules((f"!(self in {list(OWN_VARIABLES)})", _ANOTHER_VARIABLE)),
    ),
]
VolumeName = Annotated[
    str,
    AfterValidator(_volume),
    Field(
        min_length=1,
        max_length=63,
        json_schema_extra=rules((f"!self.startsWith('{OWN_VOLUME_PREFIX}')", _ANOTHER_VOLUME)),
    ),
]
MountPath = Annotated[
    str,
    AfterValidator(_place),
    Field(
        min_length=1,
        max_length=1024,
        json_schema_extra=rules((f"!self.matches('{OWN_PLACES_PATTERN}')", _ANOTHER_PLACE)),
    ),
]


def _one_of(place: str, fields: tuple[str, ...]) -> ConfigDict:
    """The rule that exactly one of those fields is set."""
    held = ", ".join(f"has(self.{name})" for name in fields)
    allowed = f"{place}: exactly one of {', '.join(fields)}"
    return ConfigDict(json_schema_extra=rules((f"[{held}].filter(one, one).size() == 1", allowed)))


def _refuse_all_but_one(part: ResourceModel, fields: tuple[str, ...]) -> None:
    held = [name for name in fields if name in part.to_wire()]
    if len(held) != 1:
        raise PydanticCustomError("reserved", f"exactly one of {', '.join(fields)}")


class SecretKey(ResourceModel):
    """corev1.SecretKeySelector."""

    name: SecretName
    """The Secret; none of the operator's."""
    key: Annotated[str, Field(min_length=1, max_length=253)]
    """Which of its values."""
    optional: bool | None = None
    """Whether it may be missing."""


class VariableSource(ResourceModel):
    """corev1.EnvVarSource."""

    field_ref: Free | None = None
    """A field of the pod, as corev1.ObjectFieldSelector."""
    resource_field_ref: Free | None = None
    """A resource of the container, as corev1.ResourceFieldSelector."""
    config_map_key_ref: Free | None = None
    """A key of a ConfigMap, as corev1.ConfigMapKeySelector."""
    secret_key_ref: SecretKey | None = None


class EnvironmentVariable(ResourceModel):
    """corev1.EnvVar."""

    name: VariableName
    """Its name; none that the operator sets."""
    value: Annotated[str, Field(max_length=32768)] | None = None
    """What it is."""
    value_from: VariableSource | None = None


class NamedSecret(ResourceModel):
    """corev1.SecretEnvSource, and other references to a Secret by name."""

    name: SecretName
    """The Secret; none of the operator's."""
    optional: bool | None = None
    """Whether it may be missing."""


class EnvironmentSource(ResourceModel):
    """corev1.EnvFromSource."""

    prefix: Annotated[str, Field(max_length=253)] | None = None
    """What the variables' names begin with."""
    config_map_ref: Free | None = None
    """A ConfigMap whose keys become variables, as corev1.ConfigMapEnvSource."""
    secret_ref: NamedSecret | None = None


class SecretVolume(ResourceModel):
    """corev1.SecretVolumeSource."""

    secret_name: SecretName
    """The Secret; none of the operator's."""
    items: FreeItems | None = None
    """Keys and the files that they become, as corev1.KeyToPath; absent: all."""
    default_mode: Annotated[int, Field(ge=0, le=0o777)] | None = None
    """The mode of its files, in decimal."""
    optional: bool | None = None
    """Whether it may be missing."""


class CsiVolume(ResourceModel):
    """corev1.CSIVolumeSource."""

    driver: Annotated[str, Field(min_length=1, max_length=63)]
    """The CSI driver."""
    fs_type: Annotated[str, Field(max_length=63)] | None = None
    """The file system."""
    read_only: bool | None = None
    """Whether it is mounted read-only."""
    volume_attributes: Free | None = None
    """What the driver is told."""
    node_publish_secret_ref: NamedSecret | None = None


class ProjectedSecret(ResourceModel):
    """corev1.SecretProjection."""

    name: SecretName
    """The Secret; none of the operator's."""
    items: FreeItems | None = None
    """Keys and the files that they become, as corev1.KeyToPath; absent: all."""
    optional: bool | None = None
    """Whether it may be missing."""


_PROJECTED = ("secret", "configMap", "downwardAPI", "clusterTrustBundle")


class ProjectedSource(ResourceModel):
    """corev1.VolumeProjection, without the tokens and certificates of a service account."""

    model_config = _one_of("sources", _PROJECTED)

    secret: ProjectedSecret | None = None
    config_map: Passed | None = None
    """As corev1.ConfigMapProjection."""
    downward_api: Annotated[Passed | None, Field(alias="downwardAPI")] = None
    """As corev1.DownwardAPIProjection."""
    cluster_trust_bundle: Passed | None = None
    """As corev1.ClusterTrustBundleProjection."""

    @model_validator(mode="after")
    def _one_source(self) -> ProjectedSource:
        _refuse_all_but_one(self, _PROJECTED)
        return self


class ProjectedVolume(ResourceModel):
    """corev1.ProjectedVolumeSource."""

    sources: Annotated[tuple[ProjectedSource, ...], Field(strict=False, max_length=64)]
    """What lies in it together."""
    default_mode: Annotated[int, Field(ge=0, le=0o777)] | None = None
    """The mode of its files, in decimal."""


_VOLUMES = (
    *("configMap", "csi", "downwardAPI", "emptyDir", "ephemeral"),
    *("persistentVolumeClaim", "projected", "secret"),
)


class Volume(ResourceModel):
    """corev1.Volume, of a type that the restricted Pod Security Standard allows."""

    model_config = _one_of("volumes", _VOLUMES)

    name: VolumeName
    """Its name; the operator's begin with esper-."""
    config_map: Passed | None = None
    """As corev1.ConfigMapVolumeSource."""
    csi: CsiVolume | None = None
    downward_api: Annotated[Passed | None, Field(alias="downwardAPI")] = None
    """As corev1.DownwardAPIVolumeSource."""
    empty_dir: Passed | None = None
    """As corev1.EmptyDirVolumeSource."""
    ephemeral: Passed | None = None
    """As corev1.EphemeralVolumeSource."""
    persistent_volume_claim: Passed | None = None
    """As corev1.PersistentVolumeClaimVolumeSource."""
    projected: ProjectedVolume | None = None
    secret: SecretVolume | None = None

    @model_validator(mode="after")
    def _one_type(self) -> Volume:
        _refuse_all_but_one(self, _VOLUMES)
        return self


class VolumeMount(ResourceModel):
    """corev1.VolumeMount."""

    name: Annotated[str, Field(min_length=1, max_length=63)]
    """The volume."""
    mount_path: MountPath
    """Where it is seen; no place of the operator's."""
    sub_path: Annotated[str, Field(max_length=1024)] | None = None
    """A path within the volume."""
    sub_path_expr: Annotated[str, Field(max_length=1024)] | None = None
    """One that names variables."""
    read_only: bool | None = None
    """Whether nothing can be written."""
    recursive_read_only: Annotated[str, Field(max_length=32)] | None = None
    """Whether that holds for what is mounted below, too."""
    mount_propagation: Annotated[str, Field(max_length=32)] | None = None
    """How mounts reach the container from its host."""


class PodTemplate(ResourceModel):
    """The fields of a worker pod that a session may set; free-form ones are passed on."""

    env: Annotated[tuple[EnvironmentVariable, ...], Field(strict=False, max_length=128)] = ()
    """Variables of the worker."""
    env_from: Annotated[tuple[EnvironmentSource, ...], Field(strict=False, max_length=64)] = ()
    """Sources whose keys become variables."""
    volumes: Annotated[tuple[Volume, ...], Field(strict=False, max_length=64)] = ()
    """Volumes of the pod."""
    volume_mounts: Annotated[tuple[VolumeMount, ...], Field(strict=False, max_length=64)] = ()
    """Where the worker sees them."""
    node_selector: Labels = Field(default_factory=dict)
    """Labels that a node must have."""
    tolerations: FreeItems = ()
    """Taints that are borne, as corev1.Toleration."""
    affinity: Free | None = None
    """Which nodes and neighbours are wanted, as corev1.Affinity."""
    runtime_class_name: Subdomain | None = None
    """The RuntimeClass."""
    priority_class_name: Subdomain | None = None
    """The PriorityClass."""
    image_pull_secrets: FreeItems = ()
    """Secrets with which the image is pulled, as corev1.LocalObjectReference."""
    shared_memory: Quantity | None = None
    """Size of the memory-backed /dev/shm."""
    termination_grace_period_seconds: Annotated[int, Field(ge=0, le=86_400)] | None = None
    """For a worker to write a checkpoint once it is asked to stop; absent: the operator's
    default."""
    extra: Free | None = None
    """Other fields of the pod's spec; the API server checks them when the pod is made.

    Neither those that the operator sets nor those that have a field here.
    """
