"""The folder store, on real folders."""

import asyncio
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from esper.errors import BadInput, StorageFull, StoreUnavailable
from esper.utils.object_store import MAX_KEY_CHARACTERS, FolderStore, ObjectStore

KEY = "kernels/ab12.safetensors"
SEGMENTS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True)
KEYS = st.lists(SEGMENTS, min_size=1, max_size=4).map("/".join)


def files_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def put(folder: Path, key: str, data: bytes) -> bool:
    return asyncio.run(FolderStore(folder).put(key, data))


def get(folder: Path, key: str) -> bytes | None:
    return asyncio.run(FolderStore(folder).get(key))


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_what_is_no_file_is_no_object(tmp_path, kind):
    async def life():
        store = FolderStore(tmp_path)
        for found in (store.get("a"), store.open_read("a"), store.size("a"), store.exists("a")):
            assert not await asyncio.wait_for(found, 5)
        assert await store.delete("a") is False

    if kind == "folder":
        (tmp_path / "a").mkdir()
    else:
        os.mkfifo(tmp_path / "a")
    asyncio.run(life())
    assert (tmp_path / "a").exists()


@settings(deadline=None)
@given(KEYS, st.binary(max_size=4096))
def test_what_was_put_comes_back(key, data):
    with tempfile.TemporaryDirectory() as folder:
        assert put(Path(folder), key, data)
        assert get(Path(folder), key) == data
        assert (Path(folder) / key).read_bytes() == data


def test_the_folder_store_is_an_object_store(tmp_path):
    store: ObjectStore = FolderStore(tmp_path / "not" / "made" / "yet")

    async def life() -> list[object]:
        return [
            await store.exists(KEY),
            await store.get(KEY),
            await store.delete(KEY),
            await store.put(KEY, b"one"),
            await store.exists(KEY),
            await store.delete(KEY),
            await store.exists(KEY),
        ]

    assert asyncio.run(life()) == [False, None, False, True, True, True, False]


def test_a_key_that_exists_keeps_its_object(tmp_path):
    assert put(tmp_path, KEY, b"first")
    assert not put(tmp_path, KEY, b"second")
    assert get(tmp_path, KEY) == b"first"


def test_concurrent_puts_of_one_object_leave_one_whole_object(tmp_path):
    store = FolderStore(tmp_path)
    data = os.urandom(1 << 20)

    async def together() -> list[bool]:
        return await asyncio.gather(*(store.put(KEY, data) for _ in range(8)))

    assert any(asyncio.run(together()))
    assert files_under(tmp_path) == [tmp_path / KEY]
    assert get(tmp_path, KEY) == data


@pytest.mark.parametrize(
    "key",
    [
        "",
        ".",
        "..",
        "../outside",
        "a/../../outside",
        "a/..",
        "a/./b",
        "/etc/passwd",
        "//a",
        "a//b",
        "a/",
        "/",
        "a\\..\\b",
        "C:\\a",
        "~/a",
        ".hidden",
        "a/.b.part",
        "a\0b",
        "a\n",
        "a b",
        "ä",
        "%2e%2e/a",
        "a" * (MAX_KEY_CHARACTERS + 1),
    ],
)
def test_keys_that_could_leave_the_folder_are_refused(tmp_path, key):
    store = FolderStore(tmp_path / "store")
    calls = (store.put(key, b"x"), store.get(key), store.exists(key), store.delete(key))

    for call in calls:
        with pytest.raises(BadInput, match=r"^object key: got "):
            asyncio.run(call)

    assert files_under(tmp_path) == []


@settings(deadline=None)
@given(st.text(max_size=40))
def test_no_text_reaches_a_file_outside(key):
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "store"
        try:
            put(folder, key, b"x")
        except BadInput:
            assert files_under(Path(parent)) == []
        else:
            assert files_under(Path(parent)) == [folder / key]


def test_a_link_that_leads_outside_is_refused(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_bytes(b"secret")
    store = tmp_path / "store"
    store.mkdir()
    (store / "door").symlink_to(outside)

    with pytest.raises(BadInput, match="stays in the store's folder"):
        get(store, "door/secret")
    with pytest.raises(BadInput, match="stays in the store's folder"):
        put(store, "door/mine", b"x")
    assert files_under(outside) == [outside / "secret"]


class Crash(BaseException):
    """The process ends here."""


def test_a_crash_between_write_and_name_leaves_no_object(tmp_path, monkeypatch):
    def crash(*_: object, **__: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", crash)
        with pytest.raises(Crash):
            FolderStore(tmp_path)._put(KEY, b"half")

    assert get(tmp_path, KEY) is None
    assert files_under(tmp_path) == []
    assert put(tmp_path, KEY, b"whole")
    assert get(tmp_path, KEY) == b"whole"


def test_a_process_killed_before_the_name_is_given_leaves_nothing_to_be_read(tmp_path):
    process = os.fork()
    if process == 0:
        # As kill -9 would: no handler and no cleaning up runs.
        os.link = lambda *_, **__: os._exit(9)
        FolderStore(tmp_path)._put(KEY, b"half")
        os._exit(0)
    _, status = os.waitpid(process, 0)

    assert os.waitstatus_to_exitcode(status) == 9
    assert files_under(tmp_path) == []
    assert put(tmp_path, KEY, b"whole")
    assert get(tmp_path, KEY) == b"whole"


def test_where_every_file_needs_a_name_it_is_a_hidden_one(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "O_TMPFILE")
    assert put(tmp_path, KEY, b"bytes")
    assert not put(tmp_path, KEY, b"bytes")
    assert get(tmp_path, KEY) == b"bytes"
    assert files_under(tmp_path) == [tmp_path / KEY]


def test_bytes_are_on_disk_before_they_get_their_name(tmp_path, monkeypatch):
    order: list[str] = []
    sync, name = os.fsync, os.link
    monkeypatch.setattr(os, "fsync", lambda fd: (order.append("sync"), sync(fd))[1])
    monkeypatch.setattr(os, "link", lambda *at, **by: (order.append("name"), name(*at, **by))[1])

    put(tmp_path, KEY, b"bytes")

    assert order[:2] == ["sync", "name"]
    assert set(order[2:]) == {"sync"}


def test_a_full_disk_is_storage_full(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match=KEY) as caught:
        put(tmp_path, KEY, b"bytes")

    assert isinstance(caught.value.__cause__, OSError)
    assert files_under(tmp_path) == []


def test_a_folder_that_is_a_file_does_not_answer(tmp_path):
    blocked = tmp_path / "store"
    blocked.write_bytes(b"")

    with pytest.raises(StoreUnavailable, match=KEY) as caught:
        put(blocked, KEY, b"bytes")

    assert isinstance(caught.value.__cause__, OSError)
    assert get(blocked, KEY) is None
    assert asyncio.run(FolderStore(blocked).delete(KEY)) is False


def test_a_folder_at_the_key_is_no_object(tmp_path):
    (tmp_path / KEY).mkdir(parents=True)
    store = FolderStore(tmp_path)

    assert get(tmp_path, KEY) is None
    assert not asyncio.run(store.exists(KEY))
    assert asyncio.run(store.delete(KEY)) is False
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.put(KEY, b"bytes"))


def test_a_loop_of_links_is_refused(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")

    with pytest.raises((BadInput, StoreUnavailable)):
        get(tmp_path, "loop/key")


def test_large_objects_are_whole(tmp_path):
    data = bytes(range(256)) * (1 << 14)
    digest = hashlib.sha256(data).hexdigest()

    put(tmp_path, f"kernels/{digest}", data)

    came = get(tmp_path, f"kernels/{digest}")
    assert came is not None
    assert hashlib.sha256(came).hexdigest() == digest
