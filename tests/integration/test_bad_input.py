"""Every way in which what a person wrote can be wrong: one line that says so, and nothing written.

Each case gives the message's three parts: the field, what came, and what is allowed.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from esper.cli.main import main
from tests.integration.processes import environment, until
from tests.integration.spirals import API, SESSION, SPIRALS, changed, write_session

MODULE = (
    SPIRALS
    + """

NUMBER = 3


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(1, 4, 3)

    def forward(self, x):
        return self.features(x).mean(dim=(2, 3))


class Two(Net):
    def forward(self, x):
        return super().forward(x), x


def fixed():
    net = Net()
    net.requires_grad_(False)
    return net


def failing():
    raise RuntimeError("no weights at hand\\nnor anywhere else")


def nothing():
    return None


def unsplit():
    return {"train": spirals()["train"]}


def without_validation():
    data = spirals()
    empty = TensorDataset(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long))
    return data | {"validation": empty}


def floating_labels():
    data = spirals()
    return {
        name: TensorDataset(part.tensors[0], part.tensors[1].float().unsqueeze(1).repeat(1, 3))
        for name, part in data.items()
    }
"""
)


def blueprint(name="own", **spec):
    return {"apiVersion": API, "kind": "Blueprint", "metadata": {"name": name}, "spec": spec}


def graph(*nodes, hosts=("Linear",), output="y"):
    return blueprint(hosts=list(hosts), graph={"nodes": list(nodes), "output": output})


def offering(document, **changes):
    """A session that may germinate that blueprint, and the blueprint."""
    return changed(SESSION, spec__growth__blueprints=None, **changes), document


X = {"op": "input", "id": "x"}

MANIFESTS = {
    "unknown field": (
        [changed(SESSION, spec__training__epoch=3)],
        ("spec.training.epoch", "an unknown field", "did you mean epochs?"),
    ),
    "wrong type": (
        [changed(SESSION, spec__training__epochs="ten")],
        ("spec.training.epochs", 'the text "ten"', "a whole number from 1 to 100000"),
    ),
    "number as text": (
        [changed(SESSION, spec__training__optimizer__learningRate="0.1")],
        ("spec.training.optimizer.learningRate", 'the text "0.1"', "at most 100"),
    ),
    "out of range": (
        [changed(SESSION, spec__training__batchSize=0)],
        ("spec.training.batchSize", "0", "a whole number from 1 to 1048576"),
    ),
    "two fields that contradict": (
        [changed(SESSION, spec__growth__gates__dwellEpochs=4)],
        ("spec.growth.gates.ageEpochs", "3", "at least dwellEpochs, 4"),
    ),
    "required field left out": (
        [changed(SESSION, spec__data=None)],
        ("spec.data", "nothing", "entrypoint"),
    ),
    "wrong kind": (
        [changed(SESSION, kind="Pod")],
        ("kind", "Pod", "TrainingSession or Blueprint"),
    ),
    "wrong apiVersion": (
        [changed(SESSION, apiVersion="esper.dev/v1")],
        ("apiVersion", "esper.dev/v1", "esper.dev/v1alpha1"),
    ),
    "bad name": (
        [changed(SESSION, metadata__name="My Session")],
        ("metadata.name", "My Session", "lower-case letters"),
    ),
    "two sessions": ([SESSION, SESSION], ("session.yaml", "2 TrainingSession", "exactly one")),
    "unknown blueprint": (
        [changed(SESSION, spec__growth__blueprints={"matchLabels": {"esper.dev/blueprint": "x"}})],
        ("spec.growth.blueprints", "esper.dev/blueprint: x", "noop"),
    ),
    "what this version can't do": (
        [changed(SESSION, spec__training__checkpoint={"resumeFrom": "elsewhere"})],
        ("spec.training.checkpoint.resumeFrom", "elsewhere", "nothing; this version"),
    ),
    "more shards than samples in a batch": (
        [changed(SESSION, spec__training__logicalShards=4096)],
        ("spec.training.batchSize", "30", "at least training.logicalShards, 4096"),
    ),
    "model that doesn't import": (
        [changed(SESSION, spec__model__entrypoint="nowhere.at_all:Net")],
        ("spec.model.entrypoint", "nowhere.at_all:Net (ModuleNotFoundError", "beside the manifest"),
    ),
    "model that is not in its module": (
        [changed(SESSION, spec__model__entrypoint="own:Nett")],
        ("spec.model.entrypoint", "own:Nett", "Net"),
    ),
    "no module and attribute": (
        [changed(SESSION, spec__model__entrypoint="own.Net")],
        ("spec.model.entrypoint", "own.Net", "module.path:attribute"),
    ),
    "model that isn't callable": (
        [changed(SESSION, spec__model__entrypoint="own:NUMBER")],
        ("spec.model.entrypoint", "own:NUMBER, a int", "a callable"),
    ),
    "model that refuses its arguments": (
        [changed(SESSION, spec__model__arguments={"depth": 3})],
        ("spec.model.arguments", "depth=3", "Net(width=3)"),
    ),
    "model that fails": (
        [changed(SESSION, spec__model__entrypoint="own:failing")],
        ("spec.model.arguments", "no weights at hand nor anywhere", "arguments with which"),
    ),
    "model that is something else": (
        [changed(SESSION, spec__model__entrypoint="own:nothing")],
        ("spec.model.entrypoint", "own:nothing -> NoneType", "nn.Module"),
    ),
    "model with nothing to train": (
        [changed(SESSION, spec__model__entrypoint="own:fixed")],
        ("spec.model.entrypoint", "Net without trainable parameters", "requires a gradient"),
    ),
    "model with two outputs": (
        [changed(SESSION, spec__model__entrypoint="own:Two")],
        ("spec.model.entrypoint", "a tuple", "one tensor"),
    ),
    "data that doesn't import": (
        [changed(SESSION, spec__data__entrypoint="own:missing")],
        ("spec.data.entrypoint", "own:missing", "spirals"),
    ),
    "data that refuses its arguments": (
        [changed(SESSION, spec__data__arguments={"size": 10})],
        ("spec.data.arguments", "size=10", "spirals(train=600"),
    ),
    "data that is something else": (
        [changed(SESSION, spec__data__entrypoint="own:nothing")],
        ("spec.data.entrypoint", "NoneType", "train, validation and test"),
    ),
    "data without its splits": (
        [changed(SESSION, spec__data__entrypoint="own:unsplit")],
        ("spec.data.entrypoint", "a dict with train", "exactly train, validation and test"),
    ),
    "data whose shape the model refuses": (
        [changed(SESSION, spec__model__entrypoint="own:Conv")],
        ("data.train", "inputs [2, 2], targets [2]", "a shape that Conv takes"),
    ),
    "data that the objective refuses": (
        [changed(SESSION, spec__data__entrypoint="own:floating_labels")],
        ("data.train", "targets [2, 3]", "targets that fit the model's output"),
    ),
    "empty validation set": (
        [changed(SESSION, spec__data__entrypoint="own:without_validation")],
        ("data.validation", "0 samples", "at least 4, not an empty set"),
    ),
    "objective that doesn't import": (
        [changed(SESSION, spec__training__objective="own:Loss")],
        ("spec.training.objective", "own:Loss", "an attribute of own"),
    ),
    "blueprint with a cycle": (
        offering(
            graph(
                X,
                {"op": "add", "id": "a", "inputs": ["x", "y"]},
                {"op": "activation", "id": "y", "input": "a", "kind": "relu"},
            )
        ),
        ("spec.graph.nodes[1].input", "'y', which closes a cycle", "an earlier id (x)"),
    ),
    "unknown op": (
        offering(graph(X, {"op": "softsign", "id": "y", "input": "x"})),
        ("spec.graph.nodes[1].op", "softsign", "linear"),
    ),
    "unknown built-in": (
        offering(blueprint(builtin="transformer")),
        ("spec.builtin", "transformer", "bottleneck-mlp"),
    ),
    "unknown argument of a built-in": (
        offering(blueprint(builtin="widen", arguments={"rank": 3})),
        ("spec.arguments.rank", "rank", "units, initialisation for widen"),
    ),
    "shapes that don't fit": (
        offering(graph(X, {"op": "linear", "id": "y", "input": "x", "features": 7})),
        ("spec.graph.output", "'y' of shape (7,)", "(3,) (Blueprint own at layer first"),
    ),
    "shapes that don't fit each other": (
        offering(
            graph(
                X,
                {"op": "linear", "id": "a", "input": "x", "features": 4},
                {"op": "linear", "id": "b", "input": "x", "features": 5},
                {"op": "add", "id": "c", "inputs": ["a", "b"]},
                {"op": "linear", "id": "y", "input": "c", "features": "out"},
            )
        ),
        ("spec.graph.nodes[3].inputs", "shapes [(4,), (5,)]", "one shape and layout for all"),
    ),
    "an op of another kind of layer": (
        offering(
            graph(X, {"op": "conv2d", "id": "y", "input": "x", "channels": "out", "kernelSize": 3})
        ),
        ("spec.graph.nodes[1].op", "conv2d on a Linear host", "Conv2d, BatchNorm2d hosts"),
    ),
    "hosts of which the model has none": (
        offering(
            graph(
                X,
                {"op": "conv2d", "id": "y", "input": "x", "channels": "out", "kernelSize": "host"},
                hosts=["Conv2d"],
            )
        ),
        ("spec.hosts", "Conv2d", "a kind of the model's host layers: Linear"),
    ),
    "over the cap on nodes": (
        offering(
            graph(
                X,
                *(
                    {"op": "activation", "id": f"n{i}", "input": f"n{i - 1}" if i else "x"}
                    | {"kind": "relu"}
                    for i in range(70)
                ),
                output="n69",
            )
        ),
        ("spec.graph.nodes", '[{"id": "x"', "a list of 1 to 64 entries"),
    ),
    "over the cap on sizes": (
        offering(graph(X, {"op": "linear", "id": "y", "input": "x", "features": 2_000_000})),
        ("spec.graph.nodes[1].features", "2000000", "1000000"),
    ),
    "over the cap on parameters": (
        offering(
            graph(
                X,
                {"op": "linear", "id": "a", "input": "x", "features": 10_000},
                {"op": "linear", "id": "b", "input": "a", "features": 10_000},
                {"op": "linear", "id": "y", "input": "b", "features": "out"},
            )
        ),
        ("spec.graph", "parameters", "at most 50000000 (Blueprint own at layer first"),
    ),
    "a built-in over the cap on parameters": (
        offering(
            blueprint(builtin="bottleneck-mlp", arguments={"units": 60_000}),
            spec__model__arguments={"width": 1500},
        ),
        ("spec.arguments", "parameters", "at most 50000000 (Blueprint own at layer first"),
    ),
}

FILES = {
    "missing file": (None, ("absent.yaml", "No such file or directory", "a readable manifest")),
    "broken YAML": ("spec: [1, 2", ("broken.yaml:1:", "broken YAML", "well-formed YAML")),
    "a key twice": ("kind: A\nkind: B\n", ("broken.yaml:2:1", "key 'kind' twice", "each key once")),
    "no text": (b"\xff\xfe\x00", ("broken.yaml", "no UTF-8", "UTF-8 text")),
    "nothing in it": ("", ("broken.yaml", "no TrainingSession documents", "exactly one")),
    "no mapping": ("just words", ("document", "just words", "a mapping with apiVersion")),
    "a tag": ("!!python/name:os.system x", ("broken.yaml:1:1", "python/name", "plain values")),
}


@pytest.fixture(autouse=True)
def _process_as_before(monkeypatch):
    """A command may change its process; these share one."""
    threads, modules = torch.get_num_threads(), set(sys.modules)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(False)
    for name in {"own", "spirals"} & (set(sys.modules) - modules):
        del sys.modules[name]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The working directory of the commands."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def tree(folder):
    """Everything below `folder`, with contents and times; Python's own caches left out."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_mtime_ns, _content(path))
        for path in [folder, *folder.rglob("*")]
        if "__pycache__" not in str(path.name) and path.parent.name != "__pycache__"
    } | {"": sorted(path.name for path in folder.iterdir() if path.name != "__pycache__")}


def _content(path):
    return path.read_bytes() if path.is_file() else None


def refused(capsys, folder, argv, said):
    """The command ends with 2, one line of those three parts, and the folder as it was."""
    before = tree(folder)
    status = main([str(word) for word in argv])
    out, err = capsys.readouterr()
    assert one_refusal(status, out, err, said)
    after = tree(folder)
    # A cache of compiled modules beside the manifest touches the folder itself.
    before.pop("."), after.pop(".")
    assert after == before


def one_refusal(status, out, err, said):
    """Whether a command refused with one line whose three parts hold `said`."""
    field, came, allowed = said
    assert status == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert err.startswith("esper: error: ")
    start, _, end = err.removeprefix("esper: error: ").rpartition("; allowed: ")
    named, _, got = start.partition(": got ")
    assert field in named
    assert str(came) in got
    assert allowed in end
    return True


def with_own_module(documents):
    """The documents, every entry point in the module with all the faulty ones."""
    text = yaml.safe_dump_all(documents).replace("spirals:", "own:")
    return list(yaml.safe_load_all(text))


@pytest.mark.parametrize(("documents", "said"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_session_that_cannot_be_run_is_refused(place, capsys, documents, said):
    path = write_session(place, *with_own_module(documents), modules={"own": MODULE})
    refused(capsys, place, ["run", path, "--output-dir", place / "D"], said)


@pytest.mark.parametrize("case", ["unknown field", "over the cap on parameters"])
def test_validate_refuses_what_run_refuses(place, capsys, case):
    documents, said = MANIFESTS[case]
    path = write_session(place, *with_own_module(documents), modules={"own": MODULE})
    refused(capsys, place, ["validate", path], said)


@pytest.mark.parametrize(("content", "said"), FILES.values(), ids=FILES)
def test_a_manifest_that_cannot_be_read_is_refused(place, capsys, content, said):
    path = place / ("absent.yaml" if content is None else "broken.yaml")
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    refused(capsys, place, ["run", path], said)


def test_a_built_in_blueprint_may_fit_nowhere(place, capsys):
    document = blueprint(builtin="bottleneck-conv", arguments={"channels": 3})
    path = write_session(place, *offering(document))
    assert main(["validate", str(path), "--json"]) == 0
    assert '"own"' in capsys.readouterr().out


def test_a_blueprint_of_which_nothing_is_selected_may_fit_nowhere(place, capsys):
    document = graph(X, {"op": "linear", "id": "y", "input": "x", "features": 7})
    path = write_session(place, SESSION, document)
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().err == ""


def test_a_blueprint_that_fits_one_layer_of_several_is_taken(place, capsys):
    document = graph(X, {"op": "linear", "id": "y", "input": "x", "features": 2, "init": "zero"})
    path = write_session(place, *offering(document))
    assert main(["validate", str(path)]) == 0
    assert capsys.readouterr().err == ""


def occupied_by_a_run(place):
    (place / "D").mkdir()
    (place / "D" / "manifest.yaml").write_text("kind: TrainingSession")
    return place / "D"


def occupied_by_something(place):
    (place / "D").mkdir()
    (place / "D" / "thesis.tex").write_text("all that there is")
    return place / "D"


def a_file(place):
    (place / "D").write_text("a file")
    return place / "D"


def below_a_file(place):
    return a_file(place) / "deeper" / "D"


def not_writable(place):
    if os.geteuid() == 0:
        return Path("/proc") / "D"  # even root makes nothing there
    (place / "D").mkdir(mode=0o500)
    return place / "D"


DIRECTORIES = {
    "another session": (occupied_by_a_run, ("which holds a run", "--resume")),
    "foreign files": (occupied_by_something, ("which holds thesis.tex", "an empty directory")),
    "a file in its place": (a_file, ("a file", "a directory")),
    "a path below a file": (below_a_file, ("deeper", "a directory you may write to")),
    "not writable": (not_writable, ("D", "a directory you may write to")),
}


@pytest.mark.parametrize(("make", "said"), DIRECTORIES.values(), ids=DIRECTORIES)
def test_an_output_directory_that_cannot_be_used_is_refused(place, capsys, make, said):
    path = write_session(place)
    refused(capsys, place, ["run", path, "--output-dir", make(place)], ("--output-dir", *said))


def test_overwriting_spares_what_is_no_run(place, capsys):
    path = write_session(place)
    directory = occupied_by_something(place)
    said = ("--output-dir", "which holds thesis.tex", "an empty directory")
    refused(capsys, place, ["run", path, "--output-dir", directory, "--overwrite"], said)


@pytest.mark.parametrize("make", [lambda place: place / "D", a_file, occupied_by_something])
def test_only_a_run_is_resumed(place, capsys, make):
    directory = make(place)
    said = ("--resume", str(directory), "the output directory of a run, with its manifest.yaml")
    refused(capsys, place, ["run", "--resume", directory], said)


def test_an_empty_directory_is_no_run(place, capsys):
    (place / "D").mkdir()
    said = ("--resume", "D", "the output directory of a run, with its manifest.yaml")
    refused(capsys, place, ["run", "--resume", "D"], said)


def test_a_run_whose_manifest_was_spoilt_is_refused(place, capsys):
    directory = occupied_by_a_run(place)
    said = ("apiVersion", "nothing", "esper.dev/v1alpha1")
    refused(capsys, place, ["run", "--resume", directory], said)


def test_a_resumed_run_stays_where_it_is(place, capsys):
    directory = occupied_by_a_run(place)
    said = ("--output-dir", "E", "only --resume D alone")
    refused(capsys, place, ["run", "--resume", directory, "--output-dir", "E"], said)


@pytest.mark.parametrize(
    ("setting", "missing", "url"),
    [
        ("redis.url", "hub.url", "redis://localhost"),
        ("hub.url", "redis.url", "http://localhost:8080"),
    ],
)
def test_a_bus_or_a_hub_alone_is_refused(place, capsys, setting, missing, url):
    path = write_session(place, SESSION)
    argv = ("run", path, "--output-dir", "D", "--set", f"{setting}={url}")
    refused(capsys, place, argv, (missing, "None", f"because {setting} is set"))


def test_two_processes_never_run_in_one_directory(place, server, capsys):
    path = write_session(place)
    # Stopped in its first epoch, the process holds its directory.
    place_of_stop = "esper.services.tolaria.engine:Engine._step"
    stopped = ["kill_before", place_of_stop, 1, signal.SIGSTOP]
    started = server.start("run", path, "--output-dir", "D", folder=place, fault=stopped)
    try:
        until(lambda: Path(f"/proc/{started.pid}/stat").read_text().split()[2] == "T")
        said = ("output directory", "D, in which another process runs", "a directory of its own")
        refused(capsys, place, ["run", "--resume", "D"], said)
    finally:
        started.signal(signal.SIGKILL)
    assert started.wait().status == -9


@pytest.mark.parametrize("case", ["unknown field", "data whose shape the model refuses"])
def test_a_process_of_its_own_ends_the_same(tmp_path, case):
    documents, said = MANIFESTS[case]
    path = write_session(tmp_path, *with_own_module(documents), modules={"own": MODULE})
    before = sorted(p.name for p in tmp_path.iterdir())
    ended = subprocess.run(
        [sys.executable, "-m", "esper", "run", path.name],
        cwd=tmp_path,
        env=environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert one_refusal(ended.returncode, ended.stdout, ended.stderr, said)
    assert sorted(p.name for p in tmp_path.iterdir()) == before
