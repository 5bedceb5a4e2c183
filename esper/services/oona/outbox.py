"""What leaves this process for Redis, in order: messages, and acknowledgements after them.

Everything waits in one queue, which one task empties with as few round trips as it can. While
Redis is away the queue is the buffer: telemetry makes room for what came later, oldest first, and
is counted; nothing else is ever dropped, so whoever publishes it waits for room. What Redis
refuses for good is an error to whoever still waits for the answer; else it is tried on and on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from redis.exceptions import ResponseError

from esper.configs import RedisConfig
from esper.errors import BusUnavailable, ConfigError, EsperError, one_line
from esper.services.oona.connections import RedisConnections, Reply, passes
from esper.services.oona.streams import packed
from esper.services.oona.trimming import Trimming

_BATCH_ITEMS = 512
_BATCH_BYTES = 4 * 2**20

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Receipt:
    """Tells one call of `publish` when all of its messages are in Redis, or in the buffer."""

    missing: int
    done: asyncio.Future[None]

    def settle(self, error: EsperError | None = None) -> None:
        self.missing -= 1
        if self.done.done():
            return
        if error is not None:
            self.done.set_exception(error)
        elif self.missing == 0:
            self.done.set_result(None)


@dataclass(slots=True)
class _Addition:
    """A message on its way to the stream `key`."""

    key: bytes
    command: bytes
    telemetry: bool
    receipt: _Receipt | None

    @property
    def promised(self) -> bool:
        """Whether nobody is left who could be told that the message is given up."""
        unheard = self.receipt is None or self.receipt.done.cancelled()
        return unheard and not self.telemetry


@dataclass(slots=True)
class _Acknowledgement:
    """Entries of one stream that a group is done with."""

    key: bytes
    group: str
    ids: list[bytes] = field(default_factory=list)

    @property
    def command(self) -> bytes:
        return packed("XACK", self.key, self.group, *self.ids)


_Item = _Addition | _Acknowledgement


class Outbox:
    """The queue and the task that empties it; for one event loop."""

    def __init__(self, connections: RedisConnections, config: RedisConfig) -> None:
        self._connections = connections
        self._config = config
        self._trimming = Trimming(connections, config.stream_length)
        self._queue: deque[_Item] = deque()
        self._in_flight = 0
        self._degraded = False
        self._closed = False
        self._stopped = False
        self._work = asyncio.Event()
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self.published = 0
        self.dropped = 0
        self.retried = 0
        self.buffered = 0
        self.refusal: str | None = None
        """Why messages wait in this process; None while Redis takes them."""

    @property
    def trimmed(self) -> int:
        """Messages that streams gave up for want of room before a group of theirs had them."""
        return self._trimming.trimmed

    async def publish(self, commands: Sequence[tuple[bytes, bytes, bool]]) -> None:
        """Send commands in order; returns when Redis has done them, or once it is known to be away.

        Each is a stream's key, the command that appends to it, and whether it is telemetry.

        Raises:
            BusUnavailable: the outbox is closed, or Redis refuses a command.
            ConfigError: Redis refuses the user.
        """
        receipt = _Receipt(len(commands), asyncio.get_running_loop().create_future())
        for key, command, telemetry in commands:
            while self.buffered >= self._config.buffer_messages and not self._closed:
                if self._degraded and self._dropped_telemetry():
                    continue
                if self._degraded and telemetry:
                    break
                await self._changed.wait()
            self._require_open()
            self.published += 1
            if self.buffered >= self._config.buffer_messages:
                self._drop()
                receipt.settle()
                continue
            self.buffered += 1
            if self._degraded:
                self._put(_Addition(key, command, telemetry, None))
                receipt.settle()
            else:
                self._put(_Addition(key, command, telemetry, receipt))
        if commands:
            await receipt.done

    def acknowledge(self, key: bytes, group: str, entry_id: bytes) -> None:
        """Send an acknowledgement after everything that is in the queue; returns at once."""
        last = self._queue[-1] if self._queue else None
        if (
            not isinstance(last, _Acknowledgement)
            or (last.key, last.group) != (key, group)
            or len(last.ids) >= _BATCH_ITEMS
        ):
            last = _Acknowledgement(key, group)
            self._put(last)
        last.ids.append(entry_id)

    async def flush(self, seconds: float) -> bool:
        """Wait until everything is in Redis, at most that long; whether it is."""
        deadline = asyncio.get_running_loop().time() + seconds
        while self._queue or self._in_flight:
            left = deadline - asyncio.get_running_loop().time()
            if left <= 0:
                return False
            try:
                await asyncio.wait_for(self._changed.wait(), left)
            except TimeoutError:
                return False
        return True

    async def close(self, seconds: float) -> None:
        """Send what is there, for at most that long; what is left then is counted and said."""
        if self._closed:
            return
        self._closed = True
        self._wake()
        if self._task is not None:
            await self.flush(seconds)
            self._stopped = True
            self._work.set()
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        error = BusUnavailable(f"the bus was closed while {self._connections.shown} was away")
        lost = [item for item in self._queue if isinstance(item, _Addition)]
        for item in lost:
            self._fail(item, error)
        if lost:
            _log.error("closed with %d messages that Redis did not take", len(lost))
        self._queue.clear()

    def _put(self, item: _Item) -> None:
        self._queue.append(item)
        self._work.set()
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="oona-outbox")

    async def _run(self) -> None:
        failures = 0
        # Not for ever: until Python 3.12 a cancellation is lost where a time limit ends in time.
        while not self._stopped:
            await self._work.wait()
            if not self._queue:
                self._work.clear()
                continue
            batch = self._next_batch()
            try:
                replies = await self._connections.execute(*[item.command for item in batch])
            except BusUnavailable as error:
                failures += 1
                self._put_back(batch)
                if failures >= self._config.attempts:
                    self._degrade(error)
                await asyncio.sleep(self._connections.pause_seconds(failures))
            except ConfigError as error:
                failures += 1
                self._refused(batch, error)
                if self._queue:
                    await asyncio.sleep(self._connections.pause_seconds(failures))
            except asyncio.CancelledError:
                self._put_back(batch)
                raise
            else:
                failures = 0 if self._settled(batch, replies) else failures + 1
                if failures:
                    await asyncio.sleep(self._connections.pause_seconds(failures))
                else:
                    with contextlib.suppress(EsperError):  # there will be another look
                        await self._trimming.look()

    def _next_batch(self) -> list[_Item]:
        batch: list[_Item] = []
        size = 0
        while self._queue and len(batch) < _BATCH_ITEMS and size < _BATCH_BYTES:
            if self._degraded and batch and isinstance(self._queue[0], _Acknowledgement):
                break  # not together with an answer that may be refused
            item = self._queue.popleft()
            size += len(item.command) if isinstance(item, _Addition) else 0
            batch.append(item)
        self._in_flight = len(batch)
        return batch

    def _put_back(self, batch: Sequence[_Item]) -> None:
        """Return what may not have arrived to its place in the order."""
        self._queue.extendleft(reversed(batch))
        self._in_flight = 0
        self.retried += sum(isinstance(item, _Addition) for item in batch)
        self._work.set()

    def _settled(self, batch: Sequence[_Item], replies: Sequence[Reply]) -> bool:
        """Take note of the answers; whether Redis could do all of it."""
        again: list[_Item] = []
        held: set[bytes] = set()
        reason: EsperError | None = None
        for item, reply in zip(batch, replies, strict=True):
            if isinstance(reply, ResponseError):
                error = self._connections.translated(reply)
                if passes(reply) or (isinstance(item, _Addition) and item.promised):
                    reason = reason or error
                    again.append(item)
                    held.add(item.key)
                else:
                    self._fail(item, error)
            elif isinstance(item, _Acknowledgement):
                if again:
                    again.append(item)
            elif item.key in held:
                # Done already, and done again: the order of a stream counts for more.
                again.append(item)
            else:
                self.buffered -= 1
                if isinstance(reply, bytes):
                    self._trimming.note(item.key, reply, item.telemetry)
                if item.receipt is not None:
                    item.receipt.settle()
        self._in_flight = 0
        if reason is not None:
            self._put_back(again)
            self._degrade(reason)
        elif self._degraded:
            self._degraded = False
            self.refusal = None
            _log.info("Redis at %s takes messages again", self._connections.shown)
        self._wake()
        return not again

    def _degrade(self, error: EsperError) -> None:
        """Redis is away: let everybody go on whose messages are in the buffer."""
        reason = one_line(str(error), 300)
        if self.refusal != reason:
            self.refusal = reason
            _log.warning("messages wait in this process: %s", reason)
        if self._degraded:
            return
        self._degraded = True
        for item in self._queue:
            if isinstance(item, _Addition) and item.receipt is not None:
                item.receipt.settle()
                item.receipt = None
        self._wake()

    def _refused(self, batch: Sequence[_Item], error: ConfigError) -> None:
        """Redis does not let this process in: tell whoever waits, keep what was promised."""
        kept = [item for item in batch if isinstance(item, _Addition) and item.promised]
        for item in batch:
            if not isinstance(item, _Addition) or not item.promised:
                self._fail(item, error)
        self._in_flight = 0
        if kept:
            self._put_back(kept)
            self._degrade(error)
        self._wake()

    def _dropped_telemetry(self) -> bool:
        """Make room by the oldest telemetry; whether there was any."""
        for index, item in enumerate(self._queue):
            if isinstance(item, _Addition) and item.telemetry:
                del self._queue[index]
                self.buffered -= 1
                self._drop()
                return True
        return False

    def _drop(self) -> None:
        self.dropped += 1
        if self.dropped.bit_count() == 1:  # 1, 2, 4, 8 …: never silent, never a flood
            _log.warning("%d packets of telemetry dropped: the buffer is full", self.dropped)

    def _fail(self, item: _Item, error: EsperError) -> None:
        if isinstance(item, _Acknowledgement):
            _log.warning("%d acknowledgements refused: %s", len(item.ids), error)
            return
        self.buffered -= 1
        if item.receipt is not None:
            item.receipt.settle(error)
            return
        self.dropped += 1
        _log.error("a message is lost: %s", error)

    def _require_open(self) -> None:
        if self._closed:
            raise BusUnavailable("the bus of this process is closed")

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
