"""A receiver of a group over Redis Streams."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable

from esper.configs import RedisConfig
from esper.contracts.messages import OonaMessage
from esper.errors import BusUnavailable, ConfigError, EsperError, one_line
from esper.services.oona.connections import RedisConnections, Reply
from esper.services.oona.counting import ReceivingCounts
from esper.services.oona.group import ConsumerGroup, is_gone, is_no_stream
from esper.services.oona.outbox import Outbox
from esper.services.oona.streams import Entry, Position, entries_of, opened

_log = logging.getLogger(__name__)


class RedisSubscription:
    """A `Subscription` of `OonaClient`, which makes it.

    One task reads while somebody waits in `receive`, up to `prefetch` messages at once; another
    refreshes what was handed out, so that work that takes long is not given to others. While Redis
    is away, `receive` waits.
    """

    def __init__(
        self,
        config: RedisConfig,
        group: ConsumerGroup,
        connections: RedisConnections,
        outbox: Outbox,
        counts: ReceivingCounts,
        *,
        prefetch: int,
        forget: Callable[[RedisSubscription], None],
    ) -> None:
        """`connections` are this receiver's own: it waits on them."""
        self._config = config
        self._group = group
        self._connections = connections
        self._outbox = outbox
        self._counts = counts
        self._prefetch = prefetch
        self._forget = forget
        self._ready: deque[Entry] = deque()
        self._unreadable: deque[tuple[Entry, str]] = deque()
        self._held: dict[str, list[Entry]] = {}
        self._held_names: set[tuple[bytes, bytes]] = set()
        self._acknowledged: set[tuple[bytes, bytes]] | None = None
        self._waiting = 0
        self._demand = asyncio.Event()
        self._arrived = asyncio.Event()
        self._failure: EsperError | None = None
        self._closed = False
        self._period = min(config.discovery_seconds, config.claim_idle_seconds / 2)
        self._looked = float("-inf")
        self._fresh_until = float("-inf")
        self._tasks = (
            asyncio.create_task(self._read_on_demand(), name="oona-reader"),
            asyncio.create_task(self._keep_refreshing(), name="oona-keeper"),
        )

    async def receive(self) -> OonaMessage:
        """The group's oldest message on the subscribed topics; waits until there is one.

        Raises:
            BusUnavailable: the bus or this subscription is closed, before or while waiting.
            ConfigError: Redis refuses the user.
        """
        while True:
            self._require_open()
            entry = self._next()
            if entry is not None:
                try:
                    # Not sooner: what is read one by one lies warm in the processor's cache.
                    message = opened(entry)
                except ValueError as error:
                    self._unreadable.append((entry, one_line(str(error))))
                    self._demand.set()
                    continue
                self._held.setdefault(message.id, []).append(entry)
                self._held_names.add(entry.name)
                self._counts.received += 1
                return message
            self._waiting += 1
            self._demand.set()
            try:
                await self._arrived.wait()
            finally:
                self._waiting -= 1

    async def acknowledge(self, message: OonaMessage) -> None:
        """The message is dealt with. One that this subscription doesn't hold is passed over.

        Returns at once; Redis is told after everything that was published before.

        Raises:
            BusUnavailable: the bus or this subscription is closed.
        """
        self._require_open()
        entries = self._held.get(message.id)
        if not entries:
            return
        entry = entries.pop(0)
        if not entries:
            del self._held[message.id]
        self._held_names.discard(entry.name)
        if self._acknowledged is not None:
            self._acknowledged.add(entry.name)
        self._outbox.acknowledge(entry.key, self._group.group, entry.id)

    def pending(self) -> int:
        """How many messages were received here and are not acknowledged yet."""
        return len(self._held_names)

    async def close(self) -> None:
        """Stop; what is pending goes back to the group, at its old place in the order.

        Redis being away, it goes back once it has not been refreshed for long.
        """
        if self._closed:
            return
        self._closed = True
        self._wake()
        self._demand.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._connections.close()
        await self._outbox.flush(self._config.read_timeout_seconds)
        with contextlib.suppress(EsperError):
            await self._group.give_back({entry.name for entry in self._ready})
        self._held.clear()
        self._held_names.clear()
        self._forget(self)

    def _next(self) -> Entry | None:
        if asyncio.get_running_loop().time() > self._fresh_until:
            # Others may have taken over what was read ahead; if not, it comes again.
            self._ready.clear()
        return self._ready.popleft() if self._ready else None

    async def _read_on_demand(self) -> None:
        failures = 0
        recovering = False
        # Not for ever: until Python 3.12 a cancellation is lost where a time limit ends in time.
        while not self._closed:
            await self._demand.wait()
            if not self._unreadable and (self._ready or not self._waiting):
                self._demand.clear()
                continue
            try:
                if recovering:
                    await self._recover()
                    recovering = False
                await self._set_aside()
                if self._waiting:
                    await self._look_around()
                    if not self._ready:
                        await self._read()
                failures = 0
            except BusUnavailable as error:
                failures += 1
                recovering = True
                if failures == self._config.attempts:
                    _log.warning("no messages are received: %s", one_line(str(error), 300))
                await asyncio.sleep(self._connections.pause_seconds(failures))
            except ConfigError as error:
                self._failure = error
                self._wake()
                return

    async def _read(self) -> None:
        """Read new messages; wait for one for a period at most."""
        wait = min(self._period, self._config.read_timeout_seconds / 2)
        if not self._group.keys:
            await asyncio.sleep(wait)
            return
        (reply,) = await self._connections.execute(
            self._group.reading(self._prefetch, max(1, int(wait * 1000)))
        )
        if is_gone(reply) or is_no_stream(reply):
            if not await self._group.rejoin():
                await asyncio.sleep(wait)
            return
        if isinstance(reply, Exception):
            raise self._connections.translated(reply)
        self._take(_read_entries(reply))

    async def _look_around(self) -> None:
        """Once a period: find new streams, and take over what others have left."""
        now = asyncio.get_running_loop().time()
        if now - self._looked < self._period:
            return
        await self._group.discover()
        found = await self._group.left_behind(self._prefetch, self._known())
        if not found:  # else there may be more, and what is left comes before what is new
            self._looked = now
        self._take(found)

    async def _recover(self) -> None:
        """Find what Redis has given to this consumer in answers that never came."""
        self._acknowledged = set()
        try:
            await self._outbox.flush(self._config.read_timeout_seconds)
            await self._group.discover()
            found = await self._group.own(self._known())
            self._take([e for e in found if e.name not in self._acknowledged])
        finally:
            self._acknowledged = None

    async def _set_aside(self) -> None:
        """Move what can't be read to the dead letters; nobody could."""
        while self._unreadable:
            entry, reason = self._unreadable[0]
            await self._group.set_aside(entry, f"it holds no message: {reason}", 1)
            self._unreadable.popleft()

    def _take(self, entries: list[Entry]) -> None:
        """Make entries ready, those of several streams in the order of the server."""
        if not self._ready:
            self._fresh_until = self._fresh_from_now()
        if len(self._group.keys) > 1:
            entries.sort(key=lambda entry: Position.of(entry.id))
        self._ready.extend(entries)
        if self._ready:
            self._wake()

    async def _keep_refreshing(self) -> None:
        while not self._closed:
            await asyncio.sleep(self._config.claim_idle_seconds / 3)
            # What was read ahead goes to others when its owner neither works nor waits.
            names = self._known() if self._waiting or self._held_names else set()
            if names:
                until = self._fresh_from_now()
                with contextlib.suppress(EsperError):
                    await self._group.refresh(names)
                    self._fresh_until = until

    def _known(self) -> set[tuple[bytes, bytes]]:
        unreadable = {entry.name for entry, _ in self._unreadable}
        return self._held_names | {entry.name for entry in self._ready} | unreadable

    def _fresh_from_now(self) -> float:
        """Until when nobody else takes over what is refreshed now, with a margin for the way."""
        return asyncio.get_running_loop().time() + 0.9 * self._config.claim_idle_seconds

    def _require_open(self) -> None:
        if self._failure is not None:
            raise self._failure
        if self._closed:
            raise BusUnavailable("this subscription is closed")

    def _wake(self) -> None:
        self._arrived.set()
        self._arrived = asyncio.Event()


def _read_entries(reply: Reply) -> list[Entry]:
    """The entries in an answer of XREADGROUP; none where nothing came in time."""
    rows = reply if isinstance(reply, list) else []
    return [entry for key, entries in rows for entry in entries_of(key, entries)]
