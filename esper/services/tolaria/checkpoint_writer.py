"""Checkpoints are written by a thread, while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable

from esper.services.tolaria.snapshots import Snapshot


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

    def drain(self) -> None:
        """Wait until all that was handed over is written.

        Raises:
            Exception: what writing it failed with.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._error = error
