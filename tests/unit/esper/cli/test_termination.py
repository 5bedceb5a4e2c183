"""What a container says last."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from esper.cli.main import main
from esper.cli.termination import MAX_BYTES, termination_text


@given(st.text(max_size=40), st.text(max_size=9000))
def test_it_is_json_that_kubernetes_keeps_whole(reason, message):
    told = json.loads(termination_text(reason, message))
    assert told["reason"] == reason
    if told["message"] != message:
        assert told["message"].endswith("…")
        assert message.startswith(told["message"][:-1])


@pytest.mark.parametrize("character", ["x", "é", "\N{GRINNING FACE}", '"', "\x01"])
def test_only_what_is_too_much_is_cut(character):
    text = termination_text("Reason", character * 9000)
    assert MAX_BYTES * 0.7 < len(text.encode()) <= MAX_BYTES
    short = termination_text("Reason", character * 600)
    assert json.loads(short)["message"] == character * 600


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["worker", "session.yaml", "--output-dir", "run"], 2, "ConfigError"),
        (["compile", "--kernel", "0" * 40], 2, "ConfigError"),
        (["compile", "--kernel", "0" * 40, "--set", "hub.url=http://127.0.0.1:9"], 1, None),
    ],
)
def test_what_ends_a_command_before_it_works_is_left_too(tmp_path, capsys, words, status, reason):
    log = tmp_path / "log"
    bad = [] if reason is None else ["--set", "redis.pool_size=0"]
    quick = ["--set", "hub.attempts=1", "--termination-log", str(log)]
    assert main([*words, *bad, *quick]) == status
    left = json.loads(log.read_text())
    assert left["reason"] == (reason or "HubUnavailable")
    assert f"esper: error: {left['message']}\n" == capsys.readouterr().err


def test_commands_that_no_pod_runs_leave_nothing(tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["validate", "none.yaml", "--termination-log", str(tmp_path / "log")])
    assert "unrecognized arguments" in capsys.readouterr().err
