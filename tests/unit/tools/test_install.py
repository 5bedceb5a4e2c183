"""`make install`: which cluster it takes."""

import tempfile
from pathlib import Path

import pytest

from tools import helm, install
from tools.cluster.containers.layout import KIND, SOURCE, STATE, Layout
from tools.cluster.containers.standing import runs
from tools.images.loaded import loaded, note


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


def pods(values):
    """The annotations and the images of the chart's pods, by component."""
    made = helm.render(values, "--values", str(helm.LOCAL_VALUES))
    workloads = [one for one in made if one["kind"] in ("Deployment", "StatefulSet")]
    return {
        one["metadata"]["labels"]["app.kubernetes.io/component"]: (
            one["spec"]["template"]["metadata"]["annotations"].get(install.IMAGE),
            one["spec"]["template"]["spec"]["containers"][0]["image"],
        )
        for one in workloads
    }


def test_another_image_under_the_same_tag_makes_its_pods_anew_and_no_others(cluster):
    assert install.annotations(cluster.admin) == {}
    note(cluster, "localhost/esper-control:dev", "sha256:1")
    note(cluster, "localhost/esper-redis:dev", "sha256:2")
    before = pods(install.annotations(cluster.admin))
    assert before == {
        "operator": ("sha256:1", "localhost/esper-control:dev"),
        "urza": ("sha256:1", "localhost/esper-control:dev"),
        "redis": ("sha256:2", "localhost/esper-redis:dev"),
    }
    assert pods(install.annotations(cluster.admin)) == before
    note(cluster, "localhost/esper-redis:dev", "sha256:3")
    after = pods(install.annotations(cluster.admin))
    assert after == before | {"redis": ("sha256:3", "localhost/esper-redis:dev")}
    assert loaded(cluster).keys() == {"localhost/esper-control:dev", "localhost/esper-redis:dev"}


def test_of_a_cluster_elsewhere_nothing_is_known(cluster, monkeypatch):
    note(cluster, "localhost/esper-control:dev", "sha256:1")
    monkeypatch.setenv("KUBECONFIG", "/dev/null")
    assert install.annotations(None) == {}
    monkeypatch.setenv("KUBECONFIG", str(cluster.admin))
    assert install.annotations(None).keys() == {"operator", "urza"}
