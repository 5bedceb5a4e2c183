"""What makes files a checkpoint: the manifest `checkpoint.json`, and what it must hold.

A checkpoint is complete if its manifest is there and every part that it names has the size and
the digest that it says. Whose it is, and the version of its form, are judged before its parts.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, ValidationError

from esper.contracts.base import AwareTime, Contract
from esper.errors import CheckpointError, one_line
from esper.services.tolaria.snapshots import PARTS

SCHEMA_VERSION = 1
"""Of the checkpoints that this version writes and reads. Before 1 they had no manifest."""

MANIFEST = "checkpoint.json"
MAX_MANIFEST_BYTES = 2**20
LOGS = ("metrics.jsonl", "events.jsonl", "decisions.jsonl")
"""A run's logs, which are parts of a checkpoint that lies outside the run's directory."""

_NAME = re.compile(r"epoch-(?P<epoch>[0-9]{6,9})(-a(?P<attempt>[0-9]{6,9}))?(-[0-9a-z-]+)?")
Count = Annotated[int, Field(ge=0, strict=True)]


@dataclass(frozen=True, kw_only=True)
class Owner:
    """Whose checkpoints: the session's name, and its uid, which tells it from its namesakes.

    `attempt` is the operator's, 0 where there is none.
    """

    session: str
    uid: str
    attempt: int = 0


class OwnerRecord(Contract):
    """The session that wrote a checkpoint."""

    name: str
    uid: str


class PartRecord(Contract):
    """One file of a checkpoint."""

    size: Annotated[int, Field(ge=0, strict=True, alias="bytes")]
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]

    @classmethod
    def of(cls, data: bytes) -> PartRecord:
        """The record of these bytes."""
        return cls(size=len(data), sha256=hashlib.sha256(data).hexdigest())


class CheckpointManifest(Contract):
    """`checkpoint.json`: the file that makes the others a checkpoint."""

    schema_version: Count
    session: OwnerRecord
    epoch: Count
    attempt: Count | None = None
    """Of the operator's attempts the one that wrote it; absent where it was none."""
    time: AwareTime
    parts: dict[str, PartRecord]

    @property
    def label(self) -> str:
        """What the name of such a checkpoint begins with: its epoch, and its attempt if any."""
        attempt = f"-a{self.attempt:06d}" if self.attempt else ""
        return f"epoch-{self.epoch:06d}{attempt}"

    def encoded(self) -> bytes:
        """The bytes of the file."""
        return json.dumps(self.to_wire(), indent=1).encode() + b"\n"


def epoch_of(name: str) -> int | None:
    """The epoch in a checkpoint's name; None where it is no checkpoint's."""
    found = _NAME.fullmatch(name)
    return int(found["epoch"]) if found else None


def attempt_of(name: str) -> int:
    """The attempt in a checkpoint's name, 0 where it has none."""
    found = _NAME.fullmatch(name)
    return int(found["attempt"] or 0) if found else 0


def newest_first(names: Iterable[str]) -> list[str]:
    """The names of checkpoints, those of later attempts first, then those of later epochs.

    An older attempt may have gone on after a newer one has begun: what it wrote counts less.
    """
    return sorted(names, key=lambda name: (attempt_of(name), epoch_of(name), name), reverse=True)


def read_manifest(
    name: str, data: bytes | None, sizes: Mapping[str, int], owner: Owner
) -> CheckpointManifest:
    """The manifest of `owner`'s checkpoint `name`, whose files have these sizes in bytes.

    The parts' digests are left to `require_part`.

    Raises:
        CheckpointError: it is cut short, damaged, another session's or of another version.
    """
    found = _parsed(name, data, sizes)
    if (found.session.name, found.session.uid) != (owner.session, owner.uid):
        raise refused(
            name,
            f"one of session {found.session.name} with uid {found.session.uid}",
            f"session {owner.session} with uid {owner.uid}",
        )
    if found.epoch != epoch_of(name):
        raise refused(name, f"{MANIFEST} of epoch {found.epoch}", "the epoch in its name")
    if (found.attempt or 0) != attempt_of(name):
        raise refused(name, f"{MANIFEST} of attempt {found.attempt}", "the attempt in its name")
    for part in PARTS:
        if part not in found.parts:
            raise refused(name, f"{MANIFEST} without {part}", "a manifest that names every part")
    for part, record in found.parts.items():
        if part not in (*PARTS, *LOGS):
            raise refused(name, f"{MANIFEST} with a part {part}", ", ".join((*PARTS, *LOGS)))
        if part not in sizes:
            raise refused(name, f"no {part}", f"{part} of {record.size} bytes")
        if sizes[part] != record.size:
            raise refused(name, f"{part} of {sizes[part]} bytes", f"{record.size} bytes")
    return found


def require_part(name: str, part: str, data: bytes | None, record: PartRecord) -> bytes:
    """The bytes of a part, which must have its size and digest.

    Raises:
        CheckpointError: they have not, or are not there any more.
    """
    if data is None:
        raise refused(name, f"no {part}", f"{part} of {record.size} bytes")
    found = PartRecord.of(data)
    if found.size != record.size:
        raise refused(name, f"{part} of {found.size} bytes", f"{record.size} bytes")
    if found.sha256 != record.sha256:
        raise refused(name, f"{part} with SHA-256 {found.sha256}", record.sha256)
    return data


def refused(name: str, came: str, allowed: str) -> CheckpointError:
    """Why the checkpoint `name` can't be used."""
    return CheckpointError(f"checkpoint {name}", came, allowed)


def _parsed(name: str, data: bytes | None, sizes: Mapping[str, int]) -> CheckpointManifest:
    if data is None:
        if all(part in sizes for part in PARTS):
            raise refused(
                name,
                f"no {MANIFEST}, so it was cut short or a version before schema 1 wrote it",
                f"one with a manifest of schema version {SCHEMA_VERSION}",
            )
        raise refused(name, f"no {MANIFEST}, so it was cut short", "one with its manifest")
    if len(data) > MAX_MANIFEST_BYTES:
        raise refused(
            name, f"{MANIFEST} of {len(data)} bytes", f"at most {MAX_MANIFEST_BYTES} bytes"
        )
    fields = _object(name, data)
    version = fields.get("schemaVersion")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise refused(name, f"schema version {one_line(version, 40)}", str(SCHEMA_VERSION))
    try:
        return CheckpointManifest.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"]))
        raise refused(name, f"{MANIFEST} with a wrong {field}", one_line(first["msg"])) from error


def _object(name: str, data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise refused(name, f"{MANIFEST} that is no JSON", "a JSON object") from error
    if not isinstance(found, dict):
        raise refused(name, f"{MANIFEST} that is no JSON object", "a JSON object")
    return found
