"""What a session names of the installation itself: nothing, in whatever namespace that is.

A session may be made in the namespace of hub, bus and operator. Whoever may make one there is not
thereby to read the hub's signing key, nor to write into its volume.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from esper.contracts.resources import TrainingSessionSpec
from esper_operator.options import Options

_TEMPLATE = "spec.workers.podTemplate"
Named = tuple[str, str]
"""A field and the name that stands in it."""


def refused(spec: TrainingSessionSpec, namespace: str, options: Options) -> str | None:
    """Which Secret or claim of the installation's is named, as a message; None if none."""
    if namespace != options.own_namespace:
        return None
    for named, own, what in (
        (_secrets(spec), options.own_secrets, "a Secret"),
        (_claims(spec), options.own_claims, "a PersistentVolumeClaim"),
    ):
        for field, name in named:
            if name in own:
                return f"{field}: got {name}; allowed: {what} that is not the installation's"
    return None


def _secrets(spec: TrainingSessionSpec) -> Iterator[Named]:
    if spec.storage.secret_name is not None:
        yield "spec.storage.secretName", spec.storage.secret_name
    template = spec.workers.pod_template
    for index, variable in enumerate(template.env):
        if variable.value_from is not None and variable.value_from.secret_key_ref is not None:
            place = f"{_TEMPLATE}.env[{index}].valueFrom.secretKeyRef.name"
            yield place, variable.value_from.secret_key_ref.name
    for index, source in enumerate(template.env_from):
        if source.secret_ref is not None:
            yield f"{_TEMPLATE}.envFrom[{index}].secretRef.name", source.secret_ref.name
    for index, volume in enumerate(template.volumes):
        place = f"{_TEMPLATE}.volumes[{index}]"
        if volume.secret is not None:
            yield f"{place}.secret.secretName", volume.secret.secret_name
        if volume.csi is not None and volume.csi.node_publish_secret_ref is not None:
            yield f"{place}.csi.nodePublishSecretRef.name", volume.csi.node_publish_secret_ref.name
        if volume.projected is not None:
            for number, part in enumerate(volume.projected.sources):
                if part.secret is not None:
                    yield f"{place}.projected.sources[{number}].secret.name", part.secret.name


def _claims(spec: TrainingSessionSpec) -> Iterator[Named]:
    """Claims that are mounted, and those that another is to be a copy of."""
    if spec.storage.claim_name is not None:
        yield "spec.storage.claimName", spec.storage.claim_name
    for index, volume in enumerate(spec.workers.pod_template.volumes):
        place = f"{_TEMPLATE}.volumes[{index}]"
        if volume.persistent_volume_claim is not None:
            name = volume.persistent_volume_claim.get("claimName")
            yield f"{place}.persistentVolumeClaim.claimName", str(name)
        template = _part(volume.ephemeral or {}, "volumeClaimTemplate", "spec")
        for source in ("dataSource", "dataSourceRef"):
            found = f"{place}.ephemeral.volumeClaimTemplate.spec.{source}.name"
            yield found, str(_part(template, source).get("name"))


def _part(document: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """What lies there in a free-form part, where it is a mapping."""
    found: Any = document
    for name in path:
        found = found.get(name) if isinstance(found, Mapping) else None
    return found if isinstance(found, Mapping) else {}
