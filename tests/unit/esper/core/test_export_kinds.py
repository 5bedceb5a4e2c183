"""What a run leaves when every kind of host has grown."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import torch

from esper.core import wrap
from esper.core.model_wrapper import LayerSelection
from tests.unit.esper.core import hosts
from tests.unit.esper.core.growing import graph_of, grow
from tests.unit.esper.core.hosts import KINDS
from tests.unit.esper.core.test_export import exported_same


@pytest.fixture
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The model of every kind as a user's module of one file."""
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "theirkinds.py").write_text(Path(hosts.__file__).read_text())
    monkeypatch.syspath_prepend(str(folder))
    yield importlib.import_module("theirkinds")
    sys.modules.pop("theirkinds")


def wrapped(user, **arguments):
    torch.manual_seed(0)
    x = torch.randint(9, (3, 7))
    return wrap(user.EveryKind(), x, layers=LayerSelection(types=KINDS), **arguments), x


def test_everything_that_stays_comes_out_as_source(user, tmp_path: Path) -> None:
    model, x = wrapped(user, seeds_per_layer=3)
    for slot, name in enumerate(("depthwise-separable-conv", "bottleneck-conv", "low-rank")):
        grow(model, "second", name, slot=slot)
        grow(model, "image", name, slot=slot)
    for slot, name in enumerate(("squeeze-excitation", "attention", "affine")):
        grow(model, "norm", name, slot=slot)
        grow(model, "batchnorm", name, slot=slot)
        grow(model, "head", name, slot=slot)
    x_affine = {"op": "input", "id": "x"}
    table = {"op": "embedding", "id": "t", "input": "x", "features": 3}
    act = {"op": "activation", "id": "a", "input": "t", "kind": "elu", "alpha": 0.5}
    up = {"op": "linear", "id": "y", "input": "a", "features": "out"}
    grow(model, "words", graph_of(x_affine, table, act, up))
    exported_same(model, "theirkinds:EveryKind", {}, tmp_path / "run", x)
    source = (tmp_path / "run" / "grown.py").read_text()
    assert "class Second(nn.Conv1d):" in source
    assert "super().__init__(4, eps=0.0001)" in source
    assert "super().__init__(3, momentum=0.2)" in source
    assert "super().__init__(9, 4, padding_idx=0)" in source
    assert "F.scaled_dot_product_attention(" in source
    assert "torch._C" not in source


def test_what_folds_leaves_plain_layers(user, tmp_path: Path) -> None:
    model, x = wrapped(user, seeds_per_layer=2)
    for layer in ("words", "norm", "first", "second", "image", "batchnorm", "head"):
        grow(model, layer, "affine")
    for layer in ("words", "first", "second", "head"):
        grow(model, layer, "low-rank", slot=1, rank=2)
    result = exported_same(model, "theirkinds:EveryKind", {}, tmp_path / "run", x)
    plain = set(user.EveryKind().state_dict())
    assert set(result["state"]) == plain | {"first.bias"}
    assert "class " not in (tmp_path / "run" / "grown.py").read_text()


def test_a_widening_under_an_output_that_a_seed_reads_is_fed(user, tmp_path: Path) -> None:
    model, x = wrapped(user, seeds_per_layer=2)
    grow(model, "second", "widen", units=2)
    grow(model, "second", "squeeze-excitation", slot=1)
    grow(model, "first", "attention")
    exported_same(model, "theirkinds:EveryKind", {}, tmp_path / "run", x)
