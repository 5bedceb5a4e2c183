"""What is built once is built by one, however many ask, and not at all where it fails."""

import threading

import pytest

from tools.servers.go_programs import built_once, run_go
from tools.servers.process import ServerError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_who_comes_while_it_is_built_waits_for_it(home):
    builds, found = [], []
    begun, go_on = threading.Event(), threading.Event()

    def build(target):
        builds.append(target)
        begun.set()
        go_on.wait(10)
        target.mkdir()
        (target / "program").write_text("built")

    def ask():
        found.append((built_once("thing-1", build) / "program").read_text())

    askers = [threading.Thread(target=ask) for _ in range(3)]
    for asker in askers:
        asker.start()
    assert begun.wait(10)
    assert not found
    go_on.set()
    for asker in askers:
        asker.join(10)
    assert found == ["built"] * 3
    assert len(builds) == 1
    assert sorted(path.name for path in (home / ".cache" / "esper").iterdir()) == [
        "thing-1",
        "thing-1.lock",
    ]


def test_a_build_that_fails_leaves_nothing_and_is_tried_again():
    def fail(target):
        target.write_text("half")
        raise ServerError("no")

    with pytest.raises(ServerError, match="no"):
        built_once("thing-1", fail)
    assert built_once("thing-1", lambda target: target.write_text("whole")).read_text() == "whole"


def test_a_command_that_fails_says_why(tmp_path):
    with pytest.raises(ServerError, match=r"go no-such-command failed: .*unknown command"):
        run_go(["no-such-command"], tmp_path)
