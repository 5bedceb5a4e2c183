"""Tezzeret as a service: one worker, started and stopped."""

from __future__ import annotations

import asyncio

from esper.services.oona_client import Oona
from esper.services.tezzeret.worker import TezzeretWorker
from esper.services.urza.client import UrzaClient


class TezzeretService:
    """Runs a `TezzeretWorker` as a task of the running loop."""

    def __init__(self, bus: Oona, hub: UrzaClient, *, name: str = "tezzeret") -> None:
        self._worker = TezzeretWorker(bus, hub, name=name)
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether requests are being answered."""
        return self._task is not None and not self._task.done()

    async def start(self) -> None:
        """Answer every request published from now on; a second call while running does nothing.

        Raises:
            BusUnavailable: the bus is closed, or does not answer.
        """
        if self.running:
            return
        subscription = await self._worker.subscribe()
        self._task = asyncio.create_task(self._worker.run(subscription), name="tezzeret")

    async def stop(self) -> None:
        """Stop; a request that is not answered yet goes back to the bus.

        Raises:
            Exception: whatever ended the worker before, so that no failure goes unseen.
        """
        task, self._task = self._task, None
        if task is None:
            return
        task.cancel()
        (ended,) = await asyncio.gather(task, return_exceptions=True)
        if isinstance(ended, Exception):
            raise ended
