"""What the operator does while it holds the lease.

The store is filled before anything is decided: a child that is not known yet would be taken for
one that is missing. Then every object is looked at once, and from then on whatever changes.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable
from typing import Any
from urllib.parse import quote

from esper.configs import EsperConfig, OperatorConfig, RedisConfig
from esper.errors import ConfigError, EsperError
from esper.services.oona_client import OonaClient
from esper.services.urza.http_client import HttpUrza
from esper_operator import watching
from esper_operator.api import ClusterApi, Object
from esper_operator.carrying import Carrier
from esper_operator.children import blueprint
from esper_operator.errors import ApiConflict, ApiRefused, ApiUnavailable
from esper_operator.health import STUCK_SECONDS, OperatorHealth
from esper_operator.hearing import Reports
from esper_operator.kinds import (
    BLUEPRINT,
    BY_METADATA,
    EVENT,
    OWN,
    SESSION,
    WATCHED,
    Kind,
)
from esper_operator.lease import Election, lasting_clock
from esper_operator.metadata_watch import MetadataWatch
from esper_operator.metrics import OperatorMetrics
from esper_operator.options import Options, pairs_of
from esper_operator.reconciling import Reconciler, work
from esper_operator.resync import Resync
from esper_operator.scope import Scope
from esper_operator.store import NAMESPACE, Store
from esper_operator.sweeping import Sweep
from esper_operator.views import Said, SessionView
from esper_operator.work import Key, WorkQueue
from esper_operator.writing import Writer

SHOW_SECONDS = 2.0
NO_PODS = "reason=FailedCreate,involvedObject.kind=Job"
SHARED_SECONDS = 1.0
RETRY_SECONDS = 1.0
CATALOGUE_SECONDS = 5.0
"""Until the catalogue is tried again, where the API server did not take it."""
_log = logging.getLogger(__name__)


class Leader:
    """Watches, decides and writes, from `lead` to its cancellation."""

    def __init__(
        self,
        config: EsperConfig,
        api: ClusterApi,
        election: Election,
        metrics: OperatorMetrics,
        health: OperatorHealth,
    ) -> None:
        """`election` holds the lease while `lead` runs."""
        settings = config.operator
        self._config = config
        self._api = api
        self._metrics = metrics
        self._health = health
        self._scope = Scope.of(settings)
        self._stopped = False
        self._store = Store()
        self._queue = WorkQueue()

        def remaining() -> float:
            return 0.0 if self._stopped else election.remaining()

        self._writer = Writer(
            api,
            remaining,
            metrics,
            seconds=settings.write_seconds,
            background_rate=settings.seed_writes_per_second,
        )
        hub = HttpUrza(config.hub)
        self._hub = hub
        self._reports = Reports(self._concerned)
        self._reconciler = Reconciler(
            self._store,
            Carrier(self._writer, self._store, self._enqueue, time.time),
            self._reports,
            hub,
            options_of(config),
            self._enqueue,
        )
        self._sweep = Sweep(
            api,
            hub,
            self._reports,
            scope=self._scope,
            every=settings.sweep_seconds,
        )
        self._resync = Resync(
            api,
            self._store,
            self._enqueue,
            scope=self._scope,
            every=settings.resync_seconds,
            clock=lasting_clock,
        )

    def stop_writing(self) -> None:
        """Refuse every write from now on."""
        self._stopped = True

    async def lead(self, keep_signals: Callable[[], None]) -> None:
        """Watch, decide and write until cancelled; kopf must not take the process's signals.

        Raises:
            ApiUnavailable: kopf has ended by itself.
        """
        async with self._hub:
            await self._lead(keep_signals)

    async def _lead(self, keep_signals: Callable[[], None]) -> None:
        await self._fill()
        for key in self._store.everything():
            self._queue.add(key)
        for kind in (*WATCHED, *BY_METADATA):
            self._resync.soon(kind)  # what went between these lists and the watches
        lasting: list[Coroutine[Any, Any, object]] = [
            *(self._work() for _ in range(self._config.operator.workers)),
            *(
                MetadataWatch(
                    self._api, kind, namespace, self._hear, within=self._scope.fields
                ).run()
                for kind in BY_METADATA
                for namespace in self._scope.places
            ),
            *(
                MetadataWatch(
                    self._api,
                    EVENT,
                    namespace,
                    self._hear_refusal,
                    fields=NO_PODS,
                    within=self._scope.fields,
                ).run()
                for namespace in self._scope.places
            ),
            self._resync.run(),
            self._reports.run(self._bus, self._uids, group_of(self._config.operator)),
            self._sweep.run(),
            self._show(),
            self._keep_catalogue(),
            self._watch(keep_signals),
        ]
        await _until_one_ends(lasting)

    async def _fill(self) -> None:
        """Take everything there is into the store; tried until it has all been had."""
        said = ""
        while True:
            try:
                for kind in (*WATCHED, *BY_METADATA):
                    for namespace in self._scope.places:
                        await self._list(kind, namespace)
            except (ApiUnavailable, ApiRefused) as error:
                if str(error) != said:
                    _log.warning("the store can't be filled: %s", error)
                said = str(error)
                self._health.report("operator", f"operator: the store can't be filled: {error}")
                await asyncio.sleep(RETRY_SECONDS)
            else:
                self._health.report("operator", None)
                return

    async def _list(self, kind: Kind, namespace: str | None) -> None:
        chunks = self._api.chunks(
            kind, namespace, self._scope.selecting(kind), metadata_only=kind in BY_METADATA
        )
        async for chunk, _ in chunks:
            for found in chunk:
                self._store.put(kind, found)

    def _hear(self, kind: Kind, event: str | None, found: Object) -> None:
        if event == "DELETED":
            self._enqueue(self._store.drop(kind, found))
            if kind is SESSION:
                self._sweep.soon()
            return
        if event is None:
            self._resync.soon(kind)
        keys = self._store.put(kind, found)
        meta = found["metadata"]
        own = Key(kind.name, meta["namespace"], meta["name"]) if kind in OWN else None
        self._enqueue(keys, own)

    def _hear_refusal(self, kind: Kind, event: str | None, found: Object) -> None:
        """The Job controller tells that it can make no pods of a Job."""
        if event != "DELETED":  # which it is by its age
            about = found["involvedObject"]
            said = Said(str(found["reason"]), str(found.get("message", "")))
            self._enqueue(self._store.refuse_pods(about["namespace"], about["name"], said))

    def _enqueue(self, keys: Iterable[Key], own: Key | None = None) -> None:
        """Have the keys looked at; `own` is that of an object that somebody has changed."""
        for key in keys:
            if key.kind == NAMESPACE:
                # It looks at all sessions of the namespace: after the first of many events, once.
                self._queue.add_within(key, SHARED_SECONDS)
            else:
                self._queue.add(key, anew=key == own)

    def _concerned(self, uid: str) -> None:
        """Something was heard of the session of that uid."""
        session = self._store.session_of_uid(uid)
        if session is not None:
            self._queue.add(Key(SESSION.name, session.namespace, session.name))

    def _uids(self) -> list[tuple[str, str]]:
        return [(session.namespace, session.uid) for session in self._store.sessions()]

    async def _bus(self) -> OonaClient:
        """The bus over all namespaces, with the user that the hub gives the operator.

        Raises:
            HubUnavailable: it can't be asked for the user.
            ConfigError: `redis.url` is missing.
        """
        issued = await self._hub.operator_credentials()
        config = with_user(self._config.redis, issued.redis_username, issued.redis_password)
        return OonaClient(config, scope=None, everywhere=True)

    async def _work(self) -> None:
        await work(self._queue, self._reconciler.reconcile, self._metrics)

    async def _watch(self, keep_signals: Callable[[], None]) -> None:
        configuration = self._api.configuration
        registry = watching.registry_of(self._hear, lambda: watching.connection_info(configuration))
        settings = watching.settings_of(fields=self._scope.fields)
        await watching.watch(registry, settings, self._scope.served, keep_signals)
        raise ApiUnavailable("the watches have ended")

    async def _keep_catalogue(self) -> None:
        """Make what is missing of the catalogue, at the start and with every resync.

        A Blueprint never changes, and one of such a name that people made is theirs.
        """
        settings = self._config.operator
        namespaces = tuple(filter(None, settings.catalogue.split(",")))
        while True:
            wait = settings.resync_seconds
            for namespace in namespaces:
                if not await self._has_catalogue(namespace):
                    wait = min(wait, CATALOGUE_SECONDS)
            await asyncio.sleep(wait)

    async def _has_catalogue(self, namespace: str) -> bool:
        """Make what a namespace lacks of the catalogue; False: it has to be tried again."""
        for manifest in blueprint.catalogue(namespace):
            if self._store.blueprint(namespace, manifest["metadata"]["name"]):
                continue
            try:
                self._enqueue(self._store.put(BLUEPRINT, await self._writer.apply(manifest)))
            except ApiConflict:
                continue  # it is there, and whoever made it keeps it
            except EsperError as error:
                _log.warning("the catalogue is tried again: %s", error)
                return False
        return True

    async def _show(self) -> None:
        """Judge the work and show the numbers, every few seconds."""
        states = States()
        while True:
            busy = self._queue.busy()
            self._metrics.show_queue(self._queue.depth(), self._queue.delayed(), len(busy))
            self._metrics.show_watches(self._resync.ages())
            self._metrics.show_sessions(states.of(self._store.sessions()))
            stuck = [key for key, since in busy.items() if since > STUCK_SECONDS]
            complaint = self._resync.complaint()
            if stuck:
                complaint = f"{'/'.join(stuck[0])} is worked on without an end"
            elif self._queue.oldest() > STUCK_SECONDS:
                complaint = f"nothing was taken up for {STUCK_SECONDS:g} s"
            self._health.fault(complaint)
            await asyncio.sleep(SHOW_SECONDS)


async def _until_one_ends(lasting: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Run all of them at once, until one ends or breaks off, which none is to do."""
    tasks = [asyncio.create_task(what) for what in lasting]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class States:
    """How many sessions there are for each reason of their condition Succeeded.

    Statuses that have not changed are not read again.
    """

    def __init__(self) -> None:
        self._read: dict[str, tuple[bytes, str]] = {}

    def of(self, sessions: Iterable[SessionView]) -> dict[str, int]:
        """The numbers now."""
        before, self._read = self._read, {}
        for session in sessions:
            known = before.get(session.uid)
            if known is None or known[0] is not session.status_text:
                known = (session.status_text, _reason_of(session))
            self._read[session.uid] = known
        return dict(Counter(reason for _, reason in self._read.values()))


def _reason_of(session: SessionView) -> str:
    conditions = session.status().get("conditions", ())
    reasons = (item["reason"] for item in conditions if item["type"] == "Succeeded")
    return next(reasons, "New")


def group_of(settings: OperatorConfig) -> str:
    """Those who share a lease share what is said on the bus.

    Operators of other namespaces have another lease, and hear all for themselves.
    """
    return f"operator:{settings.lease_namespace}:{settings.lease_name}"


def options_of(config: EsperConfig) -> Options:
    """What the decisions take from the settings.

    Raises:
        ConfigError: no hub or no bus is set, and without them no session can train.
    """
    for name, url in (("hub.url", config.hub.url), ("redis.url", config.redis.url)):
        if url is None:
            raise ConfigError(name, "nothing", "the address that the pods of sessions reach it at")
    settings = config.operator
    return Options(
        image=settings.image,
        image_pull_policy=settings.image_pull_policy,
        image_pull_secrets=tuple(filter(None, settings.image_pull_secrets.split(","))),
        hub_url=config.hub.url or "",
        redis_url=without_user(config.redis.url or ""),
        grace_seconds=settings.stop_seconds,
        compile_deadline_seconds=settings.compile_seconds,
        compile_attempts=settings.compile_attempts,
        compile_ttl_seconds=settings.compile_ttl_seconds,
        compile_requests=pairs_of(settings.compile_requests),
        compile_limits=pairs_of(settings.compile_limits),
        tamiyo_requests=pairs_of(settings.tamiyo_requests),
        tamiyo_limits=pairs_of(settings.tamiyo_limits),
        shared_memory=settings.shared_memory,
        kernels_per_session=settings.kernels_per_session,
        blueprints_per_session=settings.blueprints_per_session,
        own_namespace=settings.lease_namespace,
        own_secrets=tuple(filter(None, settings.reserved_secrets.split(","))),
        own_claims=tuple(filter(None, settings.reserved_claims.split(","))),
        pod_labels=pairs_of(settings.pod_labels),
        worker_egress=settings.worker_egress,
        log_level=config.component.log_level,
    )


def with_user(config: RedisConfig, user: str | None, password: str | None) -> RedisConfig:
    """The bus with a user of its own; one that `redis.url` names already stays."""
    scheme, sign, place = (config.url or "").partition("://")
    if user is None or password is None or "@" in place or not sign:
        return config
    return config.model_copy(update={"url": f"{scheme}://{quote(user)}:{quote(password)}@{place}"})


def without_user(url: str) -> str:
    """`url` for others, without the user and the password of this process."""
    scheme, sign, place = url.partition("://")
    return f"{scheme}{sign}{place.rpartition('@')[2]}"
