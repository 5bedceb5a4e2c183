"""How Oona's messages lie in Redis: one stream for each scope and topic, one field an entry.

A stream's key is ``esper:<namespace>:<scope, or ->:<topic>``; what is set aside lies under the
same key with ``:dead`` behind it. Commands are packed here, not by the client library: the part of
a command that all messages of a stream share is packed once.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from pydantic import TypeAdapter, ValidationError

from esper.contracts.messages import OonaMessage, Scope, TopicNames

TELEMETRY = frozenset({TopicNames.PACKETS, TopicNames.STATUS})
"""Topics of full snapshots: the next one replaces the last, so they are dropped first."""

KEPT_OF_STATUS = 16
"""Of `sessions.status` a stream keeps about so many messages, which are large: one would do."""

FIELD = b"message"
_NO_SCOPE = "-"
_KEPT_PREFIXES = 4096
_MESSAGE = TypeAdapter(OonaMessage)  # writes bytes at once
_SCOPE: TypeAdapter[str] = TypeAdapter(Scope)


class Position(NamedTuple):
    """Where an entry stands in the order of its server, from its id ``milliseconds-sequence``."""

    milliseconds: int
    sequence: int

    @classmethod
    def of(cls, entry_id: bytes) -> Position:
        """The position that an entry's id says."""
        milliseconds, _, sequence = entry_id.partition(b"-")
        return cls(int(milliseconds), int(sequence))


class Entry(NamedTuple):
    """An entry of a stream; `text` is the message as JSON, None where the entry is trimmed away."""

    key: bytes
    id: bytes
    text: bytes | None

    @property
    def name(self) -> tuple[bytes, bytes]:
        """What tells it apart from all others."""
        return self[:2]


@lru_cache(maxsize=_KEPT_PREFIXES)
def stream_key(namespace: str, scope: str, topic: TopicNames | str) -> bytes:
    """The key of the stream of that topic in that scope."""
    return f"esper:{namespace}:{scope or _NO_SCOPE}:{topic}".encode()


def dead_key(key: bytes) -> bytes:
    """Where what is set aside of that stream lies."""
    return key + b":dead"


def stream_pattern(namespace: str | None) -> bytes:
    """What all keys of a namespace match; None: those of all namespaces."""
    return b"esper:*" if namespace is None else f"esper:{namespace}:*".encode()


@lru_cache(maxsize=4096)
def scope_and_topic(key: bytes) -> tuple[str, str]:
    """The scope and the topic of a stream; of any other key, something that is no topic.

    A key with a scope that no message may have is no stream of Oona's, whoever has made it.
    """
    parts = key.decode(errors="replace").split(":", 3)
    if len(parts) != 4:
        return "", ""
    scope = "" if parts[2] == _NO_SCOPE else parts[2]
    return (scope, parts[3]) if is_scope(scope) else ("", "")


def is_scope(text: str) -> bool:
    """Whether the contract lets a message be of that scope."""
    try:
        _SCOPE.validate_python(text)
    except ValidationError:
        return False
    return True


def opened(entry: Entry) -> OonaMessage:
    """The message of an entry.

    Its scope is that of the stream, whatever the text says: who may write to a stream is Redis' to
    judge, what is written in the text is not.

    Raises:
        ValueError: the entry holds no message of the stream's topic.
    """
    if entry.text is None:
        raise ValueError("it is trimmed away")
    try:
        message = _MESSAGE.validate_json(entry.text)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{place or 'the text'}: {first['msg']}") from error
    scope, topic = scope_and_topic(entry.key)
    if message.topic != topic:
        raise ValueError(f"topic: got {message.topic}; allowed: {topic}")
    return message if message.scope == scope else message.model_copy(update={"scope": scope})


def packed(*words: bytes | int | str) -> bytes:
    """A command as Redis reads it."""
    parts = [b"*%d\r\n" % len(words)]
    for word in words:
        data = word if isinstance(word, bytes) else str(word).encode()
        parts.append(b"$%d\r\n%b\r\n" % (len(data), data))
    return b"".join(parts)


class Appending:
    """Packs XADD commands, each of which trims its stream to about `length` entries.

    That is the last resort; before it `Trimming` gives up what may be given up.
    """

    def __init__(self, length: int) -> None:
        self._length = length
        self._prefixes: dict[bytes, bytes] = {}

    def command(self, message: OonaMessage, key: bytes) -> bytes:
        """The command that appends `message` to the stream `key`."""
        prefix = self._prefixes.get(key)
        if prefix is None:
            prefix = self._prefix(key, message.topic)
        text = _MESSAGE.dump_json(message, by_alias=True)
        return b"%b$%d\r\n%b\r\n" % (prefix, len(text), text)

    def _prefix(self, key: bytes, topic: TopicNames) -> bytes:
        length = KEPT_OF_STATUS if topic is TopicNames.STATUS else self._length
        whole = packed("XADD", key, "MAXLEN", "~", length, "*", FIELD, b"")
        prefix = whole.removesuffix(b"$0\r\n\r\n")  # the empty text, packed
        if len(self._prefixes) == _KEPT_PREFIXES:
            self._prefixes.clear()
        self._prefixes[key] = prefix
        return prefix


def entries_of(key: bytes, rows: Iterable[object]) -> list[Entry]:
    """The entries in an answer of XRANGE or XCLAIM, or of XREADGROUP for one stream."""
    found = []
    for row in rows:
        if not isinstance(row, list) or not isinstance(row[0], bytes):
            continue
        fields = row[1]
        if not isinstance(fields, list):
            found.append(Entry(key, row[0], None))
        elif len(fields) == 2 and fields[0] == FIELD:
            found.append(Entry(key, row[0], fields[1]))
        else:
            values = dict(zip(fields[::2], fields[1::2], strict=True))
            found.append(Entry(key, row[0], values.get(FIELD, b"")))
    return found
