"""What goes wrong with workers on a real kubelet: retried or failed, and said at once.

All sessions of this file train at the same time; each test looks at its own.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import pytest

from tests.e2e.clusters import Pods, made_namespace, until
from tests.e2e.sessions import Session, short
from tests.e2e.stories import Story, seconds, terminated
from tools.images.recipes import RECIPES

SAID_SECONDS = 30.0
"""From the kubelet's word, or the node controller's, to the session's."""
SHARE = {"requests": {"cpu": "100m"}}
"""Without one a pod gets next to nothing of a machine that is busy."""
STAYS = {"nodeSelector": {"kubernetes.io/hostname": "esper-1"}}
ONE = {"replicas": 1, "resources": SHARE, "podTemplate": STAYS}
TWO = ONE | {"replicas": 2}
LONG = {"epochs": 400, "checkpoint": {"everyEpochs": 5}}
"""Long enough to be interrupted."""
ALONE = {"controller": {"policy": "none"}}
"""Nothing grows, and nobody is asked."""
RUNTIME = RECIPES["runtime"].image()
IMAGE = "localhost/no-such-image:1"
HUGE = {"inputs": 64, "hidden": [16000, 16000], "outputs": 10}
"""A model of 1 GB."""
INTERRUPTED, KILLED = 75, 137
CUT, LOST = "esper-2", "esper-3"
"""Nodes that stop answering: the one runs on, the other one does not."""
JOINING = Lock()
SOON = [
    {
        "key": f"node.kubernetes.io/{taint}",
        "operator": "Exists",
        "effect": "NoExecute",
        "tolerationSeconds": 5,
    }
    for taint in ("not-ready", "unreachable")
]


@pytest.fixture(scope="module")
def pods(cluster, release):
    """Those of one namespace for all of the sessions."""
    with made_namespace(cluster) as name:
        yield Pods(cluster, name)


@pytest.fixture(scope="module")
def story(pods):
    with Story(pods.cluster, pods.namespace) as story:
        yield story


@pytest.fixture(scope="module")
def played(pods, story):
    """What became of each session, by the name of its fault."""
    with ThreadPoolExecutor(len(FAULTS)) as pool:
        futures = {fault.__name__: pool.submit(fault, pods, story) for fault in FAULTS}
        yield lambda fault: futures[fault.__name__].result()
    for node in (CUT, LOST):
        pods.cluster.remove_node(node)


def image_missing(pods, story):
    workers = ONE | {"image": IMAGE}
    return Heard(
        story, pods, plain("no-image", workers=workers, runPolicy={"startupDeadlineSeconds": 15})
    ).fails()


def model_missing(pods, story):
    model = {"entrypoint": "no_such_module:Model"}
    return Heard(story, pods, plain("no-model", model=model, workers=ONE)).fails()


def memory_missing(pods, story):
    manifest = plain(
        "no-memory",
        model={"entrypoint": "esper.zoo.models:MLP", "arguments": HUGE},
        workers=ONE | {"resources": SHARE | {"limits": {"memory": "768Mi"}}},
        runPolicy={"backoffLimit": 1},
    )
    session = Heard(story, pods, manifest)
    session.fails()
    return session.status


def killed(pods, story):
    session = Heard(story, pods, plain("killed", training=LONG, workers=ONE))
    (pod,) = trains(session)
    container = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]
    assert pods.cluster.node(pod["spec"]["nodeName"]).kill_container(container)
    return session.succeeds()


def evicted(pods, story):
    session = Heard(
        story, pods, plain("evicted", training=LONG, workers=TWO, runPolicy={"backoffLimit": 0})
    )
    evict(pods, trains(session)[0])
    return session.succeeds()


def node_cut(pods, story):
    """Cut off, and joined again once the session goes on elsewhere: what ran on there ends."""
    add(pods, CUT)
    session = Heard(story, pods, on_node("cut", CUT))
    (pod,) = trains(session)
    assert pod["spec"]["nodeName"] == CUT
    pods.cluster.cut_node(CUT)
    until(lambda: session.status["attempt"] == 2, seconds=600.0)
    pods.cluster.cut_node(CUT, joined=True)
    return session.succeeds()


def node_lost(pods, story):
    add(pods, LOST)
    session = Heard(story, pods, on_node("lost", LOST))
    (pod,) = trains(session)
    assert pod["spec"]["nodeName"] == LOST
    pods.cluster.lose_node(LOST)
    return session.succeeds()


FAULTS = (node_cut, node_lost, image_missing, model_missing, memory_missing, killed, evicted)


def add(pods, node):
    """One after the other: each is given the image, which is all that the machine can do."""
    with JOINING:
        pods.cluster.add_node(node, [RUNTIME])


def on_node(name, node):
    """A session of one worker, rather on that node, which it gives up soon."""
    term = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    preferred = {"weight": 100, "preference": {"matchExpressions": [term]}}
    template = {
        "affinity": {
            "nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [preferred]}
        },
        "tolerations": SOON,
        "terminationGracePeriodSeconds": 5,
    }
    return plain(name, training=LONG, workers=ONE | {"podTemplate": template})


class Heard(Session):
    """A session whose status is what was heard of it: many that are asked for would be a load."""

    def __init__(self, story, pods, manifest):
        self._story = story
        super().__init__(pods, manifest)

    @property
    def status(self):
        return self._story.last("session", self.name).get("status", {})


def plain(name, **spec):
    """A short session that does not grow."""
    return short(name, growth=ALONE, **spec)


def trains(session, epoch=3):
    """Its workers, once it has trained for some epochs."""
    until(lambda: session.status.get("epoch", 0) >= epoch, seconds=600.0)
    return session.workers()


def evict(pods, pod):
    """Through the Eviction API, as a drain does it."""
    meta = {"name": pod["metadata"]["name"], "namespace": pods.namespace}
    eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": meta}
    path = f"/api/v1/namespaces/{pods.namespace}/pods/{meta['name']}/eviction"
    pods.cluster.kubectl("create", "--raw", path, "-f", "-", given=json.dumps(eviction))


def in_time(said, reported):
    """Whether something was said soon after it was reported; reports are of whole seconds."""
    return -1.0 <= said - seconds(reported) <= SAID_SECONDS


def summed_up(*reasons):
    """What a condition is that sums up a session with one of these reasons."""
    return lambda condition: condition["type"] == "Succeeded" and condition["reason"] in reasons


def test_an_image_that_can_not_be_pulled_is_said_and_ends_the_session(played, story):
    end = played(image_missing)
    assert end["reason"] == "ImagePullFailed"
    _, event = story.first("event", "no-image", lambda event: event["reason"] == "Failed")
    said, condition = story.said(
        "no-image", lambda c: c["type"] == "WorkersReady" and c["reason"] == "ImagePullFailed"
    )
    assert IMAGE in condition["message"]
    assert IMAGE in end["message"]
    assert in_time(said, event["firstTimestamp"])


def test_a_model_that_does_not_import_fails_its_session_at_once(played, story):
    end = played(model_missing)
    assert end["reason"] == "EntryPointError"
    assert "no_such_module" in end["message"]
    said, _ = story.said("no-model", summed_up("EntryPointError"))
    _, pod = story.first("pod", "no-model", terminated)
    assert terminated(pod)["exitCode"] == 78
    assert in_time(said, terminated(pod)["finishedAt"])


def test_workers_that_take_too_much_memory_are_retried_as_often_as_the_policy_says(played, story):
    status = played(memory_missing)
    assert status["attempt"] == status["failedAttempts"] == 2
    assert len(status["failures"]) == 2
    assert all("OOMKilled" in failure["reason"] for failure in status["failures"])
    _, pod = story.first("pod", "no-memory", terminated)
    said, condition = story.said("no-memory", summed_up("Retrying"))
    assert "OOMKilled" in condition["message"]
    assert in_time(said, terminated(pod)["finishedAt"])
    said, condition = story.said("no-memory", summed_up("BackoffLimitExceeded"))
    assert "OOMKilled" in condition["message"]
    assert in_time(said, status["failures"][-1]["time"])


def test_a_worker_that_is_killed_has_failed_and_is_retried(played, story):
    status = played(killed)
    assert (status["attempt"], status["failedAttempts"]) == (2, 1)
    (failure,) = status["failures"]
    assert failure["exitCode"] == KILLED
    _, pod = story.first("pod", "killed", terminated)
    said, condition = story.said("killed", summed_up("Retrying"))
    assert failure["pod"] == pod["metadata"]["name"]
    assert failure["pod"] in condition["message"]
    assert in_time(said, terminated(pod)["finishedAt"])


def test_a_worker_that_is_evicted_goes_on_from_its_checkpoint_and_uses_up_no_retry(played, story):
    status = played(evicted)
    assert status["attempt"] == 1
    assert status["disruptions"] >= 1
    assert not status.get("failedAttempts")
    assert not status.get("failures")
    _, pod = story.first("pod", "evicted", terminated)
    assert terminated(pod)["exitCode"] == INTERRUPTED


@pytest.mark.parametrize("fault", [node_cut, node_lost])
def test_a_session_goes_on_elsewhere_when_its_node_stops_to_answer(played, story, fault):
    status = played(fault)
    name = {node_cut: "cut", node_lost: "lost"}[fault]
    assert status["attempt"] == 2
    assert status["disruptions"] == 1
    assert not status.get("failures")
    # The node controller says so twice: of the pod's readiness, then as it evicts it.
    _, event = story.first("event", name, lambda event: event["reason"] == "NodeNotReady")
    said, condition = story.said(name, summed_up("Interrupted"))
    assert condition["message"].endswith("does not answer")
    assert in_time(said, event["firstTimestamp"])
    _, pod = story.first("pod", name, disruption)
    said, _ = story.said(
        name, lambda c: summed_up("Interrupted")(c) and "ended from outside" in c["message"]
    )
    assert in_time(said, disruption(pod)["lastTransitionTime"])
    # To the bit what it would have come to on a node that stays.
    assert status["metrics"] == played(killed)["metrics"]


def disruption(pod):
    """What ends a pod from outside; empty if nothing does."""
    conditions = pod["status"].get("conditions", ())
    return next((each for each in conditions if each["type"] == "DisruptionTarget"), {})
