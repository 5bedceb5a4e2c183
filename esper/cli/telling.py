"""How a session stands, told over the bus from a thread of its own: its event loop trains.

What is told is a whole snapshot each time, so nothing piles up while the bus is away: once it is
back the newest is sent. Nothing here is waited for by training, nor changes what it comes to.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from esper.cli.closing import Closing
from esper.cli.wiring import bus_elsewhere
from esper.configs import EsperConfig
from esper.contracts.enums import ComponentType, SessionOutcome
from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import EsperError
from esper.services.oona_client import Oona
from esper.services.tolaria.reporting import SessionReport, fitted

LOOK_SECONDS = 0.2
"""Between two looks for something new; what changes in between is told at once."""
HEARTBEAT_SECONDS = 30.0
AGAIN_SECONDS = 2.0
"""Until a bus that refuses is tried once more."""
FAREWELL_SECONDS = 2.0
CLOSING_SECONDS = 1.0
SUCCESS_SECONDS = 30.0
"""For the last snapshot of a session that succeeded: nothing else tells its figures."""

_log = logging.getLogger(__name__)


@contextmanager
def telling(report: SessionReport, config: EsperConfig, scope: str) -> Iterator[None]:
    """Inside, the bus is told of every change of `report`, of the session whose uid is `scope`.

    Of what has changed before the end it is told, too, for as long as that may take.
    """
    ending = threading.Event()
    thread = threading.Thread(
        target=_tell, args=(report, config, scope, ending), name="status", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        ending.set()
        thread.join(SUCCESS_SECONDS + FAREWELL_SECONDS + CLOSING_SECONDS)


class Teller:
    """Sends the snapshots of a report that are news; for one event loop.

    Args:
        report: what is told.
        bus: where.
        scope: the uid of the session.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        report: SessionReport,
        bus: Oona,
        scope: str,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._report = report
        self._bus = bus
        self._scope = scope
        self._clock = clock
        self._version = 0
        self._steps = 0
        self._since = clock()
        self._refused_until = float("-inf")

    @property
    def up_to_date(self) -> bool:
        """Whether the bus has the newest."""
        return self._version == self._report.version and not self._bus.statistics().buffered

    async def look(self) -> None:
        """Send what is new, unless the bus is away or has refused a moment ago.

        Where nothing but its steps is new, that is told every `HEARTBEAT_SECONDS`.
        """
        now, steps = self._clock(), self._report.steps
        if now - self._since >= HEARTBEAT_SECONDS and steps != self._steps:
            self._report.heartbeat()
        if self.up_to_date or self._bus.statistics().buffered or now < self._refused_until:
            return
        version = self._report.version
        message = OonaMessage.carrying(
            TopicNames.STATUS,
            fitted(self._report.snapshot()),
            ComponentType.TOLARIA,
            scope=self._scope,
        )
        try:
            await self._bus.publish(message)
        except EsperError as error:
            self._refused_until = now + AGAIN_SECONDS
            _log.warning("the bus does not take how the session stands: %s", error)
            return
        self._version, self._steps, self._since = version, steps, now


async def _look_again(teller: Teller, ending: threading.Event) -> None:
    while not (ending.is_set() and teller.up_to_date):
        await teller.look()
        await asyncio.sleep(LOOK_SECONDS)


def _tell(report: SessionReport, config: EsperConfig, scope: str, ending: threading.Event) -> None:
    async def life() -> None:
        async with bus_elsewhere(config, scope, Closing(CLOSING_SECONDS)) as bus:
            teller = Teller(report, bus, scope)
            # A look may take as long as a bus that is away is asked; the end is not to wait for it.
            looking = asyncio.create_task(_look_again(teller, ending), name="status")
            await asyncio.to_thread(ending.wait)
            succeeded = report.snapshot().outcome is SessionOutcome.SUCCEEDED
            seconds = SUCCESS_SECONDS if succeeded else FAREWELL_SECONDS
            await asyncio.wait({looking}, timeout=seconds)
            looking.cancel()
            await asyncio.wait({looking})
            if not looking.cancelled():
                looking.result()

    try:
        asyncio.run(life())
    except Exception:
        _log.exception("nobody is told any more how the session stands")
