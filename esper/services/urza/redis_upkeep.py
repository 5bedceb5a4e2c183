"""Has the users in Redis be those that the hub's rows say, whatever changes meanwhile.

Rows and users lie in two places that no transaction spans. So whoever has set or removed a user
looks at the rows again, and goes on until nothing has changed: what was set late, for credentials
that were revoked meanwhile, is removed by whoever set it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime

from esper.contracts.base import utc_now
from esper.errors import BusUnavailable, ConfigError
from esper.services.urza.credentials import Secrets
from esper.services.urza.redis_users import (
    OPERATOR_USER,
    RedisUser,
    RedisUsers,
    namespace_user,
    session_user,
)
from esper.services.urza.store import UrzaHub

_Makers = dict[str, Callable[[], RedisUser]]


class RedisUpkeep:
    """Sets and removes the Redis users of sessions and namespaces, and sets the operator's.

    Every method raises BusUnavailable where Redis does not answer, ConfigError where it refuses
    the user or the password of `redis.url`, and HubUnavailable where the database does not answer.

    Args:
        hub: keeps the rows.
        secrets: makes a row's user.
        users: Redis, as the user that may make users.
        clock: the time now, in UTC.
    """

    def __init__(
        self,
        hub: UrzaHub,
        secrets: Secrets,
        users: RedisUsers,
        *,
        clock: Callable[[], datetime] = utc_now,
    ) -> None:
        self._hub = hub
        self._secrets = secrets
        self._users = users
        self._clock = clock
        self._run: str | None = None

    async def give(self, user: RedisUser) -> bool:
        """Set that user; False where its row was revoked or deleted meanwhile, and it is gone."""
        await self._users.apply([user])
        done = {user.name: True}
        await self._settle(done)
        return done[user.name]

    async def look(self) -> int:
        """Remove the users of revoked and expired rows; returns how many users were set.

        All are set again once Redis was started anew, or was away. What has changed since the last
        look is saved, where Redis has a file for users: once a look, for it writes all of them.
        """
        try:
            run = await self._users.run()
            live, gone = await self._rows()
            anew = live if run != self._run else {}
            await self._users.apply(make() for make in anew.values())
            await self._users.remove(gone)
            done = dict.fromkeys(anew, True) | dict.fromkeys(gone, False)
            if done:
                await self._settle(done)
            await self._users.save()
            await self._hub.forget_namespaces(self._clock())
            self._run = run
        except (BusUnavailable, ConfigError):
            self._run = None
            raise
        return len(anew)

    async def _settle(self, done: dict[str, bool]) -> None:
        """Until the rows agree with it, do what they say; `done` has each name, and if it is set.

        A live row's user that others set is none of this call's business.
        """
        while True:
            live, _ = await self._rows()
            late = {name for name, there in done.items() if not there and name in live}
            lost = {name for name, there in done.items() if there and name not in live}
            if not late and not lost:
                return
            await self._users.remove(lost)
            await self._users.apply(live[name]() for name in sorted(late))
            done.update(dict.fromkeys(late, True) | dict.fromkeys(lost, False))

    async def _rows(self) -> tuple[_Makers, Collection[str]]:
        """What makes each user that is to be there, by its name; and the names of those that go."""
        now = self._clock()
        # The operator's has no row: it is there for as long as the hub is.
        live: _Makers = {OPERATOR_USER: self._secrets.operator_user}
        gone = []
        for row in await self._hub.list_credentials():
            name = session_user(row.namespace, row.uid)
            if row.revoked or row.expires_at <= now:
                gone.append(name)
            else:
                live[name] = lambda row=row: self._secrets.session_user(row)  # type: ignore[misc]
        for given in await self._hub.list_namespaces():
            name = namespace_user(given.namespace)
            if given.expires_at <= now:
                gone.append(name)
            else:
                live[name] = lambda at=given.namespace: self._secrets.namespace_user(at)  # type: ignore[misc]
        return live, gone
