"""A thread in which kernels are fetched while the training thread trains.

Training keeps its own event loop busy for a whole epoch: what is to arrive meanwhile needs another.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager
from threading import Thread
from types import TracebackType
from typing import Generic, Self, TypeVar

Source = TypeVar("Source")


class FetchingThread(Generic[Source]):
    """An event loop in a thread of its own, and a kernel source that lives on it.

    Inside `with`, `loop` and `source` are what a `KernelCache` takes. At the end the source is
    closed, and fetches that still run are broken off.
    """

    loop: asyncio.AbstractEventLoop
    source: Source

    def __init__(self, opening: AbstractAsyncContextManager[Source]) -> None:
        self._opening = opening
        self._stopping = asyncio.Event()
        self._opened: Future[None] = Future()
        self._thread = Thread(target=self._run, name="esper-kernels", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._opened.result()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)

    async def _serve(self) -> None:
        async with self._opening as source:
            self.loop, self.source = asyncio.get_running_loop(), source
            self._opened.set_result(None)
            await self._stopping.wait()
