"""A second installation in one namespace, by somebody who has no right beyond it.

Its database, bucket and bus are not the chart's. The first one, of the whole cluster, leaves that
namespace to it.
"""

import base64
import subprocess

import pytest
import yaml

from esper.contracts.resources import KINDS
from tests.e2e import elsewhere
from tests.e2e.clusters import Pods, made_namespace
from tests.e2e.sessions import Session, short
from tools import helm
from tools.cluster.programs import cluster_program

RELEASE = "own"
ASKS_HUB = """
import sys, urllib.request
token = open("/etc/esper/urza.admin_token").read()
for uid in sys.argv[1:]:
    asked = urllib.request.Request(
        f"http://127.0.0.1:8000/api/v1/sessions/{uid}", headers={"Authorization": f"Bearer {token}"}
    )
    try:
        print(urllib.request.urlopen(asked).status)
    except urllib.error.HTTPError as error:
        print(error.code)
"""


class Team(Pods):
    """A namespace, asked as its administrator, who has no right beyond it."""

    def __init__(self, cluster, namespace, folder):
        super().__init__(cluster, namespace)
        self.kubeconfig = folder / "team.kubeconfig"
        kinds = ",".join(f"{of.plural}.esper.dev{part}" for of in KINDS for part in ("", "/status"))
        account = f"--serviceaccount={namespace}:installer"
        for words in (
            ("serviceaccount", "installer"),
            ("rolebinding", "installer", "--clusterrole=admin", account),
            ("role", "kinds", "--verb=*", f"--resource={kinds}"),
            ("rolebinding", "kinds", "--role=kinds", account),
        ):
            cluster.kubectl("-n", namespace, "create", *words)
        token = cluster.kubectl("-n", namespace, "create", "token", "installer").strip()
        config = yaml.safe_load(cluster.layout.admin.read_text())
        for user in config["users"]:
            user["user"] = {"token": token}
        self.kubeconfig.touch(mode=0o600)
        self.kubeconfig.write_text(yaml.safe_dump(config))

    def asked(self, *words, given=None):
        """kubectl as that person, wherever it is asked for."""
        command = [str(cluster_program("kubectl")), f"--kubeconfig={self.kubeconfig}", *words]
        return subprocess.run(command, input=given or "", capture_output=True, text=True)

    def kubectl(self, *words, given=None):
        done = self.asked("-n", self.namespace, *words, given=given)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def helm(self, *words, **given):
        return helm.run(*words, "--namespace", self.namespace, kubeconfig=self.kubeconfig, **given)


@pytest.fixture(scope="module")
def team(cluster, install, tmp_path_factory):
    with made_namespace(cluster) as name:
        install(f"operator.excludedNamespaces={{{name}}}")
        elsewhere.build(cluster)
        yield Team(cluster, name, tmp_path_factory.mktemp("team"))


def secret_of(pods, name):
    found = yaml.safe_load(pods.kubectl("get", "secret", name, "-o", "yaml"))["data"]
    return {key: base64.b64decode(value).decode() for key, value in found.items()}


def test_it_trains_beside_the_clusters_own_and_takes_nothing_beyond_its_namespace(cluster, team):
    assert (
        "cannot create"
        in team.asked("create", "clusterrole", "x", "--verb=get", "--resource=pods").stderr
    )
    values = elsewhere.start(team)
    values["operator"] = {"namespaced": True, "replicas": 1}
    values["crds"] = {"install": False}
    team.helm(
        *("upgrade", "--install", RELEASE, str(helm.CHART), "--values", str(helm.LOCAL_VALUES)),
        *("--wait", "--timeout", "5m"),
        values=values,
    )
    said = team.helm("test", RELEASE, "--logs")
    assert said.count("ready") >= 2, said
    kinds = ("clusterroles,clusterrolebindings", "-l", f"app.kubernetes.io/instance={RELEASE}")
    assert cluster.get(*kinds)["items"] == []

    training = {"epochs": 2, "checkpoint": {"everyEpochs": 1}}
    session = Session(team, short("ours", training=training, workers={"replicas": 1}))
    status = session.succeeds()
    assert status["attempt"] == 1
    assert not status.get("disruptions")
    assert not status.get("failures")

    # Its own hub, bus, database and bucket, and no others, have to do with it.
    address = f"{RELEASE}-esper-urza.{team.namespace}.svc"
    files = secret_of(team, f"{session.name}-esper")
    assert f"http://{address}:8000" in files["esper.yaml"]
    assert f"@{elsewhere.NAME}.{team.namespace}.svc:6379" in files["esper.yaml"]
    uid = session.get("trainingsession", session.name)["metadata"]["uid"]
    theirs = cluster.kubectl(
        *("-n", helm.NAMESPACE, "exec", "esper-urza-0", "--"), "python", "-c", ASKS_HUB, uid
    )
    assert theirs.split() == ["404"]
    ours = team.kubectl(
        "exec", f"deployment/{RELEASE}-esper-urza", "--", "python", "-c", ASKS_HUB, uid
    )
    assert ours.split() == ["200"]
    inside = ("exec", elsewhere.NAME, "-c")
    query = "select outcome from training_sessions"
    rows = team.kubectl(
        *(*inside, "postgres", "--", "env", f"PGPASSWORD={elsewhere.PASSWORD}"),
        *(f"{elsewhere.PROGRAMS}/psql", "-AtXh", "127.0.0.1", "-U", "esper", "-d", "postgres"),
        *("-c", query),
    )
    assert [row.lower() for row in rows.split()] == ["succeeded"]
    kept = team.kubectl(*inside, "s3", "--", "find", f"/data/s3/{elsewhere.BUCKET}", "-type", "f")
    assert uid in kept
    assert "model.safetensors" in kept

    operators = cluster.kubectl(
        *("-n", helm.NAMESPACE, "logs", "-l", "app.kubernetes.io/component=operator"),
        *("--tail=-1", "--prefix=false"),
    )
    assert team.namespace not in operators
    team.helm("uninstall", RELEASE)
    assert session.condition("Succeeded")["status"] == "True"
