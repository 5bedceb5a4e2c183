"""How streams stay short without losing what somebody still waits for.

Redis would trim a stream while it appends to it, whether or not its groups have read what goes.
So whoever publishes looks at each of its streams now and then, after every `Trimming.step`
messages: what all groups have dealt with goes, down to about `redis.stream_length` messages. What
some group has not dealt with stays until the stream reaches `CAP` times that length, or `SPARED`
times for telemetry; what is given up then is counted and told.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from redis.exceptions import NoPermissionError, ResponseError

from esper.services.oona.connections import RedisConnections, Reply
from esper.services.oona.streams import Position, packed

CAP = 10
"""How many times `redis.stream_length` a stream may grow for the sake of a group that lags."""
SPARED = 2
"""The same for telemetry, whose next snapshot replaces the last."""
LAST_RESORT = 2 * CAP
"""Appending itself trims to so many times the length, should nobody look; it counts nothing."""
LEAST_LAST_RESORT = 10_000
"""But never to fewer than this: what one call publishes comes before any look."""

_LEAST_STEP = 100  # as many as Redis keeps in one node, which it removes as a whole

_KEPT_STREAMS = 4096

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Stream:
    """What this process has appended to a stream: how much since the last look, and marks in it.

    `marks` are ids of its messages, one every `Trimming.step`, oldest first.
    """

    telemetry: bool
    since: int
    last: bytes = b""
    marks: deque[bytes] = field(default_factory=deque)


class _Group(NamedTuple):
    """How far a group is: the id up to which it was given messages, and the first pending one's."""

    delivered: bytes
    pending: bytes | None

    @property
    def open(self) -> bytes:
        """Everything before this id is dealt with."""
        return self.pending or self.delivered


class Trimming:
    """Looks after the streams that one client publishes to; `length` messages of each stay.

    `trimmed` counts the messages that went before a group of theirs had received them.
    """

    def __init__(self, connections: RedisConnections, length: int) -> None:
        self.step = max(_LEAST_STEP, length // 10)
        self.trimmed = 0
        self._connections = connections
        self._length = length
        self._streams: dict[bytes, _Stream] = {}
        self._due: set[bytes] = set()
        self._blind = False

    def note(self, key: bytes, entry_id: bytes, telemetry: bool) -> None:
        """A message was appended to that stream."""
        stream = self._streams.get(key)
        if stream is None:
            if len(self._streams) == _KEPT_STREAMS:
                self._streams.clear()
                self._due.clear()
            # Its first is a reason to look: processes that live shortly append to it too.
            stream = self._streams[key] = _Stream(telemetry, self.step - 1)
        stream.since += 1
        stream.last = entry_id
        if stream.since >= self.step:
            stream.since = 0
            stream.marks.append(entry_id)
            self._due.add(key)

    async def look(self) -> None:
        """Trim the streams whose turn it is.

        Raises:
            BusUnavailable: Redis does not answer, or refuses; they are looked at again later.
            ConfigError: it refuses the user.
        """
        while self._due:
            key = self._due.pop()
            await self._trim(key, self._streams[key])

    async def _trim(self, key: bytes, stream: _Stream) -> None:
        cap = self._length * (SPARED if stream.telemetry else CAP)
        groups = await self._groups(key)
        if groups is None:
            await self._ask("XTRIM", key, "MAXLEN", "~", cap)
            return
        dealt = min([stream.last, *(group.open for group in groups)], key=Position.of)
        needed = 1 + -(-self._length // self.step)
        while len(stream.marks) > needed:
            stream.marks.popleft()
        if len(stream.marks) == needed:  # so `length` of this process' messages follow the first
            gone = min(stream.marks[0], dealt, key=Position.of)
            await self._ask("XTRIM", key, "MINID", "~", gone)
        size = await self._ask("XLEN", key)
        excess = size - cap if isinstance(size, int) else 0
        if excess > self.step:
            await self._give_up(key, excess, cap, groups)

    async def _give_up(self, key: bytes, excess: int, cap: int, groups: Collection[_Group]) -> None:
        """Hold the cap, and count what some group had not received.

        What was received and not acknowledged is counted by whoever takes it over, and finds it
        gone.
        """
        read = min((group.delivered for group in groups), key=Position.of, default=None)
        kept = None
        if read is not None:
            kept = await self._ask("XRANGE", key, "-", read, "COUNT", excess)
        gone = await self._ask("XTRIM", key, "MAXLEN", cap)
        if isinstance(gone, int) and isinstance(kept, list) and gone > len(kept):
            self.trimmed += gone - len(kept)
            name = key.decode(errors="replace")
            _log.warning("%d messages of %s were trimmed away unread", gone - len(kept), name)

    async def _groups(self, key: bytes) -> list[_Group] | None:
        """How far each group of a stream is; None where this user may not know."""
        (reply,) = await self._connections.execute(packed("XINFO", "GROUPS", key))
        if isinstance(reply, NoPermissionError):
            if not self._blind:
                self._blind = True
                _log.warning("streams are trimmed read or not, XINFO is refused: %s", reply)
            return None
        if isinstance(reply, ResponseError) and "no such key" not in str(reply):
            raise self._connections.translated(reply)
        found = []
        for fields in reply if isinstance(reply, list) else []:
            row = dict(zip(fields[::2], fields[1::2], strict=True))
            summary: Reply = None
            if row[b"pending"]:
                summary = await self._ask("XPENDING", key, row[b"name"])
            first = summary[1] if isinstance(summary, list) else None
            found.append(_Group(row[b"last-delivered-id"], first))
        return found

    async def _ask(self, *words: bytes | int | str) -> Reply:
        return await self._connections.ask(*words)
