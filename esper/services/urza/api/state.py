"""What the endpoints work with, and what keeps it in order while they do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager

from esper.configs import EsperConfig
from esper.errors import EsperError, HubUnavailable, Unavailable
from esper.services.urza.api.readiness import Readiness
from esper.services.urza.auth import Tokens
from esper.services.urza.credentials import Secrets
from esper.services.urza.database import Database
from esper.services.urza.metrics import Metrics
from esper.services.urza.redis_upkeep import RedisUpkeep
from esper.services.urza.redis_users import RedisUser, RedisUsers
from esper.services.urza.store import UrzaHub
from esper.utils.object_store import open_store

STOP_SECONDS = 5.0

_log = logging.getLogger(__name__)


class Revoked:
    """The uids of sessions whose credentials were revoked, as of the last look."""

    def __init__(self) -> None:
        self._uids: frozenset[str] = frozenset()

    def __contains__(self, uid: object) -> bool:
        return uid in self._uids

    def replace(self, uids: frozenset[str]) -> None:
        """These, and no others."""
        self._uids = uids


class Urza:
    """One hub process: its database, its store, its keys and its connection to Redis.

    Raises:
        ConfigError: `urza.signing_key` is not set, or an address can't be read.
    """

    def __init__(self, config: EsperConfig) -> None:
        self.config = config.urza
        self.revoked = Revoked()
        self.tokens = Tokens(
            config.urza.signing_key, revoked=self.revoked, admin=config.urza.admin_token
        )
        self.database = Database(config.database)
        self.store = open_store(config.storage)
        self.hub = UrzaHub(self.database, self.store)
        self.users = None if config.redis.url is None else RedisUsers(config.redis.url)
        assert config.urza.signing_key is not None  # Tokens would have refused
        self.secrets = Secrets(
            config.urza.signing_key, self.tokens, has_redis=self.users is not None
        )
        self.metrics = Metrics(self.database.statistics)
        self.opened = False
        storage = "storage.folder" if config.storage.bucket is None else "storage.bucket"
        checks: dict[str, Callable[[], Awaitable[object]]] = {
            "database.url": self.database.probe,
            storage: self.store.check,
        }
        self._redis: RedisUpkeep | None = None
        if self.users is not None:
            checks["redis.url"] = self.users.check
            self._redis = RedisUpkeep(self.hub, self.secrets, self.users)
        self._readiness = Readiness(checks)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Open everything, look after it, and close it at the end.

        A database that does not answer yet is waited for, in the background.

        Raises:
            ConfigError: the database refuses what the settings say.
            StorageFull: no room is left.
        """
        try:
            with contextlib.suppress(Unavailable):
                await self._open()
            stopping = asyncio.Event()
            upkeep = asyncio.create_task(self._upkeep(stopping), name="urza-upkeep")
            try:
                yield
            finally:
                # A look that has begun ends by itself: a connection is not broken off within.
                stopping.set()
                await asyncio.wait({upkeep}, timeout=STOP_SECONDS)
                upkeep.cancel()
                await asyncio.wait({upkeep}, timeout=STOP_SECONDS)
                await self._readiness.close()
        finally:
            if self.users is not None:
                await self.users.close()
            await self.store.close()
            await self.database.close()

    def require_open(self) -> None:
        """Refuse to work before the database was opened.

        Raises:
            HubUnavailable: it was not.
        """
        if not self.opened:
            raise HubUnavailable("Urza is starting: its database does not answer (database.url)")

    async def problems(self) -> dict[str, str]:
        """What does not answer as it must, by the setting that it depends on."""
        problems = await self._readiness.problems()
        if not self.opened:
            problems.setdefault("database.url", "Urza's tables are not ready yet")
        return problems

    async def give_user(self, user: RedisUser) -> bool:
        """Set this user in Redis, where there is one; False if its row was revoked meanwhile."""
        return self._redis is None or await self._redis.give(user)

    async def remove_sessions(self, namespace: str, uids: Iterable[str]) -> None:
        """Remove these sessions' users and streams from Redis, where there is one."""
        if self.users is not None:
            await self.users.remove_sessions(namespace, frozenset(uids))

    async def refresh_revoked(self) -> None:
        """Learn which sessions were revoked, by this process or another."""
        rows = await self.hub.list_credentials(revoked=True)
        self.revoked.replace(frozenset(row.uid for row in rows))

    async def _open(self) -> None:
        await self.database.open()
        await self.refresh_revoked()
        self.opened = True

    async def _upkeep(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            try:
                if self.opened:
                    await self.refresh_revoked()
                    if self._redis is not None and (count := await self._redis.look()):
                        _log.info("%d users set in Redis", count)
                else:
                    await self._open()
            except EsperError as error:
                _log.warning("urza's upkeep will be tried again: %s", error)
            except Exception:
                _log.exception("urza's upkeep")
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.config.upkeep_seconds):
                    await stopping.wait()
