"""Where a session's checkpoints lie: in its run's directory, or where manifest or settings say."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from pydantic import ValidationError

from esper.configs import StorageConfig
from esper.errors import ConfigError, ManifestError
from esper.services.tolaria.checkpoint_bucket import (
    ADDRESS_FIELD,
    BucketCheckpoints,
    Objects,
    naming,
)
from esper.services.tolaria.checkpoint_folder import FolderCheckpoints
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoints import CheckpointPlace, Checkpoints
from esper.utils.object_store import open_store

FOLDER = "checkpoints"

HUB = "hub"
"""The address of the hub's object store, in settings."""
_ADDRESSES = "s3://BUCKET, s3://BUCKET/PREFIX or file:///PATH, an absolute path"
_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class StorageAddress:
    """What `spec.storage.uri` names: a folder, or a bucket and what keys in it begin with."""

    uri: str
    folder: Path | None = None
    bucket: str | None = None
    prefix: str = ""

    @classmethod
    def parse(cls, uri: str) -> StorageAddress:
        """The address that `uri` writes.

        Raises:
            ManifestError: it is none.
        """
        try:
            parts = urlsplit(uri)
        except ValueError as error:
            raise ManifestError(ADDRESS_FIELD, uri, _ADDRESSES) from error
        path = parts.path
        if parts.scheme == "file":
            path = unquote(path)
            if not parts.netloc and path.startswith("/") and "\0" not in path:
                return cls(uri=uri, folder=Path(path))
        elif parts.scheme == "s3" and not parts.query and not parts.fragment:
            bucket, prefix = parts.netloc, path.strip("/")
            try:
                StorageConfig(bucket=bucket, prefix=prefix)
            except ValidationError as error:
                field = str(error.errors()[0]["loc"][0])
                allowed = StorageConfig.model_fields[field].description
                raise ManifestError(
                    ADDRESS_FIELD, uri, f"{_ADDRESSES}; {field}: {allowed}"
                ) from error
            return cls(uri=uri, bucket=bucket, prefix=prefix)
        raise ManifestError(ADDRESS_FIELD, uri, _ADDRESSES)


def open_checkpoints(
    run: Path,
    owner: Owner,
    keep: int,
    *,
    uri: str | None,
    storage: StorageConfig,
    hub: Callable[[str], Objects] | None = None,
) -> Checkpoints:
    """The checkpoints of a run, in its directory or at `uri`. Nothing is written or asked for.

    At `uri` every session has a place of its own, so that many may name the same. Where it holds
    no checkpoint, those in the run's directory are read: a version that did not know `uri` wrote
    there.

    Args:
        run: the run's directory.
        owner: the session.
        keep: how many checkpoints stay.
        uri: `spec.storage.uri` of the session, if it has one; or `HUB`.
        storage: endpoint, region and credentials of a bucket.
        hub: makes the objects of the session with that uid at the hub.

    Raises:
        ManifestError: `uri` is no address.
        ConfigError: the settings contradict each other, or no credentials are found.
    """
    inside = FolderCheckpoints(run / FOLDER, FOLDER)
    if uri is None:
        return Checkpoints(inside, owner, keep)
    if uri == HUB:
        if hub is None:
            raise ConfigError("tolaria.storage", uri, "null or file:///PATH without a hub.url")
        place = BucketCheckpoints(hub(owner.uid), HUB, FOLDER)
        return Checkpoints(place, owner, keep, portable=True, earlier=inside)
    elsewhere = _place(StorageAddress.parse(uri), _below(owner), storage)
    return Checkpoints(elsewhere, owner, keep, portable=True, earlier=inside)


def _place(address: StorageAddress, below: str, storage: StorageConfig) -> CheckpointPlace:
    if address.folder is not None:
        return FolderCheckpoints(address.folder / below, below)
    changes: dict[str, Any] = {"bucket": address.bucket, "prefix": address.prefix}
    with naming(address.uri):
        store = open_store(storage.model_copy(update=changes))
    return BucketCheckpoints(store, address.uri, below)


def _below(owner: Owner) -> str:
    """A session's own place at an address that other sessions may name too, its namesakes too."""
    uid = owner.uid
    if not _PLAIN.fullmatch(uid):
        uid = hashlib.sha256(uid.encode()).hexdigest()[:32]
    return f"{owner.session}-{uid}/{FOLDER}"
