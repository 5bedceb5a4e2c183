"""Oona over Redis Streams. `esper.services.oona_client` gives its name; here Redis is imported."""

from __future__ import annotations

import asyncio
import heapq
import os
import secrets
import socket
from collections.abc import AsyncIterator, Collection, Iterable, Sequence

from redis.exceptions import ResponseError

from esper.configs import RedisConfig
from esper.contracts.messages import OonaMessage, TopicNames
from esper.errors import BadInput, BusUnavailable, ConfigError
from esper.services.oona.connections import RedisConnections
from esper.services.oona.counting import ReceivingCounts
from esper.services.oona.group import ConsumerGroup, found_streams, is_gone, is_no_stream
from esper.services.oona.outbox import Outbox
from esper.services.oona.port import OonaStatistics
from esper.services.oona.receiving import RedisSubscription
from esper.services.oona.streams import (
    FIELD,
    TELEMETRY,
    Appending,
    Entry,
    Position,
    entries_of,
    is_scope,
    opened,
    packed,
    scope_and_topic,
    stream_key,
    stream_pattern,
)
from esper.services.oona.trimming import LAST_RESORT, LEAST_LAST_RESORT

_PAGE = 200
_AT_ONCE = 100
"""Streams whose last entry is asked for in one go: those of statuses are large."""
_NOWHERE = "check"  # no topic, so nothing lies there


class OonaClient:
    """The `Oona` of processes that share a Redis; for one event loop.

    With a `scope`, the uid of a session, it publishes and hears in that scope only. Without one it
    hears all scopes of `redis.namespace`, those that come later too, and publishes each message in
    the scope that the message names. With `everywhere` it hears all scopes of all namespaces, and
    `publish` must be told the namespace.

    While Redis is away, messages wait here in order and receivers wait; see `redis.*` for the
    bounds. `publish` returns once Redis has the messages, or once it is known to be away.

    Raises:
        ConfigError: `redis.url` is missing or can't be read.
        BadInput: `scope` is none that a message may have, or is given with `everywhere`.
    """

    def __init__(self, config: RedisConfig, *, scope: str | None, everywhere: bool = False) -> None:
        if scope is not None and not is_scope(scope):
            raise BadInput("scope", scope, "letters, digits, dots and dashes, at most 128")
        if scope is not None and everywhere:
            raise BadInput("scope", scope, "null, over all namespaces")
        self._config = config
        self._namespace = None if everywhere else config.namespace
        self._scope = scope
        self._connections = RedisConnections(config)
        self._outbox = Outbox(self._connections, config)
        self._appending = Appending(_last_resort(config))
        self._counts = ReceivingCounts()
        self._subscriptions: set[RedisSubscription] = set()
        self._closed = False

    async def publish(self, *messages: OonaMessage, namespace: str | None = None) -> None:
        """Append the messages, in this order, to the streams of their topics.

        `namespace` is that of their streams, `redis.namespace` by default.

        Returns when Redis has them. After `redis.attempts` failures in a row it returns with them
        in this process, to be sent when Redis is back: in order, `redis.buffer_messages` of them.
        Without room the oldest telemetry is dropped and counted; everything else waits for room.

        Raises:
            BadInput: a message names another scope than this client's, or the client is of all
                namespaces and `namespace` is missing.
            BusUnavailable: the bus is closed, or Redis refuses the message.
            ConfigError: Redis refuses the user.
        """
        self._require_open()
        own = namespace if namespace is not None else self._namespace
        if own is None:
            raise BadInput("namespace", None, "that of the streams, from a client of all of them")
        commands = []
        for message in messages:
            scope = message.scope if self._scope is None else self._scope
            if message.scope not in ("", scope):
                raise BadInput("scope", message.scope, f"{scope}, that of this client")
            key = stream_key(own, scope, message.topic)
            command = self._appending.command(message, key)
            commands.append((key, command, message.topic in TELEMETRY))
        await self._outbox.publish(commands)

    async def subscribe(
        self, topics: Collection[TopicNames], group: str, *, prefetch: int | None = None
    ) -> RedisSubscription:
        """A receiver for `topics` in `group`.

        A group begins with what is published from now on; over all scopes, with everything that is
        kept. `prefetch` is how many messages it reads at once, `redis.prefetch_messages` if None;
        whoever works long on each asks for 1, so that others get the rest.

        Raises:
            BusUnavailable: the bus is closed, or Redis does not answer `redis.attempts` times.
            ConfigError: Redis refuses the user.
        """
        self._require_open()
        joined = ConsumerGroup(
            self._config,
            self._connections,
            self._counts,
            topics=topics,
            group=group,
            consumer=f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}",
            namespace=self._namespace,
            scope=self._scope,
        )
        await self._connections.retrying(joined.join)
        self._require_open()
        subscription = RedisSubscription(
            self._config,
            joined,
            self._connections.apart(),
            self._outbox,
            self._counts,
            prefetch=prefetch or self._config.prefetch_messages,
            forget=self._subscriptions.discard,
        )
        self._subscriptions.add(subscription)
        return subscription

    async def history(
        self, topics: Collection[TopicNames], scope: str | None = None
    ) -> AsyncIterator[OonaMessage]:
        """What is still kept of `topics`, oldest first, received or not; receives nothing.

        Entries that hold no message are passed over. A scope that this client doesn't see has none.

        Raises:
            BusUnavailable: the bus is closed, or Redis does not answer `redis.attempts` times.
            ConfigError: Redis refuses the user.
        """
        self._require_open()
        if self._scope is not None:
            scopes = {self._scope} if scope in (None, self._scope) else set()
            keys = [stream_key(self._config.namespace, s, t) for s in scopes for t in set(topics)]
        elif scope is not None and self._namespace is not None:
            keys = [stream_key(self._namespace, scope, topic) for topic in set(topics)]
        else:
            found = await self._connections.retrying(
                lambda: found_streams(self._connections, self._namespace, topics)
            )
            keys = sorted(k for k in found if scope is None or scope_and_topic(k)[0] == scope)
        async for entry in self._merged(keys):
            try:
                yield opened(entry)
            except ValueError:
                continue

    async def newest(
        self, topic: TopicNames, scopes: Iterable[tuple[str, str]]
    ) -> AsyncIterator[OonaMessage]:
        """The last message that is kept of `topic` in each scope, received or not.

        `scopes` are pairs of a namespace and a scope in it; many are asked for at once. One whose
        last entry is no message is passed over. Nothing is received by this.

        Raises:
            BusUnavailable: the bus is closed, or Redis does not answer `redis.attempts` times.
            ConfigError: Redis refuses the user.
        """
        self._require_open()
        keys = [stream_key(namespace, scope, topic) for namespace, scope in scopes]
        for first in range(0, len(keys), _AT_ONCE):
            for entry in await self._last_entries(keys[first : first + _AT_ONCE]):
                try:
                    yield opened(entry)
                except ValueError:
                    continue

    async def check(self) -> None:
        """Return if Redis takes messages of this client and gives it those of others.

        Every command that the streams need is tried on a key that is not there, which leaves
        nothing behind: PING is answered also by a Redis that is full, and to a user without rights.

        Raises:
            BusUnavailable: it does not answer, refuses, or messages wait for it in this process; or
                the bus is closed.
            ConfigError: it refuses the user, or one of the commands to the user.
        """
        self._require_open()
        for reply in await self._connections.execute(*self._questions()):
            if isinstance(reply, ResponseError) and not _is_absence(reply):
                raise self._connections.translated(reply)
        if self._outbox.refusal is not None:
            raise BusUnavailable(
                f"{self._outbox.buffered} messages wait to be sent: {self._outbox.refusal}"
            )

    def _questions(self) -> list[bytes]:
        key = stream_key(self._config.namespace, self._scope or "", _NOWHERE)
        group = ("GROUP", _NOWHERE, _NOWHERE)
        questions = [
            packed("XADD", key, "NOMKSTREAM", "MAXLEN", 0, "*", FIELD, b""),
            packed("XGROUP", "SETID", key, _NOWHERE, "$"),
            packed("XREADGROUP", *group, "COUNT", 1, "STREAMS", key, ">"),
            packed("XACK", key, _NOWHERE, "0-0"),
            packed("XPENDING", key, _NOWHERE),
            packed("XCLAIM", key, _NOWHERE, _NOWHERE, 0, "0-0"),
            packed("XRANGE", key, "-", "+", "COUNT", 1),
        ]
        if self._scope is None:
            questions.append(
                packed("SCAN", 0, "MATCH", stream_pattern(self._namespace), "COUNT", 1)
            )
        return questions

    async def health(self) -> bool:
        """Whether Redis takes messages."""
        try:
            await self.check()
        except (BusUnavailable, ConfigError):
            return False
        return True

    def statistics(self) -> OonaStatistics:
        """Counts since the client was made."""
        return OonaStatistics(
            published=self._outbox.published,
            buffered=self._outbox.buffered,
            dropped=self._outbox.dropped,
            retried=self._outbox.retried,
            received=self._counts.received,
            claimed=self._counts.claimed,
            dead=self._counts.dead,
            trimmed=self._counts.trimmed + self._outbox.trimmed,
        )

    async def close(self) -> None:
        """Stop; whoever waits in `receive` gets BusUnavailable. Twice is as once.

        What is in the buffer is sent if Redis takes it within `redis.read_timeout_seconds`; what is
        left then is counted as dropped and logged.
        """
        if self._closed:
            return
        self._closed = True
        await asyncio.gather(*[receiver.close() for receiver in tuple(self._subscriptions)])
        await self._outbox.close(self._config.read_timeout_seconds)
        await self._connections.close()

    async def _merged(self, keys: Sequence[bytes]) -> AsyncIterator[Entry]:
        """The entries of several streams in the order of the server, read page by page."""
        pages = {key: self._entries(key) for key in keys}
        heads: list[tuple[Position, bytes, Entry]] = []
        for key in pages:
            first = await anext(pages[key], None)
            if first is not None:
                heapq.heappush(heads, (Position.of(first.id), key, first))
        while heads:
            _, key, entry = heapq.heappop(heads)
            yield entry
            following = await anext(pages[key], None)
            if following is not None:
                heapq.heappush(heads, (Position.of(following.id), key, following))

    async def _entries(self, key: bytes) -> AsyncIterator[Entry]:
        start = b"-"
        while True:
            command = packed("XRANGE", key, start, "+", "COUNT", _PAGE)
            (reply,) = await self._connections.retrying(
                lambda: self._connections.execute(command)  # noqa: B023
            )
            if isinstance(reply, ResponseError) and not is_no_stream(reply):
                raise self._connections.translated(reply)
            rows = entries_of(key, reply if isinstance(reply, list) else [])
            for entry in rows:
                yield entry
            if len(rows) < _PAGE:
                return
            start = b"(" + rows[-1].id

    async def _last_entries(self, keys: Sequence[bytes]) -> list[Entry]:
        """The last entry of each stream that has one."""
        commands = [packed("XREVRANGE", key, "+", "-", "COUNT", 1) for key in keys]
        replies = await self._connections.retrying(lambda: self._connections.execute(*commands))
        found: list[Entry] = []
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, ResponseError) and not is_no_stream(reply):
                raise self._connections.translated(reply)
            found += entries_of(key, reply if isinstance(reply, list) else [])
        return found

    def _require_open(self) -> None:
        if self._closed:
            raise BusUnavailable("the bus of this process is closed")


def _last_resort(config: RedisConfig) -> int:
    return max(LEAST_LAST_RESORT, LAST_RESORT * config.stream_length)


def _is_absence(reply: ResponseError) -> bool:
    """Whether a refusal only says that a key is not there, or holds something else."""
    return is_gone(reply) or is_no_stream(reply) or "key to exist" in str(reply)
