import asyncio
import base64
import contextvars
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.configs import LOG_NAMES
from esper.utils import logging as logging_module
from esper.utils.log_lines import redacted
from esper.utils.logging import (
    LOGGERS,
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


@pytest.fixture
def stuck(monkeypatch):
    """A disk that waits: `writing` is set when a line comes, `go_on` lets it and the rest pass."""
    stuck = SimpleNamespace(writing=threading.Event(), go_on=threading.Event())
    plain = OptimizedStructuredFormatter.line

    def slow(self, entry):
        stuck.writing.set()
        assert stuck.go_on.wait(30)
        return plain(self, entry)

    monkeypatch.setattr(OptimizedStructuredFormatter, "line", slow)
    return stuck


def test_a_full_queue_drops_counts_and_never_waits(tmp_path, stuck):
    path = tmp_path / "log"
    logger = AsyncEsperLogger("c", file=path, queue_records=2)
    with logger:
        log.warning("being written")
        assert stuck.writing.wait(30)
        for number in range(5):
            log.warning("%d", number)
        assert logger.dropped == 3
        stuck.go_on.set()
    written = lines(path)
    assert [line["message"] for line in written] == [
        "being written",
        "log records lost",
        "0",
        "1",
    ]
    assert written[1]["lost"] == written[1]["lostInAll"] == 3
    assert written[1]["level"] == "warning"


def test_losses_are_told_while_the_log_runs_and_not_too_often(tmp_path, stuck):
    path = tmp_path / "log"

    def told():
        return [line["lost"] for line in lines(path) if "lost" in line]

    def wait_for(message):
        deadline = time.monotonic() + 30
        while message not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.005)

    logger = AsyncEsperLogger("c", file=path, queue_records=2)
    with logger:
        for turn in ("first", "second"):
            stuck.writing.clear()
            stuck.go_on.clear()
            log.warning("being written")
            assert stuck.writing.wait(30)
            for number in range(5):
                log.warning("%s %d", turn, number)
            stuck.go_on.set()
            wait_for(f"{turn} 1")  # the last that had room: now there is some again
            wait_for("log records lost")
            log.warning("between")
            wait_for("between")
        assert told() == [3], "the second time waits for REPORT_SECONDS"
    assert told() == [3, 3]
    assert lines(path)[-1]["lostInAll"] == logger.dropped == 6


def test_losses_are_told_although_nothing_more_comes(tmp_path, stuck, monkeypatch):
    monkeypatch.setattr("esper.utils.logging.REPORT_SECONDS", 0.05)
    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path, queue_records=1):
        log.warning("being written")
        assert stuck.writing.wait(30)
        log.warning("queued")
        log.warning("lost")
        stuck.go_on.set()
        deadline = time.monotonic() + 30
        while "log records lost" not in path.read_text():
            assert time.monotonic() < deadline
            time.sleep(0.005)


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


def test_trace_ids_reach_threads_that_are_given_the_context(tmp_path):
    path = tmp_path / "log"

    async def in_threads():
        with tracing("t-1"):
            await asyncio.to_thread(log.warning, "to_thread")
            thread = threading.Thread(
                target=contextvars.copy_context().run, args=(log.warning, "thread")
            )
            thread.start()
            thread.join()
            with ThreadPoolExecutor(1) as pool:
                pool.submit(contextvars.copy_context().run, log.warning, "pool").result()
                pool.submit(log.warning, "without").result()
            child = asyncio.create_task(logged_later())
        with tracing("t-2"):
            await child

    async def logged_later():
        await asyncio.sleep(0)
        log.warning("task")

    with AsyncEsperLogger("c", file=path):
        asyncio.run(in_threads())
    found = {line["message"]: line.get("traceId") for line in lines(path)}
    assert found == {
        "to_thread": "t-1",
        "thread": "t-1",
        "pool": "t-1",
        "without": None,
        "task": "t-1",
    }


def test_many_tasks_and_threads_keep_their_own_trace_ids(tmp_path):
    path = tmp_path / "log"

    async def work(name):
        with tracing(name):
            for number in range(20):
                await asyncio.sleep(0)
                await asyncio.to_thread(log.warning, "%s %d", name, number)

    async def all_of_it():
        await asyncio.gather(*(work(f"t{number}") for number in range(20)))

    with AsyncEsperLogger("c", file=path):
        asyncio.run(all_of_it())
    written = lines(path)
    assert len(written) == 400
    assert all(line["message"].split()[0] == line["traceId"] for line in written)


def test_each_service_has_its_level(tmp_path):
    path = tmp_path / "log"
    levels = {"tamiyo": "debug", "urza": "error", "kasmina": "info", "sqlalchemy": "info"}
    names = {
        "esper.services.tamiyo.main": ["debug", "info", "warning", "error"],
        "esper.services.urza.api.state": ["error"],
        "esper.execution.trials": ["info", "warning", "error"],
        "esper.core.compilation": ["info", "warning", "error"],
        "esper.services.tolaria": ["warning", "error"],
        "esper_operator.handlers": ["warning", "error"],
        "sqlalchemy.engine": ["info", "warning", "error"],
        "redis": ["warning", "error"],
    }
    with AsyncEsperLogger("c", level="warning", levels=levels, file=path):
        for name in names:
            for level in ("debug", "info", "warning", "error"):
                getattr(logging.getLogger(name), level)("said")
    written = lines(path)
    for name, expected in names.items():
        assert [line["level"] for line in written if line["logger"] == name] == expected


def test_every_name_of_the_settings_has_its_loggers():
    assert set(LOGGERS) == set(LOG_NAMES)


@pytest.mark.parametrize(
    "name", ["uvicorn.error", "sqlalchemy.pool", "alembic", "botocore", "redis", "kopf", "asyncio"]
)
def test_libraries_write_the_same_lines(tmp_path, name):
    path = tmp_path / "log"
    with AsyncEsperLogger("urza", level="debug", file=path), tracing("t-1"):
        logging.getLogger(name).warning("pool of %d is full", 5)
        logging.getLogger(name).info("every request, with its headers")
    (line,) = lines(path)
    assert set(line) == {"time", "level", "component", "logger", "traceId", "message"}
    assert line["message"] == "pool of 5 is full"
    assert line["logger"] == name


def test_all_levels_and_handlers_are_put_back(tmp_path):
    loggers = [logging.getLogger(name) for names in LOGGERS.values() for name in names]
    loggers += [logging.getLogger(), logging.getLogger(ROOT)]

    def state():
        return [(logger.level, logger.propagate, list(logger.handlers)) for logger in loggers]

    before = state()
    with AsyncEsperLogger("c", levels={"urza": "debug", "redis": "info"}, file=tmp_path / "log"):
        assert state() != before
    assert state() == before


def test_a_forked_process_writes_its_own_records(tmp_path):
    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path) as logger:
        log.warning("before")
        process = os.fork()
        if process == 0:
            with tracing("child"):
                log.warning("forked")
            logger.stop()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
        log.warning("after")
    found = [(line["message"], line.get("traceId")) for line in lines(path)]
    assert sorted(found) == [("after", None), ("before", None), ("forked", "child")]


def test_a_process_without_standard_error_goes_on(monkeypatch):
    monkeypatch.setattr("sys.stderr", None)
    with AsyncEsperLogger("c") as logger:
        log.warning("lost")
    assert logger.dropped == 1


def test_standard_error_of_a_process_is_written_whole():
    code = (
        "import logging\n"
        "from esper.utils.logging import AsyncEsperLogger\n"
        "with AsyncEsperLogger('c', queue_records=10**6):\n"
        "    for number in range(3000):\n"
        "        logging.getLogger('esper.x').warning('%d ' + 'ä' * 100, number)\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    written = [json.loads(line) for line in ended.stderr.decode().splitlines()]
    assert [int(line["message"].split()[0]) for line in written] == list(range(3000))


def test_arguments_that_do_not_fit_are_said_all_the_same(tmp_path):
    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path) as logger:
        log.warning("%d of %d", 3)
        log.warning("%d", "three")
        log.warning("mapping %(a)s", {"b": 1})
    assert [line["message"] for line in lines(path)] == [
        "%d of %d (3,)",
        "%d ('three',)",
        "mapping %(a)s {'b': 1}",
    ]
    assert logger.dropped == 0


def test_an_extra_that_cannot_be_written_ends_nothing(tmp_path):
    class Broken:
        def __repr__(self):
            raise RuntimeError("no words")

    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path) as logger:
        log.warning("lost", extra={"thing": Broken()})
        log.warning("written", extra={"cycle": (cycle := []), "mixed": {(1, 2): 3}})
        cycle.append(cycle)
        log.warning("kept")
    assert logger.dropped == 1
    assert [line["message"] for line in lines(path)] == ["written", "kept", "log records lost"]


def test_frames_and_arguments_are_not_kept(tmp_path, stuck):
    class Tensor:
        pass

    alive = []
    with AsyncEsperLogger("c", file=tmp_path / "log"):
        tensor = Tensor()
        alive.append(weakref.ref(tensor))
        log.warning("have %s", tensor)
        try:
            raise ValueError(tensor)
        except ValueError:
            log.exception("it failed")
        del tensor
        assert alive[0]() is None
        stuck.go_on.set()


# What secrets are made of: anything but white space, which has no place in them.
SECRETS = st.text(
    st.characters(codec="utf-8", exclude_categories=("Z", "C")), min_size=6, max_size=60
)
WORDS = st.text("abc xyz.,:/{}[]\"'\\\n", max_size=30)


def line_of(message, extras):
    entry = record()
    entry.msg, entry.args = message, None
    vars(entry).update(extras)
    return OptimizedStructuredFormatter("c").format(entry)


def said(text):
    """Every text in a line of JSON, decoded."""
    found = []

    def walk(value):
        if isinstance(value, dict):
            for key, item in value.items():
                found.append(key)
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        else:
            found.append(str(value))

    walk(json.loads(text))
    return "\n".join(found)


@given(SECRETS, WORDS, WORDS, st.sampled_from(["redis", "postgresql+asyncpg", "https", "rediss"]))
def test_no_password_of_a_url_is_ever_written(secret, before, after, scheme):
    marked = f"SECRET{secret}SECRET"
    for user in ("", "esper"):
        url = f"{scheme}://{user}:{marked}@host:6379/0"
        text = line_of(f"{before} {url} {after}", {"url": url, "nested": {"urls": [url, 1]}})
        assert "SECRET" not in text
        assert f"{scheme}://{user}:***@host:6379/0" in said(text)


@given(SECRETS, WORDS, st.sampled_from(["Bearer ", "bearer ", "BEARER\t", "Bearer\n"]))
def test_no_bearer_token_is_ever_written(secret, before, scheme):
    marked = f"SECRET{secret}SECRET"
    header = f"{scheme}{marked}"
    text = line_of(
        f"{before} Authorization: {header}",
        {"headers": {"Authorization": header}, "pairs": [["Authorization", header]]},
    )
    assert "SECRET" not in text
    assert "***" in said(text)


@given(SECRETS, WORDS, st.sampled_from(["password", "token", "client_secret", "X-Api-Key"]))
def test_no_secret_that_is_called_one_is_ever_written(secret, before, name):
    marked = f"SECRET{secret.replace('&', '')}SECRET".replace(" ", "")
    pair = base64.b64encode(f"me:{marked}".encode()).decode()
    text = line_of(
        f"{before} http://h/a?x=1&{name}={marked}&y=2 Authorization: Basic {pair}",
        {
            name: marked,
            "pin_token": 1234567,
            "headers": {"Authorization": f"Basic {pair}", name: marked, "db_password": 7654321},
            "pairs": [["Authorization", f"basic {pair}"]],
        },
    )
    for shown in ("SECRET", pair, "1234567", "7654321"):
        assert shown not in text
    assert f"?x=1&{name}=***" in said(text)
    assert "Basic ***" in said(text)


def test_words_that_only_sound_like_secrets_stay():
    extras = {"tokens": 3, "keyword": "a", "basic": "basic usage of tokens", "secretary": "b"}
    line = json.loads(line_of("a token is missing; basic training, key 'a' twice", extras))
    assert extras.items() <= line.items()
    assert line["message"] == "a token is missing; basic training, key 'a' twice"


def test_a_very_long_text_is_cut_and_says_so():
    url = "redis://:hunter2@h"
    message = " ".join(["word"] * 20_000) + "redis://:hunter2" + "x" * 10_000_000
    text = line_of(message, {"big": "y" * 10_000_000, "url": url})
    assert len(text) < 200_000
    assert text.count("(cut: 10") == 2
    assert "hunter2" not in text
    edge = " ".join(["word"] * 13_105)  # a URL astride the place of the cut
    assert "hunter2" not in line_of(f"{edge} redis://:hunter2" + "x" * 3000 + "@h", {})


def test_a_record_that_cannot_be_made_is_lost_not_raised(tmp_path):
    class Broken:
        def __str__(self):
            raise RuntimeError("no text")

        __repr__ = __str__

    path = tmp_path / "log"
    with AsyncEsperLogger("c", file=path) as logger:
        log.warning("%s", Broken())
        log.warning(Broken())
        log.warning("after")
    assert logger.dropped == 2
    assert [line["message"] for line in lines(path)] == ["after", "log records lost"]


def test_stopping_ends_although_nobody_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(logging_module, "STOP_SECONDS", 0.3)
    reading, writing = os.pipe()
    with open(writing, "w") as pipe, monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", pipe)
        logger = AsyncEsperLogger("c")
        logger.start()
        for _ in range(20):
            log.warning("x" * 10_000)
        began = time.monotonic()
        logger.stop()
        assert time.monotonic() - began < 5
        assert 1 <= logger.dropped <= 20
        with AsyncEsperLogger("c", file=tmp_path / "log"):
            log.warning("another log")
        os.close(reading)  # the thread that waits is let go
    assert [line["message"] for line in lines(tmp_path / "log")] == ["another log"]


def test_secrets_of_other_looks_are_not_written():
    token = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
    url = "http://h/b/k?X-Amz-Credential=me&X-Amz-Signature=0f9e&X-Amz-Expires=60"
    text = said(line_of(f"token {token} {url}", {"exc_text": f"E: Bearer {token}"}))
    for secret in ("c2lnbmF0dXJl", "0f9e", "Credential=me"):
        assert secret not in text
    assert "X-Amz-Expires=60" in text


@pytest.mark.parametrize("before", ["Signature:\n", "Signature=", "signature: "])
def test_a_signature_by_itself_is_not_written(before):
    # botocore says the one that it puts into a presigned address, and the one of each header.
    text = said(line_of(f"{before}{'0f9e' * 16}", {}))
    assert "0f9e" not in text
    assert "signature" in text.lower()


@given(st.text(st.characters(codec="utf-8")), st.dictionaries(st.text("abcxyz", min_size=4), WORDS))
def test_redacted_lines_are_still_json_and_without_secrets_nothing_changes(message, extras):
    text = line_of(f"://:{message}@", extras)
    json.loads(text)
    plain = re.sub(r"(?i)eyj|bearer|://|x-amz|basic|=", "", message)
    assert json.loads(line_of(plain, extras))["message"] == plain


def test_a_hostile_line_costs_little():
    began = time.monotonic()
    for part in (
        "://a:",
        "://a:b@",
        "bearer ",
        "eyJ",
        "eyJ-",
        "eyJ.",
        "x-amz-signature=",
        "signature: ",
        "token=",
        "basic ",
        'key": ',
    ):
        redacted(part * 20_000)
    assert time.monotonic() - began < 30
