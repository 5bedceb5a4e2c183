"""Tolaria as a service: runs a trainer and stops it gracefully when the system asks."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from esper.services.tolaria.trainer import TolariaTrainer, TrainingResult

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TolariaService:
    """Runs one trainer at a time. The first SIGINT or SIGTERM stops it between two batches.

    A second signal does what it would have done without the service.
    """

    def __init__(self) -> None:
        self._stopping = False
        self._running = False
        self._heeding = False

    def stopping(self) -> bool:
        """Whether the trainer should stop; given to the trainer, which asks before each batch."""
        return self._stopping

    @property
    def running(self) -> bool:
        """Whether a trainer is at work."""
        return self._running

    def stop(self) -> None:
        """Ask the trainer to stop; `run` then raises Interrupted."""
        self._stopping = True

    async def run(self, trainer: TolariaTrainer) -> TrainingResult:
        """Train to the end.

        Raises:
            Interrupted: asked to stop; observers were given the last boundary as a checkpoint.
            LossNotFinite: every rollback was used up.
        """
        self._running = True
        try:
            with self.signals():
                return await trainer.run()
        finally:
            self._running = False

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Inside, signals ask to stop; `run` does it too, for those who don't.

        The loop is busy training, so the handler only sets a flag that the trainer reads.
        """
        if self._heeding:
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def ask(number: int, _frame: FrameType | None) -> None:
            self.stop()
            signal.signal(number, before[signal.Signals(number)])

        try:
            for number in SIGNALS:
                signal.signal(number, ask)
        except ValueError:
            # Only the main thread may set handlers; elsewhere `stop` is the way.
            yield
            return
        self._heeding = True
        try:
            yield
        finally:
            self._heeding = False
            for number, handler in before.items():
                signal.signal(number, handler)
