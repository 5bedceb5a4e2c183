"""What this process knows of an object beyond what the API server holds; lost when it ends.

Nothing here decides anything that could not be decided again without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from esper.errors import WorkFailed
from esper.services.contracts import KernelFigures
from esper_operator.digests import digest_of_object
from esper_operator.plans import Manifest, Notice
from esper_operator.views import Said
from esper_operator.work import pause_after

_LASTING = 4
"""Doublings that a lasting refusal starts at: the API server would say the same for a while."""

_REMEMBERED_NOTICES = 64

AGAIN_SECONDS = 3.0
"""Between two applies of a child from the same, where somebody changes it back again and again."""

MAX_BUSY_TURNS = 500
"""Turns in a row that may write; a decision that never comes to rest is at fault."""


@dataclass
class Refusal:
    """A child that was refused: what it was, how often, and when it is tried again."""

    said: Said
    digest: str
    times: int
    until: float


@dataclass
class Memory:
    """Of one object."""

    uid: str
    refused: dict[str, Refusal] = field(default_factory=dict)
    """By `Kind/name`."""
    applied: dict[str, tuple[str, float]] = field(default_factory=dict)
    """The digest of what a child was last applied from, and when, by `Kind/name`."""
    child_statuses: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    """Statuses of its Seeds as they were last written, by uid."""
    child_times: dict[str, float] = field(default_factory=dict)
    """When each was written."""
    stored: Any = None
    """What the hub said of it last."""
    asked_at: float = 0.0
    """When the hub has answered last."""
    same_answers: int = 0
    """How many of its answers in a row have said the same."""
    figures: KernelFigures | None = None
    """What was measured of it, where it is a kernel that is compiled."""
    hub_refusal: Said | None = None
    """Why the hub did not take it."""
    told: set[Notice] = field(default_factory=set)
    """What was told of it: a notice may hold for long, and is told once."""
    busy_turns: int = 0
    """Turns in a row that have written something."""

    def took_turn(self, *, wrote: bool) -> None:
        """A turn of the object is over.

        Raises:
            WorkFailed: it has written something in too many turns in a row; so does each that
                follows, until one writes nothing.
        """
        self.busy_turns = self.busy_turns + 1 if wrote else 0
        if self.busy_turns > MAX_BUSY_TURNS:
            turns = self.busy_turns
            raise WorkFailed(f"got {turns} turns in a row that wrote; allowed: {MAX_BUSY_TURNS}")

    def refusals(self) -> dict[str, Said]:
        """The reason and message of each refused child, by `Kind/name`."""
        return {child: refusal.said for child, refusal in self.refused.items()}

    def refuse(
        self, child: str, manifest: Manifest, said: Said, now: float, *, lasting: bool
    ) -> None:
        """The child of that manifest was refused just now; `lasting` says that it will be again."""
        digest = digest_of_object(manifest)
        before = self.refused.get(child)
        times = before.times + 1 if before is not None and before.digest == digest else 1
        pause = pause_after(times + (_LASTING if lasting else 0), 1.0)
        self.refused[child] = Refusal(said, digest, times, now + pause)

    def forget_refusals(self, there: Callable[[str], bool]) -> None:
        """Forget those of children for which `there` says, by `Kind/name`, that they exist now."""
        for child in [child for child in self.refused if there(child)]:
            del self.refused[child]

    def paces(self, child: str, digest: str, now: float) -> float:
        """Seconds until a child may be applied from the same again; 0: now, which is noted."""
        before, _ = self.applied.get(child, ("", 0.0))
        left = self.rests(child, now)
        if before == digest and left > 0:
            return left
        self.applied[child] = digest, now
        return 0.0

    def rests(self, child: str, now: float) -> float:
        """Seconds until the last apply of a child is so long ago that the hub is asked again."""
        _, at = self.applied.get(child, ("", 0.0))
        left = at + AGAIN_SECONDS - now
        return left if 0 < left <= AGAIN_SECONDS else 0.0

    def tells(self, notice: Notice) -> bool:
        """Whether a notice is to be told; from now on it was."""
        if notice in self.told:
            return False
        if len(self.told) >= _REMEMBERED_NOTICES:
            self.told.clear()
        self.told.add(notice)
        return True

    def accepted(self, child: str) -> None:
        """The child was taken."""
        self.refused.pop(child, None)

    def waits(self, child: str, manifest: Manifest, now: float) -> float:
        """Seconds until a refused child is tried again; 0: now, or it is another manifest."""
        refusal = self.refused.get(child)
        if refusal is None or refusal.digest != digest_of_object(manifest):
            return 0.0
        return max(0.0, refusal.until - now)


class Memories:
    """By kind, namespace and name; an object made anew has none of the old one's."""

    def __init__(self) -> None:
        self._held: dict[tuple[str, str, str], Memory] = {}

    def of(self, kind: str, namespace: str, name: str, uid: str) -> Memory:
        """That of the object; a fresh one where there is none."""
        held = self._held.get((kind, namespace, name))
        if held is None or held.uid != uid:
            held = self._held[kind, namespace, name] = Memory(uid)
        return held

    def refusals(self, kind: str, namespace: str, name: str) -> dict[str, Said]:
        """What was refused of an object's children; nothing where nothing is remembered of it."""
        held = self._held.get((kind, namespace, name))
        return {} if held is None else held.refusals()

    def forget(self, kind: str, namespace: str, name: str) -> None:
        """The object is gone."""
        self._held.pop((kind, namespace, name), None)
