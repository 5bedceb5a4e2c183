"""What every object store promises: the folder and S3, on the real things."""

import asyncio
import hashlib
import os
import time
from contextlib import aclosing
from pathlib import Path
from urllib.request import urlopen

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from esper.configs import StorageConfig
from esper.errors import BadInput, KernelError
from esper.utils import s3_client
from esper.utils.object_store import FolderStore, ObjectStore, open_store
from esper.utils.s3_client import PART_BYTES, OptimizedS3Client
from esper.utils.transfers import CHUNK_BYTES

KEY = "kernels/ab12.safetensors"
LARGE = os.urandom(2 * PART_BYTES + 12_345)
WRONG = "0" * 64


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


async def pieces(data: bytes, size: int = 100_003):
    for start in range(0, len(data), size):
        yield data[start : start + size]


class Shelf:
    """A store, and what lies behind it for a look that does not go through it."""

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def leftovers(self) -> list[str]:
        """Everything that takes room: objects, and what puts have not finished."""
        raise NotImplementedError

    def damage(self, key: str) -> None:
        """Change a byte of the object."""
        raise NotImplementedError

    def clutter(self, name: str) -> None:
        """Put something there under a name that no key has."""
        raise NotImplementedError

    def stream(self, data: bytes, key: str = KEY, **changes):
        asked = {"sha256": sha256(data), "max_bytes": len(data)} | changes
        return self.store.put_stream(key, pieces(data), **asked)


class Folder(Shelf):
    def __init__(self, folder: Path) -> None:
        super().__init__(open_store(StorageConfig(folder=str(folder))))
        self.folder = folder

    def leftovers(self):
        files = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(str(path.relative_to(self.folder)) for path in files)

    def damage(self, key):
        data = bytearray((self.folder / key).read_bytes())
        data[0] ^= 1
        (self.folder / key).write_bytes(data)

    def clutter(self, name):
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(b"x")


class Bucket(Shelf):
    def __init__(self, bucket, server) -> None:
        access = {
            name: getattr(bucket, name)
            for name in ("endpoint_url", "region", "access_key_id", "secret_access_key")
        }
        config = StorageConfig(bucket=bucket.name, prefix="some/place", **access)
        super().__init__(open_store(config))
        self.name = bucket.name
        self.client = server.client()

    def leftovers(self):
        found = self.client.list_objects_v2(Bucket=self.name).get("Contents", [])
        uploads = self.client.list_multipart_uploads(Bucket=self.name).get("Uploads", [])
        keys = [entry["Key"].removeprefix("some/place/") for entry in found]
        return sorted(keys + [upload["UploadId"] for upload in uploads])

    def damage(self, key):
        place = {"Bucket": self.name, "Key": f"some/place/{key}"}
        data = bytearray(self.client.get_object(**place)["Body"].read())
        data[0] ^= 1
        self.client.put_object(Body=bytes(data), **place)

    def clutter(self, name):
        self.client.put_object(Bucket=self.name, Key=f"some/place/{name}", Body=b"x")


@pytest.fixture(params=["folder", "s3"])
def shelf(request, tmp_path):
    if request.param == "folder":
        shelf = Folder(tmp_path / "not" / "made" / "yet")
    else:
        bucket = request.getfixturevalue("s3_bucket")
        shelf = Bucket(bucket, request.getfixturevalue("s3_server"))
    yield shelf
    asyncio.run(shelf.store.close())


def test_the_settings_choose_the_store(shelf):
    kind = FolderStore if isinstance(shelf, Folder) else OptimizedS3Client
    assert type(shelf.store) is kind


def test_the_life_of_an_object(shelf):
    store = shelf.store

    async def life():
        await store.check()
        return [
            await store.exists(KEY),
            await store.size(KEY),
            await store.get(KEY),
            await store.open_read(KEY),
            await store.delete(KEY),
            await store.put(KEY, b"one"),
            await store.exists(KEY),
            await store.size(KEY),
            await store.get(KEY),
            await store.delete(KEY),
            await store.exists(KEY),
        ]

    steps = [False, None, None, None, False, True, True, 3, b"one", True, False]
    assert asyncio.run(life()) == steps
    assert shelf.leftovers() == []


@pytest.mark.parametrize("data", [b"", b"x", LARGE], ids=["empty", "byte", "large"])
def test_any_size_comes_back_by_every_way(shelf, data):
    store, digest = shelf.store, sha256(data)

    async def ways():
        assert await store.put("whole", data)
        assert await shelf.stream(data, "streamed")
        for key in ("whole", "streamed"):
            assert await store.size(key) == len(data)
            for expected in (digest, None):
                assert await store.get(key, sha256=expected) == data
                chunks = [chunk async for chunk in await store.open_read(key, sha256=expected)]
                assert b"".join(chunks) == data
                assert max(map(len, chunks), default=0) <= CHUNK_BYTES

    asyncio.run(ways())
    assert shelf.leftovers() == ["streamed", "whole"]


def test_what_lies_below_a_place_is_listed_with_its_size(shelf, monkeypatch):
    monkeypatch.setattr(s3_client, "LISTED_AT_ONCE", 2)  # so that a listing has pages
    keys = ("a/1", "a/b/2", "a/b/3", "a/z", "ab/4", "a.c/5")

    async def listed():
        assert await shelf.store.listed("a") == {}
        for length, key in enumerate(keys):
            await shelf.store.put(key, bytes(length))
        await shelf.stream(LARGE, "a/large")
        return [await shelf.store.listed(place) for place in ("a", "a/b", "a/1", "none/here")]

    all_of_a, deeper, an_object, nothing = asyncio.run(listed())
    assert list(all_of_a.items()) == [
        *[("a/1", 0), ("a/b/2", 1), ("a/b/3", 2), ("a/large", len(LARGE)), ("a/z", 3)]
    ]
    assert deeper == {"a/b/2": 1, "a/b/3": 2}
    assert (an_object, nothing) == ({}, {})


def test_what_is_no_object_is_not_listed(shelf):
    async def listed():
        await shelf.store.put("a/object", b"x")
        return await shelf.store.listed("a")

    shelf.clutter("a/.hidden.part")
    shelf.clutter("a/with a space")
    assert asyncio.run(listed()) == {"a/object": 1}


def test_a_key_that_exists_keeps_its_object(shelf):
    async def twice():
        return [
            await shelf.store.put(KEY, b"first"),
            await shelf.store.put(KEY, b"second"),
            await shelf.stream(b"third"),
            await shelf.stream(LARGE),
            await shelf.store.get(KEY),
        ]

    assert asyncio.run(twice()) == [True, False, False, False, b"first"]
    assert shelf.leftovers() == [KEY]


def test_a_stream_is_verified_also_where_the_object_exists(shelf):
    async def again():
        await shelf.stream(LARGE)
        await shelf.stream(LARGE, sha256=WRONG)

    with pytest.raises(BadInput, match="SHA-256"):
        asyncio.run(again())


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
def test_of_many_writers_one_wins(shelf, data):
    async def together():
        whole = (shelf.store.put(KEY, data) for _ in range(4))
        return await asyncio.gather(*whole, *(shelf.stream(data) for _ in range(4)))

    assert sum(asyncio.run(together())) == 1
    assert asyncio.run(shelf.store.get(KEY, sha256=sha256(data))) == data
    assert shelf.leftovers() == [KEY]


@pytest.mark.parametrize("data", [b"small", LARGE], ids=["small", "large"])
@pytest.mark.parametrize("wrong", ["digest", "size"])
def test_what_was_not_announced_is_refused_and_nothing_stays(shelf, data, wrong):
    changes = {"sha256": WRONG} if wrong == "digest" else {"max_bytes": len(data) - 1}
    with pytest.raises(BadInput, match="SHA-256" if wrong == "digest" else "at most"):
        asyncio.run(shelf.stream(data, **changes))
    assert shelf.leftovers() == []


@pytest.mark.parametrize("sha", ["", "0" * 63, "Z" * 64, "A" * 64, "0" * 63 + "\n"])
def test_what_is_no_digest_is_refused(shelf, sha):
    with pytest.raises(BadInput, match="64 lower-case hexadecimal digits"):
        asyncio.run(shelf.stream(b"x", sha256=sha))


@pytest.mark.parametrize("after", [1000, PART_BYTES + 1000], ids=["small", "large"])
def test_an_upload_that_breaks_off_leaves_nothing(shelf, after):
    class GoneError(Exception):
        """The sender went away."""

    async def broken():
        async for piece in pieces(LARGE[:after]):
            yield piece
        raise GoneError

    upload = shelf.store.put_stream(KEY, broken(), sha256=sha256(LARGE), max_bytes=len(LARGE))
    with pytest.raises(GoneError):
        asyncio.run(upload)
    assert shelf.leftovers() == []


def test_an_upload_that_is_cancelled_leaves_nothing(shelf):
    async def cancelled():
        waiting = asyncio.Event()

        async def stalled():
            async for piece in pieces(LARGE):
                yield piece
            waiting.set()
            await asyncio.Event().wait()

        upload = asyncio.create_task(
            shelf.store.put_stream(KEY, stalled(), sha256=sha256(LARGE), max_bytes=len(LARGE))
        )
        await waiting.wait()
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert upload.cancelled()

    asyncio.run(cancelled())
    deadline = time.monotonic() + 30
    while shelf.leftovers():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_stream_without_end_is_refused_at_the_cap(shelf):
    given_bytes = 0

    async def endless():
        nonlocal given_bytes
        while True:
            given_bytes += 64 * 2**10
            yield bytes(64 * 2**10)

    cap = PART_BYTES + 1
    upload = shelf.store.put_stream(KEY, endless(), sha256=WRONG, max_bytes=cap)
    with pytest.raises(BadInput, match=f"more than {cap} bytes"):
        asyncio.run(upload)
    assert given_bytes <= cap + 64 * 2**10
    assert shelf.leftovers() == []


@pytest.mark.parametrize("data", [b"abc", LARGE], ids=["small", "large"])
def test_changed_bytes_are_told_before_the_last_of_them(shelf, data):
    store, digest = shelf.store, sha256(data)
    came = []

    async def read():
        async for chunk in await store.open_read(KEY, sha256=digest):
            came.append(chunk)  # noqa: PERF401 - what came before the error counts

    asyncio.run(store.put(KEY, data))
    shelf.damage(KEY)
    with pytest.raises(KernelError, match=f"allowed: {digest}"):
        asyncio.run(store.get(KEY, sha256=digest))
    with pytest.raises(KernelError, match=f"allowed: {digest}"):
        asyncio.run(read())
    assert sum(map(len, came)) < len(data)
    assert asyncio.run(store.get(KEY)) != data


def test_reading_can_be_left_off(shelf):
    async def begun():
        await shelf.store.put(KEY, LARGE)
        for _ in range(20):
            async with aclosing(await shelf.store.open_read(KEY)) as chunks:
                assert len(await anext(chunks)) == CHUNK_BYTES
        return await shelf.store.get(KEY)

    assert asyncio.run(begun()) == LARGE


def test_who_has_the_address_can_read(shelf):
    async def address(seconds):
        return await shelf.store.presigned(KEY, seconds)

    asyncio.run(shelf.store.put(KEY, b"open"))
    url = asyncio.run(address(60))
    if isinstance(shelf, Folder):
        assert url is None
        return
    with urlopen(url, timeout=10) as answer:
        assert answer.read() == b"open"
    for seconds in (0, 604_801):
        with pytest.raises(BadInput, match="1 to 604800"):
            asyncio.run(address(seconds))


@pytest.mark.parametrize(
    "key", ["", "..", "../outside", "a/../b", "/etc/passwd", "a//b", ".hidden", "a b", "ä", "a\n"]
)
def test_keys_with_tricks_are_refused_everywhere(shelf, key):
    store = shelf.store
    calls = (
        store.put(key, b"x"),
        shelf.stream(b"x", key),
        store.get(key),
        store.open_read(key),
        store.size(key),
        store.exists(key),
        store.listed(key),
        store.delete(key),
        store.presigned(key, 60),
    )
    for call in calls:
        with pytest.raises(BadInput, match=r"^object key: got "):
            asyncio.run(call)
    assert shelf.leftovers() == []


@settings(
    deadline=None,
    max_examples=25,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.lists(st.binary(max_size=3000), max_size=8))
def test_however_a_stream_is_cut_it_comes_back(shelf, chunks):
    data = b"".join(chunks)

    async def there_and_back():
        async def given_chunks():
            for chunk in chunks:
                yield chunk

        store, digest = shelf.store, sha256(data)
        await store.delete(digest)
        stored = await store.put_stream(digest, given_chunks(), sha256=digest, max_bytes=len(data))
        return stored, await store.get(digest, sha256=digest)

    assert asyncio.run(there_and_back()) == (True, data)
