"""The hub over HTTP: what is asked of it beside work, and answers that lead nowhere."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest
from pydantic import SecretStr

from esper.configs import HubConfig
from esper.errors import ConfigError, HubUnavailable, Unauthorized, WorkFailed
from esper.services.tezzeret.compiler import compile_kernel
from esper.services.urza.http_client import HttpUrza
from esper.utils.circuit_breaker import CircuitState
from tests.unit.esper.services.urza.hubs import DOCUMENT, target
from tests.unit.esper.services.urza.serving import expired, listening, over_http, settings, token

CONFIG = HubConfig(
    url="http://hub.example", token=SecretStr("a-token"), breaker_failures=2, backoff_seconds=0
)


def page(**fields: str) -> httpx.Response:
    """An empty page, streamed as a server does."""

    async def body() -> AsyncIterator[bytes]:
        yield json.dumps({"items": [], **fields}).encode()

    return httpx.Response(200, content=body())


@pytest.fixture
def place(sqlite_place):
    """The database's kind makes no difference here."""
    return sqlite_place


def test_a_hub_that_is_not_ready_still_gets_work() -> None:
    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/readyz":
            return httpx.Response(503)
        return page()

    async def life() -> None:
        async with HttpUrza(CONFIG, transport=httpx.MockTransport(answer)) as hub:
            for _ in range(5):
                assert not await hub.health()
            assert hub.statistics().circuit is CircuitState.CLOSED
            assert await hub.blueprints() == ()

    asyncio.run(life())


def test_a_token_in_a_file_is_the_one_that_it_holds_at_the_moment(tmp_path) -> None:
    file, came = tmp_path / "hub-token", []

    def answer(request: httpx.Request) -> httpx.Response:
        came.append(request.headers["Authorization"])
        return page()

    async def life() -> None:
        config = CONFIG.model_copy(update={"token_file": str(file)})
        async with HttpUrza(config, transport=httpx.MockTransport(answer)) as hub:
            await hub.blueprints()
            file.write_text("second")
            await hub.blueprints()
            file.unlink()  # it is being replaced
            await hub.blueprints()
            file.write_text("third\n")
            await hub.blueprints()

    file.write_text("first\n")
    asyncio.run(life())
    assert came == [f"Bearer {token}" for token in ("first", "second", "second", "third")]


def test_a_renewed_token_is_taken_up_by_a_client_that_goes_on(place, tmp_path) -> None:
    file = tmp_path / "hub-token"

    async def life() -> None:
        async with listening(settings(place)) as url:
            file.write_text(expired())
            async with HttpUrza(HubConfig(url=url, token_file=str(file))) as hub:
                with pytest.raises(Unauthorized):
                    await hub.blueprints()
                file.write_text(token())
                assert await hub.blueprints() == ()

    asyncio.run(life())


@pytest.mark.parametrize("content", [None, "", "two words", "geheim\u00fc"])
def test_a_file_without_a_token_is_refused_at_once_and_not_shown(tmp_path, content) -> None:
    file = tmp_path / "hub-token"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"hub\.token_file") as refused:
        HttpUrza(CONFIG.model_copy(update={"token_file": str(file)}))
    assert "geheim" not in str(refused.value)
    assert "two words" not in str(refused.value)


def test_a_hub_that_is_left_alone_is_still_asked_how_it_is() -> None:
    working = False

    def answer(request: httpx.Request) -> httpx.Response:
        return page() if working else httpx.Response(503)

    async def life() -> None:
        nonlocal working
        async with HttpUrza(CONFIG, transport=httpx.MockTransport(answer)) as hub:
            with pytest.raises(HubUnavailable):
                await hub.blueprints()
            assert hub.statistics().circuit is CircuitState.OPEN
            assert not await hub.health()
            working = True
            assert await hub.health()
            assert hub.statistics().circuit is CircuitState.OPEN

    asyncio.run(life())


@pytest.mark.parametrize("cursors", [["one"], ["one", "two"]])
def test_pages_that_go_round_in_circles_end(cursors: list[str]) -> None:
    asked = 0

    def answer(request: httpx.Request) -> httpx.Response:
        nonlocal asked
        asked += 1
        return page(nextCursor=cursors[asked % len(cursors)])

    async def life() -> None:
        async with HttpUrza(CONFIG, transport=httpx.MockTransport(answer)) as hub:
            with pytest.raises(WorkFailed, match=r"nextCursor of an earlier page.*hub\.url"):
                await hub.kernels()

    asyncio.run(life())
    assert asked == len(cursors) + 1


def test_a_lease_stands_in_no_log(place, caplog) -> None:
    made = compile_kernel(DOCUMENT, target())
    leases = []

    async def life() -> None:
        async with over_http(settings(place)) as hub:
            await hub.put_blueprint(DOCUMENT)
            kernel = (await hub.request_kernel(DOCUMENT.digest, target())).kernel
            claim = await hub.lease_kernel(kernel, "forge", 60)
            assert claim is not None
            leases.append(claim.lease)
            await hub.complete_kernel(made.metadata, made.data, token=claim.lease)

    with caplog.at_level(logging.INFO):
        asyncio.run(life())
    assert "/artifact" in caplog.text
    assert leases[0] not in caplog.text
