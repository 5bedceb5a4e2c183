"""What the demonstration takes for proof, on a cluster that only answers.

On clusters that train: `make cluster-api ARGUMENTS=--demo`, and `tests/e2e/test_demo.py`.
"""

import json
import signal
import threading
from pathlib import Path

import pytest

from tools import real_demo
from tools.cluster_demo import COLUMNS, Demo, DemoFailed
from tools.rank_worker import AGENT, RANK
from tools.servers.process import ServerError

EXAMPLE = Path("examples/02-digits-cnn/session.yaml")
TORCHRUN = [f"python -m {AGENT} 9", f"python -m {RANK} session.yaml"]


class Cluster:
    """A `DemoCluster` with the objects that it is given, by kind."""

    namespace, catalogue, kubeconfig = "esper-demo", "esper-system", Path("config")

    def __init__(self, folder, *, used=False, fossilized=1, kernels=(), pods=()):
        self.folder, self.used = folder, used
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
        return "" if words[1] == "ck" and not self.objects["ck"]["items"] else COLUMNS[words[1]]

    def processes(self, pod):
        return self.runs[pod]

    def mend(self):
        return False


def pod(name, role="worker"):
    return {"metadata": {"name": name, "labels": {"esper.dev/role": role}}}


def kernel(message, status="True"):
    ready = {"type": "Ready", "status": status, "message": message}
    return {"status": {"conditions": [ready]}}


@pytest.fixture(autouse=True)
def handler():
    """That of the signal which `make cluster-demo` takes as Ctrl-C is put back."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def demo(cluster):
    return Demo(cluster, EXAMPLE, lambda _: None, threading.Event())


@pytest.mark.parametrize(
    ("kernels", "used", "holds"),
    [
        ([kernel("Job compile-a"), kernel("the hub had it")], False, True),
        ([kernel("the hub had it")], False, False),
        ([kernel("the hub had it")], True, False),
        ([kernel("Job compile-a", "Unknown")], False, False),
        ([], False, False),
        ([], True, True),
    ],
)
def test_a_job_has_compiled_a_kernel_unless_none_was_needed(tmp_path, kernels, used, holds):
    shown = demo(Cluster(tmp_path, kernels=kernels, used=used))
    shown._listed()
    assert shown._checks.pop("a kernel made by a compile Job") is holds
    assert all(shown._checks.values())
    assert ("get ck" in shown._checks) is bool(kernels)


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
    assert shown._trained == {"a", "c"}


def test_an_earlier_session_goes_first(tmp_path, monkeypatch):
    cluster = Cluster(tmp_path)
    demo(cluster)._removed()
    assert cluster.asked[0] == ("delete", "ts", "digits-cnn", "--ignore-not-found")
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
