"""What the demonstration takes for proof, on a cluster that only answers.

On clusters that train: `make cluster-api ARGUMENTS=--demo`, and `tests/e2e/test_demo.py`.
"""

import json
import signal
import threading
from pathlib import Path

import pytest
import yaml

from tools import real_demo
from tools.cluster_demo import COLUMNS, INDEX, Demo, DemoFailed, DemoSession
from tools.rank_worker import AGENT, RANK
from tools.servers.process import ServerError

EXAMPLE = Path("examples/02-digits-cnn/session.yaml")
TORCHRUN = [f"python -m {AGENT} 9", f"python -m {RANK} session.yaml"]


class Cluster:
    """A `DemoCluster` with the objects that it is given, by kind."""

    namespace, catalogue, kubeconfig = "esper-demo", "esper-system", Path("config")

    def __init__(self, folder, *, fossilized=1, kernels=(), pods=(), in_use=()):
        self.folder, self.in_use = folder, in_use
        self.runs = dict(pods)
        self.asked = []
        self.objects = {
            "ts": {"status": {"seeds": {"fossilized": 1}, "epoch": 1}},
            "seeds": {"items": []},
            "ck": {"items": list(kernels)},
            "pods": {"items": [pod(name) for name in self.runs]},
        }
        self.seeds = "".join(f"seed.esper.dev/{number}\n" for number in range(fossilized))

    def kubectl(self, *words, given=None):
        self.asked.append(words)
        if words[0] != "get":
            return ""
        if words[-2:] == ("-o", "json"):
            return json.dumps(self.objects[words[1]])
        if "--field-selector=spec.session=digits-cnn,status.state=fossilized" in words:
            return self.seeds
        return COLUMNS[words[1]]

    def forget(self, kernels):
        return [kernel for kernel in kernels if kernel not in self.in_use]

    def processes(self, pod):
        if self.runs[pod] is None:
            raise ServerError(f"kubectl exec {pod}: container not found")
        return self.runs[pod]

    def mend(self):
        return False


def pod(name, role="worker", number=None, phase="Running"):
    labels, annotations = {"esper.dev/role": role}, {INDEX: number or name}
    meta = {"name": name, "labels": labels, "annotations": annotations}
    return {"metadata": meta, "status": {"phase": phase}}


def kernel(message, status="True", name="anew"):
    ready = {"type": "Ready", "status": status, "message": message}
    return {"metadata": {"name": name}, "status": {"conditions": [ready]}}


@pytest.fixture(autouse=True)
def handler():
    """That of the signal which `make cluster-demo` takes as Ctrl-C is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def demo(cluster, manifest=EXAMPLE, say=lambda _: None):
    return Demo(cluster, DemoSession.read(manifest), say, threading.Event())


def trained_outside(folder, *kernels):
    """What the run outside of the cluster tells of its seeds."""
    (folder / "outside").mkdir()
    lines = "".join(json.dumps({"type": "transition", "kernel": each}) + "\n" for each in kernels)
    (folder / "outside" / "events.jsonl").write_text(lines)


@pytest.mark.parametrize(
    ("kernels", "holds"),
    [
        ([kernel("Job compile-a"), kernel("the hub had it")], True),
        ([kernel("the hub had it")], False),
        ([kernel("Job compile-a", "Unknown")], False),
        ([kernel("Job compile-a", name="of-an-earlier-session")], False),
        ([], False),
    ],
)
def test_a_job_has_compiled_a_kernel_that_was_to_be_made_anew(tmp_path, kernels, holds):
    trained_outside(tmp_path, "anew", "in-use", None)
    shown = demo(Cluster(tmp_path, kernels=kernels, in_use={"in-use"}))
    shown._forgotten()
    shown._listed()
    assert shown._checks.pop("a kernel made by a compile Job") is holds
    assert all(shown._checks.values())


@pytest.mark.parametrize(
    ("kernels", "said"),
    [((), "no seed of it germinates"), (("in-use",), "others train with all of its kernels")],
)
def test_where_no_kernel_can_be_compiled_anew_nothing_begins(tmp_path, kernels, said):
    trained_outside(tmp_path, *kernels)
    with pytest.raises(DemoFailed, match=said):
        demo(Cluster(tmp_path, in_use={"in-use"}))._forgotten()


def session(folder, **workers):
    document = yaml.safe_load(EXAMPLE.read_text())
    del document["spec"]["workers"]
    document["spec"] |= {"workers": workers} if workers else {}
    blueprint = {"apiVersion": "esper.dev/v1alpha1", "kind": "Blueprint"}
    blueprint |= {"metadata": {"name": "own"}, "spec": {"builtin": "noop"}}
    path = folder / "session.yaml"
    path.write_text(yaml.safe_dump_all([blueprint, document]))
    return path


@pytest.mark.parametrize(
    ("workers", "pods", "ranks"),
    [({}, 1, 1), ({"replicas": 3}, 3, 3), ({"replicas": 2, "processesPerWorker": 4}, 2, 8)],
)
def test_a_session_has_as_many_pods_and_ranks_as_it_says(tmp_path, workers, pods, ranks):
    found = DemoSession.read(session(tmp_path, **workers))
    assert (found.name, found.pods, found.ranks) == ("digits-cnn", pods, ranks)
    suspended = found.suspended("other")
    assert (suspended["kind"], suspended["metadata"]["name"]) == ("TrainingSession", "other")
    assert suspended["spec"]["runPolicy"] == {"suspend": True}


def test_a_session_that_cannot_be_read_or_is_refused_is_told_before_anything(tmp_path, capsys):
    for path, said in (
        (tmp_path / "none.yaml", "none.yaml: got No such file or directory"),
        (session(tmp_path, replicas=0), "spec.workers.replicas: got 0"),
    ):
        assert real_demo.main([f"--session={path}"]) == 1
        (line,) = capsys.readouterr().out.splitlines()
        assert line.startswith("error: ")
        assert said in line


@pytest.mark.parametrize(("fossilized", "holds"), [(0, False), (1, True), (2, False)])
def test_fossils_are_listed_as_many_as_counted(tmp_path, fossilized, holds):
    shown = demo(Cluster(tmp_path, fossilized=fossilized))
    shown._listed()
    assert shown._checks["get seeds --field-selector"] is holds


def test_the_catalogue_is_listed_where_it_is(tmp_path):
    cluster = Cluster(tmp_path)
    demo(cluster)._listed()
    assert ("get", "bp", "-n", "esper-system") in cluster.asked
    assert ("get", "seeds", "-n", "esper-demo") in cluster.asked


@pytest.mark.parametrize("missing", [AGENT, RANK])
def test_a_pod_trains_under_torchrun_if_both_are_at_work(tmp_path, missing):
    without = [words for words in TORCHRUN if missing not in words]
    cluster = Cluster(tmp_path, pods={"a": TORCHRUN, "b": without, "c": TORCHRUN})
    cluster.objects["pods"]["items"].append(pod("tamiyo", role="controller"))
    shown = demo(cluster)
    shown._look()
    assert shown._trained.keys() == {"a", "c"}


def test_a_pod_that_cannot_be_looked_into_is_not_seen_and_one_that_waits_is_not_asked(tmp_path):
    cluster = Cluster(tmp_path, pods={"a": None, "b": TORCHRUN})
    cluster.objects["pods"]["items"] += [
        pod("c", phase="Pending"),
        pod("b-again", number="b"),  # the same worker's next
    ]
    shown = demo(cluster)
    shown._look()
    assert shown._trained == {"b": "b"}


@pytest.mark.parametrize("epoch", [0, 1])
def test_pods_are_looked_at_until_all_were_seen(tmp_path, epoch, monkeypatch):
    cluster, said = Cluster(tmp_path, pods={"a": TORCHRUN}), []
    cluster.objects["ts"]["status"]["epoch"] = epoch
    shown = demo(cluster, say=said.append)
    rounds = []

    def waited(seconds):
        rounds.append(seconds)
        if len(rounds) == 1:
            cluster.runs["b"] = TORCHRUN
            cluster.objects["pods"]["items"].append(pod("b"))
        elif len(rounds) == 2:
            done = {"type": "Succeeded", "status": "True"}
            cluster.objects["ts"]["status"]["conditions"] = [done]
        return False

    monkeypatch.setattr(shown._stop, "wait", waited)
    monkeypatch.setitem(COLUMNS, "ts", "digits-cnn Running 1m")
    shown._followed()
    assert shown._trained.keys() == {"a", "b"}
    assert not any("too short" in line for line in said)
    assert len(rounds) == 2


def test_a_session_that_was_too_short_to_be_watched_is_told(tmp_path, monkeypatch):
    cluster, said = Cluster(tmp_path), []
    ended = [{"type": "Succeeded", "status": "True"}]
    cluster.objects["ts"]["status"]["conditions"] = ended
    monkeypatch.setitem(COLUMNS, "ts", "digits-cnn Completed 1m")
    demo(cluster, say=said.append)._followed()
    assert any("torchrun was seen in 0 of 2 pods" in line for line in said)


def test_an_earlier_session_goes_first(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path)
    demo(cluster)._removed()
    assert cluster.asked[:2] == [
        ("delete", "ts", name, "--ignore-not-found")
        for name in ("digits-cnn", "digits-cnn-suspended")
    ]
    cluster.objects["seeds"]["items"] = [{"metadata": {"name": "old"}}]
    monkeypatch.setattr("tools.cluster_demo.GONE_SECONDS", 0)
    with pytest.raises(DemoFailed, match="an earlier digits-cnn has not gone"):
        demo(cluster)._removed()


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted: what was made stays"),
        (ServerError("no root"), 1, "error: no root"),
        (DemoFailed("digits-cnn: BadInput: no"), 1, "error: digits-cnn: BadInput: no"),
    ],
)
def test_how_make_cluster_demo_breaks_off(error, status, said, capsys, monkeypatch):
    def broken_off(*_):
        raise error

    monkeypatch.setattr(real_demo, "_told", broken_off)
    assert real_demo.main([]) == status
    assert capsys.readouterr().out.startswith(said)


@pytest.mark.parametrize("holds", [True, False])
def test_its_last_line_tells_what_holds(holds, capsys, monkeypatch):
    monkeypatch.setattr(real_demo, "_told", lambda *_: {"holds": holds})
    monkeypatch.setattr(real_demo, "cluster_program", lambda name: Path("/programs") / name)
    assert real_demo.main([]) == (0 if holds else 1)
    lines = capsys.readouterr().out.splitlines()
    assert json.loads(lines[-1]) == {"holds": holds}
    assert any(" PATH=/programs:$PATH" in line for line in lines)
