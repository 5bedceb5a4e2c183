import asyncio
import io
import json
import logging
import math
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.utils.logging import (
    ROOT,
    AsyncEsperLogger,
    OptimizedStructuredFormatter,
    current_trace_id,
    tracing,
)

log = logging.getLogger("esper.somewhere")


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def record(message="m", **fields):
    return logging.makeLogRecord({"name": "esper.x", "msg": message, "levelname": "INFO"} | fields)


def test_a_line_says_when_who_where_and_what(tmp_path):
    path = tmp_path / "log"
    with AsyncEsperLogger("tolaria", level="info", file=path), tracing("t-1"):
        log.info("epoch %d", 3, extra={"layer": "fc1"})
    (line,) = lines(path)
    assert line.pop("time").endswith("Z")
    assert line == {
        "level": "info",
        "component": "tolaria",
        "logger": "esper.somewhere",
        "traceId": "t-1",
        "message": "epoch 3",
        "layer": "fc1",
    }


def test_records_below_the_level_are_not_written(tmp_path):
    path = tmp_path / "log"
    with AsyncEsperLogger("c", level="warning", file=path):
        log.info("quiet")
        log.warning("loud")
    assert [line["message"] for line in lines(path)] == ["loud"]


def test_an_error_carries_its_trace_on_the_same_line(tmp_path):
    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path):
        try:
            raise ValueError("inside")
        except ValueError:
            log.exception("it failed")
    (line,) = lines(path)
    assert line["message"] == "it failed"
    assert line["exception"].endswith("ValueError: inside")
    assert "Traceback" in line["exception"]


def test_arguments_are_read_when_logged_not_when_written(tmp_path):
    path = tmp_path / "log"
    values = [1]
    with AsyncEsperLogger("c", file=path):
        log.warning("have %s", values)
        values.append(2)
    assert lines(path)[0]["message"] == "have [1]"


def test_trace_ids_follow_tasks_and_nest():
    seen = {}

    async def work(name):
        with tracing(name):
            await asyncio.sleep(0)
            seen[name] = current_trace_id()
            with tracing("inner"):
                seen["inner"] = current_trace_id()
            seen[name + " after"] = current_trace_id()

    async def both():
        await asyncio.gather(work("a"), work("b"))

    asyncio.run(both())
    assert seen == {"a": "a", "b": "b", "inner": "inner", "a after": "a", "b after": "b"}
    assert current_trace_id() is None


def test_a_full_queue_drops_counts_and_never_waits(tmp_path, monkeypatch):
    path = tmp_path / "log"
    writing, go_on = threading.Event(), threading.Event()
    plain = OptimizedStructuredFormatter.format

    def slow(self, entry):
        writing.set()
        assert go_on.wait(30)
        return plain(self, entry)

    monkeypatch.setattr(OptimizedStructuredFormatter, "format", slow)
    logger = AsyncEsperLogger("c", file=path, queue_records=2)
    with logger:
        log.warning("being written")
        assert writing.wait(30)
        for number in range(5):
            log.warning("%d", number)
        assert logger.dropped == 3
        go_on.set()
    written = lines(path)
    assert [line["message"] for line in written] == [
        "being written",
        "0",
        "1",
        "log records lost",
    ]
    assert written[-1]["lost"] == 3


def test_every_record_of_every_thread_is_written(tmp_path):
    path = tmp_path / "log"

    def talk(name):
        for number in range(200):
            log.warning("%s %d", name, number)

    with AsyncEsperLogger("c", file=path):
        threads = [threading.Thread(target=talk, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    messages = [line["message"] for line in lines(path)]
    assert len(messages) == 600
    for name in "abc":
        assert [m for m in messages if m[0] == name] == [f"{name} {n}" for n in range(200)]


def test_a_log_that_cannot_be_written_ends_nothing(monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("sys.stderr", Full())
    logger = AsyncEsperLogger("c")
    with logger:
        log.warning("lost")
        log.warning("lost too")
    assert logger.dropped >= 2


def test_standard_error_is_the_default(capsys):
    with AsyncEsperLogger("c"):
        log.warning("shown")
    captured = capsys.readouterr()
    assert json.loads(captured.err)["message"] == "shown"
    assert captured.out == ""


def test_stopping_leaves_logging_as_it_was(tmp_path):
    root = logging.getLogger(ROOT)
    before = (root.level, root.propagate, list(root.handlers))
    threads = threading.active_count()
    logger = AsyncEsperLogger("c", level="debug", file=tmp_path / "log")
    logger.stop()
    logger.start()
    logger.start()
    assert root.level == logging.DEBUG
    log.debug("one")
    logger.stop()
    logger.stop()
    assert (root.level, root.propagate, list(root.handlers)) == before
    assert threading.active_count() == threads
    assert len(lines(tmp_path / "log")) == 1


def test_a_file_that_cannot_be_opened_is_told_at_once(tmp_path):
    handlers = list(logging.getLogger(ROOT).handlers)
    with pytest.raises(OSError, match="No such file"):
        AsyncEsperLogger("c", file=tmp_path / "no" / "log").start()
    assert logging.getLogger(ROOT).handlers == handlers


def test_a_second_run_appends(tmp_path):
    for message in ("first", "second"):
        with AsyncEsperLogger("c", file=tmp_path / "log"):
            log.warning(message)
    assert [line["message"] for line in lines(tmp_path / "log")] == ["first", "second"]


@pytest.mark.parametrize("second", [0, 1_700_000_000])
def test_times_keep_their_milliseconds_within_a_cached_second(second):
    formatter = OptimizedStructuredFormatter("c")
    times = [
        json.loads(formatter.format(record(created=second + part)))["time"]
        for part in (0.25, 0.5, 1.0)
    ]
    assert [time[19:] for time in times] == [".250Z", ".500Z", ".000Z"]
    assert times[0][:19] == times[1][:19] != times[2][:19]


@pytest.mark.parametrize("value", [math.nan, math.inf, {1, 2}, object()])
def test_what_json_cannot_hold_is_written_as_its_repr(value):
    line = json.loads(OptimizedStructuredFormatter("c").format(record(loss=value)))
    assert line["loss"] == repr(value)


def test_extras_never_replace_the_fields_of_the_line():
    line = json.loads(OptimizedStructuredFormatter("c").format(record(component="x", level="y")))
    assert line["component"] == "c"
    assert line["level"] == "info"


@given(st.text(), st.dictionaries(st.text("abcxyz", min_size=4), st.floats() | st.text()))
def test_any_record_is_one_line_of_strict_json(message, extras):
    entry = record()
    entry.msg, entry.args = message, None
    vars(entry).update(extras)
    text = OptimizedStructuredFormatter("c").format(entry)
    assert "\n" not in text

    def refuse(constant):
        raise AssertionError(constant)

    assert json.loads(text, parse_constant=refuse)["message"] == message
