"""`esper fetch`: from a real hub, by a program that stands for kubectl.

The real kubectl and the real forwarding are those of `tests/e2e/test_demo.py`.
"""

import base64
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from pydantic import SecretStr

from esper.cli import kubectl
from esper.cli.main import main
from esper.configs import EsperConfig, HubConfig, StorageConfig
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.urza.auth import Role
from esper.services.urza.http_objects import HubObjects
from tests.alive import alive
from tests.unit.esper.services.tolaria.places import served
from tests.unit.esper.services.urza.hubs import Place
from tests.unit.esper.services.urza.serving import settings, token

UID = "0b1c0c3e-6b0c-4d8e-9d0e-1f2a3b4c5d6e"
RESULTS = {
    "manifest.yaml": b"kind: TrainingSession\n",
    "metrics.jsonl": b'{"epoch": 1}\n',
    "model.safetensors": bytes(range(256)) * 9000,
    "grown.py": b"def load(): return 'grown'\n",
    "surplus.sh": b"rm -rf /\n",
}
FETCHED = {name: data for name, data in RESULTS.items() if name != "surplus.sh"}
KUBECTL = """#!/bin/sh
echo "$@" >> {folder}/asked
for word; do
    case "$word" in
    trainingsessions.esper.dev | secret) exec cat "{folder}/$word" ;;
    port-forward)
        echo $$ > {folder}/forwards
        echo "Forwarding from 127.0.0.1:$(cat {folder}/port) -> 8000"
        exec sleep 60 ;;
    esac
done
"""


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """The address of a hub that has a session's results."""
    folder = tmp_path_factory.mktemp("hub")
    with served(settings(Place(f"sqlite+aiosqlite:///{folder}/urza.sqlite", folder))) as url:
        keep(HubConfig(url=url, token=own_token()), "hub")
        yield url


def own_token():
    return SecretStr(token(Role.SESSION, UID, namespace="team"))


def keep(config, uri, files=RESULTS):
    """Leave results as a run does that has finished."""
    checkpoints = open_checkpoints(
        Path("never-written"),
        Owner(session="digits", uid=UID),
        1,
        uri=uri,
        storage=StorageConfig(),
        hub=lambda uid: HubObjects(config, uid),
    )
    checkpoints.keep(files)
    checkpoints.close()


class Cluster:
    """What the program answers that stands for kubectl."""

    def __init__(self, folder):
        self.folder = folder
        self.says("True", "Completed")
        self.has_secret("http://esper-urza.esper-system.svc:8000")

    def says(self, status, reason, **storage):
        conditions = [{"type": "Succeeded", "status": status, "reason": reason}]
        found = {
            "metadata": {"uid": UID},
            "spec": {"storage": storage},
            "status": {"conditions": conditions},
        }
        (self.folder / "trainingsessions.esper.dev").write_text(json.dumps(found))

    def has_secret(self, url):
        files = {
            "esper.yaml": yaml.safe_dump({"hub": {"url": url}}),
            "hub-token": own_token().get_secret_value(),
        }
        data = {name: base64.b64encode(text.encode()).decode() for name, text in files.items()}
        (self.folder / "secret").write_text(json.dumps({"data": data}))

    def forwards_to(self, url):
        (self.folder / "port").write_text(url.rpartition(":")[2])

    def asked(self):
        return (self.folder / "asked").read_text().splitlines()

    def says_before_it_forwards(self, commands):
        program = self.folder / "kubectl"
        program.write_text(
            KUBECTL.format(folder=self.folder).replace(
                "port-forward)", f"port-forward)\n{commands}"
            )
        )


def until_gone(process):
    deadline = time.monotonic() + 10
    while alive(process):
        assert time.monotonic() < deadline, "kubectl goes on"
        time.sleep(0.01)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    folder = tmp_path / "kubectl"
    folder.mkdir()
    program = folder / "kubectl"
    program.write_text(KUBECTL.format(folder=folder))
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return Cluster(folder)


def left(directory):
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


def fetched(*words):
    return main(["fetch", "digits", *words])


def refused(capsys, *words):
    """The one line of an error that bad input is told with."""
    assert fetched(*words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert not Path("runs").exists()
    return error


def test_results_come_through_a_port_that_kubectl_forwards(cluster, hub, capsys):
    cluster.forwards_to(hub)
    assert fetched("-n", "team") == 0
    assert left("runs/digits") == FETCHED
    session, secret, forward = cluster.asked()
    assert session.startswith("--namespace=team get trainingsessions.esper.dev digits ")
    assert secret.startswith("--namespace=team get secret digits-esper ")
    assert session.endswith(" --request-timeout=30s")
    assert secret.endswith(" --request-timeout=30s")
    assert forward.startswith("--namespace=esper-system port-forward service/esper-urza :8000 ")
    process = int((cluster.folder / "forwards").read_text())
    until_gone(process)
    printed = capsys.readouterr()
    assert own_token().get_secret_value() not in printed.out + printed.err
    assert 'cd runs/digits && python -c "import grown' in printed.err


def test_a_hub_with_an_address_outside_is_asked_there(cluster, hub):
    assert fetched("--hub", hub, "--output-dir", "a") == 0
    cluster.has_secret(hub)
    assert fetched("--output-dir", "b") == 0
    assert left("a") == left("b") == FETCHED
    assert not any("port-forward" in words for words in cluster.asked())
    assert all("--namespace" not in words for words in cluster.asked())


def test_results_at_an_address_of_the_sessions_own_need_no_hub(cluster, tmp_path):
    uri = f"file://{tmp_path}/shared"
    keep(None, uri)
    cluster.says("True", "Completed", uri=uri)
    assert fetched() == 0
    assert left("runs/digits") == FETCHED
    assert not any("port-forward" in words for words in cluster.asked())


def test_a_run_that_is_there_is_replaced_only_if_asked(cluster, hub, capsys):
    assert fetched("--hub", hub) == 0
    Path("runs/digits/report.html").write_text("old")
    assert fetched("--hub", hub) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (Path("runs/digits") / "report.html").exists()
    assert fetched("--hub", hub, "--overwrite", "--json") == 0
    assert left("runs/digits") == FETCHED
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told == {"session": "digits", "directory": "runs/digits", "files": sorted(FETCHED)}


@pytest.mark.parametrize(
    ("status", "reason"), [("Unknown", "Running"), ("False", "BackoffLimitExceeded")]
)
def test_a_session_that_has_not_succeeded_has_nothing_to_fetch(cluster, capsys, status, reason):
    cluster.says(status, reason)
    assert f"session digits: got {reason}; allowed: one that has succeeded" in refused(capsys)


def test_results_in_a_claim_are_told_of(cluster, capsys):
    cluster.says("True", "Completed", claimName="mine")
    assert "results in the claim mine" in refused(capsys)


def test_results_without_a_model_are_none(cluster, tmp_path, capsys):
    uri = f"file://{tmp_path}/shared"
    keep(None, uri, {"metrics.jsonl": b""})
    cluster.says("True", "Completed", uri=uri)
    assert "results of digits: got metrics.jsonl; allowed: " in refused(capsys)


def test_what_kubectl_says_last_is_said(cluster, capsys):
    (cluster.folder / "kubectl").write_text(
        "#!/bin/sh\necho noise >&2\necho 'Error from server (NotFound): no digits' >&2\nexit 1\n"
    )
    error = refused(capsys)
    assert "got Error from server (NotFound): no digits; allowed: " in error
    assert "noise" not in error


def test_a_port_that_is_not_forwarded_is_told(cluster, capsys):
    program = cluster.folder / "kubectl"
    program.write_text(
        program.read_text().replace("port-forward)", "port-forward)\necho no pod >&2; exit 1")
    )
    assert fetched() == 1
    assert "port-forward service/esper-urza :8000: no pod" in capsys.readouterr().err
    assert not Path("runs").exists()


def test_warnings_before_the_port_are_passed_over(cluster, hub):
    cluster.forwards_to(hub)
    cluster.says_before_it_forwards("echo W1130 klog.go:1 the plugin is old >&2; sleep 0.2; echo")
    assert fetched() == 0
    assert left("runs/digits") == FETCHED


def test_a_kubectl_that_goes_on_without_a_port_is_not_waited_for(cluster, capsys, monkeypatch):
    cases = ((0.3, "exec sleep 60", "it said nothing"), (2, "echo trying >&2", "trying"))
    for seconds, does, told in cases:
        monkeypatch.setattr(kubectl, "FORWARD_SECONDS", seconds)
        cluster.says_before_it_forwards(f"{does}; echo $$ > $0.silent; exec sleep 60")
        assert fetched() == 1
        error = capsys.readouterr().err
        assert f"service/esper-urza :8000: no port after {seconds} s: {told}" in error
    until_gone(int((cluster.folder / "kubectl.silent").read_text()))
    assert not Path("runs").exists()


def test_a_kubectl_that_will_not_end_is_ended(cluster, hub, monkeypatch):
    monkeypatch.setattr(kubectl, "_STOP_SECONDS", 0.2)
    cluster.forwards_to(hub)
    program = cluster.folder / "kubectl"
    program.write_text(program.read_text().replace("exec sleep 60", "trap '' TERM; exec sleep 60"))
    assert fetched() == 0
    until_gone(int((cluster.folder / "forwards").read_text()))


@pytest.mark.skipif(sys.platform != "linux", reason="no parent's death is told elsewhere")
def test_kubectl_does_not_outlive_an_esper_that_is_killed(cluster):
    # Nobody listens at that port: it goes on asking for the hub.
    cluster.forwards_to("http://127.0.0.1:1")
    words = [sys.executable, "-m", "esper", "fetch", "digits", "--set", "hub.attempts=20"]
    with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as esper:
        deadline = time.monotonic() + 60
        forwards = cluster.folder / "forwards"
        while not (forwards.exists() and forwards.read_text().strip()):
            assert time.monotonic() < deadline, "nothing is forwarded"
            time.sleep(0.01)
        process = int(forwards.read_text())
        assert alive(process)
        esper.kill()
    until_gone(process)


def test_a_hub_with_tls_is_not_taken_under_another_name(cluster, capsys):
    address = "https://esper-urza.esper-system.svc:8443"
    cluster.has_secret(address)
    error = refused(capsys)
    assert (
        f"hub of session digits: got {address}; allowed: http within a cluster; or --hub" in error
    )
    assert not any("port-forward" in words for words in cluster.asked())


def test_without_kubectl_it_is_missed(cluster, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(cluster.folder / "nothing"))
    assert "PATH: got no kubectl; allowed: " in refused(capsys)


def test_a_token_that_is_not_taken_is_told(cluster, hub, capsys, monkeypatch):
    secret = json.loads((cluster.folder / "secret").read_text())
    secret["data"]["hub-token"] = base64.b64encode(b"another").decode()
    (cluster.folder / "secret").write_text(json.dumps(secret))
    assert "token" in refused(capsys, "--hub", hub)
    assert EsperConfig().hub.token is None
