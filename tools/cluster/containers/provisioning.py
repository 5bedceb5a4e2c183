"""Which volumes claims need, and which have had their time: decisions alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROVISIONER = "esper.dev/hostpath"
_PROVISIONED_BY = "pv.kubernetes.io/provisioned-by"
_BLOCK = "Block"

Object = Mapping[str, Any]


@dataclass(frozen=True)
class Plan:
    """What is to be done.

    Attributes:
        made: PersistentVolumes to create, each with its folder.
        removed: names of PersistentVolumes that go, each with its folder.
        refused: claims that can't be served.
    """

    made: tuple[tuple[Object, Path], ...]
    removed: tuple[tuple[str, Path], ...]
    refused: tuple[Object, ...]


def plan(
    claims: Iterable[Object], volumes: Iterable[Object], classes: Iterable[Object], root: Path
) -> Plan:
    """What is to be done for the PersistentVolumeClaims and PersistentVolumes that there are.

    Args:
        claims: all claims.
        volumes: all volumes.
        classes: all StorageClasses.
        root: below it each volume has its folder.
    """
    ours = {each["metadata"]["name"]: each for each in classes if _ours(each)}
    volumes = tuple(volumes)
    names = {volume["metadata"]["name"] for volume in volumes}
    waiting = [claim for claim in claims if _waits(claim, ours, names)]
    return Plan(
        made=tuple(
            (_volume(claim, ours[claim["spec"]["storageClassName"]], root), root / _name(claim))
            for claim in waiting
            if not _block(claim)
        ),
        removed=tuple(
            (name, root / name)
            for volume in volumes
            if _is_done(volume)
            for name in [str(volume["metadata"]["name"])]
        ),
        refused=tuple(claim for claim in waiting if _block(claim)),
    )


def _ours(storage_class: Object) -> bool:
    return bool(storage_class["provisioner"] == PROVISIONER)


def _waits(claim: Object, ours: Mapping[str, Object], names: set[str]) -> bool:
    spec, metadata = claim["spec"], claim["metadata"]
    return (
        spec.get("storageClassName") in ours
        and not spec.get("volumeName")
        and "deletionTimestamp" not in metadata
        and _name(claim) not in names
    )


def _block(claim: Object) -> bool:
    return bool(claim["spec"].get("volumeMode") == _BLOCK)


def _is_done(volume: Object) -> bool:
    """Whether its claim is gone, and it was to go with it."""
    annotations = volume["metadata"].get("annotations", {})
    return (
        annotations.get(_PROVISIONED_BY) == PROVISIONER
        and volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete"
        and volume.get("status", {}).get("phase") in {"Released", "Failed"}
        and "deletionTimestamp" not in volume["metadata"]
    )


def _name(claim: Object) -> str:
    return f"pvc-{claim['metadata']['uid']}"


def _volume(claim: Object, storage_class: Object, root: Path) -> Object:
    metadata, spec = claim["metadata"], claim["spec"]
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": _name(claim), "annotations": {_PROVISIONED_BY: PROVISIONER}},
        "spec": {
            "accessModes": spec["accessModes"],
            "capacity": {"storage": spec["resources"]["requests"]["storage"]},
            # So that no other claim takes it.
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": metadata["namespace"],
                "name": metadata["name"],
                "uid": metadata["uid"],
            },
            "hostPath": {"path": str(root / _name(claim)), "type": "Directory"},
            "persistentVolumeReclaimPolicy": storage_class.get("reclaimPolicy", "Delete"),
            "storageClassName": storage_class["metadata"]["name"],
            "volumeMode": "Filesystem",
        },
    }
