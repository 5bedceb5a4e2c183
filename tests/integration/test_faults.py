"""What happens when the work itself goes wrong: a loss that is no number, a disk that is full.

The run is kept, its status says why, and it can be resumed. And layers that can't host seeds.
"""

import json

import pytest

from tests.integration.spirals import SESSION, SPIRALS, changed, left, lines, status, write_session

STEEP = '''\
"""A line through points: gradient descent diverges above a learning rate of one."""

import torch
from torch import nn
from torch.utils.data import TensorDataset


def line(samples=600):
    x = torch.linspace(-1, 1, samples).unsqueeze(1) * 3**0.5
    data = TensorDataset(x, 0.5 * x)
    return {"train": data, "validation": data, "test": data}


def model():
    torch.manual_seed(0)
    return nn.Linear(1, 1, bias=False)
'''

OVERFLOW = '''\
"""The spirals, read one by one: what is read the 700th and the 1300th time overflows."""

import spirals
from spirals import Net


class Overflowing:
    def __init__(self, data):
        self.data = data
        self.read = 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        self.read += 1
        x, y = self.data[index]
        return (x + 1e30 * 1e30 if self.read in (700, 1300) else x), y


def data():
    splits = spirals.spirals()
    return splits | {"train": Overflowing(splits["train"])}
'''

STEEP_SESSION = changed(
    SESSION,
    spec__model={"entrypoint": "steep:model"},
    spec__data={"entrypoint": "steep:line"},
    spec__training__objective="regression",
    spec__training__batchSize=4,
    spec__training__epochs=3,
    spec__growth__controller__policy="none",
)


def descent(rate):
    return {"name": "sgd", "learningRate": rate}


def rollbacks(directory):
    events = map(json.loads, lines(directory / "events.jsonl"))
    return [event for event in events if event.get("reason") == "RolledBack"]


def rows(directory):
    return [json.loads(line) for line in lines(directory / "metrics.jsonl")]


def run(server, folder, *documents, directory="D", fault=None, modules=None):
    manifest = write_session(folder, *documents, modules=modules)
    argv = ("run", manifest, "--output-dir", directory, "--quiet")
    return server.run(*argv, folder=folder, fault=fault)


def failed_in_one_line(ended):
    """The message of a command that ended with 1."""
    assert ended.status == 1, ended
    assert ended.err.count("\n") == 1, ended.err
    assert ended.err.startswith("esper: error: ")
    return ended.err.removeprefix("esper: error: ").strip()


# -- loss not finite ------------------------------------------------------------------------


def test_a_rollback_with_half_the_learning_rate_saves_the_run(server, tmp_path):
    session = changed(STEEP_SESSION, spec__training__optimizer=descent(1.5))
    ended = run(server, tmp_path, session, modules={"steep": STEEP})
    assert (ended.status, ended.err) == (0, "")
    (event,) = rollbacks(tmp_path / "D")
    assert event["epoch"] == 0
    assert "the learning rate is now 0.5 of the configured (1 of 3 tries)" in event["message"]
    assert [row["learningRate"] for row in rows(tmp_path / "D")] == [0.75] * 3
    assert rows(tmp_path / "D")[-1]["validationLoss"] < 1e-6
    # Work undone was work all the same: the first epoch was paid twice.
    costs = [row["flops"] for row in rows(tmp_path / "D")]
    assert costs[0] > 1.5 * (costs[1] - costs[0])
    assert status(tmp_path / "D")[1]["reason"] == "Succeeded"


def test_a_kill_after_the_rollback_changes_nothing(server, tmp_path):
    session = changed(STEEP_SESSION, spec__training__optimizer=descent(1.5))
    assert run(server, tmp_path, session, modules={"steep": STEEP}, directory="E").status == 0
    fault = ["kill_before", "esper.services.tolaria.engine:Engine.train_epoch", 2]
    ended = run(server, tmp_path, session, modules={"steep": STEEP}, fault=fault)
    assert ended.status == -9
    assert len(rollbacks(tmp_path / "D")) == 1
    assert server.run("run", "--resume", "D", folder=tmp_path).status == 0
    assert left(tmp_path / "D") == left(tmp_path / "E")


@pytest.mark.parametrize("tries", [0, 2])
def test_given_up_after_the_configured_tries(server, tmp_path, tries):
    session = changed(
        STEEP_SESSION,
        spec__training__optimizer=descent(100),
        spec__training__nonFinite={"maxRollbacks": tries},
    )
    ended = run(server, tmp_path, session, modules={"steep": STEEP})
    said = failed_in_one_line(ended)
    assert said.startswith(f"the loss was not finite after epoch 0, also after {tries} rollbacks")
    assert "spec.training.optimizer.learningRate" in said
    shares = [event["message"].split(" is now ")[1][:4] for event in rollbacks(tmp_path / "D")]
    assert shares == ["0.5 ", "0.25"][:tries]
    found, summary = status(tmp_path / "D")
    assert (summary["status"], summary["reason"]) == ("False", "Failed")
    assert summary["message"] == said
    assert found["epoch"] == 0
    assert (tmp_path / "D" / "report.html").is_file()
    # Nothing has changed, so trying again ends the same.
    again = server.run("run", "--resume", "D", "--quiet", folder=tmp_path)
    assert failed_in_one_line(again) == said


def test_active_seeds_go_before_the_learning_rate_does(server, tmp_path):
    session = changed(
        SESSION,
        spec__model__entrypoint="overflow:Net",
        spec__data__entrypoint="overflow:data",
    )
    modules = {"overflow": OVERFLOW, "spirals": SPIRALS}
    ended = run(server, tmp_path, session, modules=modules)
    assert (ended.status, ended.err) == (0, "")
    # 600 samples an epoch: the second epoch overflows, and so does its repetition.
    first, second = rollbacks(tmp_path / "D")
    assert first["epoch"] == second["epoch"] == 1
    assert "1 active seeds were culled (1 of 3 tries)" in first["message"]
    assert "the learning rate is now 0.5 of the configured (2 of 3 tries)" in second["message"]
    culled = [
        event
        for event in map(json.loads, lines(tmp_path / "D" / "events.jsonl"))
        if event.get("current") == "culled" and event["epoch"] == 1
    ]
    assert [event["reason"] for event in culled] == ["the loss was not finite"]
    rates = [row["learningRate"] for row in rows(tmp_path / "D")]
    assert rates == [0.01] + [0.005] * 7
    assert len(rows(tmp_path / "D")) == 8


# -- disk full ------------------------------------------------------------------------------

RUN = "esper.services.tolaria.run_directory"

FULL = {
    "checkpoint": ["full_before", "esper.services.tolaria.checkpoint_folder:_write", 9],
    "checkpoint, at its sync": ["refused_sync", "state.json", 3],
    "checkpoint, at its folder": ["full_before", f"{RUN}:RunLog._write_checkpoint", 3, 9000],
    "line of metrics": ["full_in_line", "metrics.jsonl", 4],
    "line of events": ["full_in_line", "events.jsonl", 5],
    "line of decisions": ["full_in_line", "decisions.jsonl", 2],
    "database being made": ["full_database", "esper.services.urza.database:Database.open", 1],
    "database": ["full_before", "esper.services.urza.store:UrzaHub.request_kernel", 2],
    "database, a kernel being stored": [
        "full_before",
        "esper.services.urza.store:UrzaHub.complete_kernel",
        2,
    ],
    "kernel's artifact": ["full_before", "esper.utils.object_store:_write_atomically", 2],
    "status": ["full_before", "esper.services.tolaria.status:StatusFile.write", 4],
    "exported model": ["full_before", "esper.core.export:write_atomically", 2],
    "exported model, at its sync": ["refused_sync", ".grown.py.partial", 1],
    "result": ["full_before", f"{RUN}:RunDirectory.write_result", 1],
    "report": ["full_before", "esper.cli.embedded:write_report", 1],
}


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert run(server, folder).status == 0
    return left(folder / "D")


@pytest.mark.parametrize("fault", FULL.values(), ids=FULL)
def test_a_full_disk_ends_the_run_which_can_be_resumed(server, tmp_path, undisturbed, fault):
    ended = run(server, tmp_path, fault=fault)
    said = failed_in_one_line(ended)
    assert "no room left" in said
    resumed = server.run("run", "--resume", "D", "--quiet", folder=tmp_path)
    assert (resumed.status, resumed.err) == (0, "")
    found = left(tmp_path / "D")
    for name, value in undisturbed.items():
        assert found[name] == value, name
    assert status(tmp_path / "D")[1]["reason"] == "Succeeded"


def test_a_store_that_fails_once_only_puts_a_seed_off(server, tmp_path):
    """What the store can't take says nothing about the blueprint."""
    # The store writes to files without a name, which the system calls by a number.
    ended = run(server, tmp_path, fault=["refused_sync", "#* (deleted)", 2])
    assert (ended.status, ended.err) == (0, "")
    decisions = [json.loads(line) for line in lines(tmp_path / "D" / "decisions.jsonl")]
    (put_off,) = [found for found in decisions if found["outcome"].startswith("put off")]
    assert not put_off["applied"]
    assert "no room left" in put_off["outcome"]
    later = [
        found
        for found in decisions
        if (found.get("layer"), found.get("blueprint")) == (put_off["layer"], put_off["blueprint"])
    ]
    assert any(found["applied"] for found in later)


def test_a_disk_that_is_too_small_from_the_start(server, tmp_path):
    """The model's checkpoints are larger than any file may be; everything else has room."""
    wide = changed(SESSION, spec__model__arguments={"width": 250}, spec__training__epochs=2)
    assert run(server, tmp_path, wide, directory="E").status == 0
    ended = run(server, tmp_path, wide, fault=["file_size", 400_000])
    said = failed_in_one_line(ended)
    assert said.startswith("no room left for D: ")
    assert said.endswith("free some and go on with: esper run --resume D")
    found, summary = status(tmp_path / "D")
    assert (summary["status"], summary["reason"], summary["message"]) == ("False", "Failed", said)
    assert "checkpoint" not in found
    assert not list((tmp_path / "D" / "checkpoints").iterdir())
    assert server.run("run", "--resume", "D", folder=tmp_path).status == 0
    assert left(tmp_path / "D") == left(tmp_path / "E")


# -- layers that can't host -----------------------------------------------------------------

ATTENTION = '''\
"""Attention over the two coordinates, and a layer that is never called."""

from torch import nn

from spirals import spirals


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(1, 8)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.spare = nn.Linear(8, 8)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        x = self.embed(x.unsqueeze(2))
        return self.head(self.attend(x, x, x)[0].flatten(1))
'''


def test_layers_that_cannot_host_are_left_alone_and_named(server, tmp_path):
    session = changed(
        SESSION,
        spec__model__entrypoint="attention:Net",
        spec__data__entrypoint="attention:spirals",
        spec__training__epochs=2,
    )
    modules = {"attention": ATTENTION, "spirals": SPIRALS}
    ended = run(server, tmp_path, session, modules=modules)
    assert (ended.status, ended.err) == (0, "")
    found, _ = status(tmp_path / "D")
    refused = {layer["name"]: layer["reason"] for layer in found["refusedLayers"]}
    assert set(refused) == {"attend.out_proj", "spare"}
    assert "MultiheadAttention" in refused["attend.out_proj"]
    assert "called" in refused["spare"]
    assert [layer["name"] for layer in found["layers"]] == ["embed", "head"]
