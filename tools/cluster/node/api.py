"""What the node asks of the API server, patient with one that is away for a while."""

from __future__ import annotations

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import yaml

Object = dict[str, Any]

REQUEST_SECONDS = 10.0
WATCH_SECONDS = 300
PAUSE_SECONDS = 0.2
MOST_PAUSE_SECONDS = 2.0
STRATEGIC = "application/strategic-merge-patch+json"
MERGE = "application/merge-patch+json"

_log = logging.getLogger(__name__)


class RefusedError(Exception):
    """The API server has answered that it won't; `status` is that of HTTP."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Api:
    """A client made from a kubeconfig with a certificate and a token."""

    def __init__(self, kubeconfig: Path) -> None:
        config = yaml.safe_load(kubeconfig.read_text())
        cluster, user = config["clusters"][0]["cluster"], config["users"][0]["user"]
        self.url: str = cluster["server"]
        self._client = httpx.AsyncClient(
            base_url=self.url,
            headers={"Authorization": f"Bearer {user['token']}"},
            verify=ssl.create_default_context(cafile=cluster["certificate-authority"]),
            timeout=REQUEST_SECONDS,
            limits=httpx.Limits(max_connections=256),
            trust_env=False,
        )

    async def close(self) -> None:
        """Let go of the connections."""
        await self._client.aclose()

    async def ask(
        self, method: str, path: str, body: Object | None = None, *, kind: str = "application/json"
    ) -> Object:
        """One request, made again until the API server answers it.

        Raises:
            RefusedError: the answer is a refusal.
        """
        pause = PAUSE_SECONDS
        while True:
            try:
                return await self.ask_once(method, path, body, kind=kind)
            except httpx.TransportError as error:
                _log.info("%s %s: %r", method, path, error)
            except RefusedError as refusal:
                if refusal.status < 500 and refusal.status != 429:
                    raise
                _log.info("%s %s: %s", method, path, refusal)
            await asyncio.sleep(pause)
            pause = min(pause * 2, MOST_PAUSE_SECONDS)

    async def ask_once(
        self, method: str, path: str, body: Object | None = None, *, kind: str = "application/json"
    ) -> Object:
        """One request.

        Raises:
            RefusedError: the answer is a refusal.
            httpx.TransportError: there is no answer.
        """
        content = None if body is None else json.dumps(body)
        answer = await self._client.request(
            method, path, content=content, headers={"Content-Type": kind}
        )
        if answer.is_success:
            found: Object = answer.json()
            return found
        try:
            message = answer.json()["message"]
        except (ValueError, KeyError):
            message = answer.text
        raise RefusedError(answer.status_code, message)

    async def follow(self, path: str, heard: Callable[[str, Object], None]) -> None:
        """Tell every object of a collection, and then every change, for ever.

        `heard` gets ADDED, MODIFIED or DELETED and the object. What went away while nobody looked
        is told as DELETED too.
        """
        known: dict[str, Object] = {}

        def tell(event: str, item: Object) -> None:
            if event == "DELETED":
                known.pop(item["metadata"]["uid"], None)
            else:
                known[item["metadata"]["uid"]] = item
            heard(event, item)

        while True:
            found = await self.ask("GET", path)
            items = {item["metadata"]["uid"]: item for item in found["items"]}
            for uid in known.keys() - items.keys():
                tell("DELETED", known[uid])
            for uid, item in items.items():
                tell("MODIFIED" if uid in known else "ADDED", item)
            try:
                async for event, item in self._watch(path, found["metadata"]["resourceVersion"]):
                    tell(event, item)
            except (httpx.TransportError, RefusedError, ValueError) as error:
                _log.info("watch of %s: %r", path, error)
                await asyncio.sleep(PAUSE_SECONDS)

    async def _watch(self, path: str, version: str) -> AsyncIterator[tuple[str, Object]]:
        query = {
            "watch": "1",
            "resourceVersion": version,
            "timeoutSeconds": str(WATCH_SECONDS),
            "allowWatchBookmarks": "true",
        }
        reading = httpx.Timeout(REQUEST_SECONDS, read=WATCH_SECONDS + REQUEST_SECONDS)
        async with self._client.stream("GET", path, params=query, timeout=reading) as answer:
            if not answer.is_success:
                raise RefusedError(answer.status_code, "watch")
            async for line in answer.aiter_lines():
                event = json.loads(line)
                if event["type"] == "ERROR":
                    raise RefusedError(event["object"].get("code", 500), event["object"]["message"])
                if event["type"] != "BOOKMARK":
                    yield event["type"], event["object"]
