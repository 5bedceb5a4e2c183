"""What every child has: its owner, its labels and the hash of what it was rendered from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Protocol

from esper.contracts.resources import API_VERSION
from esper_operator.digests import digest_of_object
from esper_operator.kinds import MANAGED_LABEL, MANAGER
from esper_operator.views import (
    ATTEMPT_LABEL,
    DIGEST_ANNOTATION,
    ROLE_LABEL,
    SESSION_LABEL,
    UID_LABEL,
)

Json = dict[str, Any]
Role = Literal["worker", "tamiyo", "compile"]


class Named(Protocol):
    """What an owner is known by."""

    @property
    def namespace(self) -> str:
        """Its namespace."""

    @property
    def name(self) -> str:
        """Its name."""

    @property
    def uid(self) -> str:
        """Its uid."""


def labels_of(
    session: Named | None = None, *, role: Role | None = None, attempt: int | None = None
) -> dict[str, str]:
    """The labels by which the operator finds what it has made."""
    found = {MANAGED_LABEL: MANAGER}
    if session is not None:
        found |= {SESSION_LABEL: session.name, UID_LABEL: session.uid}
    if role is not None:
        found[ROLE_LABEL] = role
    if attempt is not None:
        found[ATTEMPT_LABEL] = str(attempt)
    return found


def owner_of(kind: str, owner: Named, *, controller: bool = True) -> Json:
    """The reference with which a child goes away together with its parent."""
    return {
        "apiVersion": API_VERSION,
        "kind": kind,
        "name": owner.name,
        "uid": owner.uid,
        "controller": controller,
        "blockOwnerDeletion": False,
    }


def child(
    api_version: str,
    kind: str,
    namespace: str,
    name: str,
    content: Mapping[str, Any],
    *,
    labels: Mapping[str, str],
    owners: tuple[Json, ...] = (),
    known_by: Mapping[str, Any] | None = None,
    annotations: Mapping[str, str] | None = None,
) -> Json:
    """A whole manifest, marked with the hash of what it is rendered from.

    `known_by` is that, where it is not the manifest itself: for one that holds secrets.
    """
    metadata: Json = {"name": name, "namespace": namespace, "labels": dict(labels)}
    if owners:
        metadata["ownerReferences"] = list(owners)
    manifest: Json = {"apiVersion": api_version, "kind": kind, "metadata": metadata, **content}
    digest = digest_of_object(manifest if known_by is None else known_by)
    metadata["annotations"] = {DIGEST_ANNOTATION: digest, **(annotations or {})}
    return manifest


def digest_in(manifest: Mapping[str, Any]) -> str:
    """The hash with which `child` has marked a manifest."""
    return str(manifest["metadata"]["annotations"][DIGEST_ANNOTATION])
