"""Watches of the operator's own, against a real HTTP server: how long they last, what follows."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import pytest
from aiohttp import web
from kubernetes.aio.client import Configuration

from esper_operator.api import WATCH_SILENCE_SECONDS, ClusterApi
from esper_operator.kinds import EVENT, SECRET, Kind
from esper_operator.metadata_watch import MetadataWatch


@pytest.mark.parametrize(
    ("kind", "fields", "bookmarks"), [(EVENT, "reason=FailedCreate", False), (SECRET, None, True)]
)
def test_a_watch_ends_before_its_silence_or_is_told_that_there_is_nothing(
    kind: Kind, fields: str | None, bookmarks: bool
) -> None:
    """Of Events no bookmark comes; each watch goes on where the last has ended."""
    lists: list[dict[str, str]] = []
    watches: list[dict[str, str]] = []
    enough = asyncio.Event()

    async def answer(request: web.Request) -> web.StreamResponse:
        query = dict(request.query)
        if "watch" not in query:
            lists.append(query)
            return web.json_response({"metadata": {"resourceVersion": "7"}, "items": []})
        watches.append(query)
        if len(watches) == 2:
            enough.set()
        return web.Response(text="")  # as when its time is over

    async def life() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        configuration = Configuration()
        configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
        heard: list[Any] = []
        async with ClusterApi(configuration) as api:
            watch = MetadataWatch(api, kind, None, lambda *told: heard.append(told), fields=fields)
            task = asyncio.create_task(watch.run())
            await enough.wait()
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        await runner.cleanup()

    asyncio.run(asyncio.wait_for(life(), 10.0))
    assert len(lists) == 1
    assert {query["resourceVersion"] for query in watches} == {"7"}
    lasts = {float(query["timeoutSeconds"]) for query in watches}
    assert bookmarks or max(lasts) < WATCH_SILENCE_SECONDS - 5.0
