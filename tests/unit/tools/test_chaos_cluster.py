"""What `make chaos-cluster` does to whom, and that it finds what is lost or done twice."""

import json
import random
import sqlite3
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from esper.configs import HubConfig
from esper.contracts.enums import ComponentType
from esper.contracts.messages import OonaMessage, TopicNames
from esper.contracts.operational import SeedTransition
from tools import chaos_cluster, chaos_kernels
from tools.chaos_checks import Outcome, check_transitions, was_compiled
from tools.chaos_cluster import EXAMPLE, Plan, main, prepared, run
from tools.chaos_kernels import Notes, forget
from tools.chaos_sessions import check_decisions, check_seeds
from tools.cluster.containers.layout import KIND, SOURCE
from tools.cluster_faults import DELETE, WAYS, Fault, Pod, course
from tools.servers.process import ServerError

EVERY = {Fault(part, way) for part, ways in WAYS.items() for way in ways}


@pytest.mark.parametrize("seed", range(5))
def test_each_part_is_hit_first_and_then_in_each_of_its_ways(seed):
    faults = course(20, random.Random(seed))
    assert {fault.part for fault in faults[: len(WAYS)]} == set(WAYS)
    assert set(faults[: len(EVERY)]) == EVERY
    assert len(faults) == 20
    assert faults == course(20, random.Random(seed))
    assert len(course(5, random.Random(seed))) == 5


def test_no_pod_of_a_stateful_set_is_deleted_before_it_has_ended():
    assert EVERY.isdisjoint({Fault("urza", DELETE), Fault("redis", DELETE)})


def pod(state, **meta):
    return {
        "metadata": {"namespace": "n", "name": "p", "uid": "u", "labels": {}, **meta},
        "spec": {"nodeName": "esper-1"},
        "status": {"containerStatuses": [{"state": state, "containerID": "containerd://c0ffee"}]},
    }


def test_only_a_pod_that_runs_can_be_hit():
    assert Pod.of(pod({"running": {}})).container == "c0ffee"
    assert Pod.of(pod({"waiting": {}})) is None
    assert Pod.of(pod({"running": {}}, deletionTimestamp="2026-01-01T00:00:00Z")) is None
    assert Pod.of({"metadata": {}, "status": {}}) is None


def test_a_session_may_fail_as_often_as_it_is_killed():
    document = prepared(EXAMPLE)
    assert document["spec"]["runPolicy"]["backoffLimit"] >= 100
    assert document["spec"]["workers"]["replicas"] == 2


def test_a_session_of_only_what_is_required_is_prepared(tmp_path):
    manifest = tmp_path / "session.yaml"
    manifest.write_text(
        "# other objects may stand before it\n---\n"
        "apiVersion: esper.dev/v1alpha1\nkind: Blueprint\nmetadata: {name: low-rank}\n"
        "spec: {builtin: low-rank}\n---\n"
        "apiVersion: esper.dev/v1alpha1\nkind: TrainingSession\nmetadata: {name: bare}\n"
        "spec: {model: {entrypoint: 'a:Model'}, data: {entrypoint: 'a:data'}}\n"
    )
    spec = prepared(manifest)["spec"]
    assert spec["training"]["checkpoint"]["everyEpochs"] > 0
    assert spec["workers"]["resources"]["requests"]


def test_a_session_that_can_not_be_read_is_told_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(chaos_cluster, "layout", lambda: SimpleNamespace(way=SOURCE))
    assert main([f"--session={tmp_path}/away.yaml"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/away.yaml" in line


TRANSITION = {
    "session": "s",
    "epoch": 3,
    "layer": "head",
    "slot": 0,
    "cycle": 0,
    "previous": "dormant",
    "current": "germinated",
    "reason": "why",
}


def written(folder, *, decisions=(), transitions=()):
    for name, found in (("decisions", decisions), ("events", transitions)):
        text = "".join(json.dumps(line) + "\n" for line in found)
        (folder / f"{name}.jsonl").write_text(text)
    return folder


def transition(**changes):
    return {"type": "transition", "time": "t", **TRANSITION, **changes}


def decision(identity, **changes):
    return {"id": identity, "action": "germinate", "applied": True, **changes}


def broken(check, *words):
    outcome = Outcome()
    check(*words, outcome)
    return outcome.broken


def test_a_decision_that_was_applied_twice_is_found(tmp_path):
    once = written(tmp_path, decisions=[decision("a")], transitions=[transition()])
    assert broken(check_decisions, once) == []
    twice = written(tmp_path, decisions=[decision("a")] * 2, transitions=[transition()])
    assert any("a are recorded twice" in line for line in broken(check_decisions, twice))
    same = written(tmp_path, decisions=[decision("a")], transitions=[transition()] * 2)
    assert any("2 seeds germinated in 1 slots" in line for line in broken(check_decisions, same))
    other = [transition(), transition(slot=1)]
    more = written(tmp_path, decisions=[decision("a")], transitions=other)
    assert any("1 decisions to germinate" in line for line in broken(check_decisions, more))


def test_a_seed_that_is_not_as_the_log_tells_is_found(tmp_path):
    told = [transition(), transition(previous="germinated", current="training")]
    place = written(tmp_path, transitions=told)
    seed = {"spec": {"layer": "head", "slot": 0}, "status": {"state": "training"}}
    assert broken(check_seeds, [seed], place) == []
    assert broken(check_seeds, [], place)
    assert broken(check_seeds, [seed | {"status": {"state": "germinated"}}], place)


def published(*transitions):
    return [
        OonaMessage.carrying(
            TopicNames.TRANSITIONS, SeedTransition.model_validate(found), ComponentType.TOLARIA
        ).model_copy(update={"id": identity})
        for identity, found in transitions
    ]


def test_a_transition_that_is_lost_or_in_disorder_is_found(tmp_path):
    first, second = TRANSITION, TRANSITION | {"slot": 1}
    place = written(tmp_path, transitions=[transition(), transition(slot=1)])
    again = published(("1", first), ("2", second), ("1", first))
    assert broken(check_transitions, again, place) == []
    lost = published(("1", first), ("3", TRANSITION | {"slot": 2}), ("1", first), ("2", second))
    assert broken(check_transitions, lost, place) == []  # an attempt went otherwise, and was lost
    assert broken(check_transitions, published(("1", first), ("1", second)), place)
    assert broken(check_transitions, published(("1", first)), place)
    assert broken(check_transitions, published(("2", second), ("1", first)), place)
    assert broken(check_transitions, published(("1", first), ("2", second), ("3", second)), place)


class Here:
    """A hub's pod that is this process's own machine."""

    def kubectl(self, *words):
        command = [sys.executable, *words[words.index("python") + 1 :]]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_a_second_accepted_result_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos_kernels, "DATABASE", str(tmp_path / "urza.sqlite"))
    with sqlite3.connect(tmp_path / "urza.sqlite") as db:
        db.execute("CREATE TABLE compiled_kernels (id, kernel, state, lease_token)")
        db.execute("INSERT INTO compiled_kernels VALUES ('1', 'a', 'proposed', NULL)")

    def accept(lease):
        with sqlite3.connect(tmp_path / "urza.sqlite") as db:
            values = f"state = 'characterized', lease_token = '{lease}'"
            db.execute(f"UPDATE compiled_kernels SET {values}")

    notes = Notes(Here())
    notes.begin()
    assert broken(notes.check, ["a"]) == ["no result was accepted for kernels a"]
    accept("one")
    assert broken(notes.check, ["a"]) == []
    assert broken(notes.check, ["a", "b"]) == ["no result was accepted for kernels b"]
    accept("two")
    assert any("2 results were accepted" in line for line in broken(notes.check, ["a"]))
    notes.end()
    with sqlite3.connect(tmp_path / "urza.sqlite") as db:
        assert [row[0] for row in db.execute("SELECT name FROM sqlite_master")] == [
            "compiled_kernels"
        ]


class Hub(BaseHTTPRequestHandler):
    """Answers deletions of kernels by the status that their names are."""

    def do_DELETE(self):
        self.send_response(int(self.path.rpartition("/")[2]))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.fixture
def hub():
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


class Reached:
    """A cluster of which only the hub can be asked."""

    def __init__(self, url):
        self.url = url

    @contextmanager
    def hub(self):
        yield HubConfig(url=self.url, token="t")


def test_a_kernel_that_a_live_session_uses_stays_and_the_others_go(hub):
    assert forget(Reached(hub), ["204", "404", "409"]) == ["204", "404"]
    with pytest.raises(ServerError, match="kernel 403 can't be deleted"):
        forget(Reached(hub), ["204", "403"])
    with pytest.raises(ServerError, match="kernel 204 can't be deleted"):
        forget(Reached("http://127.0.0.1:9"), ["204"])


class Away:
    """A cluster in which nothing can be begun, and the hub is away."""

    def __init__(self, _):
        self.asked, self.began = [], False
        Away.last = self

    def kubectl(self, *words, given=None):
        self.asked.append(words)
        if "exec" in words and self.began:
            raise ServerError("the hub is away")
        if "apply" in words:
            self.began = True
            raise ServerError("no room")
        return ""


def test_where_something_cannot_be_taken_back_the_rest_is_and_the_first_error_stays(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(chaos_cluster, "RealCluster", Away)
    cluster, said = SimpleNamespace(layout=SimpleNamespace(admin=None)), []
    with pytest.raises(ServerError, match="no room"):
        run(cluster, prepared(EXAMPLE), tmp_path, Plan(), said.append)
    assert [line for line in said if "the hub is away" in line]
    asked = Away.last.asked
    rollout, end, deleted = asked[-4], asked[-2], asked[-1]
    assert "rollout" in rollout
    assert "exec" in end
    (made,) = (words[2] for words in asked if words[:2] == ("create", "namespace"))
    assert made in deleted
    assert deleted[:2] == ("delete", "namespace")


@pytest.mark.parametrize(
    ("way", "said"),
    [
        (KIND, "got a cluster of kind; allowed: one from source (make cluster-down, then make "),
        (None, "got no cluster; allowed: one from source (make cluster ARGUMENTS=--way=source)"),
    ],
)
def test_a_cluster_that_cannot_be_hit_is_told_with_the_way_out(way, said, capsys, monkeypatch):
    place = SimpleNamespace(way=way, state="/s")
    monkeypatch.setattr(chaos_cluster, "layout", lambda: place)
    assert main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"make chaos-cluster: /s: {said}")


def test_ctrl_c_is_told_in_a_line(capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(chaos_cluster, "layout", lambda: SimpleNamespace(way=SOURCE))
    monkeypatch.setattr(chaos_cluster, "run", interrupted)
    monkeypatch.setattr(chaos_cluster.signal, "signal", lambda *_: None)
    assert main([]) == 130
    assert capsys.readouterr().err == "make chaos-cluster: interrupted\n"


@pytest.mark.parametrize(
    ("status", "message", "made"),
    [
        ("True", "Job kernel-0a1b", True),
        ("True", "the hub had it", False),
        ("Unknown", "Job kernel-0a1b", False),
    ],
)
def test_a_kernel_that_the_hub_had_was_compiled_by_no_job(status, message, made):
    ready = {"type": "Ready", "status": status, "message": message}
    assert was_compiled({"status": {"conditions": [ready]}}) is made
    assert not was_compiled({})
