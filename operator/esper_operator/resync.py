"""Whether the store still agrees with the API server: a list of metadata, every few minutes.

It mends what a watch can't tell, deletions that happened while it was renewed; and it tells a watch
that has died from one that has nothing to say. An object that the API server has had for longer
than `GRACE_SECONDS` in a version that the store has not seen proves that its watch is dead.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping

from esper_operator.api import ClusterApi, Object
from esper_operator.errors import ApiRefused, ApiUnavailable
from esper_operator.kinds import BY_METADATA, WATCHED, Kind
from esper_operator.scope import Scope
from esper_operator.store import Name, Store
from esper_operator.work import Key

GRACE_SECONDS = 90.0
"""Longer than a watch takes to notice that its server has gone."""
SETTLE_SECONDS = 2.0
"""After a watch was renewed, until what it has missed is looked for."""
Held = Mapping[Name, tuple[str, int]]
_log = logging.getLogger(__name__)


class Resync:
    """Compares the store with the API server, kind by kind."""

    def __init__(
        self,
        api: ClusterApi,
        store: Store,
        enqueue: Callable[[Iterable[Key]], None],
        *,
        scope: Scope,
        every: float,
        clock: Callable[[], float],
    ) -> None:
        """`scope` is what is watched; `every` is in seconds."""
        self._api = api
        self._store = store
        self._enqueue = enqueue
        self._scope = scope
        self._every = every
        self._clock = clock
        self._agreed: dict[str, float] = {}
        self._unseen: dict[str, dict[Name, tuple[tuple[str, int], float]]] = {}
        self._wanted: set[Kind] = set()
        self._wake = asyncio.Event()

    async def run(self) -> None:
        """Compare for ever."""
        begun = self._clock()
        self._agreed = {kind.name: begun for kind in (*WATCHED, *BY_METADATA)}
        due = dict.fromkeys((*WATCHED, *BY_METADATA), begun + self._every)
        while True:
            wait = min(due.values()) - self._clock()
            if await self._woken(wait):
                await asyncio.sleep(SETTLE_SECONDS)
                for kind in self._wanted:
                    due[kind] = self._clock()
                self._wanted.clear()
            for kind in [kind for kind, at in due.items() if at <= self._clock()]:
                agrees = await self._compared(kind)
                due[kind] = self._clock() + (self._every if agrees else GRACE_SECONDS / 4)

    def soon(self, kind: Kind) -> None:
        """The watch of `kind` was renewed: what was deleted meanwhile must be looked for."""
        self._wanted.add(kind)
        self._wake.set()

    def ages(self) -> dict[str, float]:
        """Seconds since each kind was last seen to agree."""
        now = self._clock()
        return {kind: now - at for kind, at in self._agreed.items()}

    def complaint(self) -> str | None:
        """Which watch is dead; None: none is known to be."""
        now = self._clock()
        for kind, unseen in self._unseen.items():
            late = [name for name, (_, since) in unseen.items() if now - since > GRACE_SECONDS]
            if late:
                return f"the watch of {kind} has not told of {'/'.join(late[0])}, and is dead"
        return None

    async def _woken(self, seconds: float) -> bool:
        try:
            await asyncio.wait_for(self._wake.wait(), max(seconds, 0.0))
        except TimeoutError:
            return False
        self._wake.clear()
        return True

    async def _compared(self, kind: Kind) -> bool:
        try:
            unseen: dict[Name, tuple[str, int]] = {}
            for namespace in self._scope.places:
                before = self._store.held(kind, namespace)
                unseen |= await self._compare(kind, namespace, before)
        except (ApiUnavailable, ApiRefused) as error:
            _log.info("%s can't be compared at the moment: %s", kind.plural, error)
            return False
        stored, now = self._store.held(kind, None), self._clock()
        known = self._unseen.get(kind.name, {})
        self._unseen[kind.name] = {
            name: known[name]
            if name in known and not _seen(stored.get(name), known[name][0])
            else (held, now)
            for name, held in unseen.items()
        }
        if not unseen:
            self._agreed[kind.name] = now
        return not unseen

    async def _compare(
        self, kind: Kind, namespace: str | None, before: Held
    ) -> dict[Name, tuple[str, int]]:
        """What the API server holds and the store has not seen; what is gone is dropped."""
        listed: dict[Name, tuple[str, int]] = {}
        async for chunk, _ in self._api.chunks(
            kind, namespace, self._scope.selecting(kind), metadata_only=True
        ):
            for found in chunk:
                listed |= _held(found)
        for name, (uid, _) in before.items():
            if listed.get(name, ("", 0))[0] != uid:
                self._enqueue(self._store.drop_uid(kind, name, uid))
        now = self._store.held(kind, namespace)
        return {
            name: held
            for name, held in listed.items()
            if not self._store.deleted(held[0]) and not _seen(now.get(name), held)
        }


def _held(found: Object) -> dict[Name, tuple[str, int]]:
    meta = found["metadata"]
    return {(meta["namespace"], meta["name"]): (meta["uid"], int(meta["resourceVersion"]))}


def _seen(stored: tuple[str, int] | None, listed: tuple[str, int]) -> bool:
    return stored is not None and stored[0] == listed[0] and stored[1] >= listed[1]
