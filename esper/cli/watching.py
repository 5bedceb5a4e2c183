"""What a trainer stands on, watched from a thread of its own: its event loop is busy training."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

from esper.cli.wiring import bus_answers, bus_elsewhere, hub_answers, hub_elsewhere
from esper.configs import EsperConfig
from esper.services.health import Check, ServiceHealth, not_looked_at, watch

JOIN_SECONDS = 2.0
SETTINGS = ("redis.url", "hub.url")

_log = logging.getLogger(__name__)


@contextmanager
def watched_services(health: ServiceHealth, config: EsperConfig, scope: str) -> Iterator[None]:
    """Inside, `health` tells whether bus and hub answer the session whose uid is `scope`.

    Over connections of its own: those of the trainer belong to the trainer's loop.
    """
    not_looked_at(health, SETTINGS)
    stopping = _Stopping()
    thread = threading.Thread(
        target=_watch, args=(health, config, scope, stopping), name="health checks", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(JOIN_SECONDS)


class _Stopping:
    """A request to stop, from any thread to a loop that may not run yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._event: asyncio.Event | None = None

    def set(self) -> None:
        """Ask."""
        with self._lock:
            self._asked = True
            if self._loop is not None and self._event is not None:
                with suppress(RuntimeError):  # the loop has ended by itself
                    self._loop.call_soon_threadsafe(self._event.set)

    async def wait(self) -> None:
        """Wait until it is asked, in the loop that runs."""
        with self._lock:
            self._loop, self._event = asyncio.get_running_loop(), asyncio.Event()
            if self._asked:
                return
        await self._event.wait()


def _watch(health: ServiceHealth, config: EsperConfig, scope: str, stopping: _Stopping) -> None:
    async def life() -> None:
        async with bus_elsewhere(config, scope) as bus, hub_elsewhere(config) as hub:
            checks: Mapping[str, Check] = {
                "redis.url": lambda: bus_answers(bus),
                "hub.url": lambda: hub_answers(hub),
            }
            watching = asyncio.create_task(watch(health, checks, beating=False))
            await stopping.wait()
            watching.cancel()
            await asyncio.wait({watching})

    try:
        asyncio.run(life())
    except Exception as error:
        _log.exception("nobody watches the services any more")
        for setting in SETTINGS:
            health.report(setting, f"{setting}: can't be watched: {type(error).__name__}")
