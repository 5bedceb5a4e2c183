"""How a session comes to its end, and the step that a policy takes towards it."""

from __future__ import annotations

from dataclasses import dataclass

from esper_operator.decisions.scene import Scene
from esper_operator.plans import Notice


@dataclass(frozen=True)
class End:
    """The end of a session; `reason` is one of ours, or what a worker said of its own."""

    succeeded: bool
    reason: str
    message: str
    time: float


@dataclass(frozen=True)
class Step:
    """What a policy makes of a scene: perhaps the end, perhaps another attempt."""

    scene: Scene
    end: End | None = None
    notices: tuple[Notice, ...] = ()
    again_in: float | None = None


def soonest(*seconds: float | None) -> float | None:
    """The least of what is not None, at least a tenth of a second; None where all are."""
    found = [each for each in seconds if each is not None]
    return max(0.1, min(found)) if found else None
