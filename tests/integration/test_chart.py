"""The chart on a real API server: installed, upgraded, taken away and installed again."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from esper.contracts.resources import KINDS
from tests.unit.charts.objects import INSTALLATIONS, of_kind, pods
from tools import helm
from tools.cluster.control_plane import ControlPlane
from tools.helm import NAMESPACE, RELEASE

pytestmark = pytest.mark.xdist_group("cluster")

RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
OTHERS = {"ServiceMonitor"}
SESSION = """
apiVersion: esper.dev/v1alpha1
kind: TrainingSession
metadata: {name: kept, namespace: default}
spec:
  model: {entrypoint: "esper.zoo.models:MLP"}
  data: {entrypoint: "esper.zoo.data:spirals"}
"""


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ControlPlane]:
    """One of its own: what others have applied is not Helm's to take over."""
    with ControlPlane(tmp_path_factory.mktemp("chart")) as running:
        for name in (NAMESPACE, "team-a", "team-b"):
            running.create_namespace(name, RESTRICTED)
        yield running


@pytest.fixture
def helm_of(plane: ControlPlane) -> Iterator[Callable[..., str]]:
    """Helm in that cluster; what it has installed under the chart's name goes afterwards."""

    def run(command: str, *words: str, **given: Any) -> str:
        where = ("--namespace", NAMESPACE)
        return helm.run(command, RELEASE, *words, *where, kubeconfig=plane.admin, **given)

    yield run
    run("uninstall", "--ignore-not-found")


def secret(plane: ControlPlane) -> dict[str, str]:
    found: dict[str, str] = plane.get("-n", NAMESPACE, "secret", "esper-credentials")["data"]
    return found


def test_it_outlives_upgrades_and_is_found_again(
    plane: ControlPlane, helm_of: Callable[..., str]
) -> None:
    notes = helm_of("install", str(helm.CHART))
    assert "Esper" in notes
    assert "for all namespaces" in notes
    first = secret(plane)
    assert {len(value) > 40 for value in first.values()} == {True}
    plane.kubectl("apply", "-f", "-", given=SESSION)
    uid = plane.get("trainingsession", "kept")["metadata"]["uid"]

    # A definition of an earlier release lacks what this one has.
    plane.kubectl(
        *("patch", "crd", "trainingsessions.esper.dev", "--type=json", "-p"),
        json.dumps([{"op": "replace", "path": "/spec/names/shortNames", "value": []}]),
    )
    helm_of("upgrade", str(helm.CHART), "--set", "operator.logLevel=debug", "--force-conflicts")
    assert secret(plane) == first
    crd = plane.get("crd", "trainingsessions.esper.dev")
    assert crd["spec"]["names"]["shortNames"] == ["ts"]
    settings = plane.get("-n", NAMESPACE, "configmap", "esper-operator")["data"]["esper.yaml"]
    assert yaml.safe_load(settings)["component"]["log_level"] == "debug"

    assert "kept due to the resource policy" in helm_of("uninstall")
    assert plane.get("trainingsession", "kept")["metadata"]["uid"] == uid
    assert secret(plane) == first
    left = {item["metadata"]["name"] for item in plane.get("-n", NAMESPACE, "pvc")["items"]}
    assert left == {"esper-urza", "esper-redis"}
    for kind in ("deployment", "statefulset", "service", "networkpolicy", "pdb", "role"):
        assert plane.get("-n", NAMESPACE, kind)["items"] == [], kind
    ours = ("-l", f"app.kubernetes.io/instance={RELEASE}")
    assert plane.get("clusterrole", *ours)["items"] == []

    helm_of("install", str(helm.CHART))
    assert secret(plane) == first
    assert plane.get("trainingsession", "kept")["metadata"]["uid"] == uid
    plane.kubectl("delete", "trainingsession", "kept")


def test_in_one_namespace_it_needs_no_right_beyond(plane: ControlPlane) -> None:
    """Whoever installs it administers a namespace; the kinds are there."""
    own = plane.create_namespace("team-own", RESTRICTED)
    plane.kubectl("apply", "--server-side", "--force-conflicts", "-f", str(helm.ROOT / "crds"))
    for words in (
        ("serviceaccount", "installer"),
        ("rolebinding", "installer", "--clusterrole=admin", f"--serviceaccount={own}:installer"),
        ("role", "kinds", "--verb=*", "--resource=" + ",".join(
            f"{of.plural}.esper.dev{part}" for of in KINDS for part in ("", "/status")
        )),
        ("rolebinding", "kinds", "--role=kinds", f"--serviceaccount={own}:installer"),
    ):  # fmt: skip
        plane.kubectl("create", "-n", own, *words)
    values = {"operator": {"namespaced": True}, "crds": {"install": False}}
    helm.run(
        *("install", RELEASE, str(helm.CHART), "--namespace", own),
        values=values,
        kubeconfig=plane.kubeconfig("installer", own),
    )
    for kind in ("clusterrole", "clusterrolebinding"):
        assert plane.get(kind, "-l", f"app.kubernetes.io/instance={RELEASE}")["items"] == []
    account = f"--as=system:serviceaccount:{own}:esper-operator"
    asked = ("auth", "can-i", "create", "jobs.batch", account)
    assert plane.try_kubectl(*asked, "-n", own).stdout == "yes\n"
    assert plane.try_kubectl(*asked, "-n", "default").stdout == "no\n"
    plane.delete_namespace(own)


@pytest.mark.parametrize("installation", INSTALLATIONS)
def test_the_api_server_takes_every_installation(plane: ControlPlane, installation: str) -> None:
    objects = helm.render(INSTALLATIONS[installation])
    known = [each for each in objects if each["kind"] not in OTHERS]
    dry = ("apply", "--dry-run=server", "--server-side", "--force-conflicts", "-f", "-")
    plane.kubectl(*dry, given=yaml.safe_dump_all(known))
    for name, _, pod in pods(objects):
        _created(plane, name, pod)


def test_a_pod_that_is_not_restricted_would_be_refused(plane: ControlPlane) -> None:
    for name, _, pod in pods(of_kind(helm.render(), "Deployment", "StatefulSet")):
        (container,) = pod["containers"]
        weaker = {**container, "securityContext": {}}
        with pytest.raises(Exception, match="violates PodSecurity"):
            _created(plane, name, {**pod, "containers": [weaker]})


def _created(plane: ControlPlane, name: str, spec: dict[str, Any]) -> None:
    """Have the API server judge a pod of that spec, as the controllers would make it."""
    # Whose account is not made by a dry run, and classes, are no matter of Pod Security.
    kept = {k: v for k, v in spec.items() if k not in {"serviceAccountName", "imagePullSecrets"}}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"{name}-checked", "namespace": NAMESPACE},
        "spec": kept,
    }
    plane.kubectl("create", "--dry-run=server", "-f", "-", given=json.dumps(pod))
