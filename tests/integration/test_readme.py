"""The README on one machine: what it says to type, typed."""

import json
import tempfile
from pathlib import Path

import pytest

from tests.readme import blocks, checkout, play

# They write into one folder, one after the other, as a reader does.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("readme")]


@pytest.fixture(scope="module")
def folder():
    """The repository as a reader has it, with the README's session in it.

    Postgres never runs as root, and whom it runs as then has to come by.
    """
    with tempfile.TemporaryDirectory(prefix="reader-") as temporary:
        Path(temporary).chmod(0o755)
        yield written(checkout(Path(temporary) / "esper"))


def written(found):
    """The session of the README, in a folder."""
    (manifest,) = blocks("A session", "yaml")
    (code,) = blocks("A session", "python")
    (found / "session.yaml").write_text(manifest)
    (found / "model.py").write_text(code)
    return found


def accuracy(run):
    return json.loads((run / "result.json").read_text())["accuracy"]


def test_two_commands_grow_a_model(folder):
    play("Try it", folder)
    demo = folder / "runs" / "demo"
    result = json.loads((demo / "result.json").read_text())
    assert result["parameters"] > result["parametersBase"]
    assert (demo / "report.html").stat().st_size > 10_000


def test_a_session_of_ones_own(folder):
    said = play("A session", folder)
    assert "session.yaml: valid" in said[".venv/bin/esper validate session.yaml"]
    assert accuracy(folder / "runs" / "digits") > 0.8


def test_what_it_leaves_is_loaded(folder):
    (said,) = play("What a run leaves", folder).values()
    assert "Linear" in said


def test_the_same_over_services(folder):
    play("Over services", folder)
    one, other = folder / "runs" / "digits", folder / "runs" / "over-services"
    assert (one / "model.safetensors").read_bytes() == (other / "model.safetensors").read_bytes()


def test_a_cluster_without_root(folder):
    (said,) = play("Without root or Docker", folder).values()
    assert "export KUBECONFIG=" in said
