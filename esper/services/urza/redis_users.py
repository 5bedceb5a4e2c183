"""Redis users for sessions and namespaces: what each may do, and nothing else.

A session's user reaches the streams of its own session, `esper:<namespace>:<uid>:*`; the user of a
namespace, its Tamiyo's, those of all sessions in it; the operator's, some of all namespaces. None
may list keys of others by pattern, run scripts or change settings; those of more than one session
may scan, because they have to find new ones.
From Redis 7 on reading and writing are told apart too: each user adds to the streams of the topics
that it publishes, and reads, as a group does, those that it receives.
Redis keeps users in memory: they are set again whenever it has been started anew. One that has an
ACL file saves them, too, so that who works goes on at once after such a start.
"""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from esper.configs import without_password
from esper.contracts.messages import TopicNames
from esper.errors import BusUnavailable, ConfigError, one_line

# Who adds to a stream also trims what all groups of it have dealt with; it reads no message.
_ADDING = ("xadd", "xinfo|groups", "xlen", "xpending", "xtrim")
# What a group does; of these XREADGROUP and XPENDING read, and the rest change the group's state.
_RECEIVING = (
    "xack",
    "xautoclaim",
    "xclaim",
    "xgroup|create",
    "xlen",
    "xpending",
    "xrange",
    "xreadgroup",
    "xrevrange",
)
# Redis 6 can't tell streams apart by what is done to them: one list for all that a user reaches.
_STREAM_COMMANDS = tuple(sorted({*_ADDING, *_RECEIVING, "xgroup", "xinfo"}))
# A client finds out what it may do on a stream that is none.
_CHECK = ("check",)
_CONNECTION_COMMANDS = ("ping", "client|setname", "client|id", "multi", "exec", "discard")
_SELECTORS_SINCE = 7
OPERATOR_USER = "esper-operator"
_NOBODY = "esper-nobody"  # no session's name, nor a namespace's
_SCANNED = 1000
_NO_FILE = "not configured to use an ACL file"


@dataclass(frozen=True)
class RedisUser:
    """A user of Redis: its name, its password, and the streams that it reaches.

    Args:
        name: unique in Redis.
        password: kept as its SHA-256 alone.
        streams: what the keys of its streams begin with, as a pattern: ``esper:team:uid``.
        publishes: the topics that it adds to.
        receives: the topics that it reads; what it can't read goes to their dead letters.
        scans: whether it may look for keys.
    """

    name: str
    password: str = field(repr=False)
    streams: str
    publishes: tuple[TopicNames, ...] = ()
    receives: tuple[TopicNames, ...] = ()
    scans: bool = False

    def rules(self, release: int) -> list[str]:
        """What ACL SETUSER of a Redis of that major release takes."""
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        rules = ["reset", "on", f"#{digest}", "resetchannels", "-@all"]
        rules += _may((*_CONNECTION_COMMANDS, *(("scan",) if self.scans else ())))
        if release < _SELECTORS_SINCE:
            return [*rules, f"~{self.streams}:*", *_may(_STREAM_COMMANDS)]
        added = [*self.publishes, *(f"{topic}:dead" for topic in self.receives)]
        # A selector allows its commands on its keys and nothing on others.
        if added:
            rules.append(_selector("%RW~", self.streams, added, _ADDING))
        if self.receives:
            rules.append(_selector("%RW~", self.streams, self.receives, _RECEIVING))
        rules.append(_selector("%RW~", self.streams, _CHECK, _STREAM_COMMANDS))
        return rules


def _may(commands: Iterable[str]) -> list[str]:
    return [f"+{command}" for command in commands]


def _selector(access: str, streams: str, topics: Iterable[str], commands: Iterable[str]) -> str:
    keys = [f"{access}{streams}:{topic}" for topic in topics]
    return f"({' '.join(['-@all', *_may(commands), *keys])})"


def session_user(namespace: str, uid: str) -> str:
    """The name of a session's user."""
    return f"esper-session:{namespace}:{uid}"


def namespace_user(namespace: str) -> str:
    """The name of a namespace's user."""
    return f"esper-namespace:{namespace}"


class RedisUsers:
    """Makes and removes users, as the user that `redis.url` names.

    Every method raises BusUnavailable where Redis does not answer, and ConfigError where it
    refuses the user or the password of `redis.url`.

    Raises:
        ConfigError: the URL can't be read.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 5.0) -> None:
        self._url = without_password(url)
        self._unsaved = False
        try:
            self._redis = Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                decode_responses=True,
                max_connections=4,
                # Whoever asks tries again: an endpoint's caller, or the next look after upkeep.
                retry=Retry(NoBackoff(), 0),
            )
            # What the driver makes of the options, it says only to who makes a connection.
            pool = self._redis.connection_pool
            pool.connection_class(**pool.connection_kwargs)
        except (ValueError, TypeError, RedisError):  # the text may hold a part of the password
            raise ConfigError("redis.url", self._url, "a Redis URL") from None
        # redis-py gives it no type.
        self._command = cast("Callable[..., Awaitable[Any]]", self._redis.execute_command)

    async def apply(self, users: Iterable[RedisUser]) -> None:
        """Make the users, or set those that are there to what they should be."""
        anew = list(users)
        if not anew:
            return
        async with self._translated():
            release = int(str((await self._server())["redis_version"]).partition(".")[0])
            for user in anew:
                await self._command("ACL", "SETUSER", user.name, *user.rules(release))
                self._unsaved = True

    async def remove(self, names: Collection[str]) -> None:
        """Remove these users; one that is not there passes."""
        if names:
            async with self._translated():
                if await self._command("ACL", "DELUSER", *names):
                    self._unsaved = True

    async def save(self) -> bool:
        """Have Redis write the users to its ACL file if they have changed; False if it has none."""
        if not self._unsaved:
            return True
        self._unsaved = False
        try:
            async with self._translated():
                await self._command("ACL", "SAVE")
        except BusUnavailable as error:
            if isinstance(error.__cause__, ResponseError) and _NO_FILE in str(error.__cause__):
                return False
            self._unsaved = True
            raise
        return True

    async def remove_sessions(self, namespace: str, uids: Collection[str]) -> None:
        """Remove sessions' users with every stream of theirs; one that is not there passes."""
        if not uids:
            return
        await self.remove([session_user(namespace, uid) for uid in uids])
        async with self._translated():
            async for key in self._redis.scan_iter(match=f"esper:{namespace}:*", count=_SCANNED):
                if key.split(":")[2] in uids:
                    await self._redis.unlink(key)

    async def check(self) -> None:
        """Return if Redis lets users be made and removed: it is asked to remove one that is none.

        INFO is also answered to who may not.
        """
        await self.run()
        await self.remove([_NOBODY])

    async def run(self) -> str:
        """What tells one start of Redis from the next."""
        async with self._translated():
            return str((await self._server())["run_id"])

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

    async def _server(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._redis.info("server")
        return found

    @asynccontextmanager
    async def _translated(self) -> AsyncIterator[None]:
        try:
            yield
        except (AuthenticationError, NoPermissionError) as error:
            raise ConfigError(
                "redis.url", self._url, "a user with its password that may use ACL and INFO"
            ) from error
        except ResponseError as error:
            # Of a command, a message of Redis quotes names at most; rules hold no password.
            raise BusUnavailable(f"Redis at {self._url} refuses: {one_line(str(error))}") from error
        except (RedisError, OSError) as error:
            # The connections that wait for use ended with this one; each would fail once more.
            await self._redis.connection_pool.disconnect(inuse_connections=False)
            reason = one_line(f"{type(error).__name__}: {error}")
            raise BusUnavailable(
                f"Redis at {self._url} does not answer: {reason}; see redis.url"
            ) from error
