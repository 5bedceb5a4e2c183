"""Structured logging that never makes its caller wait.

A logging call puts what it has to say on a bounded queue and returns; one thread formats and
writes. A full queue drops the record and counts it: training must not wait for a slow disk. Losses
are told in the log itself, while it runs. Libraries' records go the same way, so that a process has
one log in one format.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Lock, Thread
from types import TracebackType
from typing import Literal

from esper.utils.log_lines import (
    LogEntry,
    OptimizedStructuredFormatter,
    current_trace_id,
    entry_of,
    tracing,
)

__all__ = (
    "LOGGERS",
    "ROOT",
    "AsyncEsperLogger",
    "Level",
    "OptimizedStructuredFormatter",
    "current_trace_id",
    "tracing",
)

ROOT = "esper"
"""The logger above every logger of Esper; each module logs to `logging.getLogger(__name__)`."""

Level = Literal["debug", "info", "warning", "error"]

LOGGERS: Mapping[str, tuple[str, ...]] = {
    "kasmina": ("esper.core", "esper.execution"),
    "tolaria": ("esper.services.tolaria",),
    "tamiyo": ("esper.services.tamiyo",),
    "urza": ("esper.services.urza",),
    "tezzeret": ("esper.services.tezzeret",),
    "oona": ("esper.services.oona", "esper.services.oona_client"),
    "operator": ("esper_operator",),
    "uvicorn": ("uvicorn",),
    "sqlalchemy": ("sqlalchemy",),
    "alembic": ("alembic",),
    "botocore": ("botocore", "boto3", "s3transfer", "urllib3"),
    "redis": ("redis",),
    "kopf": ("kopf",),
}
"""Whose level can be set, by the names of `esper.configs.LOG_NAMES`."""

_LIBRARIES = frozenset({"uvicorn", "sqlalchemy", "alembic", "botocore", "redis", "kopf"})
_LIBRARY_LEVEL: Level = "warning"  # below it they tell of every request, with its headers

GATHER_SECONDS = 0.01
"""How long the writing thread lets records gather: waking it for each would slow the caller."""
REPORT_SECONDS = 10.0
"""Losses are told at once, then at most so often."""
STOP_SECONDS = 5.0
"""How long stopping waits for a place that takes no lines, a pipe that nobody reads."""
_BATCH = 256
# Formatting holds the interpreter's lock, for which a caller would wait. So the writing thread lets
# go of it after every few lines, unless so many wait that it must hurry.
_TURN = 3
_BREATH_SECONDS = 20e-6
# A full disk, a closed pipe; a stream that is closed; a process without standard error.
_UNWRITABLE = (OSError, ValueError, AttributeError)


class _Front(logging.Handler):
    """Hands entries on, in the caller's thread."""

    def __init__(self, accept: Callable[[LogEntry], None], lose: Callable[[int], None]) -> None:
        """`accept` takes an entry, `lose` how many could not be made."""
        super().__init__()
        self.accept = accept
        self._lose = lose

    def createLock(self) -> None:  # noqa: N802 - the library's name
        """Nothing here needs a lock."""
        self.lock = None

    def handle(self, record: logging.LogRecord) -> bool:
        """What `logging` calls; the way through the library's own is longer."""
        if self.filters and not self.filter(record):
            return False
        try:
            entry = entry_of(record)
        except Exception:  # an argument that can't be said must not break the work it is logged in
            self._lose(1)
        else:
            self.accept(entry)
        return True


class _Output:
    """Where lines go: a file, or standard error as it is at that moment."""

    def __init__(self, path: Path | None) -> None:
        self._file = path.open("ab", buffering=0) if path is not None else None

    def write(self, text: str) -> None:
        """Write it all, in one piece where the system allows.

        Raises:
            OSError: it can't be written.
            ValueError: standard error is closed.
            AttributeError: there is none.
        """
        data = text.encode("utf-8", "backslashreplace")
        descriptor = self._descriptor()
        if descriptor is None:
            sys.stderr.write(data.decode())
            sys.stderr.flush()
            return
        # No buffer: a process forked from this one would write what lies there once more.
        while data:
            data = data[os.write(descriptor, data) :]

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()

    def _descriptor(self) -> int | None:
        if self._file is not None:
            return self._file.fileno()
        try:
            return sys.stderr.fileno()
        except (io.UnsupportedOperation, AttributeError):
            return None


class AsyncEsperLogger:
    """The log of one process: from `start` to `stop`, its records go to one place.

    A context manager. `stop` waits until everything queued is written, `STOP_SECONDS` at most. A
    process forked meanwhile writes its own records itself, to the same place.

    `dropped` counts the records lost so far: those that found the queue full, could not be made or
    written, or waited for a reader at the end. The log says so as well, in lines of their own.

    Args:
        component: the component's name, on every line.
        level: the least severe level written of Esper's records.
        levels: other levels, by the names of `LOGGERS`; libraries' is warning where none is given.
        file: where lines are appended; None means standard error.
        queue_records: how many records may wait before more are dropped.
    """

    def __init__(
        self,
        component: str,
        *,
        level: Level = "warning",
        levels: Mapping[str, Level] | None = None,
        file: Path | None = None,
        queue_records: int = 10_000,
    ) -> None:
        self.component = component
        self.dropped = 0
        self._level = level
        self._levels = levels or {}
        self._path = file
        self._limit = queue_records
        self._formatter = OptimizedStructuredFormatter(component)
        self._entries: SimpleQueue[LogEntry | None] = SimpleQueue()
        self._counting = Lock()
        self._told = 0
        self._told_at = -REPORT_SECONDS
        self._front = _Front(self._queue, self._lose)
        self._writing = 0
        self._thread: Thread | None = None
        self._output: _Output | None = None
        self._running = ExitStack()

    def start(self) -> None:
        """Take over the process's records; a second call changes nothing.

        Raises:
            OSError: the file can't be opened.
        """
        if self._output is not None:
            return
        self._output = output = _Output(self._path)
        with ExitStack() as undo:
            undo.callback(self._close, output)
            self._front = _Front(self._queue, self._lose)
            self._thread = Thread(
                target=self._write_queued, args=(self._entries,), name="esper-log", daemon=True
            )
            self._thread.start()
            undo.callback(self._finish)
            esper = logging.getLogger(ROOT)
            undo.callback(setattr, esper, "propagate", esper.propagate)
            esper.propagate = False
            self._set_levels(undo)
            for unused in ("logThreads", "logProcesses", "logMultiprocessing"):
                undo.callback(setattr, logging, unused, getattr(logging, unused))
                setattr(logging, unused, False)  # no line says it, and finding it out takes time
            for logger in (logging.getLogger(), esper):
                logger.addHandler(self._front)
                undo.callback(logger.removeHandler, self._front)
            self._running = undo.pop_all()
        _started.add(self)

    def stop(self) -> None:
        """Write what is queued, tell of losses, and leave logging as it was found."""
        _started.discard(self)
        self._running.close()
        self._output = None

    def _set_levels(self, undo: ExitStack) -> None:
        levels: dict[str, Level] = {ROOT: self._level}
        for name, loggers in LOGGERS.items():
            fallback = _LIBRARY_LEVEL if name in _LIBRARIES else None
            level = self._levels.get(name, fallback)
            if level is not None:
                levels |= dict.fromkeys(loggers, level)
        levels.setdefault("esper_operator", self._level)
        for name, level in levels.items():
            logger = logging.getLogger(name)
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(level.upper())

    # In the callers' threads

    def _queue(self, entry: LogEntry) -> None:
        if self._entries.qsize() >= self._limit:
            self._lose(1)
        else:
            self._entries.put(entry)

    def _lose(self, count: int) -> None:
        with self._counting:
            self.dropped += count

    # In the writing thread

    def _write_queued(self, entries: SimpleQueue[LogEntry | None]) -> None:
        running = True
        while running:
            batch, running = self._gather(entries)
            self._write(batch)
            if self.dropped > self._told and self._may_tell():
                self._tell_losses()

    def _gather(self, entries: SimpleQueue[LogEntry | None]) -> tuple[list[LogEntry], bool]:
        """What has come, after waiting for the first; and whether more will."""
        try:
            wait = None if self.dropped == self._told else REPORT_SECONDS
            entry = entries.get(timeout=wait)
        except Empty:
            return [], True
        batch: list[LogEntry] = []
        time.sleep(GATHER_SECONDS if entry is not None else 0)
        while entry is not None:
            batch.append(entry)
            if len(batch) == _BATCH or entries.empty():
                return batch, True
            entry = entries.get()
        return batch, False

    def _write(self, batch: list[LogEntry]) -> None:
        output = self._output
        if not batch or output is None:
            return
        self._writing = len(batch)
        lines = []
        for number, entry in enumerate(batch):
            if number % _TURN == _TURN - 1 and len(batch) < _BATCH:
                time.sleep(_BREATH_SECONDS)
            try:
                lines.append(self._formatter.line(entry) + "\n")
            except Exception:  # an extra whose repr fails must not end the log
                self._lose(1)
        try:
            output.write("".join(lines))
        except _UNWRITABLE:
            self._lose(len(lines))
        self._writing = 0

    def _may_tell(self) -> bool:
        return time.monotonic() - self._told_at >= REPORT_SECONDS

    def _tell_losses(self) -> None:
        dropped = self.dropped
        extras = {"lost": dropped - self._told, "lostInAll": dropped}
        line = LogEntry(time.time(), "WARNING", ROOT, "log records lost", None, None, extras)
        self._told_at = time.monotonic()
        if self._output is None:
            return
        try:
            self._output.write(self._formatter.line(line) + "\n")
            self._told = dropped
        except _UNWRITABLE:
            """They are told with the next ones."""

    def _finish(self) -> None:
        if self._thread is not None:
            self._entries.put(None)
            self._thread.join(STOP_SECONDS)
            if self._thread.is_alive():
                self._give_up()
                return
            self._thread = None
        if self.dropped > self._told:
            self._tell_losses()

    def _give_up(self) -> None:
        """Nobody takes what is written: count the rest, and leave the thread to end when it can."""
        waiting, self._entries = self._entries, SimpleQueue()
        left = self._writing
        with suppress(Empty):
            while True:
                left += waiting.get_nowait() is not None
        waiting.put(None)
        self._lose(left)

    def _close(self, output: _Output) -> None:
        # Not under a thread that still writes: the system gives the number to the next file.
        if self._thread is None:
            output.close()
        self._thread = None

    # In a process forked from this one

    def continue_forked(self) -> None:
        """Write each record where it is logged: the writing thread stayed in the other process."""
        self._thread = None
        self._counting = Lock()
        self._entries = SimpleQueue()
        self._front.accept = self._write_now

    def _write_now(self, entry: LogEntry) -> None:
        self._write([entry])

    def __enter__(self) -> AsyncEsperLogger:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()


_started: weakref.WeakSet[AsyncEsperLogger] = weakref.WeakSet()


def _continue_forked() -> None:
    for logger in list(_started):
        logger.continue_forked()


os.register_at_fork(after_in_child=_continue_forked)
