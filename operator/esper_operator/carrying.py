"""A plan carried out: each of its requests in its order, and what became of them remembered."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from esper.errors import EsperError
from esper_operator.children.objects import digest_in
from esper_operator.errors import ApiConflict, ApiNotFound, ApiRefused, NotOurs
from esper_operator.kinds import BY_NAME, JOB, MANAGED_LABEL, MENDED, OWN, SECRET, Kind
from esper_operator.memory import Memory
from esper_operator.plans import Manifest, Notice, Plan
from esper_operator.store import Store, version_of
from esper_operator.views import POLICY_ANNOTATION, UID_LABEL, Said
from esper_operator.work import Key
from esper_operator.writing import Writer

TURN_SECONDS = 0.02
"""A turn that has written something makes no more children after that: while the API server is
slow, for many want something of it, each object gets a little at a time."""
HUB_REQUESTS, HUB_SECONDS = 6, 0.1
"""Objects for which the hub is asked at once; others come again, and keep no worker waiting."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """The object that a plan is about."""

    kind: Kind
    namespace: str
    name: str
    uid: str


@dataclass
class Outcome:
    """What carrying out a plan has come to."""

    wrote: bool = False
    """Whether there is something new to decide on."""
    again_in: float = math.inf
    gone: bool = False
    """Whether the object is not there any more."""
    began: float = field(default_factory=time.monotonic)

    def over(self) -> bool:
        """Whether the turn has written something and lasted long enough; the rest has the next."""
        return self.wrote and time.monotonic() - self.began > TURN_SECONDS

    def soon(self, seconds: float | None) -> None:
        """Look again in so many seconds at the latest."""
        if seconds is not None:
            self.again_in = min(self.again_in, seconds)


class Carrier:
    """Carries plans out with the one writer, and puts its answers into the store at once."""

    def __init__(
        self,
        writer: Writer,
        store: Store,
        enqueue: Callable[[Iterable[Key]], None],
        clock: Callable[[], float],
    ) -> None:
        """`enqueue` has what an answer concerns looked at; `clock` gives the time of day."""
        self._enqueue = enqueue
        self._writer = writer
        self._store = store
        self._asking = 0
        self._clock = clock

    async def status(self, about: About, plan: Plan, outcome: Outcome) -> bool:
        """Write the status; False: the object is gone, or is another one."""
        if plan.status is None:
            return True
        manifest = {
            "apiVersion": about.kind.api_version,
            "kind": about.kind.name,
            "metadata": {"name": about.name, "namespace": about.namespace, "uid": about.uid},
            "status": plan.status,
        }
        before = self._store.version(about.kind, about.namespace, about.name)
        try:
            answer = await self._writer.apply_status(manifest)
        except (ApiNotFound, ApiConflict) as error:
            _log.debug("the status has no object any more: %s", error)
            return False
        own = Key(about.kind.name, about.namespace, about.name)
        outcome.wrote |= before != version_of(answer)
        self._enqueue(key for key in self._store.put(about.kind, answer) if key != own)
        return True

    async def rest(self, about: About | None, memory: Memory, plan: Plan, outcome: Outcome) -> None:
        """All but the status: what is to be gone, to be made, and to be told about the object."""
        if about is not None:
            await self.notices(about, memory, plan, outcome)
        for deletion in plan.delete:
            kind = BY_NAME[deletion.kind]
            name = (deletion.namespace, deletion.name)
            grace = deletion.grace_seconds
            if not await self._writer.delete(kind, *name, deletion.uid, grace_seconds=grace):
                # Its end fell between the list that filled the store and the watch.
                self._enqueue(self._store.drop_uid(kind, name, deletion.uid))
            outcome.wrote = True
        all_there = True
        for manifest in plan.apply:
            if outcome.over():
                return
            # A Job comes after what its pods can't do without.
            if all_there or manifest["kind"] != JOB.name:
                all_there &= await self.child(memory, manifest, outcome)
        for manifest in plan.child_statuses:
            if outcome.over():
                return
            await self._child_status(memory, manifest, outcome)

    async def notices(self, about: About, memory: Memory, plan: Plan, outcome: Outcome) -> None:
        """What is to be told, with the status whose news it is; the next plan has none of it."""
        for notice in plan.notices:
            if notice.background and self._writer.background_wait() > 0:
                continue
            if memory.tells(notice):
                await self._told(about, notice)
                outcome.wrote = True

    async def child(
        self,
        memory: Memory,
        manifest: Manifest,
        outcome: Outcome,
        known_by: Manifest | None = None,
    ) -> bool:
        """Apply a child; one that is refused is remembered as that, and tried again later.

        `known_by` is what it is remembered by, where the manifest is another one each time. False:
        it was not applied.
        """
        kind = BY_NAME[manifest["kind"]]
        name = manifest["metadata"]["name"]
        child = f"{kind.name}/{name}"
        known = manifest if known_by is None else known_by
        now = self._clock()
        waits = memory.waits(child, known, now)
        if not waits and kind in MENDED:
            waits = memory.paces(child, _mark(manifest), now)
        if waits > 0:
            outcome.soon(waits)
            return False
        before = self._store.version(kind, manifest["metadata"]["namespace"], name)
        try:
            answer = await self._applied(kind, manifest)
        except ApiConflict as error:
            outcome.soon(1.0)
            _log.info("to be applied again: %s", error)
            return False
        except ApiRefused as error:
            said = Said(error.reason, error.said)
            # What a session of that name has left goes soon.
            lasting = not isinstance(error, NotOurs)
            memory.refuse(child, known, said, self._clock(), lasting=lasting)
            _log.info("refused: %s", error)
            outcome.wrote = True
            return False
        # What the apply has not changed since it was decided on, the next one would not either.
        outcome.wrote |= child in memory.refused or before != version_of(answer)
        memory.accepted(child)
        # Its own event will be old news: whom it concerns besides has to learn of it here.
        self._enqueue(self._store.put(kind, answer, applied=True))
        return True

    async def secret(
        self,
        memory: Memory,
        name: str,
        asked: Callable[[], Awaitable[Manifest]],
        outcome: Outcome,
    ) -> None:
        """Apply the Secret that the hub fills; where it does not, that is remembered."""
        child = f"{SECRET.name}/{name}"
        now = self._clock()
        waits = max(memory.waits(child, {}, now), memory.rests(child, now))
        if self._asking >= HUB_REQUESTS:
            waits = max(waits, HUB_SECONDS)
        if waits > 0:
            outcome.soon(waits)
            return
        self._asking += 1
        try:
            manifest = await asked()
        except EsperError as error:
            said = Said(type(error).__name__, str(error))
            memory.refuse(child, {}, said, self._clock(), lasting=error.permanent)
            outcome.wrote = True
            return
        finally:
            self._asking -= 1
        await self.child(memory, manifest, outcome, known_by={})

    async def _applied(self, kind: Kind, manifest: Manifest) -> Manifest:
        """Make a child, or change the one that was made for the same parent, and no other.

        Raises:
            NotOurs: there is another object of that name.
            ApiConflict: it has come or gone just now.
        """
        meta = manifest["metadata"]
        place, labels = (meta["namespace"], meta["name"]), meta["labels"]
        session = labels.get(UID_LABEL, "")
        try:
            return await self._writer.apply(manifest, self._store.own(kind, *place, session))
        except ApiConflict:
            # What others may have made too is heard of, and is theirs as well.
            there = None if kind in OWN else await self._writer.there(manifest)
            if there is None:
                raise
        held = there.get("labels") or {}
        if any(held.get(name) != labels.get(name) for name in (MANAGED_LABEL, UID_LABEL)):
            raise NotOurs(f"{kind.name} {'/'.join(place)}")
        return await self._writer.apply(manifest, there["uid"])

    async def _child_status(self, memory: Memory, manifest: Manifest, outcome: Outcome) -> None:
        kind, meta = BY_NAME[manifest["kind"]], manifest["metadata"]
        uid = self._store.own(kind, meta["namespace"], meta["name"], memory.uid)
        if uid is None:
            return  # it was refused: what has its name is not the session's; it is tried again
        wait = self._writer.background_wait()
        if wait > 0:
            outcome.soon(wait)
            return
        try:
            answer = await self._writer.apply_status({**manifest, "metadata": {**meta, "uid": uid}})
        except (ApiNotFound, ApiConflict):
            outcome.soon(1.0)  # it has gone just now, and is made anew
            return
        self._store.put(kind, answer)
        memory.child_statuses[uid] = manifest["status"]
        memory.child_times[uid] = self._clock()
        outcome.wrote = True

    async def _told(self, about: About, notice: Notice) -> None:
        described = {
            "apiVersion": about.kind.api_version,
            "kind": about.kind.name,
            "namespace": about.namespace,
            "name": about.name,
            "uid": about.uid,
        }
        try:
            await self._writer.tell(described, notice.type, notice.reason, notice.message)
        except ApiRefused as error:
            _log.info("an event can't be told: %s", error)


def _mark(manifest: Manifest) -> str:
    """What a child is made of: its content, and what its Secret says that the hub was told."""
    policy = manifest["metadata"]["annotations"].get(POLICY_ANNOTATION, "")
    return f"{digest_in(manifest)} {policy}"
