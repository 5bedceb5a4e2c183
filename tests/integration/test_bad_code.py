"""Code of the user's that can not be trained, or that exits: refused in one line."""

import json

import pytest

from esper.cli.main import main
from tests.integration.spirals import SESSION, SPIRALS, changed, write_session
from tests.integration.test_bad_input import (  # noqa: F401  # fixtures
    _process_as_before,
    place,
    refused,
    with_own_module,
)

MODULE = (
    SPIRALS
    + """

class Untrainable(Net):
    def forward(self, x):
        if self.training:
            raise RuntimeError("no way to learn this")
        return super().forward(x)


def one_sample():
    data = spirals()
    return data | {"train": TensorDataset(*(part[:1] for part in data["train"].tensors))}


def leaving():
    raise SystemExit("no weights")


class Leaving(Net):
    def forward(self, x):
        raise SystemExit(3)


class LeavingLater(Net):
    calls = 0

    def forward(self, x):
        type(self).calls += self.training
        # Not while it is looked at, before anything is written.
        if type(self).calls > 20:
            raise SystemExit(0)
        return super().forward(x)


class Samples(TensorDataset):
    def __getitem__(self, index):
        raise SystemExit


def leaving_samples():
    return {name: Samples(*part.tensors) for name, part in spirals().items()}


class Loss:
    def loss(self, outputs, targets):
        raise SystemExit("no loss")
"""
)

TOO_FEW = {
    "a batch of one sample for a normalisation layer": (
        {"training__batchSize": 1},
        (
            "spec.training.batchSize",
            "1, a sample a batch, and ValueError: Expected more than 1 value",
            "at least 2 with this model",
        ),
    ),
    "some shards of one sample for a normalisation layer": (
        {"training__logicalShards": 16},
        (
            "spec.training.batchSize",
            "30, a sample a shard, and ValueError: Expected more than 1 value",
            "at least 32 with this model, two samples for each of 16 shards",
        ),
    ),
    "one training sample for a normalisation layer": (
        {"data__entrypoint": "own:one_sample"},
        ("data.train", "1 samples at once in training mode: ValueError", "what Net takes"),
    ),
    "a model that can't be trained": (
        {"model__entrypoint": "own:Untrainable"},
        (
            "data.train",
            "2 samples at once in training mode: RuntimeError: no way to learn this",
            "what Untrainable takes in training mode",
        ),
    ),
}
LEAVING = {
    "a model's entry point": (
        {"model__entrypoint": "own:leaving"},
        ("spec.model.arguments", "own:leaving(no arguments) -> SystemExit: no weights", "returns"),
    ),
    "a model when it is called": (
        {"model__entrypoint": "own:Leaving"},
        ("spec.model.entrypoint", "code that exits: SystemExit: 3", "code that returns, or raises"),
    ),
    "data when a sample is asked for": (
        {"data__entrypoint": "own:leaving_samples"},
        ("data.train[0]", "SystemExit", "a pair (input, target)"),
    ),
    "an objective when it is called": (
        {"training__objective": "own:Loss"},
        ("spec.training.objective", "code that exits: SystemExit: no loss", "code that returns"),
    ),
}


def written(folder, changes):
    document = changed(SESSION, **{f"spec__{path}": value for path, value in changes.items()})
    return write_session(folder, *with_own_module([document]), modules={"own": MODULE})


@pytest.mark.parametrize(("changes", "said"), TOO_FEW.values(), ids=TOO_FEW)
def test_a_model_that_its_batches_can_not_train_is_refused(place, capsys, changes, said):  # noqa: F811
    refused(capsys, place, ["run", written(place, changes), "--output-dir", place / "D"], said)


@pytest.mark.parametrize(("changes", "said"), LEAVING.values(), ids=LEAVING)
def test_code_that_exits_is_refused(place, capsys, changes, said):  # noqa: F811
    refused(capsys, place, ["run", written(place, changes), "--output-dir", place / "D"], said)


def test_code_that_exits_in_training_ends_the_run_with_a_line(place, capsys):  # noqa: F811
    path = written(place, {"model__entrypoint": "own:LeavingLater"})
    assert main(["run", str(path), "--output-dir", "D", "--quiet"]) == 2
    said = "spec.model.entrypoint: got code that exits: SystemExit: 0; allowed: code that returns"
    assert said in capsys.readouterr().err
    assert said in " ".join((place / "D" / "status.yaml").read_text().split())


def test_a_worker_does_not_start_code_that_exits_again(tmp_path, server):
    path = written(tmp_path, {"model__entrypoint": "own:LeavingLater"})
    log = tmp_path / "termination.log"
    argv = ("worker", path, "--output-dir", "D", "--processes", 1, "--termination-log", log)
    ended = server.run(*argv, folder=tmp_path)
    said = "spec.model.entrypoint: got code that exits: SystemExit: 0; allowed: code that returns"
    assert ended.status == 78, ended.err
    assert said in ended.err
    assert json.loads(log.read_text())["reason"] == "EntryPointError"
