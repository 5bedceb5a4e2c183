"""Artifacts on their way in and out: only what the compiler writes for that kernel is kept."""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import pickle
import struct
import zipfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from esper.contracts.kernels import KernelMetadata
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.wire import LEASE_HEADER
from tests.unit.esper.services.urza.hubs import DOCUMENT, OTHER, target
from tests.unit.esper.services.urza.serving import Client, serving, settings, stored_files

MADE = compile_kernel(DOCUMENT, target())
DATA, METADATA = MADE.data, MADE.metadata
KERNEL = METADATA.kernel
CLAIMS = "/internal/requested-kernels"
ROOT = f"{CLAIMS}/{KERNEL}"
BINARY = {"Content-Type": "application/octet-stream"}


@pytest.fixture
def place(sqlite_place):
    """What is checked here never reaches the database's kind."""
    return sqlite_place


async def leased(client: Client) -> str:
    await client.hub.put_blueprint(DOCUMENT)
    await client.hub.request_kernel(DOCUMENT.digest, target())
    answer = await client.post(f"{ROOT}/claim", json={"worker": "forge"})
    assert answer.status_code == 200
    lease: str = answer.json()["lease"]
    return lease


async def uploaded(
    client: Client, lease: str, data: bytes, *, content: Any = None, **changes: Any
) -> httpx.Response:
    params = {
        "digest": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        **changes,
    }
    return await client.put(
        f"{ROOT}/artifact",
        params=params,
        content=data if content is None else content,
        headers={**BINARY, LEASE_HEADER: lease},
    )


def result(lease: str, metadata: KernelMetadata = METADATA) -> dict[str, Any]:
    return {"lease": lease, "metadata": metadata.to_wire()}


async def pieces(data: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("size", [1, 7, 64, 10_000])
def test_an_artifact_comes_in_chunks_of_any_size_and_goes_out_as_it_came(place, size):
    async def life() -> None:
        async with serving(settings(place)) as client:
            lease = await leased(client)
            answer = await uploaded(client, lease, DATA, content=pieces(DATA, size))
            assert answer.status_code == 200, answer.text
            assert answer.json()["artifactDigest"] == METADATA.artifact_digest
            done = await client.post(f"{ROOT}/result", json=result(lease))
            assert done.json()["state"] == "characterized"
            path = f"/api/v1/kernels/{KERNEL}/artifact"
            came = await client.get(path)
            assert came.content == DATA
            assert came.headers["Content-Length"] == str(len(DATA))
            assert came.headers["ETag"] == f'"{METADATA.artifact_digest}"'
            known = await client.get(path, headers={"If-None-Match": came.headers["ETag"]})
            assert (known.status_code, known.content) == (304, b"")
            # A folder gives nothing out itself, so it streams all the same.
            assert (await client.get(path, params={"presigned": "true"})).content == DATA

    asyncio.run(life())
    assert stored_files(place) == [f"kernels/{METADATA.artifact_digest}.safetensors"]


def header(entries: object, tensors: bytes = b"") -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + tensors


def parts(data: bytes = DATA) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", data)
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def with_tensor(**entry: Any) -> bytes:
    given = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}
    return header({**parts(), "t": given}, b"x" * 8)


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data.pkl", b"0" * 10**6)
    return file.getvalue()


def changed(name: str, text: str) -> bytes:
    found = parts()
    found["__metadata__"][name] = text
    return header(found)


META = parts()["__metadata__"]
REFUSED = {
    "a pickle": pickle.dumps({"weights": [1.0] * 100}),
    "a zip, as torch.save makes it": zipped(),
    "too short": b"1234567 ",
    "a header longer than the file": struct.pack("<Q", 10**6) + b"{}" + b" " * 100,
    "a header of a petabyte": struct.pack("<Q", 2**50) + b"{}",
    "an empty header": header(b"{}"),
    "no JSON": header(b"{" * 400),
    "a list": header([1, 2, 3]),
    "deep JSON": header(b"[" * 200_000),
    "a key twice": header(b'{"__metadata__":{},"__metadata__":{}}'),
    "NaN": header(b'{"t":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'),
    "no metadata": header({"t": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"xxxx"),
    "a part missing": header({"__metadata__": {k: v for k, v in META.items() if k != "graph"}}),
    "a part too many": changed("code", "import os"),
    "a graph that is none": changed("graph", "{}"),
    "deep JSON in a part": changed("graph", "[" * 50_000),
    "another target": changed("target", META["target"].replace("4", "5")),
    "another manifest": changed(
        "manifest", META["manifest"].replace('"parameters":', '"parameters":1')
    ),
    "bytes behind the end": DATA + b"hidden",
    "a tensor of another size": with_tensor(shape=[3]),
    "a tensor behind the end": with_tensor(data_offsets=[0, 16]),
    "a tensor after a gap": with_tensor(data_offsets=[4, 12]),
    "a tensor backwards": with_tensor(data_offsets=[8, 0]),
    "a negative size": with_tensor(shape=[-2]),
    "a shape of truth values": with_tensor(shape=[True, 2]),
    "a huge shape": with_tensor(shape=[2**60, 2**60]),
    "an unknown dtype": with_tensor(dtype="object"),
    "more than a tensor has": with_tensor(code="x"),
    "no shape": with_tensor(shape="2"),
    "an artifact of another blueprint": compile_kernel(OTHER, target()).data,
    "an artifact of another target": compile_kernel(DOCUMENT, target(5)).data,
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_artifact_of_that_kernel_is_refused_and_not_stored(place, what):
    data = REFUSED[what]

    async def life() -> None:
        async with serving(settings(place)) as client:
            lease = await leased(client)
            for size in (len(data), 5 if len(data) < 10_000 else 4096):
                answer = await uploaded(client, lease, data, content=pieces(data, size))
                assert answer.status_code == 422, answer.text
                assert len(answer.content) < 5000
            named = METADATA.model_copy(
                update={
                    "artifact_digest": hashlib.sha256(data).hexdigest(),
                    "artifact_bytes": len(data),
                }
            )
            done = await client.post(f"{ROOT}/result", json=result(lease, named))
            assert done.status_code == 422
            assert (await client.hub.kernel(KERNEL)).state == "compiling"

    asyncio.run(life())
    assert stored_files(place) == []


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (422, {"digest": "0" * 64}),
        (422, {"digest": "../../urza"}),
        (422, {"digest": "A" * 64}),
        (422, {"bytes": len(DATA) + 1}),
        (422, {"bytes": len(DATA) - 1}),
        (422, {"bytes": 0}),
        (422, {"bytes": -1}),
        (422, {"bytes": 2**40}),
        (409, {"lease": "0" * 32}),
        (422, {"lease": "x"}),
        (422, {"content": pieces(DATA + b"x" * 4096, 512)}),
        (413, {"content": DATA + b"x" * 4096}),
        (422, {"content": DATA[:-1]}),
        (422, {"content": b""}),
    ],
)
def test_an_upload_must_be_what_it_says(place, status, changes):
    async def life() -> None:
        async with serving(settings(place, max_artifact_bytes=4096)) as client:
            lease = changes.get("lease") or await leased(client)
            if "lease" in changes:
                await leased(client)
            given = {name: value for name, value in changes.items() if name != "lease"}
            answer = await uploaded(client, lease, DATA, **given)
            assert answer.status_code == status, answer.text

    asyncio.run(life())
    assert stored_files(place) == []


def test_a_result_needs_its_upload_first(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            lease = await leased(client)
            answer = await client.post(f"{ROOT}/result", json=result(lease))
            assert answer.status_code == 422
            assert "got none in the store" in answer.json()["detail"]
            both = {**result(lease), "error": "x"}
            assert (await client.post(f"{ROOT}/result", json=both)).status_code == 422
            neither = await client.post(f"{ROOT}/result", json={"lease": lease})
            assert neither.status_code == 422

    asyncio.run(life())


def test_a_result_is_of_its_own_kernel_and_says_what_was_counted(place):
    """The bytes are in the store, and another kernel's lease is good: that is not enough."""

    async def life() -> None:
        async with serving(settings(place)) as client:
            await uploaded(client, await leased(client), DATA)
            await client.hub.request_kernel(DOCUMENT.digest, target(5))
            claim = (await client.post(f"{CLAIMS}/claim", json={"worker": "forge"})).json()
            others = {**result(claim["lease"])["metadata"], "kernel": claim["kernel"]}
            answer = await client.post(
                f"{CLAIMS}/{claim['kernel']}/result",
                json={"lease": claim["lease"], "metadata": others},
            )
            assert answer.status_code == 422
            assert f"an artifact of kernel {KERNEL}" in answer.json()["detail"]
            assert (await client.hub.kernel(claim["kernel"])).artifact_digest is None

    asyncio.run(life())


@pytest.mark.parametrize("name", ["parameters", "flops"])
def test_figures_that_were_not_counted_are_refused(place, name):
    async def life() -> None:
        async with serving(settings(place)) as client:
            lease = await leased(client)
            await uploaded(client, lease, DATA)
            said = result(lease)
            said["metadata"]["figures"][name] += 1
            answer = await client.post(f"{ROOT}/result", json=said)
            assert answer.status_code == 422
            assert f"metadata.figures.{name}" in answer.json()["detail"]
            assert (await client.post(f"{ROOT}/result", json=result(lease))).status_code == 200

    asyncio.run(life())


def test_an_artifact_that_the_store_lost_or_changed_is_not_given_out(place):
    async def life() -> None:
        async with serving(settings(place)) as client:
            lease = await leased(client)
            await uploaded(client, lease, DATA)
            await client.post(f"{ROOT}/result", json=result(lease))
            (file,) = (place.artifacts / "kernels").iterdir()
            file.write_bytes(DATA[:-1])
            path = f"/api/v1/kernels/{KERNEL}/artifact"
            assert (await client.get(path)).status_code == 404
            file.unlink()
            lost = await client.get(path)
            assert lost.status_code == 404
            assert lost.json()["type"] == "urn:esper:problem:kernel-error"
            assert (await client.get(f"/api/v1/kernels/{KERNEL}/metadata")).status_code == 200

    asyncio.run(life())
