"""What the hub stands on, asked whether it answers; nobody waits longer than the limit."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping

from esper.errors import EsperError

CHECK_TIMEOUT_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Readiness:
    """Checks by the setting that each depends on.

    A check that has not ended goes on after whoever asked was answered, because breaking off may
    wait for the server too; it is asked again only once it has ended, so they never pile up.
    """

    def __init__(
        self,
        checks: Mapping[str, Callable[[], Awaitable[object]]],
        *,
        limit_seconds: float = CHECK_TIMEOUT_SECONDS,
    ) -> None:
        self._checks = checks
        self._limit = limit_seconds
        self._running: dict[str, asyncio.Task[str | None]] = {}

    async def problems(self) -> dict[str, str]:
        """What does not answer as it must, within `limit_seconds`."""
        for name, check in self._checks.items():
            task = self._running.get(name)
            if task is None or task.done():
                self._running[name] = asyncio.create_task(_problem(check), name=f"urza-{name}")
        asked = dict(self._running)
        await asyncio.wait(asked.values(), timeout=self._limit)
        late = f"no answer within {self._limit:g} s"
        found = {name: task.result() if task.done() else late for name, task in asked.items()}
        return {name: problem for name, problem in found.items() if problem is not None}

    async def close(self) -> None:
        """Break off what still runs."""
        for task in self._running.values():
            task.cancel()
        if self._running:
            await asyncio.wait(self._running.values(), timeout=self._limit)


async def _problem(check: Callable[[], Awaitable[object]]) -> str | None:
    try:
        await check()
    except EsperError as error:
        return str(error)
    except Exception as error:
        # A library's own, whose text may hold what it was given; the question is answered anyway.
        _log.exception("a check of what the hub stands on")
        return f"the check broke off with {type(error).__name__}"
    return None
