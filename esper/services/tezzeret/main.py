"""Tezzeret as a service: one worker, started and stopped."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping

from esper.errors import ConfigError, EsperError, Unauthorized
from esper.services.listening import keep_listening
from esper.services.oona_client import Oona
from esper.services.tezzeret.forge import Forge
from esper.services.tezzeret.worker import TezzeretWorker
from esper.services.urza.client import UrzaClient

POLL_SECONDS = 2.0
MAX_PAUSE_SECONDS = 10.0
"""Between two looks for work at most, while each comes to nothing."""

_log = logging.getLogger(__name__)


class TezzeretService:
    """Runs a `TezzeretWorker` as a task of the running loop.

    With a `forge` it is one of many workers of a hub elsewhere: it also looks for work by itself,
    every `poll_seconds`, and outlasts a bus and a hub that are away.
    """

    def __init__(
        self,
        bus: Oona,
        hub: UrzaClient,
        *,
        name: str = "tezzeret",
        forge: Forge | None = None,
        poll_seconds: float = POLL_SECONDS,
    ) -> None:
        self._worker = TezzeretWorker(bus, hub, name=name, forge=forge)
        self._forge = forge
        self._poll_seconds = poll_seconds
        self._task: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        """Whether requests are being answered."""
        return self._task is not None and not self._task.done()

    @property
    def counts(self) -> Mapping[str, int]:
        """What came of the work under leases so far."""
        return {} if self._forge is None else self._forge.counts

    async def start(self) -> None:
        """Answer every request published from now on; a second call while running does nothing.

        Raises:
            BusUnavailable: the bus is closed, or does not answer.
        """
        if self.running:
            return
        if self._forge is not None:
            self._task = asyncio.create_task(self._keep_working(self._forge), name="tezzeret")
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

    async def _keep_working(self, forge: Forge) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(keep_listening(self._worker.subscribe, self._worker.handle))
                tasks.create_task(self._poll(forge))
        except* EsperError as failures:
            raise failures.exceptions[0] from failures

    async def _poll(self, forge: Forge) -> None:
        """Work off what nobody has asked for on the bus, or what the bus has lost.

        After work that was given back, the next try waits longer each time: the same work would
        be found again at once.

        Raises:
            ConfigError, Unauthorized: a person has to mend the settings.
        """
        failures = 0
        while True:
            try:
                await forge.work_off()
                failures = 0
            except (ConfigError, Unauthorized):
                raise
            except EsperError as error:
                failures += 1
                _log.warning("no work can be done at the moment: %s", error)
            except Exception:
                # The worker outlives faults that nobody foresaw; the next work may go well.
                failures += 1
                _log.exception("work broke off")
            await asyncio.sleep(self._pause_seconds(failures))

    def _pause_seconds(self, failures: int) -> float:
        """How long to wait for the next look, after that many in a row that came to nothing."""
        longest = max(self._poll_seconds, MAX_PAUSE_SECONDS)
        return min(self._poll_seconds * 2.0 ** min(failures, 60), longest)
