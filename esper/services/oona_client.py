"""Oona, the bus: its port, the bus of one process, and the one over Redis Streams.

`OonaClient` is imported when it is asked for: a run in one process needs no Redis library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from esper.errors import ConfigError
from esper.services.oona.in_process import InProcessOona, InProcessSubscription
from esper.services.oona.port import Oona, OonaStatistics, Subscription

if TYPE_CHECKING:
    from esper.services.oona.redis_bus import OonaClient

__all__ = [
    "InProcessOona",
    "InProcessSubscription",
    "Oona",
    "OonaClient",
    "OonaStatistics",
    "Subscription",
]


def __getattr__(name: str) -> object:
    if name != "OonaClient":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from esper.services.oona.redis_bus import OonaClient
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "redis":
            raise
        raise ConfigError(
            "redis.url", "a URL", "null, unless the extra is installed: pip install 'esper[bus]'"
        ) from error
    return OonaClient
