"""A consumer group's side of the streams: joining, taking over, giving back, setting aside.

Every message that a receiver got and did not acknowledge stands in the group's list of pending
entries, under the receiver's name and with the times it was delivered. Whoever lives refreshes its
own entries; an entry that nobody has refreshed for `redis.claim_idle_seconds` goes to another
receiver, and after `redis.max_deliveries` to the dead letters.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

from redis.exceptions import ResponseError

from esper.configs import RedisConfig
from esper.contracts.messages import TopicNames
from esper.services.oona.connections import RedisConnections, Reply
from esper.services.oona.counting import ReceivingCounts
from esper.services.oona.streams import (
    FIELD,
    Entry,
    Position,
    dead_key,
    entries_of,
    packed,
    scope_and_topic,
    stream_key,
    stream_pattern,
)

_PAGE = 500
_SCANNED = 1000
_RELEASED_MS = 10 * 86_400_000  # more than redis.claim_idle_seconds can be

_log = logging.getLogger(__name__)


class _Pending(NamedTuple):
    """An entry that somebody got and has not acknowledged."""

    id: bytes
    consumer: bytes
    deliveries: int


class ConsumerGroup:
    """One consumer of a group on the streams of `topics`: of one scope, or of all that there are.

    Every method raises BusUnavailable where Redis does not answer, and ConfigError where it
    refuses the user.
    """

    def __init__(
        self,
        config: RedisConfig,
        connections: RedisConnections,
        counts: ReceivingCounts,
        *,
        topics: Collection[TopicNames],
        group: str,
        consumer: str,
        namespace: str | None,
        scope: str | None,
    ) -> None:
        """Without a `namespace` it is on the streams of all; then there is no `scope` either."""
        self.group = group
        self.consumer = consumer.encode()
        self.keys: tuple[bytes, ...] = ()
        self._config = config
        self._connections = connections
        self._counts = counts
        self._topics = frozenset(topics)
        self._namespace = namespace
        self._scope = scope
        self._reading: tuple[tuple[bytes, ...], tuple[int, int], bytes] | None = None
        self._made = 0
        self._strange: set[bytes] = set()
        self._claim_ms = int(config.claim_idle_seconds * 1000)

    async def join(self, start: str = "$") -> None:
        """Make the group where it is missing, from `start` on: ``$`` means from now on.

        Over all scopes, streams are found, not made, and read from their beginning.
        """
        if self._scope is None or self._namespace is None:
            await self.discover()
            return
        keys = tuple(stream_key(self._namespace, self._scope, t) for t in self._topics)
        await self._create(keys, start, "MKSTREAM")
        self.keys = keys

    async def discover(self) -> None:
        """Find the streams that there are now; nothing to do for one scope."""
        if self._scope is not None:
            return
        found = await found_streams(self._connections, self._namespace, self._topics)
        new = sorted(found.difference(self.keys))
        gone = await self._create(new, "0") if new else set()
        self.keys = tuple(sorted(found - gone))

    async def rejoin(self) -> bool:
        """Make the group anew where the server has lost it; whether anything was lost.

        Whatever is in its streams then came after the loss, so it is read from its beginning. A
        stream that was made anew meanwhile looks like the old one: every stream is asked.
        """
        before, made = self.keys, self._made
        if self._scope is None:
            self.keys = ()
        await self.join(start="0")
        return self._made > made or self.keys != before

    async def _create(self, keys: Sequence[bytes], start: str, *options: str) -> set[bytes]:
        """Make the group on each stream; those keys that hold no stream.

        A key of something else is passed over where streams are found, and told once.
        """
        replies = await self._connections.execute(
            *[packed("XGROUP", "CREATE", key, self.group, start, *options) for key in keys]
        )
        gone = set()
        for key, reply in zip(keys, replies, strict=True):
            if not isinstance(reply, ResponseError):
                self._made += 1
                continue
            if "BUSYGROUP" in str(reply):
                continue
            strange = self._scope is None and is_no_stream(reply)
            if "key to exist" not in str(reply) and not strange:
                raise self._connections.translated(reply)
            if strange and key not in self._strange:
                self._strange.add(key)
                name = key.decode(errors="replace")
                _log.warning("%s is passed over, it holds no stream: %s", name, reply)
            gone.add(key)
        return gone

    def reading(self, count: int, block_ms: int) -> bytes:
        """The command that reads up to `count` new entries, and waits for one if there is none.

        Redis counts each stream's by itself: of more than `count` streams it reads one entry each.
        """
        share = max(1, count // max(1, len(self.keys)))
        limits = (share, block_ms)
        if self._reading is None or self._reading[:2] != (self.keys, limits):
            consumer = ("GROUP", self.group, self.consumer)
            options = ("COUNT", share, "BLOCK", block_ms, "STREAMS")
            places = [">"] * len(self.keys)
            command = packed("XREADGROUP", *consumer, *options, *self.keys, *places)
            self._reading = (self.keys, limits, command)
        return self._reading[2]

    async def left_behind(self, count: int, held: Collection[tuple[bytes, bytes]]) -> list[Entry]:
        """Take over up to about `count` entries that nobody has refreshed for long.

        Entries of this consumer's own that are not in `held` are among them. Those delivered too
        often are set aside instead.
        """
        taken: list[Entry] = []
        idle = [
            packed("XPENDING", key, self.group, "IDLE", self._claim_ms, "-", "+", count)
            for key in self.keys
        ]
        for key, reply in await self._asked(self.keys, idle):
            rows = [row for row in _pending(reply) if (key, row.id) not in held]
            # This consumer's own were read ahead and never handed out: that is no delivery.
            unseen = [row for row in rows if row.consumer == self.consumer]
            left = [row for row in rows if row.consumer != self.consumer]
            worn = [row for row in left if row.deliveries >= self._config.max_deliveries]
            rest = [row for row in left if row.deliveries < self._config.max_deliveries]
            for row, entry in await self._claimed(key, worn, self._claim_ms):
                times = row.deliveries
                reason = f"delivered {times} times to {self.group} and never acknowledged"
                await self.set_aside(entry, reason, times)
            claimed = await self._claimed(key, rest, self._claim_ms)
            self._counts.claimed += len(claimed)
            again = await self._claimed(key, unseen, self._claim_ms, keep_count=True)
            taken += [entry for _, entry in (*claimed, *again)]
        return sorted(taken, key=lambda entry: Position.of(entry.id))

    async def own(self, known: Collection[tuple[bytes, bytes]]) -> list[Entry]:
        """What is pending here and not in `known`: answers that got lost on their way."""
        found: list[Entry] = []
        for key, rows in await self._own_pending():
            lost = [row for row in rows if (key, row.id) not in known]
            found += [entry for _, entry in await self._claimed(key, lost, 0, keep_count=True)]
        return found

    async def refresh(self, names: Collection[tuple[bytes, bytes]]) -> None:
        """Say of entries that are still this consumer's that they are being worked on."""
        commands = []
        for key, rows in await self._own_pending({key for key, _ in names}):
            ids = [row.id for row in rows if (key, row.id) in names]
            if ids:
                commands.append(packed("XCLAIM", key, self.group, self.consumer, 0, *ids, "JUSTID"))
        if commands:
            await self._connections.execute(*commands)

    async def give_back(self, unseen: Collection[tuple[bytes, bytes]]) -> None:
        """Let others take what is pending here at once; `unseen` does not count as delivered."""
        commands = []
        for key, rows in await self._own_pending():
            for row in rows:
                times = row.deliveries - ((key, row.id) in unseen)
                claim = ("XCLAIM", key, self.group, self.consumer, 0, row.id)
                commands.append(packed(*claim, "IDLE", _RELEASED_MS, "RETRYCOUNT", times, "JUSTID"))
        if commands:
            await self._connections.execute(*commands)

    async def set_aside(self, entry: Entry, reason: str, deliveries: int) -> None:
        """Move an entry to the dead letters of its stream, with the reason and the count."""
        fields: tuple[bytes | int | str, ...] = (
            *(FIELD, entry.text or b"", "reason", reason, "deliveries", deliveries),
            *("group", self.group, "id", entry.id),
        )
        length = self._config.stream_length
        replies = await self._connections.execute(
            packed("MULTI"),
            packed("XADD", dead_key(entry.key), "MAXLEN", "~", length, "*", *fields),
            packed("XACK", entry.key, self.group, entry.id),
            packed("EXEC"),
        )
        for reply in replies:
            if isinstance(reply, ResponseError):
                raise self._connections.translated(reply)
        self._counts.dead += 1
        name = entry.key.decode(errors="replace")
        _log.warning("%s of %s is set aside: %s", entry.id.decode(), name, reason)

    async def _claimed(
        self, key: bytes, rows: Sequence[_Pending], idle_ms: int, *, keep_count: bool = False
    ) -> list[tuple[_Pending, Entry]]:
        """Those of `rows` that are this consumer's from now on; others were quicker at the rest."""
        found = []
        commands = []
        for row in rows:
            count = ("RETRYCOUNT", row.deliveries) if keep_count else ()
            claim = ("XCLAIM", key, self.group, self.consumer, idle_ms, row.id)
            commands.append(packed(*claim, *count))
        for row, (_, reply) in zip(
            rows, await self._asked([key] * len(rows), commands), strict=True
        ):
            entries = entries_of(key, reply) if isinstance(reply, list) else []
            if entries:
                found.append((row, entries[0]))
            elif reply:  # [None]: claimed, but trimmed away
                await self._connections.ask("XACK", key, self.group, row.id)
                self._counts.trimmed += 1
                _log.warning("%s of %s was trimmed away unread", row.id.decode(), key.decode())
        return found

    async def _own_pending(
        self, keys: Collection[bytes] | None = None
    ) -> list[tuple[bytes, list[_Pending]]]:
        """What is pending under this consumer's name, all of it, by stream."""
        found: dict[bytes, list[_Pending]] = {}
        starts: Mapping[bytes, bytes] = dict.fromkeys(self.keys if keys is None else keys, b"-")
        while starts:
            commands = [
                packed("XPENDING", key, self.group, start, "+", _PAGE, self.consumer)
                for key, start in starts.items()
            ]
            following = {}
            for key, reply in await self._asked(list(starts), commands):
                rows = _pending(reply)
                found.setdefault(key, []).extend(rows)
                if len(rows) == _PAGE:
                    following[key] = b"(" + rows[-1].id
            starts = following
        return list(found.items())

    async def _asked(
        self, keys: Sequence[bytes], commands: Sequence[bytes]
    ) -> list[tuple[bytes, Reply]]:
        """The answers, each with its stream; None where the stream or its group is gone."""
        if not commands:
            return []
        found: list[tuple[bytes, Reply]] = []
        replies = await self._connections.execute(*commands)
        for key, reply in zip(keys, replies, strict=True):
            if isinstance(reply, ResponseError) and not is_gone(reply) and not is_no_stream(reply):
                raise self._connections.translated(reply)
            found.append((key, None if isinstance(reply, ResponseError) else reply))
        return found


def is_gone(reply: Reply) -> bool:
    """Whether Redis says that a stream or its group does not exist."""
    return isinstance(reply, ResponseError) and str(reply).startswith("NOGROUP")


def is_no_stream(reply: Reply) -> bool:
    """Whether Redis says that a key holds something else than a stream."""
    return isinstance(reply, ResponseError) and str(reply).startswith("WRONGTYPE")


async def found_streams(
    connections: RedisConnections, namespace: str | None, topics: Collection[TopicNames]
) -> set[bytes]:
    """The keys of all streams of `topics` that there are in a namespace; None: in all of them."""
    found: set[bytes] = set()
    cursor = b"0"
    while True:
        pattern = stream_pattern(namespace)
        reply = await connections.ask("SCAN", cursor, "MATCH", pattern, "COUNT", _SCANNED)
        if not isinstance(reply, list):
            return found
        cursor, keys = reply
        found.update(key for key in keys if scope_and_topic(key)[1] in topics)
        if cursor == b"0":
            return found


def _pending(reply: Reply) -> list[_Pending]:
    rows = reply if isinstance(reply, list) else []
    return [_Pending(entry_id, consumer, times) for entry_id, consumer, _, times in rows]
