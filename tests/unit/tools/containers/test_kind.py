"""The way where Docker answers: programs that stand for docker and kind take down what is asked."""

import tempfile
from pathlib import Path

import pytest

from tools import real_demo
from tools.cluster.containers import kind, packages
from tools.cluster.containers.__main__ import main, way_to_make
from tools.cluster.containers.kind import KindCluster, docker_answers
from tools.cluster.containers.layout import KIND, SOURCE, STATE, layout
from tools.cluster.programs import ASSETS, cluster_program
from tools.servers.process import ServerError

DOCKER = "#!/bin/sh\n[ -e {folder}/answers ] && echo 28.0.0\n"
KIND_PROGRAM = """#!/bin/sh
echo "$@" >> {folder}/asked
case "$1 $2" in
"get clusters") cat {folder}/clusters ;;
"create cluster") echo "${{3#--name=}}" > {folder}/clusters ;;
"delete cluster") : > {folder}/clusters ;;
esac
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in (("docker", DOCKER), ("kind", KIND_PROGRAM), ("kubectl", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text.format(folder=tmp_path))
        (tmp_path / name).chmod(0o755)
    for name in ("answers", "clusters", "asked"):
        (tmp_path / name).touch()
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv(ASSETS, str(tmp_path))
    cluster_program.cache_clear()
    yield tmp_path
    cluster_program.cache_clear()


@pytest.fixture
def state(folder):
    # Sockets lie in it, whose paths may not be long, as those of a worker's tests are.
    with tempfile.TemporaryDirectory(prefix="kind-", dir="/tmp") as short:
        yield Path(short) / "state"


def asked(folder):
    return (folder / "asked").read_text().splitlines()


def test_docker_answers_or_it_does_not(folder, monkeypatch):
    assert docker_answers()
    (folder / "answers").unlink()
    assert not docker_answers()
    (folder / "docker").write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(kind, "_DOCKER_SECONDS", 0.1)
    assert not docker_answers()
    monkeypatch.setenv("PATH", str(folder / "nothing"))
    assert not docker_answers()


def test_it_is_made_once_and_deleted(folder, state, capsys):
    name = KindCluster(layout(state)).name
    config = f"--kubeconfig={state}/admin.kubeconfig"
    assert main(["--state", str(state), "up"]) == 0
    said = capsys.readouterr().out
    assert "Docker answers: a cluster of kind" in said
    assert f"export KUBECONFIG={state}/admin.kubeconfig " in said
    assert layout(state).way == KIND
    assert main(["--state", str(state), "up"]) == 0
    assert "it was up" in capsys.readouterr().out
    assert main(["--state", str(state), "load", "/x.tar"]) == 0
    assert main(["--state", str(state), "down"]) == 0
    assert not state.exists()
    changes = [line for line in asked(folder) if not line.startswith("get")]
    assert changes == [
        f"create cluster --name={name} --wait=3m {config}",
        f"export kubeconfig --name={name} {config}",
        f"load image-archive --name={name} /x.tar",
        f"delete cluster --name={name} {config}",
    ]


def test_images_of_docker_are_loaded(folder, state):
    cluster = KindCluster(layout(state))
    cluster.load_image("localhost/one:dev")
    assert asked(folder) == [f"load docker-image --name={cluster.name} localhost/one:dev"]


def test_a_docker_that_has_gone_is_told(folder, state):
    (folder / "answers").unlink()
    with pytest.raises(ServerError, match="a cluster of kind, and Docker does not answer"):
        KindCluster(layout(state)).up()


def test_kinds_cluster_has_no_further_nodes(folder, state, capsys):
    main(["--state", str(state), "up"])
    for command in (["node", "add"], ["exec", "true"]):
        assert main(["--state", str(state), *command]) == 1
        assert "got no cluster from source" in capsys.readouterr().out


@pytest.fixture
def not_root(monkeypatch):
    monkeypatch.setattr(packages.os, "geteuid", lambda: 1000)


def test_a_cluster_from_source_that_can_not_be_leaves_nothing(folder, state, capsys, not_root):
    (folder / "answers").unlink()
    told = "a cluster from source needs root; got user id 1000"
    for words in ([], ["--way=source"]):
        assert main(["--state", str(state), "up", *words]) == 1
        assert told in capsys.readouterr().out
        assert not state.exists()
    assert layout(state).way is None


def test_a_cluster_of_kind_needs_no_root(folder, state, not_root):
    assert way_to_make(layout(state)) == KIND
    assert main(["--state", str(state), "up"]) == 0
    # What was made stays what it is, whatever is asked for.
    assert way_to_make(layout(state), SOURCE) == KIND


def test_the_demonstration_is_refused_before_it_builds(
    folder, state, capsys, not_root, monkeypatch
):
    (folder / "answers").unlink()
    monkeypatch.setenv(STATE, str(state))

    def built(name):
        raise AssertionError(f"{name} was built")

    monkeypatch.setattr(real_demo, "cluster_program", built)
    assert real_demo.main([]) == 1
    assert "a cluster from source needs root; got user id 1000" in capsys.readouterr().out
