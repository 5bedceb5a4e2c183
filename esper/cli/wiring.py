"""Services elsewhere: what is built from their addresses, and whether something answers there."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING

from esper.cli.closing import Closing
from esper.configs import EsperConfig, without_password
from esper.errors import BusUnavailable, ConfigError, HubUnavailable, KernelNotFound

if TYPE_CHECKING:
    from esper.services.oona_client import OonaClient
    from esper.services.urza.client import UrzaClient
    from esper.services.urza.http_client import HttpUrza
    from esper.services.urza.http_objects import HubObjects

_log = logging.getLogger(__name__)

NO_KERNEL = "0" * 40
"""A kernel id that no kernel has: asking for it tells what the hub makes of the token."""


@asynccontextmanager
async def bus_elsewhere(
    config: EsperConfig, scope: str | None, closing: Closing | None = None
) -> AsyncIterator[OonaClient]:
    """The bus at `redis.url`, in one scope or (None) in all; closed at the end, within `closing`.

    Raises:
        ConfigError: `redis.url` is missing or can't be read.
    """
    from esper.services.oona_client import OonaClient

    bus = OonaClient(config.redis, scope=scope)
    try:
        yield bus
    finally:
        if not await (closing or Closing()).do(bus.close()):
            _log.error("closed with %d messages that Redis did not take", bus.statistics().buffered)


def hub_elsewhere(config: EsperConfig) -> HttpUrza:
    """The hub at `hub.url`; closed by `async with`.

    Raises:
        ConfigError: `hub.url` is missing.
    """
    from esper.services.urza.http_client import HttpUrza

    return HttpUrza(config.hub)


def hub_objects(config: EsperConfig, uid: str) -> HubObjects:
    """What the session of that uid keeps at the hub at `hub.url`.

    Raises:
        ConfigError: `hub.url` is missing.
        BadInput: the uid is none.
    """
    from esper.services.urza.http_objects import HubObjects

    return HubObjects(config.hub, uid)


async def hub_answers(hub: UrzaClient) -> bool:
    """Whether the hub answers and takes the token.

    Raises:
        HubUnavailable: it does not answer.
        Unauthorized: it refuses the token; the error names the setting.
    """
    with suppress(KernelNotFound):
        await hub.kernel(NO_KERNEL)
    return True


async def hub_gives_work(hub: HttpUrza) -> bool:
    """Whether the hub answers and lets a worker work.

    Raises:
        HubUnavailable: it does not answer.
        Unauthorized: it refuses the token, or the token's role; the error names the setting.
    """
    await hub.require_work()
    return True


async def bus_answers(bus: OonaClient) -> bool:
    """Whether the bus answers and takes the user.

    Raises:
        BusUnavailable: it does not answer.
        ConfigError: it refuses the user; the error names the setting.
    """
    await bus.check()
    return True


async def refuse_unreachable(config: EsperConfig, scope: str) -> None:
    """Refuse services that do not answer now to the session whose uid is `scope`.

    Raises:
        ConfigError: one does not, or refuses the user; the error names the setting.
        Unauthorized: the hub refuses the token, or the token's role.
    """
    async with bus_elsewhere(config, scope) as bus, hub_elsewhere(config) as hub:
        try:
            await bus_answers(bus)
        except BusUnavailable as error:
            shown = without_password(config.redis.url or "")
            raise ConfigError("redis.url", shown, f"a Redis that answers ({error})") from error
        try:
            await hub_answers(hub)
            await hub.require_session(scope)
        except HubUnavailable as error:
            raise ConfigError("hub.url", config.hub.url, f"a hub that answers ({error})") from error
