"""What has to be looked at: a queue of keys, each waiting once and worked on once at a time.

A key that comes while it is being worked on is worked on once more afterwards. One whose work broke
off comes again after 1 s, 2 s, 4 s, … 60 s; what happens to it meanwhile waits for that moment,
unless somebody changed the object itself. Keys that were never worked on have a lane of their own
and two of three turns: whoever has just applied something sees it taken up, however much else is to
be done.
"""

from __future__ import annotations

import asyncio
import heapq
import math
import random
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 60.0
_DOUBLINGS = 6
FIRST_VISITS_IN_A_ROW = 2
"""While others wait, every third turn is theirs, however many first visits there are."""


class Key(NamedTuple):
    """The object that has to be looked at."""

    kind: str
    namespace: str
    name: str


@dataclass(frozen=True)
class Turn:
    """A key to be worked on, and for how many seconds it had to wait."""

    key: Key
    waited: float


def pause_after(failures: int, chance: float) -> float:
    """Seconds until the next try after so many failures in a row; `chance` is in [0, 1)."""
    doubled = FIRST_PAUSE_SECONDS * 2.0 ** min(failures - 1, _DOUBLINGS)
    longest = min(LONGEST_PAUSE_SECONDS, doubled)
    return longest * (0.75 + 0.25 * chance)


class WorkQueue:
    """For one event loop."""

    def __init__(self, *, chance: Callable[[], float] = random.random) -> None:
        """`chance` spreads tries, so that what failed together does not come together again."""
        self._chance = chance
        self._lanes: tuple[deque[Key], deque[Key]] = (deque(), deque())
        self._in_a_row = 0
        self._waiting: dict[Key, float] = {}
        self._busy: dict[Key, float] = {}
        self._dirty: dict[Key, float] = {}
        self._afterwards: dict[Key, float] = {}
        self._known: set[Key] = set()
        self._failures: dict[Key, int] = {}
        self._due: dict[Key, float] = {}
        # A key has one entry that counts, at or before its due time: deadlines are put off far more
        # often than they are reached.
        self._heap: list[tuple[float, Key]] = []
        self._listed: dict[Key, float] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._takers: deque[asyncio.Future[None]] = deque()

    # Who has something to be done

    def add(self, key: Key, *, anew: bool = False) -> None:
        """Look at `key` soon; `anew` says that what made it fail may be mended."""
        if anew:
            self._failures.pop(key, None)
        elif key in self._failures and key in self._due:
            return
        self._put(key)

    def add_in(self, key: Key, seconds: float) -> None:
        """Look at `key` in so many seconds, if nothing makes it due before; replaces the last."""
        self._due[key] = due = self._now() + seconds
        if due < self._listed.get(key, math.inf):
            self._list(key, due)
            self._arm()

    def add_within(self, key: Key, seconds: float) -> None:
        """Look at `key` in so many seconds at the latest; what it is due for before stays.

        Where it is being worked on, that counts from now on, whatever becomes of the work.
        """
        if key in self._busy:
            due = self._now() + seconds
            self._afterwards[key] = min(due, self._afterwards.get(key, due))
        elif self._due.get(key, math.inf) > self._now() + seconds:
            self.add_in(key, seconds)

    def forget(self, key: Key) -> None:
        """There is nothing of that name any more."""
        self._due.pop(key, None)
        self._failures.pop(key, None)
        self._known.discard(key)

    def __contains__(self, key: Key) -> bool:
        """Whether a key was ever worked on, and not forgotten since."""
        return key in self._known

    # Who does it

    async def take(self) -> Turn:
        """The key whose turn it is; to be given back by `done` or `failed`."""
        while not any(self._lanes):
            taker: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._takers.append(taker)
            try:
                await taker
            except asyncio.CancelledError:
                if taker.done() and not taker.cancelled():
                    self._wake()  # it was woken, and can't come
                raise
        key = self._next()
        now = self._now()
        self._busy[key] = now
        self._known.add(key)
        return Turn(key, now - self._waiting.pop(key))

    def _next(self) -> Key:
        first, rest = self._lanes
        if first and (not rest or self._in_a_row < FIRST_VISITS_IN_A_ROW):
            self._in_a_row = self._in_a_row + 1 if rest else 0
            return first.popleft()
        self._in_a_row = 0
        return rest.popleft()

    def done(self, key: Key, again_in: float | None = None) -> None:
        """The work on `key` went well; it is due again in so many seconds, if at all."""
        self._failures.pop(key, None)
        self._end(key)
        if again_in is None:
            self._due.pop(key, None)
        else:
            self.add_in(key, again_in)
        due = self._afterwards.pop(key, None)
        if due is not None:
            self.add_within(key, max(0.0, due - self._now()))

    def failed(self, key: Key) -> None:
        """The work on `key` broke off."""
        self._failures[key] = self._failures.get(key, 0) + 1
        self._dirty.pop(key, None)
        self._afterwards.pop(key, None)
        self._end(key)
        self.add_in(key, pause_after(self._failures[key], self._chance()))

    # How it stands

    def depth(self) -> int:
        """How many keys wait for their turn."""
        return len(self._waiting)

    def delayed(self) -> int:
        """How many keys are due later."""
        return len(self._due)

    def busy(self) -> Mapping[Key, float]:
        """What is being worked on, and for how many seconds."""
        now = self._now()
        return {key: now - since for key, since in self._busy.items()}

    def oldest(self) -> float:
        """For how many seconds the key that waits longest has waited."""
        return self._now() - min(self._waiting.values(), default=self._now())

    def _put(self, key: Key) -> None:
        if key in self._busy:
            self._dirty.setdefault(key, self._now())
        elif key not in self._waiting:
            self._line_up(key, self._now())

    def _line_up(self, key: Key, since: float) -> None:
        self._due.pop(key, None)
        self._waiting[key] = since
        self._lanes[key in self._known].append(key)
        self._wake()

    def _end(self, key: Key) -> None:
        del self._busy[key]
        since = self._dirty.pop(key, None)
        if since is not None:
            self._line_up(key, since)

    def _wake(self) -> None:
        while self._takers:
            taker = self._takers.popleft()
            if not taker.done():
                taker.set_result(None)
                return

    def _list(self, key: Key, due: float) -> None:
        self._listed[key] = due
        heapq.heappush(self._heap, (due, key))

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if self._heap:
            self._timer = asyncio.get_running_loop().call_at(self._heap[0][0], self._ripen)

    def _ripen(self) -> None:
        now = self._now()
        while self._heap and self._heap[0][0] <= now:
            listed, key = heapq.heappop(self._heap)
            if self._listed.get(key) != listed:
                continue  # an earlier entry has taken its place
            del self._listed[key]
            due = self._due.get(key, math.inf)
            if due <= now:
                self._put(key)
            elif due < math.inf:
                self._list(key, due)
        self._arm()

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
