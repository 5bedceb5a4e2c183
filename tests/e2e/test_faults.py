"""What goes wrong with workers on a real kubelet: retried or failed, and said at once.

All sessions of this file train at the same time; each test looks at its own. Those that are
interrupted would train for days, however fast the machine is: they are ended once enough was seen.
"""

from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Lock

import pytest

from tests.e2e.clusters import SOON, Pods, made_namespace, until
from tests.e2e.sessions import Session, short
from tests.e2e.stories import Story, figures, next_report, reported, seconds, terminated
from tools.images.recipes import RECIPES

SAID_SECONDS = 30.0
"""From the kubelet's word, or the node controller's, to the session's."""
SHARE = {"requests": {"cpu": "100m"}}
"""Without one a pod gets next to nothing of a machine that is busy."""
STAY = "esper-1"
STAYS = {"nodeSelector": {"kubernetes.io/hostname": STAY}}
ONE = {"replicas": 1, "resources": SHARE, "podTemplate": STAYS}
LONG = {"epochs": 100_000, "checkpoint": {"everyEpochs": 2}}
PACED = """
import time
from torch.utils.data import TensorDataset
from esper.zoo import data

class Paced(TensorDataset):
    def __getitem__(self, index):
        time.sleep(0.0025)
        return super().__getitem__(index)

def digits():
    splits = data.digits(image=False)
    return splits | {"train": Paced(*splits["train"].tensors)}
"""
"""Half a second an epoch: the status tells nearly each of them, and other sessions have the CPU."""
CODE = {
    "env": [{"name": "PYTHONPATH", "value": "/code"}],
    "volumes": [{"name": "code", "configMap": {"name": "paced"}}],
    "volumeMounts": [{"name": "code", "mountPath": "/code", "readOnly": True}],
}
ALIKE = 3
"""Epochs that two sessions have told of, which have to be the same to the bit."""
ALONE = {"controller": {"policy": "none"}}
"""Nothing grows, and nobody is asked."""
RUNTIME = RECIPES["runtime"].image()
IMAGE = "localhost/no-such-image:1"
HUGE = {"inputs": 64, "hidden": [32000, 32000], "outputs": 10}
"""A model of 4 GB."""
INTERRUPTED, KILLED = 75, 137
CUT, LOST = "esper-2", "esper-3"
"""Nodes that stop answering: the one runs on, the other one does not."""
JOINING = Lock()


@pytest.fixture(scope="module")
def pods(cluster, release):
    """Those of one namespace for all of the sessions."""
    with made_namespace(cluster) as name:
        pods = Pods(cluster, name)
        pods.apply(
            {
                "apiVersion": "v1",
                "kind": "ConfigMap",
                "metadata": {"name": "paced"},
                "data": {"paced.py": PACED},
            }
        )
        yield pods


@pytest.fixture(scope="module")
def story(pods):
    with Story(pods.cluster, pods.namespace) as story:
        yield story


@pytest.fixture(scope="module")
def played(pods, story):
    """What became of each session, by the name of its fault."""
    pool = ThreadPoolExecutor(len(FAULTS))
    futures = {fault.__name__: pool.submit(fault, pods, story) for fault in FAULTS}
    try:
        yield lambda fault: futures[fault.__name__].result()
    finally:
        story.close()  # so that nobody waits on, where a test was chosen or broken off
        pool.shutdown(cancel_futures=True)


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
        workers=ONE | {"resources": SHARE | {"limits": {"memory": "1Gi"}}},
        runPolicy={"backoffLimit": 1},
    )
    session = Heard(story, pods, manifest)
    session.fails()
    return session.status


def killed(pods, story):
    session = Heard(story, pods, endless("killed"))
    (pod,) = session.trains()
    container = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]
    assert pods.cluster.node(pod["spec"]["nodeName"]).kill_container(container)
    session.goes_on()
    return session  # it trains on: others are compared with it


def evicted(pods, story):
    manifest = endless("evicted", replicas=2, runPolicy={"backoffLimit": 0})
    session = Heard(story, pods, manifest)
    pods.evict(session.trains()[0]["metadata"]["name"])
    session.goes_on()
    session.delete()
    return session


def node_cut(pods, story):
    """Cut off, and joined again once the session goes on elsewhere: what ran on there ends."""
    with further(pods, CUT):
        session = Heard(story, pods, on_node("cut", CUT))
        (pod,) = session.trains()
        assert pod["spec"]["nodeName"] == CUT
        pods.cluster.cut_node(CUT)
        until(lambda: session.status["attempt"] == 2, seconds=600.0)
        pods.cluster.cut_node(CUT, joined=True)
        session.goes_on()
        session.is_compared()
        session.delete()
        return session


def node_lost(pods, story):
    with further(pods, LOST):
        session = Heard(story, pods, on_node("lost", LOST))
        (pod,) = session.trains()
        assert pod["spec"]["nodeName"] == LOST
        pods.cluster.lose_node(LOST)
        session.goes_on()
        session.is_compared()
        session.delete()
        return session


FAULTS = (node_cut, node_lost, image_missing, model_missing, memory_missing, killed, evicted)


@contextmanager
def further(pods, node):
    """A node that joins, and is removed.

    One after the other: each is given the image, which is all that the machine can do.
    """
    try:
        with JOINING:
            pods.cluster.add_node(node, [RUNTIME])
        yield
    finally:
        if pods.cluster.node(node).made:
            pods.cluster.remove_node(node)


def on_node(name, node):
    """A session of one worker, rather on that node, which it gives up soon."""

    def of(*nodes):
        term = {"key": "kubernetes.io/hostname", "operator": "In", "values": list(nodes)}
        return {"matchExpressions": [term]}

    affinity = {
        "preferredDuringSchedulingIgnoredDuringExecution": [
            {"weight": 100, "preference": of(node)}
        ],
        # Not on the other node that stops to answer: it would be interrupted once more.
        "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [of(node, STAY)]},
    }
    template = {
        "affinity": {"nodeAffinity": affinity},
        "tolerations": SOON,
        "terminationGracePeriodSeconds": 5,
    }
    return endless(name, template=template)


class Heard(Session):
    """A session whose status is what was heard of it: many that are asked for would be a load.

    `known` is the epoch of the checkpoint that the status showed before the fault, `resumed` the
    status by the first report after it, and `end` that of the moment when enough was seen.
    """

    def __init__(self, story, pods, manifest):
        self._story = story
        self._before = set()
        super().__init__(pods, manifest)

    @property
    def status(self):
        return self._story.last("session", self.name).get("status", {})

    def trains(self):
        """Its workers, once there is a checkpoint to go on from."""
        until(lambda: self.status.get("checkpoint", {}).get("epoch", 0) > 0, seconds=600.0)
        workers = self.workers()
        self._before = {pod["metadata"]["uid"] for pod in workers}
        self.known = self.status["checkpoint"]["epoch"]
        return workers

    def goes_on(self):
        """Wait until a worker that has taken another's place has reported, and trains on."""
        self.resumed = until(
            lambda: next_report(self._story, self.name, self._before), seconds=600.0
        )
        reached = self.resumed.get("epoch", 0)
        until(lambda: self.status.get("epoch", 0) > reached)
        self.end = self.status

    def compared(self):
        """What was told of the same epochs, of this session since it went on, and of `killed`."""
        own = figures(self._story, self.name, since=reported(self.resumed))
        other = figures(self._story, "killed")
        return [(own[epoch], other[epoch]) for epoch in sorted(own.keys() & other.keys())]

    def is_compared(self):
        """Wait until there is enough to compare."""
        until(lambda: len(self.compared()) >= ALIKE)
        self.alike = self.compared()
        self.end = self.status

    def delete(self):
        self.pods.kubectl("delete", "trainingsession", self.name, "--wait=false")


def plain(name, **spec):
    """A short session that does not grow."""
    return short(name, growth=ALONE, **spec)


def endless(name, *, template=STAYS, replicas=1, **spec):
    """A session that trains until it is ended."""
    workers = {"replicas": replicas, "resources": SHARE, "podTemplate": CODE | template}
    data = {"entrypoint": "paced:digits"}
    return plain(name, data=data, training=LONG, workers=workers, **spec)


def in_time(said, reported):
    """Whether something was said soon after it was reported; reports are of whole seconds."""
    return -1.0 <= said - seconds(reported) <= SAID_SECONDS


def assert_resumed(session):
    """It went on from a checkpoint that there was before the fault, or from a later one."""
    assert session.known > 0
    assert session.resumed.get("epoch", 0) >= session.known


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
    _, pod = story.first("pod", status["failures"][-1]["pod"], terminated)
    assert in_time(said, terminated(pod)["finishedAt"])


def test_a_worker_that_is_killed_has_failed_and_is_retried(played, story):
    session = played(killed)
    assert_resumed(session)
    status = session.end
    assert (status["attempt"], status["failedAttempts"]) == (2, 1)
    (failure,) = status["failures"]
    assert failure["exitCode"] == KILLED
    _, pod = story.first("pod", "killed", terminated)
    said, condition = story.said("killed", summed_up("Retrying"))
    assert failure["pod"] == pod["metadata"]["name"]
    assert failure["pod"] in condition["message"]
    assert in_time(said, terminated(pod)["finishedAt"])


def test_a_worker_that_is_evicted_goes_on_from_its_checkpoint_and_uses_up_no_retry(played, story):
    session = played(evicted)
    assert_resumed(session)
    status = session.end
    assert status["attempt"] == 1
    assert status["disruptions"] >= 1
    assert not status.get("failedAttempts")
    assert not status.get("failures")
    _, pod = story.first("pod", "evicted", terminated)
    assert terminated(pod)["exitCode"] == INTERRUPTED


@pytest.mark.parametrize("fault", [node_cut, node_lost])
def test_a_session_goes_on_elsewhere_when_its_node_stops_to_answer(played, story, fault):
    session = played(fault)
    assert_resumed(session)
    name, status = session.name, session.end
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
    # To the bit what it comes to on a node that stays.
    for own, other in session.alike:
        assert own == other
        assert len(own) == 1


def disruption(pod):
    """What ends a pod from outside; empty if nothing does."""
    conditions = pod["status"].get("conditions", ())
    return next((each for each in conditions if each["type"] == "DisruptionTarget"), {})
