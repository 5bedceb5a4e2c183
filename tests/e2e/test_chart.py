"""The chart on a real cluster: a session trains on through an upgrade, and while it is away."""

from tests.e2e.clusters import until
from tests.e2e.sessions import Session, example
from tools import helm

UPGRADE = ("operator.logLevel=debug", "urza.logLevel=debug", "images.runtime.pullPolicy=Never")


def restarts(session):
    """Each worker pod's uid with how often it was started anew."""
    return {
        pod["metadata"]["uid"]: pod["status"]["containerStatuses"][0]["restartCount"]
        for pod in session.workers()
    }


def credentials(cluster):
    return cluster.get("-n", helm.NAMESPACE, "secret", "esper-credentials")["data"]


def test_a_session_trains_on_through_an_upgrade_and_while_the_release_is_away(
    cluster, install, pods
):
    said = install()
    assert "/readyz ready" in said  # of the operator, asked by Helm's test
    made = credentials(cluster)
    session = Session(pods, example())
    until(lambda: session.status.get("epoch", 0) >= 3, seconds=300.0)
    before = restarts(session)
    assert list(before.values()) == [0, 0]

    install(*UPGRADE)
    assert restarts(session) == before

    helm.run("uninstall", helm.RELEASE, "--namespace", helm.NAMESPACE)
    assert cluster.get("-n", helm.NAMESPACE, "deployments")["items"] == []
    assert restarts(session) == before

    install()
    assert credentials(cluster) == made
    status = session.succeeds()
    # The Job ends, with whoever is left, when the first worker does.
    assert restarts(session).items() <= before.items()
    assert status["attempt"] == 1
    assert not status.get("disruptions")
    assert not status.get("failures")
    # Compiled by a Job, of this session or of one before on a cluster that was kept.
    seeds = [seed["status"] for seed in session.get("seeds")["items"]]
    assert [seed["kernel"] for seed in seeds if seed["state"] == "fossilized"]
    assert pods.cluster.get("-n", pods.namespace, "networkpolicy", f"{session.name}-workers")
