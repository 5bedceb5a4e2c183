"""Training loops that take turns: each runs some steps, then waits while another one runs.

What is timed is the trainer's own loop, not a copy of it. Each loop has a thread of its own, which
is held up at the beginning of a step; the time of a turn is taken in that thread, so that passing
the turn on is not part of it. All ranks give the turns in one order.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks.execution_timing import Timings, collecting_no_garbage
from esper.services.tolaria.distribution import Ranks
from esper.services.tolaria.process_group import ProcessGroup

BLOCK_SECONDS = 0.01
MAX_BLOCK = 16
GRACE_SECONDS = 60.0
EDGE_STEPS = 3
"""Steps at the beginning of an epoch in which DistributedDataParallel sorts its buckets anew."""

Loop = Callable[[Callable[[], None]], None]
"""Trains for ever; calls what it is given at the beginning of every step."""


class _Over(BaseException):
    """No more turns."""


class Paced:
    """A training loop in a thread of its own that runs only when it is given a turn."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._go, self._came = threading.Semaphore(0), threading.Semaphore(0)
        self._left, self._over = 0, False
        self._began = self._seconds = 0.0
        self._error: BaseException | None = None
        self.steps = 0
        """How many were taken."""
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        self._wait()

    def run(self, steps: int) -> float:
        """Take so many steps; the seconds that they took."""
        self._left = steps
        self._go.release()
        self._wait()
        self.steps += steps
        return self._seconds

    def close(self) -> None:
        """End the loop where it is."""
        self._over = True
        self._go.release()
        self._thread.join()

    def _wait(self) -> None:
        self._came.acquire()
        if self._error is not None:
            raise self._error

    def _gate(self) -> None:
        if self._left == 0:
            self._seconds = time.perf_counter() - self._began
            self._came.release()
            self._go.acquire()
            if self._over:
                raise _Over
            self._began = time.perf_counter()
        self._left -= 1

    def _run(self) -> None:
        torch.set_num_threads(1)
        try:
            self._loop(self._gate)
        except _Over:
            pass
        except BaseException as error:
            self._error = error
            self._came.release()


class Held:
    """`ranks`, but that asking whether to stop, before each step, first waits for its turn.

    The time in which others have theirs does not bring the next question nearer.
    """

    def __init__(self, ranks: Ranks, gate: Callable[[], None]) -> None:
        self._ranks = ProcessGroup() if ranks.size > 1 else ranks
        self._rhythm = self._ranks._rhythm if isinstance(self._ranks, ProcessGroup) else None
        self._gate = gate

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ranks, name)

    def agree_to_stop(self) -> bool:
        """Wait for the turn, then ask as ever."""
        began = time.monotonic()
        self._gate()
        if self._rhythm is not None:
            self._rhythm._asked += time.monotonic() - began
        return self._ranks.agree_to_stop()


Meter = Callable[[], float]
"""Seconds that some part of all steps has taken so far."""


def turns(
    ranks: Ranks,
    loops: Mapping[str, Loop],
    epoch_steps: int,
    seconds: float,
    process: int,
    meters: Mapping[str, Meter] | None = None,
) -> Timings:
    """Seconds a step of every loop, in rounds of shuffled order, for about `seconds`.

    On a machine that gives them no turn in that time it goes on until there is one round to keep.

    A turn is a step that is not timed and a block of some that are; it took as long as it did on
    the slowest rank. The ends of epochs are left out, for all loops of the round. A meter's part of
    a block is kept beside it under its own name.
    """
    meters = meters or {}
    order, shuffling = list(loops), random.Random(process)
    shuffling.shuffle(order)
    paced = {name: Paced(loops[name]) for name in order}
    for name in order:
        paced[name].run(EDGE_STEPS)
    longest = max(_slowest(ranks, [paced[name].run(3)])[0] / 3 for name in order)
    block = max(1, min(MAX_BLOCK, round(BLOCK_SECONDS / longest)))
    found: dict[str, list[float]] = {name: [] for name in (*loops, *meters)}
    end = time.monotonic() + seconds
    with collecting_no_garbage():
        while ranks.told(
            (now := time.monotonic()) < end or (not found[order[0]] and now < end + GRACE_SECONDS)
        ):
            shuffling.shuffle(order)
            taken: dict[str, float] = {}
            for name in order:
                paced[name].run(1)
                before = [read() for read in meters.values()]
                own = [paced[name].run(block)]
                own += [read() - was for read, was in zip(meters.values(), before, strict=True)]
                slowest = [one / block for one in _slowest(ranks, own)]
                taken |= dict(zip((name, *meters), slowest, strict=True))
            gc.collect(0)
            if not at_edge(paced[order[0]].steps, block, epoch_steps):
                for name, one in taken.items():
                    found[name].append(one)
    for one in paced.values():
        one.close()
    return Timings(processes=(found,))


def at_edge(steps: int, block: int, epoch_steps: int) -> bool:
    """Whether the last `block` of `steps` has an epoch's first steps, or its last."""
    places = [step % epoch_steps for step in range(steps - block, steps)]
    return any(place < EDGE_STEPS or place == epoch_steps - 1 for place in places)


def _slowest(ranks: Ranks, values: list[float]) -> list[float]:
    """For each value the largest of any rank; afterwards all ranks begin together."""
    rows = ranks.gathered(torch.tensor(values, dtype=torch.float64))
    return [float(value) for value in rows.amax(dim=0)]
