"""What end-to-end tests take from what they have heard, and that they hear when it ends."""

import json

import pytest

from tests.e2e.stories import Told, figures, next_report, reported

AT = "2026-11-30T10:00:{:02}Z"


def line(found, kind="MODIFIED"):
    return json.dumps({"type": kind, "object": found})


def session(second, epoch, **metrics):
    status = {"epoch": epoch, "lastHeartbeatTime": AT.format(second), "metrics": metrics}
    return {"metadata": {"name": "one"}, "status": status}


def worker(uid, second, role="worker"):
    running = {"running": {"startedAt": AT.format(second)}}
    meta = {"name": f"one-{uid}", "uid": uid, "labels": {"esper.dev/role": role}}
    return {"metadata": meta, "status": {"containerStatuses": [{"state": running}]}}


class Heard(Told):
    """What is heard of objects, whose watches go on."""

    def take(self, kind, lines):
        super().take(kind, lines)
        self._ended = ""


@pytest.fixture
def told():
    return Heard()


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ([], "the watch of each pod has ended"),
        (
            [line({"code": 410, "message": "too old"}, "ERROR")],
            "the watch of each pod broke: .*410",
        ),
        ([line(worker("a", 1)), '{"type":'], "the watch of each pod broke off: "),
    ],
)
def test_who_waits_is_told_that_a_watch_has_ended_and_why(lines, why):
    told = Told()
    told.take("pod", lines)
    told.end("nobody listens any more")
    with pytest.raises(AssertionError, match=why):
        told.last("session", "one")


def test_an_error_is_no_object(told):
    told.take("pod", [line(worker("a", 1)), line({"message": "too old"}, "ERROR")])
    assert [pod["metadata"]["uid"] for _, pod in told.heard("pod")] == ["a"]


def test_the_first_report_after_another_worker_began_is_found(told):
    told.take("session", [line(session(5, 8)), line(session(9, 9))])
    told.take("pod", [line(worker("a", 1)), line(worker("t", 6, role="tamiyo"))])
    assert next_report(told, "one", {"a"}) is None
    told.take("pod", [line(worker("b", 10))])
    assert next_report(told, "one", {"a"}) is None
    told.take("session", [line(session(9, 9)), line(session(12, 6)), line(session(13, 7))])
    assert next_report(told, "one", {"a"})["epoch"] == 6
    assert next_report(told, "one", {"a", "b"}) is None


def test_metrics_are_those_of_each_epoch_since_a_report(told):
    told.take("session", [line(session(1, 4, loss="0.5")), line(session(2, 4, loss="0.5"))])
    told.take("session", [line(session(5, 4, loss="0.6")), line(session(6, 5, loss="0.4"))])
    every = {4: {'{"loss": "0.5"}', '{"loss": "0.6"}'}, 5: {'{"loss": "0.4"}'}}
    assert figures(told, "one") == every
    since = reported(session(5, 0)["status"])
    assert figures(told, "one", since=since) == {4: {'{"loss": "0.6"}'}, 5: {'{"loss": "0.4"}'}}
    assert reported({}) == 0
