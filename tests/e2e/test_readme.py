"""The README on a cluster: what it says to type, typed. Its end is in `test_cluster_down.py`."""

import os
import re

import pytest

from tests.readme import blocks, checkout, play
from tools import helm
from tools.cluster.containers.layout import STATE
from tools.cluster.programs import cluster_program

EPOCHS = 6


@pytest.fixture
def folder(tmp_path):
    return checkout(tmp_path / "esper")


def test_by_hand(cluster, release, folder):
    # The whole of it is trained by the demonstration, and by the test of the chart.
    manifest = folder / "examples" / "02-digits-cnn" / "session.yaml"
    manifest.write_text(manifest.read_text().replace("epochs: 60", f"epochs: {EPOCHS}"))
    said = play("By hand", folder, **{STATE: str(cluster.layout.state)})
    assert re.search(rf"digits-cnn +Completed +{EPOCHS} ", said["kubectl get ts,seeds"])
    fetched = folder / "runs" / "digits-cnn"
    assert {"grown.py", "model.safetensors", "report.html"} <= {p.name for p in fetched.iterdir()}
    cluster.kubectl("delete", "ts", "digits-cnn")


def test_a_cluster_of_ones_own(cluster, release, folder):
    (values,) = blocks("A cluster of your own", "yaml")
    (folder / "values.yaml").write_text(values)
    helm.render(None, "--values", str(folder / "values.yaml"))
    # On this one the images have other places.
    (folder / "values.yaml").write_text(helm.LOCAL_VALUES.read_text())
    programs = [str(cluster_program(name).parent) for name in ("helm", "kubectl")]
    path = os.pathsep.join([*programs, os.environ["PATH"]])
    given = {"KUBECONFIG": str(cluster.layout.admin), "PATH": path}
    said = play("A cluster of your own", folder, **given)
    assert "bottleneck-mlp" in said["kubectl get blueprints -n esper-system"]
