"""Sessions side by side, seen from inside their pods: each opens its own things and nothing else.

`intruder.py` runs in the pods themselves, with what they really hold. NetworkPolicies are not
enforced by the bridge of a cluster from source (`tests/unit/charts/test_networks.py` has them), so
that what is tried here is refused by those who are asked.
"""

import json
import random
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from esper.contracts.messages import TopicNames
from tests.e2e.clusters import Pods, failed, made_namespace, until
from tests.e2e.sessions import Session, compiled_here, short, target_of_nobody
from tests.e2e.verdicts import opened, refused
from tools import helm

ASKS = """
import asyncio, json, sys
from pathlib import Path
from esper.configs import EsperConfig
from esper.contracts.blueprints import KernelTarget, builtin
from esper.services.urza.http_client import HttpUrza

async def asked(uid, target):
    config = EsperConfig.load(file=Path("/etc/esper/esper.yaml"), environment={})
    async with HttpUrza(config.hub) as hub:
        blueprint = await hub.put_blueprint(builtin("low-rank", {}), session=uid)
        return await hub.request_kernel(blueprint.digest, target, session=uid)

uid, target = json.loads(sys.argv[1])
print(asyncio.run(asked(uid, KernelTarget.model_validate(target))).kernel)
"""
"""A session asks the hub alone for a kernel, so that nobody begins to compile it."""

INTRUDER = (Path(__file__).parent / "intruder.py").read_text()

LONG = {"epochs": 100_000, "checkpoint": {"everyEpochs": 1}}
GROWTH = {"mine": "heuristic", "beside": "none", "elsewhere": "random"}
"""The policies: one session has a Tamiyo, one asks for kernels at once."""

ATTEMPT = "checkpoints/attempts/000000001"
"""What every session keeps at the hub from its first checkpoint on."""


def long(name):
    arguments = {"inputs": 64, "hidden": [random.randrange(17, 2000)], "outputs": 10}
    model = {"entrypoint": "esper.zoo.models:MLP", "arguments": arguments}
    growth = {"controller": {"policy": GROWTH[name]}}
    return short(name, model=model, training=LONG, growth=growth, workers={"replicas": 1})


class Place:
    """A namespace with sessions, and how a pod in it attacks those of others."""

    def __init__(self, cluster, namespace, *names):
        self.pods = Pods(cluster, namespace)
        self.sessions = [Session(self.pods, long(name)) for name in names]
        self.cluster = cluster

    def ready(self):
        """Wait until there is something to be read of every session."""
        until(lambda: all(s.status.get("checkpoint") for s in self.sessions), seconds=600)

    def pod(self, role):
        """The name of a running pod of that role; of the first session where that has one."""
        chosen = f"esper.dev/role={role}"
        if role == "worker":
            chosen += f",esper.dev/session={self.sessions[0].name}"
        found = self.cluster.get("-n", self.pods.namespace, "pods", "-l", chosen)["items"]
        running = [pod for pod in found if pod["status"]["phase"] == "Running"]
        return running[0]["metadata"]["name"] if running else None

    def about(self, session):
        """Whom to attack: what is easily known, or guessed, of a session."""
        uid = session.get("trainingsession", session.name)["metadata"]["uid"]
        return {
            "uid": uid,
            "name": session.name,
            "namespace": self.pods.namespace,
            "pod": session.workers()[0]["metadata"]["name"],
            "object": ATTEMPT,
        }

    def kernel_under_way(self):
        """A kernel that the first session has asked for, and that stays as it is."""
        given = [self.about(self.sessions[0])["uid"], target_of_nobody().to_wire()]
        pod = self.pod("worker")
        return self.pods.execute(pod, "python", "-", json.dumps(given), given=ASKS).split()[-1]


def keys_of(about, *topics):
    return [f"esper:{about['namespace']}:{about['uid']}:{topic}" for topic in topics]


@pytest.fixture(scope="module")
def places(cluster, release):
    """Two sessions in one namespace, one in another, and a kernel that is being compiled."""
    with made_namespace(cluster) as here, made_namespace(cluster) as there:
        yield Place(cluster, here, "mine", "beside"), Place(cluster, there, "elsewhere")


@pytest.fixture(scope="module")
def attack(cluster, places):
    here, _ = places
    address = cluster.get("node", "esper-1")["status"]["addresses"][0]["address"]
    hosts = [("esper-operator", 8080), ("esper-urza", 8000)]
    metrics = [f"http://{host}.{helm.NAMESPACE}.svc:{port}/metrics" for host, port in hosts]

    def made(pod, **told):
        given = {
            "release": helm.NAMESPACE,
            "node": address,
            "metrics": metrics,
            "namespace": here.pods.namespace,
            "serves_namespace": False,
            "redis": f"redis://esper-redis.{helm.NAMESPACE}.svc:6379/0",
            "own_commands": [],
            "own_paths": [],
            "never_published": [],
            **told,
        }
        said = here.pods.execute(pod, "python", "-", json.dumps(given), given=INTRUDER)
        return json.loads(said.splitlines()[-1])

    return made


def closed(said, *, but=()):
    """Everything was tried and refused, but for what is named; and the API server knows nobody."""
    attempts = said["attempts"]
    others = {name: came for name, came in attempts.items() if not refused(name, came)}
    assert sorted(others) == sorted(but), json.dumps(others, indent=1)
    assert all(opened(others[name]) for name in but)
    for name, came in attempts.items():
        if name.startswith("api server https") or name == "api server a token of an account":
            assert came["status"] == 403, (name, came)
            assert "system:anonymous" in came["text"], (name, came)
    assert said["credentials"]["accounts"] == []
    for url, metrics in said["metrics"].items():
        assert metrics == {"status": 200, "told": []}, url
    assert len(attempts) > 200


@contextmanager
def compiling(place, kernel):
    """The name of the pod that compiles a kernel, held in its work: it would be over in seconds."""
    with ExitStack() as stack:
        yield until(lambda: held(stack, place, kernel))


def held(stack, place, kernel):
    """Its name, where its container runs and could be held."""
    found = place.cluster.get("-n", place.pods.namespace, "pods", "-l", "esper.dev/role=compile")
    for pod in found["items"]:
        name, state = pod["metadata"]["name"], pod["status"].get("containerStatuses", [{}])[0]
        if name.startswith(f"compile-{kernel}") and "running" in state.get("state", {}):
            container = state["containerID"].partition("://")[2]
            node = place.cluster.node(pod["spec"]["nodeName"])
            if stack.enter_context(node.held_container(container)):
                return name
    return None


def test_a_compile_pod_opens_the_work_on_its_own_kernel(places, attack):
    here, there = places
    kernel = compiled_here(here.pods)
    unknown = {"uid": "0" * 8, "name": "nobodys", "pod": "nobodys-1", "object": ATTEMPT}
    victims = [unknown | {"namespace": place.pods.namespace} for place in (here, there)]
    with compiling(here, kernel) as pod:
        said = attack(
            pod,
            victims=victims,
            own=victims[0],
            kernel=kernel,
            kernel_is_foreign=False,
            own_paths=[f"/api/v1/kernels/{kernel}"],
        )
    assert [opened(came) for came in said["own"].values()] == [True], said["own"]
    closed(said)
    (token,) = said["credentials"]["tokens"]
    assert (token["role"], token["sub"]) == ("compiler", kernel)
    assert said["listed"] == {"sessions": 403, "kernels": 403, "blueprints": 403}


def test_a_worker_opens_its_own_session(places, attack):
    here, there = places
    here.ready()
    there.ready()
    own, beside = (here.about(session) for session in here.sessions)
    (elsewhere,) = (there.about(session) for session in there.sessions)
    packets, ready = keys_of(own, TopicNames.PACKETS, TopicNames.KERNEL_READY)
    decisions, status = keys_of(own, TopicNames.DECISIONS, TopicNames.STATUS)
    foreign = until(lambda: kernels_of(there))
    said = attack(
        here.pod("worker"),
        victims=[beside, elsewhere],
        own=own,
        kernel=there.kernel_under_way(),
        kernel_is_foreign=True,
        own_commands=[
            *(["XLEN", packets], ["XLEN", status], ["XLEN", ready]),
            ["XREVRANGE", decisions, "+", "-", "COUNT", 1],
        ],
        own_paths=[
            f"/api/v1/sessions/{own['uid']}",
            f"/api/v1/sessions/{own['uid']}/objects",
            f"/api/v1/sessions/{own['uid']}/objects/{own['object']}",
        ],
        never_published=[TopicNames.DECISIONS, TopicNames.KERNEL_READY],
    )
    assert all(map(opened, said["own"].values())), json.dumps(said["own"])
    for key in (packets, status):
        assert int(said["own"][f"XLEN {key}"]["answer"]) > 0, key
    closed(said)
    (token,) = said["credentials"]["tokens"]
    assert (token["role"], token["sub"]) == ("session", own["uid"])
    assert said["listed"]["sessions"] == [own["uid"]]
    assert not set(said["listed"]["kernels"]) & set(foreign)


def kernels_of(place):
    """The kernels that sessions of a namespace have asked for."""
    found = place.cluster.get("-n", place.pods.namespace, "compiledkernels")["items"]
    return [each["metadata"]["name"] for each in found]


def test_a_tamiyo_opens_its_own_namespace(places, attack):
    here, there = places
    here.ready()
    there.ready()
    own = here.about(here.sessions[0])
    (elsewhere,) = (there.about(session) for session in there.sessions)
    packets, decisions = keys_of(own, TopicNames.PACKETS, TopicNames.DECISIONS)
    said = attack(
        until(lambda: here.pod("tamiyo")),
        victims=[elsewhere],
        own=own,
        kernel=there.kernel_under_way(),
        kernel_is_foreign=True,
        serves_namespace=True,
        own_commands=[["XREVRANGE", packets, "+", "-", "COUNT", 1], ["XLEN", decisions]],
        own_paths=[f"/api/v1/sessions/{own['uid']}"],
        never_published=[TopicNames.STATUS, TopicNames.KERNEL_READY, TopicNames.EVENTS],
    )
    assert all(map(opened, said["own"].values())), json.dumps(said["own"])
    # It has to find new sessions, and sees the names of all streams by that.
    closed(said, but=["bus SCAN 0"])
    (token,) = said["credentials"]["tokens"]
    assert (token["role"], token["ns"]) == ("reader", own["namespace"])
    assert sorted(said["listed"]["sessions"]) == sorted(
        here.about(session)["uid"] for session in here.sessions
    )


def test_no_session_takes_a_secret_by_its_manifest(cluster, places):
    here, _ = places
    beside = f"{here.sessions[1].name}-esper"
    for template in (
        {"volumes": [{"name": "v", "secret": {"secretName": beside}}]},
        {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": beside, "key": "k"}}}]},
        {"volumes": [{"name": "v", "projected": {"sources": [{"secret": {"name": beside}}]}}]},
        {"volumes": [{"name": "v", "projected": {"sources": [
            {"serviceAccountToken": {"path": "token"}}]}}]},
        {"volumes": [{"name": "v", "hostPath": {"path": "/"}}]},
        {"volumes": [{"name": "v", "secret": {"secretName": "sh.helm.release.v1.esper.v1"}}]},
    ):  # fmt: skip
        thief = short("thief", workers={"podTemplate": template})
        assert failed(Session, here.pods, thief), template
    # Beside the installation the API server does not know what is the installation's.
    beside_it = Pods(cluster, helm.NAMESPACE)
    volumes = [{"name": "v", "secret": {"secretName": "esper-credentials"}}]
    thief = Session(beside_it, short("thief", workers={"podTemplate": {"volumes": volumes}}))
    try:
        end = thief.fails()
        assert end["reason"] == "InvalidSpec"
        assert "volumes[0].secret.secretName: got esper-credentials" in end["message"]
        assert thief.workers() == []
    finally:
        beside_it.kubectl("delete", "trainingsession", "thief")


def test_afterwards_everybody_trains_on(places):
    for place in places:
        before = {session.name: session.status["epoch"] for session in place.sessions}
        for session in place.sessions:
            until(lambda s=session, b=before: s.status["epoch"] > b[s.name])
            assert session.status["attempt"] == 1
            assert not session.status.get("failures")
