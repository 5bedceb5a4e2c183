"""What a line of the log says: one JSON object, with a trace id and without secrets.

The trace id of the work in progress travels in a context variable, so that every line written on
behalf of one message carries that message's id, in the tasks and `asyncio.to_thread` calls that
begin there too. A plain thread has a context of its own; started with
`contextvars.copy_context().run` it carries the id as well.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from itertools import islice
from typing import Any, NamedTuple

_trace_id: ContextVar[str | None] = ContextVar("esper_trace_id", default=None)

# What every record has; anything else on it was given by the caller as `extra`.
_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "trace_id"}
_PLAIN_FIELDS = len(vars(logging.makeLogRecord({})))

# A line is redacted as JSON, whose strings hold no bare quote and no bare backslash: `_TEXT` stays
# within one string and leaves its escapes whole.
_TEXT = r"(?:[^\s\"\\]|\\.)"
_USER = re.compile(r"://[^\s:@/\"\\]*:")
_TOKEN = re.compile(rf"{_TEXT}*")
# What ends like one of these, a parameter or an extra, holds a secret.
_NAMES = r"(?:passw(?:or)?d|secret|token|api[_-]?key|access[_-]key|signing[_-]key)"
_SECRET_NAME = re.compile(rf"{_NAMES}\Z", re.IGNORECASE)
_SECRETS = re.compile(
    rf"(?P<bearer>(?i:bearer)(?:\s|\\[nrt])+){_TEXT}+"
    r"|(?P<signed>(?i:x-amz-(?:signature|credential|security-token))=)[^\s&\"\\]+"
    r"|(?P<signature>(?i:signature)(?:=|:(?:\s|\\[nrt])+))[0-9a-f]{64}"
    rf"|(?P<basic>(?i:authorization)\W{{1,8}}(?i:basic)(?:\s|\\[nrt])+){_TEXT}+"
    rf"|(?P<given>(?i:{_NAMES})=)(?:[^\s&\"\\]|\\[^nrt])+"
    rf"|(?P<named>(?i:{_NAMES})\": )(?P<value>\"(?:[^\"\\]|\\.)*\"|[-\d][^\s,\]}}]*)"
    r"|(?P<jwt>\beyJ)[\w-]{1,2048}\.[\w-]{1,4096}\.[\w-]{0,2048}"
)
_BASIC = re.compile(r"(?P<scheme>\b(?i:basic)(?:\s|\\[nrt])+)(?P<pair>[\w+/-]{4,}={0,2})")
_MARKS = (
    *("bearer", "x-amz-", "signature", "eyj", "passw"),
    *("secret", "token", "key", "authorization"),
)

MESSAGE_CHARACTERS = 64 * 2**10
"""What is said at once; of a longer text the beginning is kept, and how long it was."""
_LINE_CHARACTERS = 4 * MESSAGE_CHARACTERS
_WORD_CHARACTERS = 4096


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


class LogEntry(NamedTuple):
    """What is kept of a record: it holds neither arguments nor frames, only what is to be said."""

    created: float
    level: str
    logger: str
    message: str
    trace_id: str | None
    exception: str | None
    extras: dict[str, Any] | None


def entry_of(record: logging.LogRecord) -> LogEntry:
    """The entry of a record, made where it was logged: its arguments as they are at this moment."""
    fields = record.__dict__
    exception = record.exc_text
    if record.exc_info and not exception:
        exception = _EXCEPTIONS.formatException(record.exc_info)
    return LogEntry(
        record.created,
        record.levelname,
        record.name,
        _cut(_message(record)),
        fields.get("trace_id") or _trace_id.get(),
        _cut(exception) if exception else exception,
        # What was given as `extra` stands behind the fields that every record has.
        dict(islice(fields.items(), _PLAIN_FIELDS, None)) if len(fields) > _PLAIN_FIELDS else None,
    )


_EXCEPTIONS = logging.Formatter()


def _cut(text: str) -> str:
    """The text, or its beginning up to a whole word, as half a secret has no looks."""
    if len(text) <= MESSAGE_CHARACTERS:
        return text
    kept = text[:MESSAGE_CHARACTERS]
    end = max(kept.rfind(" "), kept.rfind("\n"), MESSAGE_CHARACTERS - _WORD_CHARACTERS)
    return f"{kept[:end]} … (cut: {len(text)} characters)"


def _message(record: logging.LogRecord) -> str:
    if not record.args:
        return str(record.msg)
    try:
        return str(record.msg) % record.args
    except (TypeError, ValueError, KeyError):  # arguments that do not fit; both are said
        return f"{record.msg} {record.args!r}"


class OptimizedStructuredFormatter(logging.Formatter):
    """One line of JSON a record: extras, time, level, component, logger, trace id, message.

    The time is ISO 8601 in UTC with milliseconds. Its part down to the second is formatted once a
    second, not once a record. What JSON can't hold is written as its `repr`. Passwords in URLs,
    bearer tokens, basic credentials, JSON web tokens, the signatures of requests and of presigned
    addresses, and what is called a password, a secret, a token or a key are written as "***". Texts
    longer than `MESSAGE_CHARACTERS` are cut and say how long they were.
    """

    def __init__(self, component: str) -> None:
        super().__init__()
        self._component = component
        self._second = -1
        self._prefix = ""
        self._dump = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=repr).encode

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON, without a line break."""
        return self.line(entry_of(record))

    def line(self, entry: LogEntry) -> str:
        """The entry as JSON, without a line break."""
        line: dict[str, Any] = {
            "time": self._time(entry.created),
            "level": entry.level.lower(),
            "component": self._component,
            "logger": entry.logger,
        }
        if entry.trace_id is not None:
            line["traceId"] = entry.trace_id
        line["message"] = entry.message
        if entry.exception is not None:
            line["exception"] = entry.exception
        extras = entry.extras or {}
        extras = {
            name: "***" if _SECRET_NAME.search(str(name)) else value
            for name, value in extras.items()
            if name not in _RECORD_FIELDS
        }
        with suppress(ValueError, TypeError, RecursionError):
            # A number that is not finite has no JSON; a cycle, or a key of another type, neither.
            text = self._dump(extras | line)
            if len(text) <= _LINE_CHARACTERS:
                return redacted(text)
        shortened = {name: _cut(repr(value)) for name, value in extras.items()}
        return redacted(self._dump(shortened | line))

    def _time(self, created: float) -> str:
        second = int(created)
        if second != self._second:
            self._second = second
            self._prefix = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
        return f"{self._prefix}.{int((created - second) * 1000):03d}Z"


def redacted(line: str) -> str:
    """A line of JSON with "***" for each secret that is known by its looks."""
    if "://" in line:
        line = _without_passwords(line)
    lowered = line.lower()
    if any(mark in lowered for mark in _MARKS):
        line = _SECRETS.sub(_hidden, line)
    if "basic" in lowered:
        line = _BASIC.sub(_without_pair, line)
    return line


def _hidden(found: re.Match[str]) -> str:
    if found["named"] is not None:
        return f'{found["named"]}"***"'
    return f"{found[found.lastgroup or 0]}***"


def _without_pair(found: re.Match[str]) -> str:
    """Credentials, which are "user:password" in base64; what follows the word else is none."""
    text = found["pair"].rstrip("=").translate(_URL_SAFE)
    with suppress(ValueError):
        if b":" in base64.b64decode(text + "=" * (-len(text) % 4)):
            return f"{found['scheme']}***"
    return found[0]


_URL_SAFE = str.maketrans("-_", "+/")


def _without_passwords(line: str) -> str:
    """The line with "***" between a URL's user and the last "@" before white space.

    Not only up to its host: who writes a password into a URL may have escaped nothing in it.
    """
    parts, done = [], 0
    while found := _USER.search(line, done):
        token = _TOKEN.match(line, found.end())
        end = token.end() if token else found.end()
        at = line.rfind("@", found.end(), end)
        if at < 0:
            parts.append(line[done:end])
            done = end
        else:
            parts += (line[done : found.end()], "***")
            done = at
    return "".join(parts) + line[done:]
