"""`esper worker`: what it runs where, what it refuses, and what it leaves for the cluster."""

import json
import subprocess
import sys

import pytest
import yaml

from esper.cli.accelerators import require_any_accelerator
from esper.cli.main import main, parser
from esper.cli.outcomes import Ended, Outcome
from esper.cli.rank import parser as rank_parser
from esper.cli.supervising import Supervisor
from esper.cli.worker import newest_checkpoint, placement_of, rank_program
from esper.configs import TORCHRUN
from esper.contracts.manifests import load_manifest
from esper.errors import ConfigError
from esper.services.tolaria.reporting import SessionReport
from esper.services.tolaria.status import StatusFile

MANIFEST = {
    "apiVersion": "esper.dev/v1alpha1",
    "kind": "TrainingSession",
    "metadata": {"name": "digits"},
    "spec": {
        "model": {"entrypoint": "esper.zoo.models:MLP"},
        "data": {"entrypoint": "esper.zoo.data:digits"},
        "training": {"batchSize": 64},
        "workers": {"replicas": 2, "processesPerWorker": 4},
    },
}


@pytest.fixture
def manifest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for variable in [name for names in TORCHRUN.values() for name in names]:
        monkeypatch.delenv(variable, raising=False)
    path = tmp_path / "session.yaml"
    path.write_text(yaml.safe_dump(MANIFEST))
    return path


def placed(manifest, **given):
    named = {name: (text, f"--{name}") for name, text in given.items()}
    return placement_of(load_manifest(manifest).session, named)


def test_a_node_stands_where_the_manifest_and_the_cluster_say(manifest):
    node = placed(manifest, node_rank="1", rendezvous="digits-0.digits:29400")
    assert (node.processes, node.nodes, node.node) == (4, 2, 1)
    assert (node.host, node.port, node.meeting) == ("digits-0.digits", 29400, "digits")


def test_options_beat_the_manifest(manifest):
    alone = placed(manifest, nodes="1", processes="2", rendezvous_id="uid-3")
    assert (alone.processes, alone.nodes, alone.meeting) == (2, 1, "uid-3")
    ipv6 = placed(manifest, node_rank="0", rendezvous="[fd00::7]:29400")
    assert (ipv6.host, ipv6.port) == ("fd00::7", 29400)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "--node-rank: got nothing; allowed: given with 2 nodes"),
        ({"node_rank": "0"}, "--rendezvous: got nothing; allowed: given with 2 nodes"),
        ({"node_rank": "2", "rendezvous": "h:1"}, "allowed: 0 to 1, for 2 nodes"),
        ({"node_rank": "-1", "rendezvous": "h:1"}, "a whole number from 0"),
        ({"node_rank": "0", "rendezvous": "h"}, "HOST:PORT"),
        ({"node_rank": "0", "rendezvous": ":1"}, "HOST:PORT"),
        ({"node_rank": "0", "rendezvous": "h:65536"}, "HOST:PORT"),
        ({"nodes": "1:4"}, "--nodes: got 1:4; allowed: a whole number from 1 to 4096"),
        ({"nodes": "1", "processes": "gpu"}, "--processes: got gpu"),
        ({"nodes": "1", "processes": "0"}, "a whole number from 1 to 64"),
    ],
)
def test_a_place_that_is_none_is_refused(manifest, given, said):
    with pytest.raises(ConfigError, match=said):
        placed(manifest, **given)


@pytest.mark.parametrize(
    ("argv", "variables", "said"),
    [
        (["none.yaml"], {}, "none.yaml"),
        (["session.yaml"], {}, "--node-rank"),
        (["session.yaml", "--nodes", "1", "--restarts", "x"], {}, "--restarts"),
        (["session.yaml"], {"PET_NNODES": "1:2"}, "environment PET_NNODES"),
        (["session.yaml", "--nodes", "2"], {"PET_NNODES": "1:2"}, "--node-rank"),
    ],
)
def test_bad_input_is_told_and_left_for_the_cluster(
    manifest, tmp_path, monkeypatch, capsys, argv, variables, said
):
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    log = tmp_path / "log"
    words = ["worker", *argv, "--output-dir", "run", "--termination-log", str(log)]
    assert main(words) == 78
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("esper: error: ")
    assert (captured.err.count("\n"), said in captured.err) == (1, True)
    left = json.loads(log.read_text())
    assert set(left) == {"reason", "message"}
    assert f"esper: error: {left['message']}\n" == captured.err
    assert not (tmp_path / "run").exists()


def test_where_there_is_no_gpu_it_says_what_would_have_been_launched(
    manifest, tmp_path, monkeypatch, capsys
):
    # As where CUDA has no driver.
    monkeypatch.setattr(require_any_accelerator, "__defaults__", ("libnosuch.so.1",))
    workers = MANIFEST["spec"]["workers"] | {"resources": {"limits": {"nvidia.com/gpu": "4"}}}
    spec = MANIFEST["spec"] | {"workers": workers}
    manifest.write_text(yaml.safe_dump(MANIFEST | {"spec": spec}))
    log = tmp_path / "log"
    words = ["worker", "session.yaml", "--output-dir", "run", "--termination-log", str(log)]
    assert main([*words, "--nodes", "1", "--processes", "2"]) == 78
    said, refusal = capsys.readouterr().err.splitlines()
    assert said == "esper: not launched: 2 processes over cpu:gloo,cuda:nccl"
    assert "limits[nvidia.com/gpu]: got 4; allowed: at most 0" in refusal
    assert json.loads(log.read_text())["reason"] == "AcceleratorMissing"


def test_a_log_that_can_not_be_written_changes_no_exit_code(manifest, tmp_path, capsys):
    argv = ["worker", "none.yaml", "--output-dir", "run", "--termination-log", str(tmp_path)]
    assert main(argv) == 78
    assert "nothing is left in" in capsys.readouterr().err


def test_ranks_get_what_the_command_got(manifest):
    words = ["session.yaml", "--output-dir", "run", "--json", "--debug", "--config", "c.yaml"]
    words += ["--set", "tolaria.stop_seconds=5", "--set", "component.log_level=info"]
    arguments = parser().parse_args(["worker", *words])
    program = rank_program(arguments)
    assert program[:3] == [sys.executable, "-m", "esper.cli.rank"]
    found = rank_parser().parse_args([*program[3:], "--outcomes", "folder"])
    for name in ("file", "output_dir", "json", "debug", "config", "assignments"):
        assert getattr(found, name) == getattr(arguments, name)


def test_progress_is_the_newest_checkpoint_that_the_status_names(tmp_path):
    assert newest_checkpoint(tmp_path) == -1
    status = tmp_path / "status.yaml"
    for content in ({}, {"status": None}, {"status": {"checkpoint": {"epoch": "x"}}}, []):
        status.write_text(yaml.safe_dump(content))
        assert newest_checkpoint(tmp_path) == -1
    status.write_text("{")
    assert newest_checkpoint(tmp_path) == -1
    status.write_text(yaml.safe_dump({"status": {"checkpoint": {"name": "c", "epoch": 12}}}))
    assert newest_checkpoint(tmp_path) == 12


def test_where_it_gives_up_the_status_says_so(manifest, tmp_path, monkeypatch, capsys):
    session = load_manifest(manifest).session
    report = SessionReport("small", layers={}, refused={}, parameters_base=3, epochs=2, threads=1)
    running = StatusFile(tmp_path / "status.yaml", session, report)
    running.write()
    crashed = Ended(Outcome.CRASHED, "RankCrashed", "rank 1 was killed by SIGKILL; given up")
    monkeypatch.setattr(Supervisor, "run", lambda *_: crashed)
    words = ["worker", "session.yaml", "--output-dir", ".", "--nodes", "1"]
    assert main(words) == 1
    summary = yaml.safe_load((tmp_path / "status.yaml").read_text())["status"]["conditions"][0]
    assert (summary["status"], summary["reason"]) == ("False", "Failed")
    assert summary["message"] == f"RankCrashed: {crashed.message}"
    # Other nodes do not know how rank 0 stands.
    running.write()
    assert main([*words[:-1], "2", "--node-rank", "1", "--rendezvous", "h:1"]) == 1
    text = (tmp_path / "status.yaml").read_text()
    assert yaml.safe_load(text)["status"]["conditions"][0]["reason"] == "Running"
    (tmp_path / "status.yaml").write_text("{")
    assert main(words) == 1
    assert "the status does not say so" in capsys.readouterr().err


def test_the_supervisor_itself_stays_small():
    code = "import sys, esper.cli.supervising; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
