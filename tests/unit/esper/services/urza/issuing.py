"""Credentials as tests ask for them, and what opens with them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from tests.unit.esper.services.urza.serving import Client

BLUEPRINT = {
    "name": "gain",
    "hosts": ["Linear"],
    "graph": {
        "nodes": [
            {"op": "input", "id": "x"},
            {"op": "linear", "id": "y", "input": "x", "features": "out"},
        ],
        "output": "y",
    },
}


async def made(client: Client, uid: str, namespace: str) -> dict[str, Any]:
    answer = await client.post(
        f"/internal/sessions/{uid}/credentials", json={"namespace": namespace}
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    found: dict[str, Any] = answer.json()
    return found


@asynccontextmanager
async def redis_of(server: Any, issued: dict[str, Any]) -> AsyncIterator[Redis]:
    client = Redis(
        host="127.0.0.1",
        port=server.port,
        username=issued["redisUsername"],
        password=issued["redisPassword"],
        decode_responses=True,
        retry=Retry(NoBackoff(), 0),
    )
    try:
        yield client
    finally:
        await client.aclose()


async def until(condition: Any) -> None:
    for _ in range(400):
        if await condition():
            return
        await asyncio.sleep(0.02)
    raise AssertionError("it never came")
