"""kopf as the source of events, and of nothing else.

Each event goes into the store, and what it concerns into the queue. The handlers write nothing and
keep nothing: kopf then adds no annotation, no finalizer and makes no write of its own. So that this
holds whatever kopf does, what it would remember objects by is switched off too.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any

import kopf
from kubernetes.aio.client import Configuration

from esper_operator.kinds import MANAGED_BY, OWN, WATCHED, Kind

Object = Mapping[str, Any]
Hear = Callable[[Kind, str | None, Object], None]
"""Takes a kind, the event's type (None: from a list) and the object."""

SERVER_SECONDS = 600
"""After which the API server ends a watch, and kopf begins a new one."""
REQUEST_SECONDS = 15.0
CONNECT_SECONDS = 5.0
SILENCE_SECONDS = 70.0
"""Bookmarks come every minute: a watch that is silent for longer has lost its server."""
CHUNK = 500


class Unremembering(kopf.DiffBaseStorage):
    """Remembers no object: nothing here asks kopf what has changed."""

    def build(self, *, body: kopf.Body, extra_fields: object = None) -> Any:
        """Nothing to be compared."""
        return {}

    def fetch(self, *, body: kopf.Body) -> None:
        """Nothing is remembered."""

    def store(self, *, body: kopf.Body, patch: kopf.Patch, essence: object) -> None:
        """Remember nothing."""


def settings_of(kinds: Collection[Kind] = WATCHED, *, fields: str = "") -> kopf.OperatorSettings:
    """How kopf watches: bounded, in chunks, and only what is ours and passes a field selector."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.queueing.idle_timeout = 0.05
    settings.queueing.exit_timeout = 0.5
    settings.networking.request_timeout = REQUEST_SECONDS
    settings.networking.connect_timeout = CONNECT_SECONDS
    settings.watching.server_timeout = SERVER_SECONDS
    settings.watching.connect_timeout = CONNECT_SECONDS
    settings.watching.inactivity_timeout = SILENCE_SECONDS
    settings.watching.chunk_size = CHUNK
    settings.persistence.diffbase_storage = Unremembering()
    for kind in kinds:
        version = kind.api_version.rpartition("/")[2]
        if kind not in OWN:
            settings.watching.label_selectors[kind.group, version, kind.plural] = MANAGED_BY
        if fields:
            settings.watching.field_selectors[kind.group, version, kind.plural] = fields
    return settings


def registry_of(
    hear: Hear,
    login: Callable[[], Awaitable[kopf.ConnectionInfo]],
    kinds: Collection[Kind] = WATCHED,
) -> kopf.OperatorRegistry:
    """Handlers that hand every event of `kinds` to `hear`."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        return await login()

    for kind in kinds:
        _listen(registry, kind, hear)
    return registry


def _listen(registry: kopf.OperatorRegistry, kind: Kind, hear: Hear) -> None:
    version = kind.api_version.rpartition("/")[2]

    @kopf.on.event(kind.group, version, kind.plural, registry=registry, id=kind.plural)
    async def heard(event: Object, **_: Any) -> None:
        hear(kind, event["type"], event["object"])


async def connection_info(configuration: Configuration) -> kopf.ConnectionInfo:
    """The connection of `configuration` as kopf has it; read anew, since tokens are renewed."""
    authorization = (await configuration.auth_settings()).get("BearerToken", {}).get("value")
    scheme, _, token = (authorization or "").partition(" ")
    return kopf.ConnectionInfo(
        server=configuration.host,
        ca_path=configuration.ssl_ca_cert,
        insecure=not configuration.verify_ssl,
        certificate_path=configuration.cert_file,
        private_key_path=configuration.key_file,
        scheme=scheme.title() or None,
        token=token or None,
    )


async def watch(
    registry: kopf.OperatorRegistry,
    settings: kopf.OperatorSettings,
    namespaces: Collection[str],
    keep_signals: Callable[[], None],
) -> None:
    """Watch until cancelled, or until kopf ends; without `namespaces` the whole cluster.

    kopf takes the process's signals when it begins; `keep_signals` takes them back.
    """
    others = asyncio.all_tasks()
    tasks = await kopf.spawn_tasks(
        registry=registry,
        settings=settings,
        standalone=True,
        clusterwide=not namespaces,
        namespaces=list(namespaces),
    )
    keep_signals()
    with contextlib.suppress(asyncio.CancelledError):
        await kopf.run_tasks(tasks, ignored=others)
