"""Faults of a real S3 server, and of the way to it."""

import asyncio
import hashlib
import os
import socket
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from esper.configs import StorageConfig
from esper.errors import ConfigError, StoreUnavailable
from esper.utils.object_store import open_store
from esper.utils.s3_client import PART_BYTES, OptimizedS3Client
from tools.servers.s3 import S3Server

KEY = "kernels/ab12.safetensors"
BUCKET = "kernels"
LARGE = os.urandom(2 * PART_BYTES + 12_345)
HUGE = LARGE * 4
"""More than the sockets between two processes hold."""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


async def pieces(data, size=2**18):
    for start in range(0, len(data), size):
        yield data[start : start + size]


def settings(server, **changes):
    given = {
        "bucket": BUCKET,
        "endpoint_url": server.url,
        "access_key_id": server.access_key_id,
        "secret_access_key": server.secret_access_key,
        "connect_timeout_seconds": 0.5,
        "read_timeout_seconds": 0.5,
        "attempts": 2,
    }
    return StorageConfig(**(given | changes))


@pytest.fixture
def server(private_s3):
    private_s3.create_bucket(BUCKET)
    return private_s3


@pytest.fixture
def opened(server):
    stores = []

    def opening(**changes):
        stores.append(OptimizedS3Client(settings(server, **changes)))
        return stores[-1]

    yield opening
    for store in stores:
        asyncio.run(store.close())


@contextmanager
def meanwhile(work):
    """`work` in another thread, done at the end of the block."""
    thread = threading.Thread(target=work)
    thread.start()
    yield
    thread.join()


def calls(store):
    return {
        "put": lambda: store.put(KEY, b"x"),
        "stream": lambda: store.put_stream(
            KEY, pieces(LARGE), sha256=sha256(LARGE), max_bytes=len(LARGE)
        ),
        "get": lambda: store.get(KEY),
        "read": lambda: store.open_read(KEY),
        "size": lambda: store.size(KEY),
        "exists": lambda: store.exists(KEY),
        "delete": lambda: store.delete(KEY),
        "check": store.check,
    }


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_a_service_that_is_away_is_unavailable_and_then_back(server, opened, fault):
    store = opened()
    assert asyncio.run(store.put("before", b"kept"))
    getattr(server, fault)()
    for call in calls(store).values():
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match=r"see storage\.endpoint_url") as caught:
            asyncio.run(call())
        assert time.monotonic() - began < 30
        assert server.url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None
    server.start()
    assert asyncio.run(store.get("before")) == b"kept"
    # What was frozen may have done what it was asked, once it went on.
    asyncio.run(store.put(KEY, b"x"))
    assert asyncio.run(store.get(KEY)) == b"x"


def test_a_short_absence_is_not_noticed(server, opened):
    store = opened(attempts=10)
    server.kill()

    def back():
        time.sleep(0.5)
        server.start()

    with meanwhile(back):
        assert asyncio.run(store.put(KEY, b"x"))
    statistics = store.statistics()
    assert statistics.attempts > statistics.calls == 1


def test_reading_goes_on_after_a_restart(server, opened):
    store = opened(attempts=10)
    asyncio.run(store.put(KEY, HUGE))

    async def read():
        chunks = await store.open_read(KEY, sha256=sha256(HUGE))
        data = await anext(chunks)
        await asyncio.to_thread(server.kill)
        await asyncio.to_thread(server.start)
        async for chunk in chunks:
            data += chunk
        return data

    assert asyncio.run(read()) == HUGE


def test_reading_what_never_comes_back_ends(server, opened):
    store = opened()
    asyncio.run(store.put(KEY, HUGE))

    async def read():
        async for _ in await store.open_read(KEY):
            await asyncio.to_thread(server.kill)

    with pytest.raises(StoreUnavailable, match=KEY):
        asyncio.run(read())


@pytest.mark.parametrize("fault", ["kill", "freeze"])
def test_an_upload_in_parts_outlasts_a_fault(server, opened, fault):
    store = opened(attempts=10)

    async def shaken():
        async for piece in pieces(LARGE, PART_BYTES):
            yield piece
            await asyncio.to_thread(getattr(server, fault))
            await asyncio.to_thread(server.start)

    upload = store.put_stream(KEY, shaken(), sha256=sha256(LARGE), max_bytes=len(LARGE))
    assert asyncio.run(upload)
    assert asyncio.run(store.get(KEY, sha256=sha256(LARGE))) == LARGE


def test_an_upload_that_a_death_ended_shows_nothing(server, opened, caplog):
    store = opened()

    async def shaken():
        async for piece in pieces(LARGE, PART_BYTES):
            yield piece
        await asyncio.to_thread(server.kill)

    upload = store.put_stream(KEY, shaken(), sha256=sha256(LARGE), max_bytes=len(LARGE))
    with pytest.raises(StoreUnavailable):
        asyncio.run(upload)
    assert "parts of an upload are left in the bucket" in caplog.text
    server.start()
    assert asyncio.run(store.get(KEY)) is None
    assert asyncio.run(store.put(KEY, LARGE))


def test_an_upload_that_is_cancelled_while_it_begins_is_given_up(server, opened, monkeypatch):
    store = opened()
    begin, begun, returned = store._begin, threading.Event(), threading.Event()

    def slowly(key):
        upload = begin(key)
        begun.set()
        assert returned.wait(30)
        return upload

    monkeypatch.setattr(store, "_begin", slowly)

    def left():
        return server.client().list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])

    async def life():
        stream = store.put_stream(KEY, pieces(LARGE), sha256=sha256(LARGE), max_bytes=len(LARGE))
        upload = asyncio.create_task(stream)
        await asyncio.to_thread(begun.wait, 30)
        assert len(left()) == 1
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        returned.set()
        deadline = time.monotonic() + 30
        while left():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    asyncio.run(life())


@pytest.mark.parametrize(
    ("wrong", "setting", "came"),
    [
        ({"secret_access_key": "sesame"}, "storage.secret_access_key", "(not shown)"),
        ({"access_key_id": "nobody"}, "storage.access_key_id", "nobody"),
        ({"bucket": "nowhere"}, "storage.bucket", "nowhere"),
    ],
)
def test_wrong_settings_are_named_by_every_call(opened, wrong, setting, came):
    for call in calls(opened(**wrong)).values():
        with pytest.raises(ConfigError) as caught:
            asyncio.run(call())
        assert str(caught.value).startswith(f"{setting}: got {came}; allowed: ")
        shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__cause__}"
        assert "sesame" not in shown


@pytest.mark.parametrize("missing", ["access_key_id", "secret_access_key"])
def test_half_of_the_credentials_is_refused(server, missing):
    with pytest.raises(ConfigError, match=f"storage.{missing}: got None"):
        open_store(settings(server, **{missing: None}))


def test_a_bucket_must_be_named():
    with pytest.raises(ConfigError, match=r"storage\.bucket"):
        OptimizedS3Client(StorageConfig())


@pytest.mark.parametrize("address", ["http://[::1", "http://host:port"])
def test_what_is_no_address_is_refused(server, address):
    with pytest.raises(ConfigError, match=r"storage\.endpoint_url"):
        open_store(settings(server, endpoint_url=address))


def test_without_any_credentials_the_setting_is_named(server, monkeypatch, tmp_path):
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    store = open_store(settings(server, access_key_id=None, secret_access_key=None))
    with pytest.raises(ConfigError, match=r"storage\.access_key_id: got None"):
        asyncio.run(store.check())
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(ConfigError, match=r"storage\.access_key_id"):
        open_store(settings(server, access_key_id=None, secret_access_key=None))


def test_the_credentials_of_the_machine_are_used_where_none_are_set(server, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", server.access_key_id)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", server.secret_access_key)
    store = open_store(settings(server, access_key_id=None, secret_access_key=None))
    assert asyncio.run(store.put(KEY, b"x"))


def test_neither_address_nor_proxy_come_from_the_environment(opened, monkeypatch):
    nowhere = "http://127.0.0.1:9"
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert asyncio.run(opened().put(KEY, b"x"))


def test_secrets_are_in_no_repr(server, opened):
    store = opened()
    shown = f"{store!r} {store} {store.statistics()} {settings(server)!r}"
    assert server.secret_access_key not in shown


def test_a_service_that_knows_no_checksums_is_sent_none(opened):
    store = opened(checksum="none")
    stream = store.put_stream(KEY, pieces(LARGE), sha256=sha256(LARGE), max_bytes=len(LARGE))
    assert asyncio.run(stream)
    assert asyncio.run(store.put("small", b"x"))
    assert asyncio.run(store.get(KEY, sha256=sha256(LARGE))) == LARGE


def test_threads_without_a_loop_have_the_same(opened):
    store = opened()
    assert store.stat(KEY) is None
    assert store.upload(KEY, b"bytes")
    assert not store.upload(KEY, b"bytes")
    assert store.download(KEY, sha256(b"bytes")) == b"bytes"
    assert store.stat(KEY) == 5
    assert store.remove(KEY)
    assert store.download(KEY) is None


def test_what_happened_is_counted(server, opened):
    store = opened()
    asyncio.run(store.put(KEY, b"12345"))
    asyncio.run(store.get(KEY))
    asyncio.run(store.get("other"))
    before = store.statistics()
    assert (before.calls, before.attempts, before.failures) == (3, 3, 0)
    assert (before.sent_bytes, before.received_bytes) == (5, 5)
    assert before.seconds > 0
    server.kill()
    with pytest.raises(StoreUnavailable):
        asyncio.run(store.get(KEY))
    after = store.statistics()
    assert (after.calls, after.attempts, after.failures) == (4, 5, 1)


def test_a_closed_store_asks_nothing_and_waits_for_one_answer_at_most(server, opened):
    store = opened(attempts=20)
    server.freeze()

    async def closed():
        waiting = asyncio.create_task(store.get(KEY))
        await asyncio.sleep(0.2)
        await store.close()
        began = time.monotonic()
        with pytest.raises(StoreUnavailable, match="closed"):
            await waiting
        assert time.monotonic() - began < 5

    asyncio.run(closed())
    with pytest.raises(StoreUnavailable, match="closed"):
        asyncio.run(store.get(KEY))
    server.thaw()


class Wire:
    """A connection's way to the server: what goes through can be changed or cut.

    `change(data, total)` gets what comes from the client, or with `answers` from the server, and
    how many bytes came before; it gives what goes on, None to cut.
    """

    def __init__(self, server: S3Server, change, *, answers=False):
        self._target = ("127.0.0.1", server.port)
        self._change, self._answers = change, answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self):
        self._listener.close()

    def _accept(self):
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            far = socket.create_connection(self._target)
            for source, sink, changed in (
                (near, far, not self._answers),
                (far, near, self._answers),
            ):
                arguments = (source, sink, self._change if changed else None)
                threading.Thread(target=self._pump, args=arguments, daemon=True).start()

    @staticmethod
    def _pump(source, sink, change):
        total = 0
        try:
            while data := source.recv(2**16):
                come = len(data)
                if change is not None:
                    data = change(data, total)
                total += come
                if data is None:
                    break
                sink.sendall(data)
        except OSError:
            pass
        finally:
            for end in (source, sink):
                with suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)


@contextmanager
def over(wire):
    yield wire.url
    wire.close()


@pytest.mark.parametrize("size", [200_000, len(LARGE)], ids=["whole", "parts"])
def test_bytes_changed_on_the_way_there_are_never_stored(server, opened, size):
    data = LARGE[:size]

    def flip(chunk, total):
        if total < 50_000 < total + len(chunk):
            at = 50_000 - total
            return chunk[:at] + bytes([chunk[at] ^ 1]) + chunk[at + 1 :]
        return chunk

    with over(Wire(server, flip)) as url:
        with pytest.raises(StoreUnavailable):
            asyncio.run(
                opened(endpoint_url=url).put_stream(
                    KEY, pieces(data), sha256=sha256(data), max_bytes=len(data)
                )
            )
        if size < PART_BYTES:
            with pytest.raises(StoreUnavailable):
                asyncio.run(opened(endpoint_url=url).put(KEY, data))
    found = server.client().list_objects_v2(Bucket=BUCKET)
    assert found["KeyCount"] == 0


def test_connections_that_break_while_reading_are_resumed(server, opened):
    asyncio.run(opened().put(KEY, LARGE))
    limit = 5 * 2**20

    def cut(chunk, total):
        return chunk if total + len(chunk) < limit else None

    with over(Wire(server, cut, answers=True)) as url:
        store = opened(endpoint_url=url, attempts=3)

        async def read():
            return b"".join([c async for c in await store.open_read(KEY, sha256=sha256(LARGE))])

        assert asyncio.run(read()) == LARGE
        assert asyncio.run(store.get(KEY)) == LARGE


def test_a_wire_that_lets_no_body_through_is_given_up(server, opened):
    asyncio.run(opened().put(KEY, LARGE))

    def headers_only(chunk, total):
        return chunk[: chunk.index(b"\r\n\r\n") + 4] if total == 0 else None

    with over(Wire(server, headers_only, answers=True)) as url:
        store = opened(endpoint_url=url, attempts=3)
        with pytest.raises(StoreUnavailable, match=r"broke off 3 times at 0 of \d+"):
            asyncio.run(store.get(KEY))


def test_an_object_replaced_while_it_is_read_is_not_mixed(server, opened):
    asyncio.run(opened().put(KEY, LARGE))
    limit, other = 5 * 2**20, bytes(len(LARGE))

    def cut(chunk, total):
        return chunk if total + len(chunk) < limit else None

    with over(Wire(server, cut, answers=True)) as url:
        store = opened(endpoint_url=url)

        async def read():
            chunks = await store.open_read(KEY)
            await anext(chunks)
            server.client().put_object(Bucket=BUCKET, Key=KEY, Body=other)
            async for _ in chunks:
                pass

        with pytest.raises(StoreUnavailable, match="PreconditionFailed"):
            asyncio.run(read())
