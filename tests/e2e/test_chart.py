"""The chart on a real cluster: a session trains on through an upgrade, and while it is away."""

import pytest
import yaml

from tests.e2e.clusters import module, until
from tools import helm

EXAMPLE = helm.ROOT / "examples" / "02-digits-cnn" / "session.yaml"
NAME = "digits-cnn"
TRAINS_SECONDS = 900.0
UPGRADE = ("operator.logLevel=debug", "urza.logLevel=debug", "images.runtime.pullPolicy=Never")


@pytest.fixture(scope="module")
def install(cluster, images):
    """`make install` with values; returns what it said."""

    def installed(*values):
        words = [word for value in values for word in ("--set", value)]
        return module("tools.install", *words, state=cluster.layout.state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", str(cluster.layout.admin))
        yield installed


class Session:
    """The example's, in a namespace of the test."""

    def __init__(self, pods):
        self.pods = pods
        manifest = yaml.safe_load(EXAMPLE.read_text())
        assert manifest["spec"]["workers"]["replicas"] == 2
        pods.apply(manifest)

    def get(self, *words):
        return self.pods.cluster.get("-n", self.pods.namespace, *words)

    @property
    def status(self):
        return self.get("trainingsession", NAME).get("status", {})

    def workers(self):
        """Each worker pod's uid with how often it was started anew."""
        found = self.get("pods", "-l", f"esper.dev/session={NAME},esper.dev/role=worker")["items"]
        return {
            pod["metadata"]["uid"]: pod["status"]["containerStatuses"][0]["restartCount"]
            for pod in found
        }


def credentials(cluster):
    return cluster.get("-n", helm.NAMESPACE, "secret", "esper-credentials")["data"]


def test_a_session_trains_on_through_an_upgrade_and_while_the_release_is_away(
    cluster, install, pods
):
    said = install()
    assert "/readyz ready" in said  # of the operator, asked by Helm's test
    made = credentials(cluster)
    session = Session(pods)
    until(lambda: session.status.get("epoch", 0) >= 3, seconds=TRAINS_SECONDS)
    before = session.workers()
    assert list(before.values()) == [0, 0]

    install(*UPGRADE)
    assert session.workers() == before

    helm.run("uninstall", helm.RELEASE, "--namespace", helm.NAMESPACE)
    assert cluster.get("-n", helm.NAMESPACE, "deployments")["items"] == []
    assert session.workers() == before

    install()
    assert credentials(cluster) == made
    words = ("--for=condition=Succeeded", f"trainingsession/{NAME}", "--timeout=900s")
    pods.kubectl("wait", *words)
    # The Job ends, with whoever is left, when the first worker does.
    assert session.workers().items() <= before.items()
    status = session.status
    assert status["attempt"] == 1
    assert not status.get("disruptions")
    assert not status.get("failures")
    # Compiled by a Job, of this session or of one before on a cluster that was kept.
    seeds = [seed["status"] for seed in session.get("seeds")["items"]]
    assert [seed["kernel"] for seed in seeds if seed["state"] == "fossilized"]
    assert pods.cluster.get("-n", pods.namespace, "networkpolicy", f"{NAME}-workers")
