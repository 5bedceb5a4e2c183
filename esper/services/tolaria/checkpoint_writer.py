"""Checkpoints are written by a thread, while training goes on."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from esper.services.tolaria.snapshots import Snapshot

LOOK_SECONDS = 0.1
SILENCE_SECONDS = 5.0
"""For a place to answer a run that is asked to stop; a pod's grace may be no more than 10."""


class CheckpointWriter:
    """Writes one snapshot at a time.

    An error is raised to whoever hands over the next one, or drains; it is raised once.

    Args:
        write: writes a snapshot; called in a thread of its own. A process that ends does not wait
            for it, so what it leaves when it is cut short must be no checkpoint.
    """

    def __init__(self, write: Callable[[Snapshot], None]) -> None:
        self._write = write
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether one is being written."""
        return self._thread is not None and self._thread.is_alive()

    def hand_over(self, snapshot: Snapshot) -> None:
        """Write `snapshot`, which must not change any more, once the one before is written.

        Raises:
            Exception: what the one before failed with; then `snapshot` is not written.
        """
        self.drain()
        self._thread = threading.Thread(
            target=self._run, args=(snapshot,), name="esper-checkpoint", daemon=True
        )
        self._thread.start()

    def drain(self, given_up: Callable[[], bool] = lambda: False) -> bool:
        """Wait until all that was handed over is written; False where it was `given_up` before.

        Raises:
            Exception: what writing it failed with.
        """
        if self._thread is not None:
            while self._thread.is_alive():
                self._thread.join(LOOK_SECONDS)
                if self._thread.is_alive() and given_up():
                    return False
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        return True

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._error = error


class Silence:
    """Whether a place where checkpoints lie has been silent for too long to be waited for.

    Args:
        stopping: whether there is a hurry; without it, no silence is too long.
        answers: a number that grows as long as the place answers, None if nothing of it is known.
    """

    def __init__(self, stopping: Callable[[], bool], answers: Callable[[], int | None]) -> None:
        self._stopping = stopping
        self._answers = answers
        self._heard: int | None = None
        self._since = math.inf

    def __call__(self) -> bool:
        """Look once more; from the first look in a hurry on, time counts."""
        if not self._stopping() or (heard := self._answers()) is None:
            return False
        if heard != self._heard:
            self._heard, self._since = heard, time.monotonic()
        return time.monotonic() > self._since + SILENCE_SECONDS
