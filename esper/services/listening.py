"""A service's ear on the bus: every message handled, then acknowledged, under its trace id."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable

from esper.contracts.messages import OonaMessage
from esper.errors import BusUnavailable, EsperError
from esper.services.oona_client import Subscription
from esper.utils.logging import tracing

RECONNECT_SECONDS = 0.5

Handle = Callable[[OonaMessage], Awaitable[None]]
Subscribe = Callable[[], Awaitable[Subscription]]

_log = logging.getLogger(__name__)


async def listen(subscription: Subscription, handle: Handle) -> None:
    """Handle every message until cancelled or until the bus does not answer.

    A message is acknowledged after it was handled: one whose handling breaks off comes again.

    Raises:
        BusUnavailable: the bus does not answer, or is closed.
    """
    try:
        while True:
            message = await subscription.receive()
            with tracing(message.trace_id):
                await handle(message)
            await subscription.acknowledge(message)
    finally:
        try:
            await subscription.close()
        except BusUnavailable as error:
            _log.debug("a subscription could not be closed: %s", error)


async def keep_listening(subscribe: Subscribe, handle: Handle) -> None:
    """Handle messages for ever; while the bus is away, try to get back to it.

    Once it was reached, all that is in the way is waited out: a Redis that has restarted refuses
    its users until they are made anew. A message whose handling fails in a way that nobody foresaw
    counts as delivered and comes again, until the bus sets it aside.

    Raises:
        EsperError: something that does not pass, as wrong credentials, before the bus was reached.
    """
    reached = False
    while True:
        try:
            subscription = await subscribe()
            reached = True
            await listen(subscription, handle)
        except EsperError as error:
            if error.permanent and not reached:
                raise
            _log.warning("messages are not heard at the moment: %s", error)
        except Exception:
            if not reached:
                raise
            _log.exception("a message could not be handled; it will come again")
        await asyncio.sleep(RECONNECT_SECONDS)
