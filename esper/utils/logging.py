"""Structured logging that never makes its caller wait.

A logging call puts its record on a bounded queue and returns; one thread formats and writes. A
full queue drops the record and counts it: training must not wait for a slow disk. Each record is
one line of JSON. The trace id of the work in progress travels in a context variable, so that every
line written on behalf of one message carries that message's id.
"""

from __future__ import annotations

import copy
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from logging.handlers import QueueHandler, QueueListener
from pathlib import Path
from queue import Full, Queue
from threading import Lock
from types import TracebackType
from typing import Literal, TextIO

ROOT = "esper"
"""The logger above every logger of Esper; each module logs to `logging.getLogger(__name__)`."""

Level = Literal["debug", "info", "warning", "error"]

_trace_id: ContextVar[str | None] = ContextVar("esper_trace_id", default=None)

# What every record has; anything else on it was given by the caller as `extra`.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "trace_id"}


@contextmanager
def tracing(trace_id: str) -> Iterator[None]:
    """Every record logged inside the block, tasks started in it included, carries `trace_id`."""
    token = _trace_id.set(trace_id)
    try:
        yield
    finally:
        _trace_id.reset(token)


def current_trace_id() -> str | None:
    """The trace id of the work in progress, None outside `tracing`."""
    return _trace_id.get()


class OptimizedStructuredFormatter(logging.Formatter):
    """One line of JSON a record: extras, time, level, component, logger, trace id, message.

    The time is ISO 8601 in UTC with milliseconds. Its part down to the second is formatted once a
    second, not once a record. What JSON can't hold is written as its `repr`.
    """

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component
        self._second = -1
        self._prefix = ""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, without a line break."""
        line: dict[str, object] = {
            "time": self._time(record.created),
            "level": record.levelname.lower(),
            "component": self._component,
            "logger": record.name,
        }
        trace_id = getattr(record, "trace_id", None)
        if trace_id is not None:
            line["traceId"] = trace_id
        line["message"] = record.getMessage()
        extras = {name: value for name, value in vars(record).items() if name not in _RECORD_FIELDS}
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        if record.exc_text:
            line["exception"] = record.exc_text
        try:
            return self._dump(extras | line)
        except ValueError:  # a number that is not finite has no JSON; a cycle has none either
            return self._dump({name: repr(value) for name, value in extras.items()} | line)

    @staticmethod
    def _dump(line: dict[str, object]) -> str:
        return json.dumps(line, ensure_ascii=False, allow_nan=False, default=repr)

    def _time(self, created: float) -> str:
        second = int(created)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{int((created - second) * 1000):03d}Z"


class _LosingQueueHandler(QueueHandler):
    """Puts records on the queue without waiting, and loses those that find no room."""

    queue: Queue[logging.LogRecord]

    def __init__(self, records: Queue[logging.LogRecord], lose: Callable[[], None]) -> None:
        super().__init__(records)
        self._lose = lose
        self._exceptions = logging.Formatter()

    def prepare(self, record: logging.LogRecord) -> logging.LogRecord:
        """The record, fit to leave this thread: message merged, traceback in text, trace id on."""
        record = copy.copy(record)
        record.msg = record.getMessage()
        record.args = None
        if record.exc_info:
            record.exc_text = self._exceptions.formatException(record.exc_info)
            record.exc_info = None
        record.trace_id = current_trace_id()
        return record

    def enqueue(self, record: logging.LogRecord) -> None:
        """Put the record, or lose it where the queue is full."""
        try:
            self.queue.put_nowait(record)
        except Full:
            self._lose()


class _LosingStreamHandler(logging.StreamHandler[TextIO]):
    """Writes lines, and loses those that can't be written (a full disk, a closed pipe)."""

    def __init__(self, stream: TextIO, lose: Callable[[], None]) -> None:
        super().__init__(stream)
        self._lose = lose

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the library's name
        """A log that can't be written must not end the work it tells about."""
        self._lose()


class _PatientQueueListener(QueueListener):
    queue: Queue[logging.LogRecord | None]

    def enqueue_sentinel(self) -> None:
        """Ask the thread to end after what is queued, also where the queue is full now."""
        self.queue.put(None)


class AsyncEsperLogger:
    """The log of one process: from `start` to `stop`, Esper's records go to one place.

    A context manager. `stop` waits until everything queued is written, then says how many records
    were lost, where any were.

    `dropped` counts the records lost so far: those that found the queue full or could not be
    written.

    Args:
        component: the component's name, on every line.
        level: the least severe level written.
        file: where lines are appended; None means standard error.
        queue_records: how many records may wait before more are dropped.
    """

    def __init__(
        self,
        component: str,
        *,
        level: Level = "warning",
        file: Path | None = None,
        queue_records: int = 10_000,
    ) -> None:
        self.component = component
        self._level = level
        self._file = file
        self._records: Queue[logging.LogRecord] = Queue(queue_records)
        self.dropped = 0
        self._counting = Lock()
        self._running = ExitStack()
        self._started = False

    def start(self) -> None:
        """Take over Esper's records; a second call changes nothing.

        Raises:
            OSError: the file can't be opened.
        """
        if self._started:
            return
        with ExitStack() as undo:
            stream: TextIO = sys.stderr
            if self._file is not None:
                stream = undo.enter_context(self._file.open("a", encoding="utf-8"))
            back = _LosingStreamHandler(stream, self._lose)
            back.setFormatter(OptimizedStructuredFormatter(self.component))
            undo.callback(self._report_losses, back)
            listener = _PatientQueueListener(self._records, back)
            listener.start()
            undo.callback(listener.stop)
            root = logging.getLogger(ROOT)
            undo.callback(root.setLevel, root.level)
            undo.callback(setattr, root, "propagate", root.propagate)
            root.setLevel(self._level.upper())
            root.propagate = False
            front = _LosingQueueHandler(self._records, self._lose)
            root.addHandler(front)
            undo.callback(root.removeHandler, front)
            self._running = undo.pop_all()
            self._started = True

    def stop(self) -> None:
        """Write what is queued, report losses, and leave logging as it was found."""
        self._running.close()
        self._started = False

    def _lose(self) -> None:
        with self._counting:
            self.dropped += 1

    def _report_losses(self, back: logging.Handler) -> None:
        if self.dropped:
            lost = {"name": ROOT, "levelno": logging.WARNING, "levelname": "WARNING"}
            lost |= {"msg": "log records lost", "lost": self.dropped}
            back.handle(logging.makeLogRecord(lost))

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
