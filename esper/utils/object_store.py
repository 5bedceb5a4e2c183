"""The object store: a port, and a folder behind it.

Objects are content-addressed: whoever puts derives the key from the bytes, so equal keys mean
equal bytes and an object never changes. That is why a put of a key that exists writes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import re
import tempfile
from pathlib import Path
from typing import Protocol

from esper.errors import BadInput, EsperError, StorageFull, StoreUnavailable

MAX_KEY_CHARACTERS = 512

# Segments begin with a letter or a digit. So there is no "..", no absolute path and no hidden
# name; the files that a put has not finished are hidden and can't be asked for.
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class ObjectStore(Protocol):
    """Bytes under keys.

    Every method raises BadInput for a key that is no relative path of letters, digits, dots,
    dashes and underscores, and StoreUnavailable when the store does not answer.
    """

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` unless the key exists; whether this call stored it.

        Readers see all of the bytes or none of them.

        Raises:
            StorageFull: no room is left.
        """
        ...

    async def get(self, key: str) -> bytes | None:
        """The bytes under `key`, None where there are none."""
        ...

    async def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        ...

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`; whether there was one."""
        ...


class FolderStore:
    """An `ObjectStore` in a folder: one file an object, its path the key.

    A put writes to a hidden file beside the target, syncs it, renames it and syncs the folders:
    after a crash at any moment an object is there whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self._root = path

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless it exists; see `ObjectStore.put`."""
        return await asyncio.to_thread(self._put, key, data)

    async def get(self, key: str) -> bytes | None:
        """The bytes under `key`, None where there are none."""
        return await asyncio.to_thread(self._get, key)

    async def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        return await asyncio.to_thread(self._exists, key)

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`; whether there was one."""
        return await asyncio.to_thread(self._delete, key)

    def _put(self, key: str, data: bytes) -> bool:
        try:
            target = self._locate(key)
            if target.is_file():
                return False
            target.parent.mkdir(parents=True, exist_ok=True)
            _write_atomically(target, data)
            for folder in target.relative_to(self._root).parents:
                _sync_folder(self._root / folder)
        except OSError as error:
            raise _translated(error, key) from error
        return True

    def _get(self, key: str) -> bytes | None:
        try:
            return self._locate(key).read_bytes()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError as error:
            raise _translated(error, key) from error

    def _exists(self, key: str) -> bool:
        try:
            return self._locate(key).is_file()
        except OSError as error:
            raise _translated(error, key) from error

    def _delete(self, key: str) -> bool:
        try:
            self._locate(key).unlink()
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            raise _translated(error, key) from error
        return True

    def _locate(self, key: str) -> Path:
        """The file of `key`, also where links in the folder would lead elsewhere refused."""
        if len(key) > MAX_KEY_CHARACTERS or not _KEY.fullmatch(key):
            raise BadInput(
                "object key",
                key,
                "a relative path of letters, digits, dots, dashes and underscores, "
                f"at most {MAX_KEY_CHARACTERS} characters",
            )
        target = self._root / key
        if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(self._root)):
            raise BadInput("object key", key, "a path that stays in the store's folder")
        return target


def _write_atomically(target: Path, data: bytes) -> None:
    descriptor, name = tempfile.mkstemp(prefix=".", suffix=".part", dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _sync_folder(path: Path) -> None:
    """Make names made in `path` outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _translated(error: OSError, key: str) -> EsperError:
    if error.errno in _NO_ROOM:
        return StorageFull(f"object {key}: no room left where the store writes ({error.strerror})")
    return StoreUnavailable(f"object {key}: the store's folder can't be used: {error}")
