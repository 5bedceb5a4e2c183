"""kubectl as the tools call it: what its errors say."""

import pytest

from tools import kubectl
from tools.servers.process import ServerError


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Stands for kubectl; returns what writes the commands that it is to run."""
    path = tmp_path / "kubectl"
    monkeypatch.setattr(kubectl, "cluster_program", lambda _: path)

    def does(commands):
        path.write_text(f"#!/bin/sh\n{commands}\n")
        path.chmod(0o755)

    return does


def test_it_is_given_words_and_standard_input(program, tmp_path):
    program('echo "$@"; cat')
    said = kubectl.run("apply", "-f", "-", kubeconfig=tmp_path / "config", given="a: 1")
    assert said == f"--kubeconfig={tmp_path}/config apply -f -\na: 1"


def test_an_error_is_told_in_a_line_without_what_is_logged(program):
    logged = 'E1130 17:00:00.000000 1 memcache.go:265] "Unhandled Error"'
    program(f"printf '%s\\n' '{logged}' 'Error: a' 'Error: b' >&2; exit 1")
    with pytest.raises(ServerError) as caught:
        kubectl.run("get", "ts")
    assert str(caught.value) == "kubectl get ts: Error: a; Error: b"
    program(f"echo '{logged}' >&2; exit 1")
    with pytest.raises(ServerError, match="Unhandled Error"):
        kubectl.run("get", "ts")


def test_one_that_does_not_end_is_an_error_like_others(program):
    program("exec sleep 30")
    with pytest.raises(ServerError, match=r"kubectl wait ts/a: it has not ended after 0\.2 s"):
        kubectl.run("wait", "ts/a", seconds=0.2)


def test_what_a_fetch_could_not_get_is_told(program, tmp_path):
    program("echo 'Error from server (NotFound): no a' >&2; exit 1")
    config = tmp_path / "config"
    with pytest.raises(ServerError, match=r"esper fetch a .*NotFound"):
        kubectl.fetch("a", tmp_path / "run", namespace="n", kubeconfig=config)
