"""Activation checkpointing runs a forward twice: the second run must leave out what the first did.

`torch.utils.checkpoint` without reentrance numbers the tensors that a region saves, and finds them
again by number when it recomputes the region. A seed that raised in the first run and not in the
second, or whose circuit has opened in between, would shift the numbers. So a fault's own tensors
are struck from the region's list, and the recomputation leaves the seed out at the same place.

The list is torch's own and private; where it can't be found, the seed is asked again. What can't
be made alike: random draws of a seed that raised after drawing, for the host's draw on from there;
a selective checkpoint's cache of operations; and a seed that raises in the second run alone, whose
output is part of the loss already: that is raised.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.compiler import is_dynamo_compiling
from torch.utils import checkpoint

_STOP = getattr(checkpoint, "_StopRecomputationError", None)

CONTROL_FLOW: tuple[type[BaseException], ...] = () if _STOP is None else (_STOP,)
"""What torch raises through a forward to end it early: no fault of whatever was just running."""

_top_hooks: Callable[[bool], Any] | None = getattr(
    getattr(torch._C, "_autograd", None), "_top_saved_tensors_default_hooks", None
)
_graph_task: Callable[[], int] | None = getattr(torch._C, "_current_graph_task_id", None)

_left_out: WeakKeyDictionary[Any, set[tuple[object, int]]] = WeakKeyDictionary()
"""By region, the parts left out of its first run, each with the number of tensors before it."""


class Region:
    """A run of a checkpointed region: the first one, or (`recomputing`) a later one.

    `frame` is torch's record of the region, `group` the key of a later run in it.
    """

    def __init__(self, frame: Any, group: object = None, *, recomputing: bool = False) -> None:
        self.recomputing = recomputing
        self._frame = frame
        self._group = group
        self._begin = 0

    def repeats_without(self, part: object) -> bool:
        """Whether the first run left out `part`, which is about to run, just here."""
        if not self.recomputing:
            self._begin = len(self._frame.weak_holders)
            return False
        left_out = _left_out.get(self._frame, ())
        return (part, self._frame.recomp_counter[self._group]) in left_out

    def leave_out(self, part: object) -> None:
        """In the first run: forget what `part` has saved, and have later runs leave it out."""
        del self._frame.weak_holders[self._begin :]
        del self._frame.x_metadatas[self._begin :]
        _left_out.setdefault(self._frame, set()).add((part, self._begin))


def current_region() -> Region | None:
    """The innermost checkpointed region that a forward is in; None outside, mostly.

    None too with reentrant checkpointing, whose first run records nothing and whose second may
    differ, and in code that is being compiled.
    """
    if is_dynamo_compiling() or _top_hooks is None:
        return None
    hooks = _top_hooks(False)
    return None if hooks is None else _region_of(hooks[0])


def in_backward() -> bool:
    """Whether a backward pass is running: a forward is then a recomputation."""
    return not is_dynamo_compiling() and _graph_task is not None and _graph_task() != -1


def _region_of(pack: Any) -> Region | None:
    """The region whose tensors the hook `pack` takes, where it is one of torch's checkpoints."""
    if getattr(pack, "__module__", None) != checkpoint.__name__:
        return None
    while hasattr(pack, "__wrapped__"):
        pack = pack.__wrapped__
    cells = (cell.cell_contents for cell in pack.__closure__ or ())
    inside = dict(zip(pack.__code__.co_freevars, cells, strict=True))
    reference = inside.get("target_frame_ref")
    frame = inside.get("frame") if reference is None else reference()
    fields = ("weak_holders", "x_metadatas", "recomp_counter")
    if not all(hasattr(frame, name) for name in fields):
        return None
    return Region(frame, inside.get("gid"), recomputing=reference is not None)
