"""One session's checkpoints in one place: written, kept to a number, and found again.

The newest complete one wins. What is cut short, damaged, another session's or of another schema
version is passed over and told in one line; nothing of it is ever deleted, but for what one of the
operator's attempts did not finish.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Protocol

from safetensors import SafetensorError

from esper.contracts.base import utc_now
from esper.errors import CheckpointError, EsperError, Superseded
from esper.services.tolaria.checkpoint_manifest import (
    LOGS,
    MANIFEST,
    SCHEMA_VERSION,
    CheckpointManifest,
    Owner,
    OwnerRecord,
    PartRecord,
    attempt_of,
    epoch_of,
    read_manifest,
    refused,
    require_part,
)
from esper.services.tolaria.snapshots import Snapshot, parts_of, snapshot_of

_NOT_A_SNAPSHOT = (ValueError, KeyError, TypeError, AttributeError, SafetensorError)

_log = logging.getLogger(__name__)


class CheckpointPlace(Protocol):
    """Where checkpoints lie, each a set of named parts under a name of its own.

    Methods are called from one thread at a time. Each raises StoreUnavailable where the place
    can't be reached; `path` says where it is, for messages.
    """

    path: str

    def listed(self) -> dict[str, dict[str, int]]:
        """Every checkpoint, complete or not, newest first: the sizes of its parts in bytes."""

    def part(self, name: str, part: str) -> bytes | None:
        """The bytes of one part, None where it has none or they can't be read."""

    def name(self, manifest: CheckpointManifest) -> str:
        """What a checkpoint with that manifest is called here; it begins with `epoch-`."""

    def write(
        self,
        name: str,
        manifest: CheckpointManifest,
        parts: Mapping[str, bytes],
        *,
        replaced: bool,
    ) -> None:
        """Store a checkpoint, whole or else without its manifest, which tells the parts' digests.

        Where something of that name is there it goes if `replaced`, once the new one is whole;
        else it is moved aside and stays.

        Raises:
            StorageFull: no room is left. What was there is as it was.
        """

    def remove(self, name: str) -> None:
        """Delete a checkpoint; from the beginning on it is none any more."""

    def begin(self, attempt: int) -> None:
        """Leave word that this attempt of the operator's has begun."""

    def begun(self) -> int:
        """The newest attempt that has left word; 0 where none has."""

    def keep(self, name: str, data: bytes) -> None:
        """Store a file that a finished run leaves, in place of one of that name."""

    def kept(self) -> dict[str, bytes]:
        """The files that were kept, by their names."""

    def shown(self, name: str) -> str:
        """Where the checkpoint lies, relative to the session's storage."""

    def check(self) -> None:
        """Return if the place can be used; raise the reason if not."""

    def answers(self) -> int | None:
        """A number that grows as long as the place answers; None where nothing of it is known.

        It is asked from any thread, while another one writes.
        """

    def close(self) -> None:
        """Let go of connections."""


@dataclass(frozen=True, kw_only=True)
class Written:
    """A checkpoint that is complete: where it lies, its epoch, and when it was written."""

    where: str
    epoch: int
    time: datetime


@dataclass(frozen=True, kw_only=True)
class Found:
    """The checkpoint to go on from.

    `written` is what was told when it was written. `logs` are the run's logs up to its boundary,
    where they are part of it. `passed` has a line for each newer checkpoint that could not be used.
    """

    name: str
    written: Written
    snapshot: Snapshot
    logs: Mapping[str, bytes] = field(default_factory=dict)
    passed: tuple[str, ...] = ()


class Checkpoints:
    """The checkpoints of one session.

    Args:
        place: where they lie.
        owner: the session.
        keep: how many complete ones of it stay, of different epochs.
        portable: whether the run's logs go along, so that any machine can go on from them.
        earlier: where to look if `place` holds none; it is only read.
    """

    def __init__(
        self,
        place: CheckpointPlace,
        owner: Owner,
        keep: int,
        *,
        portable: bool = False,
        earlier: CheckpointPlace | None = None,
    ) -> None:
        self.portable = portable
        self._place = place
        self._owner = owner
        self._keep = keep
        self._earlier = earlier
        # By name: the manifest of one that was verified or written here, None for a damaged one.
        self._known: dict[str, CheckpointManifest | None] = {}

    def begin(self) -> None:
        """Take over from earlier attempts: from now on they write and remove nothing more.

        Raises:
            Superseded: a newer attempt has.
            StoreUnavailable: the place does not answer.
        """
        if self._owner.attempt:
            self._place.begin(self._owner.attempt)
            self._refuse_superseded()

    def newest(self) -> Found | None:
        """The newest complete checkpoint of the session; None where there is none of any kind.

        Raises:
            CheckpointError: there are some, and none can be used.
            StoreUnavailable: the place does not answer.
        """
        for place in (self._place, self._earlier):
            if place is not None and (listed := _begun(place.listed())):
                return self._newest_of(place, listed)
        return None

    def write(self, snapshot: Snapshot, logs: Mapping[str, bytes]) -> Written:
        """Store a checkpoint, then drop the session's own complete ones beyond `keep`.

        Raises:
            StorageFull: no room is left; the older checkpoints are as they were.
            StoreUnavailable: the place does not answer.
            Superseded: a newer attempt has taken over.
        """
        self._refuse_superseded()
        parts = {**parts_of(snapshot), **(logs if self.portable else {})}
        manifest = CheckpointManifest(
            schema_version=SCHEMA_VERSION,
            session=OwnerRecord(name=self._owner.session, uid=self._owner.uid),
            epoch=snapshot.epoch,
            attempt=self._owner.attempt or None,
            time=utc_now(),
            parts={part: PartRecord.of(data) for part, data in parts.items()},
        )
        name = self._place.name(manifest)
        taken = self._place.listed().get(name)
        replaced = taken is not None and self._whole(name, taken)
        self._place.write(name, manifest, parts, replaced=replaced)
        self._known[name] = manifest
        self._refuse_superseded()  # what is old here may be what the newer one goes on from
        try:
            self._drop_old(name)
        except EsperError as error:
            # The checkpoint is there all the same; the next one drops what this one could not.
            _log.warning("old checkpoints in %s stay for now: %s", self._place.path, error)
        return Written(where=self._place.shown(name), epoch=snapshot.epoch, time=manifest.time)

    def keep(self, files: Mapping[str, bytes]) -> None:
        """Store what a finished run leaves, where checkpoints do not lie in its directory anyway.

        Raises:
            StorageFull: no room is left.
            StoreUnavailable: the place does not answer.
            Superseded: a newer attempt has taken over.
        """
        if self.portable:
            self._refuse_superseded()
            for name, data in files.items():
                self._place.keep(name, data)

    def kept(self) -> dict[str, bytes]:
        """What a finished run has left here; nothing where it has not finished.

        Raises:
            StoreUnavailable: the place does not answer.
        """
        return self._place.kept()

    def check(self) -> None:
        """Return if checkpoints can be written where they should; raise the reason if not."""
        self._place.check()

    @property
    def path(self) -> str:
        """Where they lie."""
        return self._place.path

    def answers(self) -> int | None:
        """A number that grows as long as the place answers; see `CheckpointPlace.answers`."""
        return self._place.answers()

    def close(self) -> None:
        """Let go of connections."""
        self._place.close()

    def _refuse_superseded(self) -> None:
        newest = self._place.begun() if self._owner.attempt else 0
        if newest > self._owner.attempt:
            raise Superseded(
                f"session {self._owner.session}: attempt {newest} has taken over from attempt "
                f"{self._owner.attempt}, which ends and leaves what is there as it is"
            )

    def _newest_of(self, place: CheckpointPlace, listed: Mapping[str, Mapping[str, int]]) -> Found:
        reasons: list[CheckpointError] = []
        for name, sizes in listed.items():
            try:
                manifest, parts = self._read(place, name, sizes)
                snapshot = _snapshot(name, manifest, parts)
            except CheckpointError as error:
                if place is self._place:
                    self._known[name] = None
                reasons.append(error)
                continue
            if place is self._place:
                self._known[name] = manifest
            logs = {part: data for part, data in parts.items() if part in LOGS}
            passed = tuple(
                f"{error}; {name}, an older one, is used and nothing was deleted ({place.path})"
                for error in reasons
            )
            for line in passed:
                _log.warning("%s", line)
            written = Written(where=place.shown(name), epoch=manifest.epoch, time=manifest.time)
            return Found(name=name, written=written, snapshot=snapshot, logs=logs, passed=passed)
        for reason in reasons[1:]:
            _log.info("%s", reason)
        newest = reasons[0]
        raise CheckpointError(
            f"checkpoints in {place.path}",
            f"{len(reasons)} of which none can be used",
            f"one complete checkpoint of the session; the newest, {newest.field.split()[-1]}, has "
            f"{newest.came} where {newest.allowed} is allowed; nothing was deleted: put a good one "
            "there, or start a new run in another output directory",
        ) from newest

    def _read(
        self, place: CheckpointPlace, name: str, sizes: Mapping[str, int]
    ) -> tuple[CheckpointManifest, dict[str, bytes]]:
        """A checkpoint's manifest and verified parts.

        Raises:
            CheckpointError: it can't be used.
        """
        data = place.part(name, MANIFEST) if MANIFEST in sizes else None
        manifest = read_manifest(name, data, sizes, self._owner)
        parts = {
            part: require_part(name, part, place.part(name, part), record)
            for part, record in manifest.parts.items()
        }
        return manifest, parts

    def _whole(self, name: str, sizes: Mapping[str, int]) -> bool:
        """Whether it is a complete one of this session; digests are read once a process."""
        known = self._known.get(name)
        if known is not None:
            return MANIFEST in sizes and all(
                sizes.get(part) == record.size for part, record in known.parts.items()
            )
        if name not in self._known:
            try:
                self._known[name] = self._read(self._place, name, sizes)[0]
            except CheckpointError:
                self._known[name] = None
        return self._known[name] is not None

    def _drop_old(self, written: str) -> None:
        kept, listed = {epoch_of(written)}, self._place.listed()
        if self._owner.attempt and any(attempt_of(one) > self._owner.attempt for one in listed):
            return  # a newer attempt began after the look, however long ago that was
        for name, sizes in listed.items():
            epoch = epoch_of(name)
            if _never_finished(name, sizes) and name != written:
                self._place.remove(name)
                continue
            if name == written or not self._whole(name, sizes):
                continue
            if epoch not in kept and len(kept) < self._keep:
                kept.add(epoch)
            else:
                self._place.remove(name)
                del self._known[name]


def _begun(listed: Mapping[str, Mapping[str, int]]) -> dict[str, Mapping[str, int]]:
    """Those that are, or were, checkpoints: what an attempt was killed in the midst of was none."""
    return {name: sizes for name, sizes in listed.items() if not _never_finished(name, sizes)}


def _never_finished(name: str, sizes: Mapping[str, int]) -> bool:
    """Whether an attempt has not come to write its manifest, which comes last."""
    return attempt_of(name) > 0 and MANIFEST not in sizes


def _snapshot(name: str, manifest: CheckpointManifest, parts: Mapping[str, bytes]) -> Snapshot:
    try:
        snapshot = snapshot_of(parts)
    except _NOT_A_SNAPSHOT as error:
        raise refused(
            name, f"parts that are no snapshot ({type(error).__name__})", "what Esper wrote"
        ) from error
    if snapshot.epoch != manifest.epoch:
        raise refused(name, f"the state of epoch {snapshot.epoch}", f"epoch {manifest.epoch}")
    return snapshot
