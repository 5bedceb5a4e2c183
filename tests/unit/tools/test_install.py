"""`make install`: which cluster it takes."""

import tempfile
from pathlib import Path

import pytest

from tools import install
from tools.cluster.containers.layout import KIND, SOURCE, STATE, Layout
from tools.cluster.containers.standing import runs


@pytest.fixture
def cluster(monkeypatch):
    """One that is not there; sockets lie in its folder, whose paths may not be long."""
    with tempfile.TemporaryDirectory(prefix="install-", dir="/tmp") as short:
        monkeypatch.setenv(STATE, short)
        monkeypatch.delenv("KUBECONFIG", raising=False)
        yield Layout(Path(short))


@pytest.mark.parametrize("way", [None, SOURCE, KIND])
def test_without_a_cluster_that_runs_it_says_what_to_set(cluster, way, capsys, monkeypatch):
    monkeypatch.setattr("tools.cluster.containers.kind.KindCluster.running", False)
    if way is not None:
        cluster.mark.write_text(way)
    assert install.main([]) == 1
    told = capsys.readouterr()
    assert told.err == (
        f"make install: KUBECONFIG: got nothing, and no cluster runs in {cluster.state}; allowed: "
        "a kubeconfig, or the cluster of make cluster (ESPER_CLUSTER_STATE names its folder)\n"
    )
    assert not told.out


def test_the_cluster_that_runs_is_taken_and_said(cluster, capsys, monkeypatch):
    cluster.mark.write_text(KIND)
    monkeypatch.setattr("tools.cluster.containers.kind.KindCluster.running", True)
    assert runs(cluster)
    assert install.chosen() == cluster.admin
    assert f"into the cluster of {cluster.state}" in capsys.readouterr().out


def test_the_one_that_is_named_is_stronger(cluster, capsys, monkeypatch):
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    monkeypatch.setattr(install, "layout", lambda: pytest.fail("asked for another"))
    assert install.chosen() is None
    assert not capsys.readouterr().out


def test_a_cluster_that_does_not_answer_is_told_in_a_line(cluster, capsys, monkeypatch):
    config = cluster.state / "config"
    config.write_text(
        "{apiVersion: v1, kind: Config, current-context: a, users: [],"
        " contexts: [{name: a, context: {cluster: a}}],"
        " clusters: [{name: a, cluster: {server: 'http://127.0.0.1:9'}}]}"
    )
    monkeypatch.setenv("KUBECONFIG", str(config))
    assert install.main([]) == 1
    error = capsys.readouterr().err
    assert error.startswith("make install: kubectl apply ")
    assert "127.0.0.1:9" in error
    assert error.count("\n") == 1
