"""Requests that come to no end: the hub is asked to stop, or the caller goes away."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from esper.services.urza.main import serve
from esper.services.urza.wire import LEASE_HEADER
from tests.unit.esper.services.urza.hubs import DOCUMENT, target
from tests.unit.esper.services.urza.issuing import until
from tests.unit.esper.services.urza.serving import bearer, listening, settings, stored_files


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


async def leased(url: str) -> tuple[str, str]:
    """A kernel to compile and the lease on it."""
    async with httpx.AsyncClient(base_url=url, headers=bearer()) as client:
        await client.post("/api/v1/blueprints/", json=DOCUMENT.to_wire())
        wanted = {"blueprintDigest": DOCUMENT.digest, "target": target().to_wire()}
        kernel = (await client.post("/api/v1/kernels/", json=wanted)).json()["kernel"]
        path = f"/internal/requested-kernels/{kernel}"
        claim = await client.post(f"{path}/claim", json={"worker": "forge"})
        return path, claim.json()["lease"]


def begun(path: str, lease: str) -> bytes:
    """An upload without its end, for which the server waits."""
    lines = (
        f"PUT {path}/artifact?digest={'0' * 64}&bytes=4096 HTTP/1.1",
        "Host: hub",
        *(f"{name}: {value}" for name, value in bearer().items()),
        "Content-Type: application/octet-stream",
        f"{LEASE_HEADER}: {lease}",
        "Content-Length: 4096",
    )
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + b"\x08\x00\x00\x00"


def test_an_upload_that_does_not_end_is_answered_when_the_hub_stops(place, caplog):
    async def life() -> None:
        stop = asyncio.Event()
        address: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        config = settings(place, shutdown_seconds=1)
        served = asyncio.create_task(serve(config, stop=stop, started=address.set_result))
        url = await address
        path, lease = await leased(url)
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
        writer.write(begun(path, lease))
        await asyncio.sleep(0.2)
        stop.set()
        answer = (await asyncio.wait_for(reader.read(), 10)).decode()
        assert answer.startswith("HTTP/1.1 503 "), answer
        assert "content-type: application/problem+json" in answer
        assert "retry-after: 1" in answer
        assert "urn:esper:problem:hub-unavailable" in answer
        await served
        writer.close()

    with caplog.at_level(logging.DEBUG):
        asyncio.run(life())
    assert "/artifact: broken off" in caplog.text
    assert "Traceback" not in caplog.text
    assert "Exception in ASGI" not in caplog.text
    assert stored_files(place) == []


def test_a_caller_that_goes_away_is_no_fault_of_the_hub(place, caplog):
    async def life() -> None:
        async with listening(settings(place)) as url, httpx.AsyncClient(base_url=url) as client:
            path, lease = await leased(url)
            _, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(url).port)
            writer.write(begun(path, lease))
            await asyncio.sleep(0.2)
            writer.close()

            async def counted() -> bool:
                told = (await client.get("/metrics")).text
                assert 'status="500"' not in told
                return 'artifact",status="400"' in told

            await until(counted)

    with caplog.at_level(logging.WARNING):
        asyncio.run(life())
    assert caplog.records == []
    assert stored_files(place) == []
