"""How messages lie in Redis: keys, packed commands, entries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from redis.connection import Connection

from esper.contracts.messages import TopicNames
from esper.services.oona.streams import (
    FIELD,
    Appending,
    Entry,
    Position,
    dead_key,
    entries_of,
    opened,
    packed,
    scope_and_topic,
    stream_key,
)
from tests.unit.esper.services.oona.messages import READY, ready

TOPICS = st.sampled_from(list(TopicNames))
SCOPES = st.from_regex(r"\A([A-Za-z0-9][A-Za-z0-9-]{0,62})?\Z")


def entry_of(text, key=None):
    return Entry(key or stream_key("n", "session-1", READY), b"1-0", text)


@given(SCOPES, TOPICS)
def test_a_key_says_its_scope_and_topic(scope, topic):
    key = stream_key("somewhere", scope, topic)
    assert key.startswith(b"esper:somewhere:")
    assert scope_and_topic(key) == (scope, topic)
    assert scope_and_topic(dead_key(key))[1] not in set(TopicNames)


@pytest.mark.parametrize("key", [b"esper:n", b"other", b"", b"\xff\xfe:::", b"esper:n:s"])
def test_any_other_key_is_of_no_topic(key):
    assert scope_and_topic(key)[1] not in set(TopicNames)


@given(st.lists(st.one_of(st.binary(max_size=50), st.integers(), st.text(max_size=20)), min_size=1))
def test_commands_are_packed_as_the_library_packs_them(words):
    first, rest = b"XADD", words
    assert packed(first, *rest) == b"".join(Connection().pack_command(first, *rest))


@given(st.text(max_size=50), SCOPES, st.integers(10, 10**7))
def test_an_appending_command_is_a_whole_one(text, scope, length):
    message = ready(1, scope).model_copy(update={"payload": {"kernel": text}})
    appending, key = Appending(length), stream_key("n", scope, READY)
    words = ("XADD", key, "MAXLEN", "~", length, "*", FIELD)
    expected = packed(*words, message.model_dump_json(by_alias=True))
    for _ in range(2):
        assert appending.command(message, key) == expected


def test_the_packed_parts_of_commands_do_not_pile_up():
    appending = Appending(10)
    for number in range(5000):
        appending.command(ready(1), f"s{number}".encode())
    assert len(appending._prefixes) < 5000


@given(st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63), st.integers(0, 2**63))
def test_positions_order_as_the_server_does(a, b, c, d):
    first, second = f"{a}-{b}".encode(), f"{c}-{d}".encode()
    assert (Position.of(first) < Position.of(second)) == ((a, b) < (c, d))


def test_a_message_comes_out_of_its_entry():
    message = ready(1)
    text = message.model_dump_json(by_alias=True).encode()
    assert opened(entry_of(text)) == message


def test_the_scope_is_that_of_the_stream_whatever_the_text_says():
    text = ready(1, "another-session").model_dump_json(by_alias=True).encode()
    assert opened(entry_of(text)).scope == "session-1"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "trimmed away"),
        (b"", "Invalid JSON"),
        (b"\xff\x00", "Invalid JSON"),
        (b"{}", "Field required"),
        (b"[1]", "the text: "),
        (b'{"topic":"x"}', "topic: Input should be"),
    ],
)
def test_what_is_no_message_says_why(text, reason):
    with pytest.raises(ValueError, match=reason):
        opened(entry_of(text))


def test_a_message_of_another_topic_is_refused():
    text = ready(1).model_dump_json(by_alias=True).encode()
    key = stream_key("n", "session-1", TopicNames.DECISIONS)
    with pytest.raises(ValueError, match=r"topic: got kernels.ready; allowed: control.decisions"):
        opened(entry_of(text, key))


@given(st.binary(max_size=200))
def test_no_bytes_break_the_reading(data):
    with pytest.raises(ValueError, match=r".+"):
        opened(entry_of(data))


def test_entries_are_read_from_what_redis_answers():
    rows = [
        [b"1-0", [FIELD, b"text"]],
        [b"2-0", [b"more", b"1", FIELD, b"second"]],
        [b"3-0", [b"other", b"1"]],
        [b"4-0", None],
        None,
    ]
    assert entries_of(b"k", rows) == [
        Entry(b"k", b"1-0", b"text"),
        Entry(b"k", b"2-0", b"second"),
        Entry(b"k", b"3-0", b""),
        Entry(b"k", b"4-0", None),
    ]
