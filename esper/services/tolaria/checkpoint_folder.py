"""Checkpoints in a folder, each a folder of its own.

One is written under a temporary name and renamed, and gets another name before it is deleted, so
that a folder with its final name was written whole.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

from esper.errors import ConfigError, StorageFull, StoreUnavailable
from esper.services.tolaria.checkpoint_manifest import (
    MANIFEST,
    CheckpointManifest,
    epoch_of,
    newest_first,
)

PREFIX = "epoch-"
PARTIAL = ".partial"
REPLACED = ".replaced"
ATTEMPTS = "attempts"
"""In it each attempt that has begun leaves a file, named by its number."""
RESULTS = "results"
ASIDE = "aside-"
"""What the name of a folder begins with that was moved out of a checkpoint's way."""

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class FolderCheckpoints:
    """A `CheckpointPlace` in a folder: `epoch-000012` is the checkpoint of epoch 12.

    Args:
        folder: where they lie; made when the first is written.
        shown: what the folder is called relative to the session's storage.
    """

    def __init__(self, folder: Path, shown: str = "checkpoints") -> None:
        self.path = str(folder)
        self._folder = folder
        self._shown = shown

    def listed(self) -> dict[str, dict[str, int]]:
        """Every checkpoint, newest first; see `CheckpointPlace.listed`."""
        with translated(self.path):
            found = {_final_name(path): path for path in self._hidden(REPLACED)}
            found |= {
                path.name: path
                for path in self._folder.glob(f"{PREFIX}*")
                if path.is_dir() and epoch_of(path.name) is not None
            }
            return {name: _sizes(found[name]) for name in newest_first(found)}

    def part(self, name: str, part: str) -> bytes | None:
        """The bytes of one part; see `CheckpointPlace.part`."""
        final = self._folder / name
        folder = final if final.is_dir() else _hide(final, REPLACED)
        try:
            return (folder / part).read_bytes()
        except OSError:
            return None

    def name(self, manifest: CheckpointManifest) -> str:
        """What a checkpoint of that epoch and attempt is called."""
        return manifest.label

    def write(
        self,
        name: str,
        manifest: CheckpointManifest,
        parts: Mapping[str, bytes],
        *,
        replaced: bool,
    ) -> None:
        """Store a checkpoint; see `CheckpointPlace.write`."""
        final = self._folder / name
        partial = _hide(final, PARTIAL)
        with translated(f"checkpoint {name} in {self.path}"):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
            partial.mkdir()
            try:
                for part, data in parts.items():
                    _write(partial / part, data)
                _write(partial / MANIFEST, manifest.encoded())
                sync(partial)
                if os.path.lexists(final):
                    # One that is replaced counts as the checkpoint until the new one has the name.
                    final.rename(_hide(final, REPLACED) if replaced else _aside(final))
                partial.rename(final)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            sync(self._folder)
            self._clean_up()

    def remove(self, name: str) -> None:
        """Delete a checkpoint; see `CheckpointPlace.remove`."""
        with translated(f"checkpoint {name} in {self.path}"):
            hidden = _hide(self._folder / name, PARTIAL)
            (self._folder / name).rename(hidden)
            shutil.rmtree(hidden, ignore_errors=True)

    def begin(self, attempt: int) -> None:
        """Leave word that an attempt has begun; see `CheckpointPlace.begin`."""
        place = self._folder / ATTEMPTS
        with translated(str(place)):
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{attempt:09d}").touch()
            sync(place)

    def begun(self) -> int:
        """The newest attempt that has begun; see `CheckpointPlace.begun`."""
        place = self._folder / ATTEMPTS
        with translated(str(place)):
            names = [path.name for path in place.iterdir()] if place.is_dir() else []
        return max((int(name) for name in names if name.isdecimal()), default=0)

    def keep(self, name: str, data: bytes) -> None:
        """Store a file of a finished run; see `CheckpointPlace.keep`."""
        place = self._folder.parent / RESULTS
        with translated(str(place / name)):
            place.mkdir(parents=True, exist_ok=True)
            partial = _hide(place / name, PARTIAL)
            _write(partial, data)
            partial.rename(place / name)
            sync(place)

    def kept(self) -> dict[str, bytes]:
        """The files of a finished run; see `CheckpointPlace.kept`."""
        place = self._folder.parent / RESULTS
        with translated(str(place)):
            paths = [path for path in place.iterdir() if path.is_file()] if place.is_dir() else []
            return {path.name: path.read_bytes() for path in paths if path.name[0] != "."}

    def shown(self, name: str) -> str:
        """The checkpoint's folder, relative to the session's storage."""
        return f"{self._shown}/{name}"

    def check(self) -> None:
        """Return if the folder, or the nearest one above it that exists, can be written.

        Raises:
            ConfigError: it can't.
        """
        places = (self._folder, *self._folder.absolute().parents)
        existing = next(place for place in places if os.path.lexists(place))
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError("spec.storage.uri", self.path, f"a writable folder; see {existing}")

    def answers(self) -> int | None:
        """Nothing is known of it."""
        return None

    def close(self) -> None:
        """Nothing is held open."""

    def _hidden(self, suffix: str) -> Iterator[Path]:
        found = self._folder.glob(f".{PREFIX}*{suffix}")
        return (path for path in found if epoch_of(_final_name(path)) is not None)

    def _clean_up(self) -> None:
        """Delete what was never finished; finish what a dead process left half done."""
        for path in self._hidden(REPLACED):
            final = self._folder / _final_name(path)
            path.rename(_hide(final, PARTIAL) if os.path.lexists(final) else final)
        for path in self._hidden(PARTIAL):
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """What the operating system says, as one of Esper's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFull(f"{what}: no room left ({error.strerror})") from error
        raise StoreUnavailable(f"{what}: can't be used: {error}") from error


def sync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sizes(folder: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for path in folder.iterdir():
        with suppress(FileNotFoundError):
            if path.is_file():
                sizes[path.name] = path.stat().st_size
    return sizes


def _hide(final: Path, suffix: str) -> Path:
    return final.with_name(f".{final.name}{suffix}")


def _final_name(hidden: Path) -> str:
    return re.sub(r"^\.(.*)\.[a-z]+$", r"\1", hidden.name)


def _aside(final: Path) -> Path:
    """A name that nothing has, for what is in a checkpoint's way."""
    names = (final.with_name(f"{ASIDE}{final.name}-{number}") for number in count(1))
    return next(path for path in names if not os.path.lexists(path))
