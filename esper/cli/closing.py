"""Ending in time: one limit on all that a process still does once it has been asked to stop."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Coroutine
from typing import Any, TypeVar

from esper.errors import Interrupted

CLOSING_SECONDS = 7.0
"""For everything that is closed, given back or told at the end of a process; in a cluster, a pod
that takes longer than its grace is killed."""

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class Closing:
    """What is left of the time to end in. It begins to run with the first thing that is closed."""

    def __init__(self, seconds: float = CLOSING_SECONDS) -> None:
        self._seconds = seconds
        self._end: float | None = None

    async def do(self, *works: Awaitable[object], most: float = CLOSING_SECONDS) -> bool:
        """Do all `works` at once, for `most` seconds or what is left; whether they came to an end.

        What does not is cancelled and left to itself: the end of the event loop ends it.

        Raises:
            Exception: what the first of them raised.
        """
        if self._end is None:
            self._end = time.monotonic() + self._seconds
        tasks = [asyncio.ensure_future(work) for work in works]
        left = max(0.0, min(most, self._end - time.monotonic()))
        ended, late = await asyncio.wait(tasks, timeout=left)
        for task in late:
            task.cancel()
        if late:
            _log.warning(
                "%d things were left behind, because the time to end in is over", len(late)
            )
        for task in tasks:
            if task in ended:
                task.result()
        return not late


async def unless_stopped(
    work: Coroutine[Any, Any, Result], stop: asyncio.Event, closing: Closing
) -> Result:
    """What `work` comes to; cancelled once `stop` is set.

    Raises:
        Interrupted: it was stopped.
    """
    working = asyncio.create_task(work)
    waiting = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({working, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        working.cancel()
        await closing.do(asyncio.wait({working}))
        if working.done() and not working.cancelled():
            return working.result()
        raise Interrupted("interrupted; what was begun is given back")
    finally:
        waiting.cancel()
