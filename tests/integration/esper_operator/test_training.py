"""A session from `kubectl apply` to what it leaves, with workers, controller and forge at work."""

import os
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from tests.integration.esper_operator.trained import GROWING, SECONDS, spec
from tools.cluster.control_plane import wait_for
from tools.cluster.programs import cluster_program
from tools.operator_workers import DEPLOYMENTS, JOBS, PODS, SECRETS, SERVICES, SESSIONS
from tools.operator_world import GROUP

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("cluster"),
    pytest.mark.usefixtures("kubelet"),
]
SEEDS, KERNELS = f"{GROUP}/seeds", f"{GROUP}/compiledkernels"
EPOCHS = 8


def ready(found):
    conditions = found.get("status", {}).get("conditions", ())
    return any(c["type"] == "Ready" and c["status"] == "True" for c in conditions)


def fetch(kubeconfig, session, namespace, directory):
    """What `esper fetch` leaves."""
    words = ("fetch", session, "--namespace", namespace, "--output-dir", str(directory))
    path = f"{cluster_program('kubectl').parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "esper", *words],
        env=os.environ | {"KUBECONFIG": str(kubeconfig), "PATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return directory


def test_a_session_trains_grows_and_leaves_nothing(
    world, patient_operator, objects, kubelet, tmp_path
):
    manifest = yaml.safe_dump(world.session("grows", spec=spec(EPOCHS, **GROWING)))
    world.plane.kubectl("apply", "-n", objects.namespace, "-f", "-", given=manifest)
    try:
        objects.wait("grows", "True", seconds=SECONDS)
    except Exception as error:
        raise AssertionError(f"{error}: {kubelet.logs(objects.namespace)[-8000:]}") from error
    status = objects.get(f"{SESSIONS}/grows")["status"]
    assert (status["epoch"], status["epochs"], status["attempt"]) == (EPOCHS, EPOCHS, 1)
    assert status["parameters"] > status["parametersBase"] == 64 * 12 + 12 + 12 * 10 + 10
    assert {"validationLoss", "validationMetric", "test"} <= status["metrics"].keys()
    assert status["checkpoint"]["epoch"] == EPOCHS

    # The kernel was made by a Job, whose pod has said so.
    compiled = [kernel for kernel in objects.items(KERNELS) if ready(kernel)]
    assert compiled
    for kernel in compiled:
        name = kernel["metadata"]["name"]
        assert kernel["status"]["parameters"] > 0
        assert objects.get(f"{JOBS}/compile-{name}")["status"]["succeeded"] == 1
        assert kernel["status"]["conditions"][0]["message"] == f"Job compile-{name}"

    seeds = wait_for(lambda: objects.items(SEEDS), "there is no seed")
    assert all(seed["status"]["transitions"] for seed in seeds)
    states = [seed["status"]["state"] for seed in seeds]
    assert states.count("fossilized") == status["seeds"]["fossilized"] >= 1
    chosen = "spec.session=grows,status.state=fossilized"
    words = ("get", "seeds", "-n", objects.namespace, f"--field-selector={chosen}", "-o", "name")
    assert len(world.plane.kubectl(*words).split()) == states.count("fossilized")

    fetched = fetch(world.plane.admin, "grows", objects.namespace, tmp_path / "run")
    assert {"report.html", "grown.py", "metrics.jsonl"} <= {path.name for path in fetched.iterdir()}
    grown = load_file(fetched / "model.safetensors")
    assert sum(tensor.numel() for tensor in grown.values()) == status["parameters"]

    told = world.plane.kubectl("describe", "ts", "grows", "-n", objects.namespace)
    assert "esper-operator" in told.partition("Events:")[2]

    world.plane.kubectl("delete", "ts", "grows", "-n", objects.namespace)
    for path in (SEEDS, KERNELS, JOBS, PODS, SERVICES, DEPLOYMENTS, f"{SECRETS}/grows-esper"):
        wait_for(
            lambda path=path: not (objects.get(path) or {}).get("items", objects.get(path)),
            f"{path} is left",
            seconds=SECONDS,
        )
