"""What a run leaves runs where Esper can't be imported, and computes the same."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from esper.core import MorphableModel, wrap
from esper.core.export import export_grown, in_one_order, write_atomically
from esper.errors import EntryPointError, OutputError, StorageFull, WrapError
from esper.execution.state_layout import SeedLifecycleState as S
from tests.outside import run_outside
from tests.unit.esper.core.growing import GRAFTING, graph_of, grow

USER = '''
import torch
from torch import nn

class Mixed(nn.Module):
    """Convolutions, norms, a tied pair, buffers of many types."""

    def __init__(self, width=4):
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1, padding_mode="circular")
        self.second = nn.Conv2d(width, 6, 3, padding="same", bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.inner, self.tied = nn.Linear(6, 6), nn.Linear(6, 6)
        self.tied.weight = self.inner.weight
        self.head = nn.Linear(6, 3)
        self.register_buffer("counts", torch.arange(3))
        self.register_buffer("mask", torch.tensor([True, False, True]))
        self.register_buffer("brief", torch.tensor([1.5, 2.5]).bfloat16())
        self.register_buffer("wide", torch.rand(2, 2).double())
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scalar", torch.tensor(7, dtype=torch.uint8))
        self.register_buffer("temporary", torch.zeros(2), persistent=False)

    def forward(self, x):
        x = torch.relu(self.first(x))
        x = self.norm(self.second(x)).mean((-2, -1))
        x = self.tied(torch.tanh(self.inner(x)))
        return self.head(torch.nn.functional.gelu(x)) * self.mask

class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.order = [self.first, self.second]
        self.first.register_forward_hook(lambda module, inputs, output: output * 2)

    def forward(self, x):
        for layer in self.order:
            x = torch.tanh(layer(x))
        return x

class Lends(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.layer(x)) @ self.layer.weight

def encoder(width):
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(width, 2, 8, batch_first=True), 1)

class Plain(nn.Sequential):
    def __init__(self, *widths):
        super().__init__()

def plain(widths=(4, 6, 5, 2), dtype="float32", shared=False):
    kind = getattr(torch, dtype)
    if shared:
        one = nn.Linear(4, 4)
        return nn.Sequential(one, nn.Tanh(), one)
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after, dtype=kind), nn.Tanh()]
    return nn.Sequential(*layers[:-1])

def single():
    return nn.Linear(4, 3)
'''

PRODUCER = {"op": "input", "id": "x", "source": "producer"}
X = {"op": "input", "id": "x"}


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A user's module of one file, importable."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirmodels.py").write_text(USER)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("theirmodels")
    yield module
    sys.modules.pop("theirmodels")


def loaded_elsewhere(folder: Path, x: torch.Tensor) -> dict:
    """What `grown.load()` gives and computes in a process that can't import Esper."""
    torch.save(x, folder / "x.pt")
    code = (
        "import sys, torch, grown\n"
        "model = grown.load(); x = torch.load('x.pt')\n"
        "with torch.no_grad():\n"
        "    out = model(x)\n"
        "assert not [n for n in sys.modules if n.split('.')[0] in ('pydantic', 'safetensors')]\n"
        "state = {k: v.clone() for k, v in model.state_dict().items()}\n"
        "torch.save({'out': out, 'state': state, 'text': repr(model)}, 'out.pt')\n"
    )
    run_outside(code, folder)
    return torch.load(folder / "out.pt")


def exported_same(
    model: MorphableModel,
    entrypoint: str,
    arguments: dict,
    folder: Path,
    x: torch.Tensor,
    metadata: dict | None = None,
) -> dict:
    model.eval()
    structure = model.morphology.structure()
    with torch.no_grad():
        expected = model(x)
    export_grown(model, entrypoint, arguments, folder, metadata or {})
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert model.morphology.structure() == structure
    result = loaded_elsewhere(folder, x)
    assert torch.allclose(result["out"], expected, atol=1e-5)
    return result


def zoo_mlp() -> MorphableModel:
    torch.manual_seed(0)
    zoo = importlib.import_module("esper.zoo.models")
    return wrap(zoo.MLP(40, [16, 16], 10), torch.randn(5, 40), seeds_per_layer=3)


ZOO = ("esper.zoo.models:MLP", {"inputs": 40, "hidden": [16, 16], "outputs": 10})


def test_a_zoo_model_with_every_kind_of_growth_runs_without_esper(tmp_path: Path) -> None:
    model = zoo_mlp()
    grow(model, "hidden.0", "bottleneck-mlp", units=7)
    grow(model, "hidden.0", "low-rank", slot=1, rank=2)
    grow(model, "hidden.1", "widen", units=5)
    grow(model, "hidden.1", "bottleneck-mlp", slot=1, units=3)
    grow(model, "head", "widen", units=3)
    grow(model, "head", "noop", slot=1)
    grow(model, "head", "bottleneck-mlp", GRAFTING, slot=2, units=2)
    story = {
        "layer": "hidden.0",
        "slot": 0,
        "blueprint": "bottleneck-mlp",
        "epoch": 12,
        "contribution": {"mean": 0.034, "lower": 0.021},
    }
    metadata = {"session": "demo", "grown": [story]}
    result = exported_same(model, *ZOO, tmp_path / "run", torch.randn(5, 40), metadata)
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"grown.py", "model.safetensors", "zoo_models.py"} <= files
    assert not any("grown.2" in name for name in result["state"])
    source = (tmp_path / "run" / "grown.py").read_text()
    assert "hidden.0[0]: bottleneck-mlp, part of the model since epoch 12" in source
    assert "adding 0.034 nats a sample (at least 0.021)" in source
    assert "5 units between hidden.0 and hidden.1" in source
    assert "class Hidden0Seed0(nn.Module):" in source
    assert "esper." not in source.replace("esper.zoo", "")
    with safetensors.safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        header = file.metadata()
        assert json.loads(header["session"]) == "demo"
        assert json.loads(header["grown"]) == [story]
        assert header["entrypoint"] == ZOO[0]


def test_a_dormant_model_leaves_its_own_state_under_its_own_names(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 6, 6)
    model = wrap(user.Mixed(), x)
    model(x)
    result = exported_same(model, "theirmodels:Mixed", {}, tmp_path / "run", x)
    assert (tmp_path / "run" / "theirmodels.py").read_text() == USER
    state = model.state_dict()
    assert list(result["state"]) == list(state)
    for name, value in state.items():
        assert result["state"][name].dtype == value.dtype
        assert torch.equal(result["state"][name], value)
    with safetensors.safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert json.loads(file.metadata()["shared"]) == {"tied.weight": "inner.weight"}


def test_grown_convolutions_and_layers_with_a_tied_weight(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 6, 6)
    model = wrap(user.Mixed(width=3), x, seeds_per_layer=2)
    grow(model, "first", "bottleneck-conv", channels=2)
    grow(model, "second", "widen", units=3)
    grow(model, "second", "low-rank", slot=1, rank=2)
    grow(model, "tied", "low-rank", rank=2)
    grow(model, "head", "bottleneck-mlp", units=3)
    result = exported_same(model, "theirmodels:Mixed", {"width": 3}, tmp_path / "run", x)
    assert not torch.equal(result["state"]["tied.weight"], result["state"]["inner.weight"])
    assert result["state"]["second.weight"].shape == (6, 6, 3, 3)


def test_a_weight_that_is_read_outside_its_layer_stays(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = wrap(user.Lends(), x)
    grow(model, "layer", "low-rank", rank=2)
    result = exported_same(model, "theirmodels:Lends", {}, tmp_path / "run", x)
    assert torch.equal(result["state"]["layer.weight"], model.layer.weight)


def test_a_seed_that_reads_the_producer_and_is_no_widening(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4)
    model = wrap(user.plain(), x, seeds_per_layer=2)
    graph = graph_of(
        PRODUCER,
        {"op": "linear", "id": "a", "input": "x", "features": 3},
        {"op": "activation", "id": "b", "kind": "gelu", "input": "a"},
        {"op": "linear", "id": "y", "input": "b", "features": "out"},
    )
    grow(model, "2", graph)
    grow(model, "2", "widen", slot=1, units=2)
    exported_same(model, "theirmodels:plain", {}, tmp_path / "run", x)


def test_zeros_products_and_pools_come_out_as_source(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 1, 6, 6)
    model = wrap(user.Mixed(), x)
    pool = {"kernel_size": 3, "stride": 1, "padding": 1}
    grow(
        model,
        "second",
        graph_of(
            X,
            {"op": "avg_pool2d", "id": "m", "input": "x", "count_include_pad": False, **pool},
            {"op": "max_pool2d", "id": "n", "input": "m", **pool},
            {"op": "conv2d", "id": "a", "input": "n", "channels": "out", "kernel_size": 1},
            {"op": "activation", "id": "lambda", "kind": "leaky_relu", "input": "a"},
            {"op": "zeros", "id": "z", "input": "x"},
            {"op": "multiply", "id": "p", "inputs": ["a", "lambda"]},
            {"op": "add", "id": "y", "inputs": ["p", "z"]},
        ),
    )
    exported_same(model, "theirmodels:Mixed", {}, tmp_path / "run", x)


def test_an_encoder_layer_does_not_pass_over_what_grew(user, tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    model = wrap(user.encoder(8), x)
    grow(model, "layers.0.linear2", "bottleneck-mlp", units=3)
    exported_same(model, "theirmodels:encoder", {"width": 8}, tmp_path / "run", x)


@pytest.mark.parametrize("name", ["bottleneck-mlp", "low-rank"])
def test_a_model_that_is_itself_a_layer_leaves_too(user, tmp_path: Path, name) -> None:
    model = wrap(user.single(), torch.randn(2, 4))
    grow(model, "model", name)
    exported_same(model, "theirmodels:single", {}, tmp_path / "run", torch.randn(2, 4))


@pytest.mark.parametrize("name", ["bottleneck-mlp", "low-rank"])
def test_a_shared_layer_grows_wherever_it_stands(user, tmp_path: Path, name) -> None:
    model = wrap(user.plain(shared=True), torch.randn(2, 4))
    grow(model, "0", name)
    exported_same(model, "theirmodels:plain", {"shared": True}, tmp_path / "run", torch.randn(2, 4))


def test_double_precision_stays_double(user, tmp_path: Path) -> None:
    x = torch.randn(3, 4, dtype=torch.float64)
    arguments = {"dtype": "float64"}
    model = wrap(user.plain(**arguments), x, seeds_per_layer=2)
    grow(model, "2", "bottleneck-mlp", units=3)
    grow(model, "2", "widen", slot=1, units=3)
    result = exported_same(model, "theirmodels:plain", arguments, tmp_path / "run", x)
    assert result["out"].dtype == torch.float64


def test_a_model_that_was_never_wrapped_leaves_too(user, tmp_path: Path) -> None:
    model, x = user.plain().eval(), torch.randn(3, 4)
    export_grown(model, "theirmodels:plain", {}, tmp_path, {})
    assert torch.equal(loaded_elsewhere(tmp_path, x)["out"], model(x))


def test_load_takes_the_weights_of_another_path(user, tmp_path: Path) -> None:
    model = user.plain()
    export_grown(model, "theirmodels:plain", {}, tmp_path, {})
    (tmp_path / "model.safetensors").rename(tmp_path / "moved")
    run_outside("import grown; grown.load('moved')", tmp_path)


def test_what_people_wrote_stays_text_in_the_source(user, tmp_path: Path) -> None:
    model, x = wrap(user.plain(), torch.randn(3, 4)), torch.randn(3, 4)
    grow(model, "0", "bottleneck-mlp", units=2)
    bad = '"""\nraise SystemExit(3)\n"""\\'
    metadata = {"grown": [{"layer": "0", "slot": 0, "blueprint": bad, "epoch": 1}]}
    exported_same(model, "theirmodels:plain", {}, tmp_path / "run", x, metadata)


def test_a_seed_that_no_blueprint_made_has_no_source(user, tmp_path: Path) -> None:
    model = wrap(user.plain(), torch.randn(3, 4))
    model.morphology.germinate("0", 0, nn.Linear(4, 6), kernel="k")
    for state in (S.TRAINING, S.GRAFTING, S.FOSSILIZED):
        model.morphology.transition("0", 0, state)
    with pytest.raises(WrapError, match=r"0\[0\].*built from a blueprint"):
        export_grown(model, "theirmodels:plain", {}, tmp_path / "run", {})
    assert not (tmp_path / "run").exists()


def test_a_state_that_is_no_tensor_is_refused(user, tmp_path: Path) -> None:
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"count": 1}

    with pytest.raises(WrapError, match="_extra_state"):
        export_grown(Extra(2, 2), "theirmodels:plain", {}, tmp_path, {})


def test_a_module_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(EntryPointError, match="nosuchmodule"):
        export_grown(nn.Linear(2, 2), "nosuchmodule:f", {}, tmp_path, {})


def test_a_user_module_called_grown_gets_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "grown.py").write_text(USER)
    monkeypatch.syspath_prepend(str(folder))
    module = importlib.import_module("grown")
    try:
        model = module.plain().eval()
        export_grown(model, "grown:plain", {}, tmp_path / "run", {})
    finally:
        sys.modules.pop("grown")
    assert (tmp_path / "run" / "user_grown.py").exists()
    x = torch.randn(2, 4)
    assert torch.equal(loaded_elsewhere(tmp_path / "run", x)["out"], model(x))


def test_a_folder_that_cannot_be_made_is_named(user, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a writable folder"):
        export_grown(user.plain(), "theirmodels:plain", {}, tmp_path / "file", {})


def test_a_full_disk_says_so(user, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageFull, match="no room left"):
        export_grown(user.plain(), "theirmodels:plain", {}, tmp_path / "run", {})
    assert list((tmp_path / "run").iterdir()) == []


def test_writing_replaces_all_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file"
    write_atomically(target, b"one")
    write_atomically(target, b"two")
    assert target.read_bytes() == b"two"
    monkeypatch.setattr(os, "fsync", lambda handle: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_atomically(target, b"three")
    assert target.read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_references_and_hooks_of_the_users_class_reach_what_grew(user, tmp_path: Path) -> None:
    x = torch.randn(3, 4)
    model = wrap(user.Listed(), x)
    grow(model, "first", "bottleneck-mlp", units=2)
    grow(model, "second", "bottleneck-mlp", units=2)
    exported_same(model, "theirmodels:Listed", {}, tmp_path / "out", x)


def test_the_weights_file_is_the_same_bytes_every_time() -> None:
    tensors = {"b": torch.arange(5.0), "a": torch.zeros(3, 2, dtype=torch.int64)}
    header = {f"key{number}": "välue" for number in range(8)}
    written = {in_one_order(safetensors.torch.save(tensors, header)) for _ in range(20)}
    assert len(written) == 1
    found = safetensors.torch.load(written.pop())
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
