"""How long a boundary waits for services that may be away, and what ends the waiting.

In one process nothing is ever away: what fails there is raised at once. Over the wire whatever
fails for a time is tried again, for ever or for as long as the session's `patienceSeconds` say.

A service that refuses the credentials is waited for only where it has accepted them before: then
it is the service that has changed, as a Redis that was started anew and knows no users yet. One
that never has would refuse them for ever.
"""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

from esper.errors import (
    BadInput,
    ConfigError,
    EsperError,
    Interrupted,
    Unauthorized,
    Unavailable,
)

Outcome = TypeVar("Outcome")

LOOK_SECONDS = 0.25
"""How long a request to stop waits at most to be seen."""
PAUSE_SECONDS = 0.5
"""Between two tries, beside what the clients wait themselves."""

REGISTERING_SECONDS = 60.0
"""How long a session that begins waits for the hub to know it, at least: what its boundaries may
wait for says nothing of that, and there is no going on without."""

HUB, BUS = "hub", "redis"
"""The services, by the sections of the settings that lead to them."""

_log = logging.getLogger(__name__)


class PatienceEnded(Unavailable):
    """Nothing came for as long as the session waits."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """The rules of waiting.

    `lasting`: services are elsewhere, their absence is waited out. `seconds`: for so long; None is
    for ever. `ask_again_seconds`: until a question is asked once more; `look_seconds`: between two
    looks at the hub for a kernel. `stopping` says whether the run should stop. `accepted` are the
    services that have accepted this process' credentials so far.
    """

    lasting: bool = False
    seconds: float | None = None
    ask_again_seconds: float = 10.0
    look_seconds: float = 1.0
    stopping: Callable[[], bool] = lambda: False
    accepted: set[str] = field(default_factory=set)

    def begin(self, *, at_least: float = 0.0) -> Wait:
        """One wait, which begins now; it takes `at_least` so many seconds."""
        seconds = math.inf if self.seconds is None else max(self.seconds, at_least)
        return Wait(self, seconds)

    def once_accepted(self, refusal: BadInput) -> bool:
        """Whether the service whose setting `refusal` names has accepted this process before."""
        return refusal.field.partition(".")[0] in self.accepted


IN_PROCESS = Patience()
"""Every service is in this process: nothing is away, and an answer always comes."""


class Wait:
    """One thing waited for; `Patience.begin` makes it."""

    def __init__(self, patience: Patience, seconds: float) -> None:
        self._patience = patience
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    async def outlast(
        self, work: Callable[[], Coroutine[Any, Any, Outcome]], *, by: str | None = None
    ) -> Outcome:
        """What `work` comes to, tried again while a service that it needs is away.

        `by` is the service that has accepted this process once the work is done.

        Raises:
            ConfigError, Unauthorized: one that never has accepted it refuses it.
            PatienceEnded: it came to nothing for too long; the cause is what was last in the way.
            Interrupted: the run was asked to stop.
            Unavailable: a service is away and its absence is not waited out.
        """
        if not self._patience.lasting:
            return await work()
        last: EsperError | None = None
        while True:
            try:
                outcome = cast("Outcome", await self._attended(work(), last))
                if by is not None:
                    self._patience.accepted.add(by)
                return outcome
            except PatienceEnded:
                raise
            except (Unavailable, ConfigError, Unauthorized) as error:
                if isinstance(error, BadInput) and not self._patience.once_accepted(error):
                    raise
                if str(error) != str(last):
                    _log.warning("waiting, because something is away: %s", error)
                last = error
            await self._attended(asyncio.sleep(PAUSE_SECONDS), last)

    async def within(self, work: Awaitable[Outcome], seconds: float) -> Outcome | None:
        """What `work` comes to within `seconds`; None if it has not by then and is cancelled.

        Raises:
            PatienceEnded: there was less time than that, and it came to nothing.
            Interrupted: the run was asked to stop.
        """
        return await self._attended(work, None, seconds)

    async def _attended(
        self, work: Awaitable[Outcome], last: EsperError | None, seconds: float = math.inf
    ) -> Outcome | None:
        """What `work` comes to; None if that takes longer than `seconds`."""
        task = asyncio.ensure_future(work)
        until = time.monotonic() + seconds
        try:
            while not task.done():
                now = time.monotonic()
                if self._patience.stopping():
                    raise Interrupted("stopped while waiting for services")
                if now >= self._end:
                    raise PatienceEnded(
                        f"got nothing for {self._seconds:g} s"
                        + (f", because {last}" if last else "")
                        + "; see spec.growth.controller.patienceSeconds"
                    ) from last
                if now >= until:
                    return None
                await asyncio.wait({task}, timeout=min(LOOK_SECONDS, self._end - now, until - now))
            return task.result()
        finally:
            task.cancel()
            await asyncio.wait({task})
