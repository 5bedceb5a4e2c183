"""A watch of metadata alone, for kinds of which contents are none of the operator's business.

Secrets stay where they are, and the many Seeds cost a few hundred bytes each. The same watch hears,
whole, what the cluster tells of Jobs that can make no pods.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from esper_operator.api import ClusterApi
from esper_operator.errors import ApiRefused, ApiUnavailable
from esper_operator.kinds import EVENT, MANAGED_BY, Kind

Object = Mapping[str, Any]
Hear = Callable[[Kind, str | None, Object], None]

SERVER_SECONDS = 600
EVENT_SECONDS = 60
"""Of Events the API server keeps no cache, so that no bookmark comes: such a watch is ended before
its silence would pass for the loss of its server."""
RETRY_SECONDS = 1.0
_log = logging.getLogger(__name__)


class MetadataWatch:
    """Watches one kind, in one namespace or in all, and hands what it hears on."""

    def __init__(
        self,
        api: ClusterApi,
        kind: Kind,
        namespace: str | None,
        hear: Hear,
        *,
        fields: str | None = None,
        within: str = "",
    ) -> None:
        """`hear` gets the kind, the event's type (None: from a list) and the object.

        Without `fields` it is about metadata of what the operator has made; with them about whole
        objects, of anybody's, whose fields are as they say. `within` are further ones.
        """
        self._query = {"labelSelector": MANAGED_BY} if fields is None else {}
        if asked := ",".join(filter(None, (fields, within))):
            self._query["fieldSelector"] = asked
        self._metadata_only = fields is None
        self._seconds = SERVER_SECONDS if kind is not EVENT else EVENT_SECONDS
        self._api = api
        self._kind = kind
        self._namespace = namespace
        self._hear = hear
        self._version: str | None = None

    async def run(self) -> None:
        """Watch for ever; what can't be heard at the moment is tried again."""
        while True:
            try:
                await self._watch()
            except (ApiUnavailable, ApiRefused) as error:
                if isinstance(error, ApiRefused):
                    self._version = None
                _log.info("the watch of %s begins anew: %s", self._kind.plural, error)
                await asyncio.sleep(RETRY_SECONDS)

    async def _watch(self) -> None:
        if self._version is None:
            async for chunk, version in self._api.chunks(
                self._kind, self._namespace, self._query, metadata_only=self._metadata_only
            ):
                for found in chunk:
                    self._hear(self._kind, None, found)
                self._version = version
        assert self._version is not None, "a list has at least one chunk"
        query = {**self._query, "timeoutSeconds": str(self._seconds)}
        async with self._api.watching(
            self._kind, self._namespace, self._version, query, metadata_only=self._metadata_only
        ) as events:
            async for event in events:
                self._take(event)

    def _take(self, event: Object) -> None:
        kind, found = event["type"], event["object"]
        if kind == "ERROR":
            code = int(found.get("code", 0))
            raise ApiRefused("watch", code, str(found.get("reason")), str(found.get("message")))
        self._version = found["metadata"]["resourceVersion"]
        if kind != "BOOKMARK":
            self._hear(self._kind, kind, found)
