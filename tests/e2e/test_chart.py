"""The chart on a real cluster: a session trains on through an upgrade, and while it is away."""

import pytest

from esper.contracts.resources import KINDS
from tests.e2e.clusters import Pods, until
from tests.e2e.sessions import Session, compiled_here, example
from tools import helm
from tools.servers.process import ServerError

UPGRADE = ("operator.logLevel=debug", "urza.logLevel=debug", "images.runtime.pullPolicy=Never")


def restarts(session):
    """Each worker pod's uid with how often it was started anew."""
    return {
        pod["metadata"]["uid"]: pod["status"]["containerStatuses"][0]["restartCount"]
        for pod in session.workers()
    }


def uids(cluster, *words):
    """The objects of a kind by name: one that was made anew has another uid."""
    return {
        item["metadata"]["name"]: item["metadata"]["uid"] for item in cluster.get(*words)["items"]
    }


def kept(cluster, namespace):
    """What uninstalling leaves: definitions, and with them what is of these kinds; and volumes."""
    definitions = uids(cluster, "crds", "-l", "app.kubernetes.io/part-of=esper")
    assert len(definitions) == len(KINDS)
    volumes = uids(cluster, "-n", helm.NAMESPACE, "pvc")
    assert volumes.keys() == {"esper-urza", "esper-redis"}
    found = {"crd": definitions, "pvc": volumes}
    for of in KINDS:
        found[of.plural] = uids(cluster, "-n", namespace, of.plural)
    return found


def holds(later, earlier):
    """Whether everything is still there that was, as the object that it was."""
    return all(earlier[kind].items() <= later[kind].items() for kind in earlier)


def credentials(cluster):
    return cluster.get("-n", helm.NAMESPACE, "secret", "esper-credentials")["data"]


def drain_operators(cluster):
    """Evict the operator's pods as the drain of their node would: one goes, the other one stays."""
    budget = ("-n", helm.NAMESPACE, "pdb", "esper-operator")
    until(lambda: cluster.get(*budget)["status"]["disruptionsAllowed"] == 1)
    chosen = "app.kubernetes.io/component=operator"
    found = cluster.get("-n", helm.NAMESPACE, "pods", "-l", chosen)["items"]
    staying = [pod["metadata"] for pod in found if "deletionTimestamp" not in pod["metadata"]]
    one, other = (meta["name"] for meta in staying)
    place = Pods(cluster, helm.NAMESPACE)
    place.evict(one)
    with pytest.raises(ServerError, match="disruption budget"):
        place.evict(other)
    assert "deletionTimestamp" not in place.get(other)["metadata"]


def test_a_session_trains_on_through_an_upgrade_and_while_the_release_is_away(
    cluster, install, pods
):
    said = install()
    assert "/readyz ready" in said  # of the operator, asked by Helm's test
    made = credentials(cluster)
    # The hub may have the session's kernels since other tests; nobody has this one.
    kernel = compiled_here(pods)
    session = Session(pods, example())
    until(lambda: session.status.get("epoch", 0) >= 3)
    until(lambda: session.get("seeds")["items"])
    before = restarts(session)
    assert list(before.values()) == [0, 0]

    first = kept(cluster, pods.namespace)
    assert first["trainingsessions"].keys() == {session.name}
    assert first["seeds"]
    assert kernel in first["compiledkernels"]

    drain_operators(cluster)
    install(*UPGRADE)
    assert restarts(session) == before
    assert holds(kept(cluster, pods.namespace), first)
    second = kept(cluster, pods.namespace)

    helm.run("uninstall", helm.RELEASE, "--namespace", helm.NAMESPACE)
    for kind in ("deployments", "statefulsets", "services", "networkpolicies", "pdb"):
        assert cluster.get("-n", helm.NAMESPACE, kind)["items"] == [], kind
    assert restarts(session) == before
    away = kept(cluster, pods.namespace)
    assert holds(away, second)

    install()
    assert credentials(cluster) == made
    assert holds(kept(cluster, pods.namespace), away)
    status = session.succeeds()
    # The Job ends, with whoever is left, when the first worker does.
    assert restarts(session).items() <= before.items()
    assert status["attempt"] == 1
    assert not status.get("disruptions")
    assert not status.get("failures")
    assert holds(kept(cluster, pods.namespace), away)
    # Compiled by a Job, of this session or of one before on a cluster that was kept.
    seeds = [seed["status"] for seed in session.get("seeds")["items"]]
    assert [seed["kernel"] for seed in seeds if seed["state"] == "fossilized"]
    assert pods.cluster.get("-n", pods.namespace, "networkpolicy", f"{session.name}-workers")
