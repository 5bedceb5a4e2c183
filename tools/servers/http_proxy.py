"""A way to an HTTP server on which every change is counted, and can be the last one seen."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from tools.servers.process import HOST

WRITES = frozenset({"POST", "PUT", "PATCH", "DELETE"})
_HOPS = frozenset({"connection", "host", "transfer-encoding", "content-length", "keep-alive"})


class HttpProxy:
    """Passes requests on to `target`; a context manager, whose thread does the work.

    `seen` is called after the server has answered a change and before the asker hears of it, with
    the change's number, method and path; it runs in the proxy's thread. `counts` says which
    changes have a number.
    """

    def __init__(
        self,
        target: str,
        trust: ssl.SSLContext,
        *,
        counts: Callable[[str, str], bool] = lambda method, path: True,
        seen: Callable[[int, str, str], None] = lambda number, method, path: None,
    ) -> None:
        """`target` is the server's URL, `trust` what its certificate is checked by."""
        self._target = target
        self._trust = trust
        self._counts = counts
        self.seen = seen
        self.count = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._runner: web.AppRunner | None = None
        self._session: aiohttp.ClientSession | None = None

    @property
    def url(self) -> str:
        """Where it listens, without TLS."""
        return f"http://{HOST}:{self.port}"

    def start(self) -> Self:
        """Begin to listen."""
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def stop(self) -> None:
        """End every connection and the thread."""
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    async def _start(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, ssl=self._trust), auto_decompress=False
        )
        application = web.Application(client_max_size=2**26)
        application.router.add_route("*", "/{tail:.*}", self._handle)
        self._runner = web.AppRunner(application, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, HOST, 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    async def _stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
        if self._session is not None:
            await self._session.close()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        assert self._session is not None
        headers = {
            name: text for name, text in request.headers.items() if name.lower() not in _HOPS
        }
        answer = await self._session.request(
            request.method,
            self._target + request.path_qs,
            headers=headers,
            data=await request.read() or None,
            timeout=aiohttp.ClientTimeout(total=None),
        )
        whole = b""
        async with answer:
            if request.method in WRITES and self._counts(request.method, request.path):
                whole = await answer.read()
                self.count += 1
                self.seen(self.count, request.method, request.path)
            passed = {n: t for n, t in answer.headers.items() if n.lower() not in _HOPS}
            response = web.StreamResponse(status=answer.status, headers=passed)
            # Whoever asked may be gone, killed: there is nobody to tell of that.
            with contextlib.suppress(OSError, aiohttp.ClientError):
                await response.prepare(request)
                await response.write(whole)
                async for piece in answer.content.iter_any():
                    await response.write(piece)
                await response.write_eof()
            return response
