"""Connections to Redis: commands out, answers in, Redis' errors translated into Esper's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from redis.asyncio.connection import BlockingConnectionPool, Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import (
    AuthenticationError,
    AuthorizationError,
    NoPermissionError,
    RedisError,
    ResponseError,
)

from esper.configs import RedisConfig, without_password
from esper.errors import BusUnavailable, ConfigError, EsperError, one_line
from esper.services.oona.streams import packed

T = TypeVar("T")

Reply = object
"""Bytes, an integer, None, a list of these, or Redis' refusal of one command."""

A_REDIS_URL = (
    "redis://[USER:PASSWORD@]HOST[:PORT][/DATABASE][?OPTION=VALUE], special characters of the"
    " password written as %XX"
)

_REFUSED = (AuthenticationError, AuthorizationError, NoPermissionError)
_LASTING = (
    "WRONGTYPE",
    "unknown command",
    "wrong number of arguments",
    "syntax error",
    "Protocol error",
    "string exceeds maximum allowed size",
    "value is not an integer",
    "Invalid stream ID",
)
"""How refusals begin that are about the command itself. Any other, one that nobody has thought of
too, is about the state that Redis is in, and is waited out: nothing that matters is given up."""


@dataclass
class Access:
    """Whether Redis has let this process in, on any connection of one client."""

    granted: bool = False


class RedisConnections:
    """A pool of connections to the Redis of `redis.url`, for one event loop.

    Every error of the pool is BusUnavailable, or ConfigError where Redis refuses user or password
    and has never let this process in. Once it has, a refusal may pass: a Redis that is started anew
    knows its users only when the hub has told it.

    Raises:
        ConfigError: `redis.url` is missing or can't be read.
    """

    def __init__(
        self, config: RedisConfig, *, size: int | None = None, access: Access | None = None
    ) -> None:
        """`size` is how many connections may be open at once; None means `redis.pool_size`."""
        if config.url is None:
            raise ConfigError("redis.url", None, "a URL that begins with redis:// or rediss://")
        self.shown = without_password(config.url)
        self._config = config
        self._access = access or Access()
        try:
            self._pool: BlockingConnectionPool = BlockingConnectionPool.from_url(
                config.url,
                max_connections=size or config.pool_size,
                timeout=config.read_timeout_seconds,
                # One limit for a whole batch, in `execute`: one for each answer is what costs most.
                socket_timeout=None,
                socket_connect_timeout=config.connect_timeout_seconds,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                driver_info=None,
            )
            # What the driver makes of the options, it says only to who makes a connection.
            self._pool.connection_class(**self._pool.connection_kwargs)
        except (ValueError, TypeError, RedisError):  # the text may hold a part of the password
            raise ConfigError("redis.url", self.shown, A_REDIS_URL) from None

    def apart(self) -> RedisConnections:
        """One connection outside the pool, for commands that wait on the server."""
        return RedisConnections(self._config, size=1, access=self._access)

    async def execute(self, *commands: bytes) -> list[Reply]:
        """Send packed commands at once; the answers in their order.

        A command that Redis refuses has its ResponseError as its answer; the others are done.

        Raises:
            BusUnavailable: Redis does not answer; what was sent may be done or not.
            ConfigError: it has never let this process in.
        """
        replies: list[Reply] = []
        connection: Connection | None = None
        limit = self._config.connect_timeout_seconds + self._config.read_timeout_seconds
        try:
            async with asyncio.timeout(limit) as timing:
                connection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
                now = asyncio.get_running_loop().time()
                timing.reschedule(now + self._config.read_timeout_seconds)
                await connection.send_packed_command(b"".join(commands), check_health=False)
                for _ in commands:
                    try:
                        replies.append(await connection.read_response())
                    except ResponseError as refusal:
                        replies.append(refusal)
        except (RedisError, OSError) as error:  # TimeoutError is one
            raise self.translated(error) from error
        finally:
            if connection is not None:
                if len(replies) < len(commands):  # what is still on its way is nobody's answer
                    await connection.disconnect(nowait=True)
                await self._pool.release(connection)
        self._access.granted = True
        return replies

    async def ask(self, *words: bytes | int | str) -> Reply:
        """Send one command; a refusal is raised.

        Raises:
            BusUnavailable: Redis does not answer, or refuses.
            ConfigError: it refuses the user.
        """
        (reply,) = await self.execute(packed(*words))
        if isinstance(reply, ResponseError):
            raise self.translated(reply) from reply
        return reply

    async def retrying(self, work: Callable[[], Awaitable[T]]) -> T:
        """Do `work`, again with pauses while Redis is away, `redis.attempts` times in all.

        Raises:
            BusUnavailable: the last attempt failed.
        """
        for failures in range(1, self._config.attempts):
            try:
                return await work()
            except BusUnavailable:
                await asyncio.sleep(self.pause_seconds(failures))
        return await work()

    def pause_seconds(self, failures: int) -> float:
        """How long to wait after that many failures in a row: exponential, with full jitter."""
        most = self._config.backoff_seconds * 2.0 ** min(failures - 1, 60)
        return random.uniform(0.0, min(most, self._config.max_backoff_seconds))

    def translated(self, error: Exception) -> EsperError:
        """What `error` of the client library, or a refused command, means to Esper."""
        refused = isinstance(error, _REFUSED) or "WRONGPASS" in str(error)
        if refused and not (self._access.granted and isinstance(error, AuthenticationError)):
            return ConfigError(
                "redis.url",
                f"{self.shown}, refused by Redis ({one_line(str(error))})",
                "a user with its password that may use the streams of redis.namespace",
            )
        reason = one_line(f"{type(error).__name__}: {error}".removesuffix(": "))
        verb = "refuses" if isinstance(error, ResponseError) else "does not answer"
        return BusUnavailable(f"Redis at {self.shown} {verb}: {reason}; see redis.url")

    async def close(self) -> None:
        """Close every connection."""
        await self._pool.disconnect()


def passes(reply: Reply) -> bool:
    """Whether an answer is a refusal that a later try may not meet."""
    if not isinstance(reply, ResponseError) or isinstance(reply, _REFUSED):
        return False
    return not str(reply).startswith(_LASTING)
