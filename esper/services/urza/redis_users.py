"""Redis users for sessions and namespaces: what each may do, and nothing else.

A session's user reaches the streams of its own session, `esper:<namespace>:<uid>:*`; the user of a
namespace, its Tamiyo's, those of all sessions in it. Neither may list keys of others by pattern,
run scripts or change settings; a namespace's user may scan, because it has to find new sessions.
Redis keeps users in memory: they are set again whenever it has been started anew.
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
from esper.errors import BusUnavailable, ConfigError, one_line

_STREAM_COMMANDS = (
    "xadd",
    "xack",
    "xautoclaim",
    "xclaim",
    "xgroup",
    "xinfo",
    "xlen",
    "xpending",
    "xrange",
    "xreadgroup",
    "xrevrange",
    "xtrim",
)
_CONNECTION_COMMANDS = ("ping", "client|setname", "client|id", "multi", "exec", "discard")
_SCANNED = 1000


@dataclass(frozen=True)
class RedisUser:
    """A user of Redis: its name, its password, and the pattern of the keys that it reaches."""

    name: str
    password: str = field(repr=False)
    keys: str
    scans: bool = False

    def rules(self) -> list[str]:
        """What ACL SETUSER takes; the password as its SHA-256 alone."""
        commands = (*_STREAM_COMMANDS, *_CONNECTION_COMMANDS, *(("scan",) if self.scans else ()))
        digest = hashlib.sha256(self.password.encode()).hexdigest()
        allowed = [f"+{command}" for command in commands]
        return ["reset", "on", f"#{digest}", "resetchannels", f"~{self.keys}", "-@all", *allowed]


def session_user(namespace: str, uid: str) -> str:
    """The name of a session's user."""
    return f"esper-session:{namespace}:{uid}"


class RedisUsers:
    """Makes and removes users, as the user that `redis.url` names.

    Every method raises BusUnavailable where Redis does not answer, and ConfigError where it
    refuses the user or the password of `redis.url`.

    Raises:
        ConfigError: the URL can't be read.
    """

    def __init__(self, url: str, *, timeout_seconds: float = 5.0) -> None:
        self._url = without_password(url)
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
        except ValueError:  # its text may hold a part of the password
            raise ConfigError("redis.url", self._url, "a Redis URL") from None
        # redis-py gives it no type.
        self._command = cast("Callable[..., Awaitable[Any]]", self._redis.execute_command)

    async def apply(self, users: Iterable[RedisUser]) -> None:
        """Make the users, or set those that are there to what they should be."""
        async with self._translated():
            for user in users:
                await self._command("ACL", "SETUSER", user.name, *user.rules())

    async def remove_sessions(self, namespace: str, uids: Collection[str]) -> None:
        """Remove sessions' users with every stream of theirs; one that is not there passes."""
        if not uids:
            return
        async with self._translated():
            await self._command("ACL", "DELUSER", *(session_user(namespace, uid) for uid in uids))
            async for key in self._redis.scan_iter(match=f"esper:{namespace}:*", count=_SCANNED):
                if key.split(":")[2] in uids:
                    await self._redis.unlink(key)

    async def run(self) -> str:
        """What tells one start of Redis from the next."""
        async with self._translated():
            found = await self._redis.info("server")
        return str(found["run_id"])

    async def close(self) -> None:
        """Close every connection."""
        await self._redis.aclose()

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
            reason = one_line(f"{type(error).__name__}: {error}")
            raise BusUnavailable(
                f"Redis at {self._url} does not answer: {reason}; see redis.url"
            ) from error
