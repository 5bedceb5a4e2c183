"""What lies outside the cluster goes when its session has gone: found by looking, not by waiting.

There is no finalizer: deleting a session, or a whole namespace, needs no operator. Whatever was
deleted, also while no operator ran, is what the hub knows and the API server does not.
"""

from __future__ import annotations

import asyncio
import logging

from esper.errors import EsperError
from esper_operator.api import ClusterApi
from esper_operator.hearing import Reports
from esper_operator.hub import Hub
from esper_operator.kinds import SESSION
from esper_operator.scope import Scope

_log = logging.getLogger(__name__)
SETTLE_SECONDS = 5.0
"""After a session has gone, for others of its namespace to go with it."""


class Sweep:
    """Ends at the hub what has no session in the API server any more."""

    def __init__(
        self,
        api: ClusterApi,
        hub: Hub,
        reports: Reports,
        *,
        scope: Scope,
        every: float,
    ) -> None:
        """`scope` is what is served; `every` is in seconds."""
        self._api = api
        self._hub = hub
        self._reports = reports
        self._scope = scope
        self._every = every
        self._wake = asyncio.Event()

    def soon(self) -> None:
        """A session has gone."""
        self._wake.set()

    async def run(self) -> None:
        """Sweep at the beginning, whenever a session has gone, and now and then; for ever."""
        while True:
            self._wake.clear()
            try:
                await self.once()
            except EsperError as error:
                _log.warning("what sessions have left can't be swept at the moment: %s", error)
            try:
                await asyncio.wait_for(self._wake.wait(), self._every)
                await asyncio.sleep(SETTLE_SECONDS)
            except TimeoutError:
                """It is time anyway."""

    async def once(self) -> None:
        """Sweep every namespace that the hub or the API server knows.

        The hub is asked first and the API server afterwards, and it is told when by its own clock:
        a session made in between is left alone.
        """
        known = await self._hub.namespaces()
        live: dict[str, list[str]] = {namespace: [] for namespace in known.namespaces}
        for served in self._scope.places:
            async for chunk, _ in self._api.chunks(
                SESSION, served, self._scope.selecting(SESSION), metadata_only=True
            ):
                for found in chunk:
                    meta = found["metadata"]
                    live.setdefault(meta["namespace"], []).append(meta["uid"])
        for namespace, uids in live.items():
            if not self._scope.has(namespace):
                continue  # another operator's
            swept = await self._hub.sweep(namespace, uids, known.as_of)
            if swept.ended:
                _log.info("swept", extra={"namespace": namespace, "sessions": len(swept.ended)})
        self._reports.keep_only({uid for uids in live.values() for uid in uids})
