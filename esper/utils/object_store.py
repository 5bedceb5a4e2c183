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
import stat
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Iterator
from pathlib import Path
from typing import IO, Protocol

from esper.configs import StorageConfig
from esper.errors import BadInput, ConfigError, StorageFull, StoreUnavailable
from esper.utils.transfers import CHUNK_BYTES, Reading, Receipt, gathered, verified

MAX_KEY_CHARACTERS = 512

# Segments begin with a letter or a digit. So there is no "..", no absolute path and no hidden
# name; the files that a put has not finished have none, or a hidden one that can't be asked for.
_SEGMENT = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_KEY = re.compile(rf"{_SEGMENT}(/{_SEGMENT})*")
_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_OPEN_FILES = Path("/proc/self/fd")
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS})
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)


class ObjectStore(Protocol):
    """Bytes under keys.

    Every method raises BadInput for a key that is no relative path of letters, digits, dots,
    dashes and underscores, StoreUnavailable when the store does not answer, and ConfigError when
    it refuses what the settings say. A `sha256` is 64 lower-case hexadecimal digits.
    """

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` unless the key exists; whether this call stored it.

        Readers see all of the bytes or none of them. Of several writers at once one is told
        that it stored them.

        Raises:
            StorageFull: no room is left.
        """
        ...

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], *, sha256: str, max_bytes: int
    ) -> bool:
        """Store what `chunks` gives, as `put` does, if it has that digest.

        What is held in memory meanwhile is bounded, whatever comes. Whatever ends the call early,
        an error of `chunks` too, leaves nothing under `key`.

        Raises:
            BadInput: another digest, or more than `max_bytes` bytes.
            StorageFull: no room is left.
        """
        ...

    async def get(self, key: str, *, sha256: str | None = None) -> bytes | None:
        """The bytes under `key`, None where there are none.

        Raises:
            KernelError: they have another digest than `sha256`.
        """
        ...

    async def open_read(
        self, key: str, *, sha256: str | None = None
    ) -> AsyncIterator[bytes] | None:
        """The bytes under `key`, None where there are none; at most CHUNK_BYTES at a time.

        An iterator that is not read to its end is closed by `aclose`, as `aclosing` does.

        Raises:
            KernelError: by the iterator, before its last chunk: another digest than `sha256`.
        """
        ...

    async def size(self, key: str) -> int | None:
        """How many bytes the object has, None where there is none."""
        ...

    async def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        ...

    async def listed(self, place: str) -> dict[str, int]:
        """The objects below `place`, as below a folder: each one's key and how many bytes it has.

        In the order of the keys. `place` is a key itself, of which an object may or may not exist.
        """
        ...

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`; whether there was one."""
        ...

    async def presigned(self, key: str, seconds: int) -> str | None:
        """An address from which anyone can read the object for so long; None: the store has none.

        Whether the object exists is not looked at.
        """
        ...

    async def check(self) -> None:
        """Return if the store can be used as the settings say; raise the reason if not."""
        ...

    def answers(self) -> int | None:
        """A number that grows as long as the store answers; None where nothing of it is known."""
        ...

    async def close(self) -> None:
        """Let go of connections and threads; nothing may be asked afterwards."""
        ...


def open_store(config: StorageConfig) -> ObjectStore:
    """The store of the settings: a bucket where one is named, else a folder.

    Raises:
        ConfigError: the settings contradict each other, or boto3 is not installed.
    """
    if config.bucket is None:
        return FolderStore(Path(config.folder))
    # Who keeps artifacts in a folder needs no boto3.
    try:
        from esper.utils.s3_client import OptimizedS3Client
    except ModuleNotFoundError as error:
        raise ConfigError(
            "storage.bucket", config.bucket, "null, or pip install 'esper[s3]'"
        ) from error
    return OptimizedS3Client(config)


def is_key(text: str) -> bool:
    """Whether `text` can be an object's key."""
    return len(text) <= MAX_KEY_CHARACTERS and _KEY.fullmatch(text) is not None


def require_key(key: str) -> None:
    """Refuse what is no key.

    Raises:
        BadInput: it is none.
    """
    if not is_key(key):
        raise BadInput(
            "object key",
            key,
            "a relative path of letters, digits, dots, dashes and underscores, "
            f"at most {MAX_KEY_CHARACTERS} characters",
        )


class FolderStore:
    """An `ObjectStore` in a folder: one file an object, its path the key.

    A put writes to a file without a name, syncs it, gives it its name and syncs the
    folders: after a crash at any moment an object is there whole or not at all.
    """

    def __init__(self, path: Path) -> None:
        self._root = path

    async def put(self, key: str, data: bytes) -> bool:
        """Store `data` under `key` unless it exists; see `ObjectStore.put`."""
        return await asyncio.to_thread(self._put, key, data)

    async def put_stream(
        self, key: str, chunks: AsyncIterable[bytes], *, sha256: str, max_bytes: int
    ) -> bool:
        """Store what `chunks` gives, if it has that digest; see `ObjectStore.put_stream`."""
        receipt = Receipt(key, sha256, max_bytes)
        target = self._locate(key)
        with _translating(key):
            file = await asyncio.to_thread(_begin, target)
        try:
            async for block in gathered(chunks, CHUNK_BYTES, receipt):
                with _translating(key):
                    await asyncio.to_thread(_append, file, block, receipt)
            receipt.close()
            with _translating(key):
                return await asyncio.to_thread(self._finish, file, target)
        finally:
            _forget(file)

    async def get(self, key: str, *, sha256: str | None = None) -> bytes | None:
        """The bytes under `key`, None where there are none; see `ObjectStore.get`."""
        return await asyncio.to_thread(self._get, key, sha256)

    async def open_read(
        self, key: str, *, sha256: str | None = None
    ) -> AsyncIterator[bytes] | None:
        """The bytes under `key`, None where there are none; see `ObjectStore.open_read`."""
        file = await asyncio.to_thread(self._open, key)
        return None if file is None else _chunks(file, key, sha256)

    async def size(self, key: str) -> int | None:
        """How many bytes the object has, None where there is none."""
        return await asyncio.to_thread(self._size, key)

    async def exists(self, key: str) -> bool:
        """Whether there is an object under `key`."""
        return await self.size(key) is not None

    async def listed(self, place: str) -> dict[str, int]:
        """The objects below `place` with their sizes in bytes; see `ObjectStore.listed`."""
        return await asyncio.to_thread(self._listed, place)

    async def delete(self, key: str) -> bool:
        """Remove the object under `key`; whether there was one."""
        return await asyncio.to_thread(self._delete, key)

    async def presigned(self, key: str, seconds: int) -> str | None:
        """None: a folder has no address for others."""
        self._locate(key)
        return None

    async def check(self) -> None:
        """Return if the folder, or the nearest one above it that exists, can be written.

        Raises:
            ConfigError: it can't.
        """
        await asyncio.to_thread(self._check)

    def answers(self) -> int | None:
        """Nothing is known of a folder that does not answer."""
        return None

    async def close(self) -> None:
        """Nothing is held open."""

    def _put(self, key: str, data: bytes) -> bool:
        with _translating(key):
            target = self._locate(key)
            if target.is_file():
                return False
            stored = _write_atomically(target, data)
            self._sync_folders(target)
        return stored

    def _finish(self, file: IO[bytes], target: Path) -> bool:
        stored = _name(file, target)
        self._sync_folders(target)
        return stored

    def _sync_folders(self, target: Path) -> None:
        for folder in target.relative_to(self._root).parents:
            _sync_folder(self._root / folder)

    def _open(self, key: str) -> IO[bytes] | None:
        with _translating(key):
            try:
                # Without waiting: a pipe, which is no object, would hold its reader for ever.
                path = self._locate(key)
                file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115
            except _ABSENT:
                return None
            if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                return file
            file.close()
        return None

    def _get(self, key: str, sha256: str | None) -> bytes | None:
        file = self._open(key)
        if file is None:
            return None
        with file, _translating(key):
            data = file.read()
        return verified(key, data, sha256)

    def _size(self, key: str) -> int | None:
        with _translating(key):
            try:
                found = self._locate(key).stat()
            except _ABSENT:
                return None
        return found.st_size if stat.S_ISREG(found.st_mode) else None

    def _listed(self, place: str) -> dict[str, int]:
        found: dict[str, int] = {}
        with _translating(place):
            for folder, _, names in os.walk(self._locate(place), onerror=_raise_unless_absent):
                for name in names:
                    key = str((Path(folder) / name).relative_to(self._root))
                    if not is_key(key):
                        continue  # a put that has not finished, or no object at all
                    size = self._size(key)
                    if size is not None:
                        found[key] = size
        return dict(sorted(found.items()))

    def _delete(self, key: str) -> bool:
        with _translating(key):
            target = self._locate(key)
            if not target.is_file():
                return False
            try:
                target.unlink()
            except _ABSENT:
                return False
        return True

    def _check(self) -> None:
        places = (self._root, *self._root.absolute().parents)
        existing = next(place for place in places if place.exists())
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise ConfigError(
                "storage.folder", str(self._root), f"a folder that can be written; see {existing}"
            )

    def _locate(self, key: str) -> Path:
        """The file of `key`, also where links in the folder would lead elsewhere refused."""
        require_key(key)
        target = self._root / key
        if not Path(os.path.realpath(target)).is_relative_to(os.path.realpath(self._root)):
            raise BadInput("object key", key, "a path that stays in the store's folder")
        return target


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, _ABSENT):
        raise error


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


async def _chunks(file: IO[bytes], key: str, sha256: str | None) -> AsyncIterator[bytes]:
    reading = Reading(key, file.read, sha256)
    try:
        with _translating(key):
            while chunk := await asyncio.to_thread(reading.next_chunk):
                yield chunk
    finally:
        file.close()


def _write_atomically(target: Path, data: bytes) -> bool:
    """Write the file unless there is one; whether there was none."""
    file = _begin(target)
    try:
        _write(file, data)
        return _name(file, target)
    finally:
        _forget(file)


def _begin(target: Path) -> IO[bytes]:
    """A file without a name beside the target, whose folder is made where there is none.

    Where the system has no such thing it is a hidden file, which a kill would leave behind.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if _OPEN_FILES.is_dir():
        with contextlib.suppress(OSError, AttributeError):
            unnamed = os.open(target.parent, os.O_TMPFILE | os.O_WRONLY, 0o600)
            return open(unnamed, "wb", buffering=0)
    return tempfile.NamedTemporaryFile(
        prefix=".", suffix=".part", dir=target.parent, buffering=0, delete=False
    )


def _append(file: IO[bytes], block: bytearray, receipt: Receipt) -> None:
    receipt.digest(block)
    _write(file, block)


def _write(file: IO[bytes], data: bytes | bytearray) -> None:
    """All of `data`: one call of a file without a buffer may write less."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _name(file: IO[bytes], target: Path) -> bool:
    """Give a file its name unless another has it; whether none had."""
    os.fsync(file.fileno())
    try:
        _link(file, target)
    except FileExistsError:
        if target.is_file():
            return False
        raise
    except OSError as error:
        if error.errno not in _NO_HARD_LINKS or not isinstance(file.name, str):
            raise
        # Where two write at once here, both are told that they stored it; the bytes are equal.
        os.replace(file.name, target)
    return True


def _link(file: IO[bytes], target: Path) -> None:
    if isinstance(file.name, str):
        os.link(file.name, target)
        return
    descriptors = os.open(_OPEN_FILES, os.O_RDONLY)
    try:
        # With a folder given, the link that stands for the open file is followed.
        os.link(str(file.name), target, src_dir_fd=descriptors)
    finally:
        os.close(descriptors)


def _forget(file: IO[bytes]) -> None:
    file.close()
    if isinstance(file.name, str):
        with contextlib.suppress(OSError):
            os.unlink(file.name)


def _sync_folder(path: Path) -> None:
    """Make names made in `path` outlast a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _translating(key: str) -> Iterator[None]:
    """What the operating system says, as one of Esper's errors."""
    try:
        yield
    except OSError as error:
        if error.errno in _NO_ROOM:
            raise StorageFull(
                f"object {key}: no room left where the store writes ({error.strerror})"
            ) from error
        raise StoreUnavailable(
            f"object {key}: the store's folder can't be used: {error}"
        ) from error
