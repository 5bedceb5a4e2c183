from __future__ import annotations

import errno
import math
import os
import random
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.execution.isolation import RandomState, preserved_randomness, seed_everything
from esper.services.tolaria.snapshots import (
    Snapshot,
    checkpoints,
    read_checkpoint,
    write_checkpoint,
)
from tests.unit.esper.services.tolaria.sessions import engine

ROOT = Path(__file__).parents[5]


def snapshot(epoch: int = 3, tensors: dict[str, Tensor] | None = None, **state: Any) -> Snapshot:
    return Snapshot(
        epoch=epoch,
        tensors={"model/w": torch.full((3,), float(epoch))} if tensors is None else tensors,
        structure=[{"layer": "head", "slot": 0, "alpha": 0.25, "graph": {"nodes": []}}],
        state=state,
        randomness=RandomState.capture(),
    )


def names(folder: Path) -> list[str]:
    return [path.name for path in checkpoints(folder)]


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous()
        .view(torch.uint8 if one.dim() else one.dtype)
        .equal(other.contiguous().view(torch.uint8 if one.dim() else one.dtype))
    )


# -- round trip ---------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def test_tensors_of_every_type_and_layout_come_back_to_the_bit(tmp_path: Path) -> None:
    base = torch.randn(4, 3, 2, 2)
    tensors = {f"of/{dtype}": (base * 50).to(dtype) for dtype in DTYPES}
    tensors |= {
        "nan": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
        "number": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "strided": torch.randn(10)[::2],
        "name.with::colons/and/slashes": torch.ones(2),
    }
    found = read_checkpoint(write_checkpoint(tmp_path, snapshot(tensors=tensors), 2))
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found.tensors[name], tensor), name


def test_tied_tensors_and_views_of_one_storage_are_stored_each(tmp_path: Path) -> None:
    weight = torch.randn(4, 4)
    tensors = {"embedding": weight, "head": weight, "row": weight[1], "turned": weight.t()}
    found = read_checkpoint(write_checkpoint(tmp_path, snapshot(tensors=tensors), 2))
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_the_rest_is_json_to_the_last_digit(tmp_path: Path) -> None:
    state = {"third": 1 / 3, "nan": math.nan, "list": [1, None, "ü"], "deep": {"x": [[True]]}}
    given_snapshot = snapshot(12, **state)
    found = read_checkpoint(write_checkpoint(tmp_path, given_snapshot, 2))
    assert found.epoch == 12
    assert found.structure == given_snapshot.structure
    assert math.isnan(found.state.pop("nan"))
    del state["nan"]
    assert found.state == state


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_every_random_stream_goes_on_where_it_stood(
    tmp_path_factory: pytest.TempPathFactory, seed: int, drawn: int
) -> None:
    def draws() -> list[float]:
        found = [*torch.rand(3).tolist(), *torch.randn(3).tolist(), float(np.random.randn())]
        return [*found, *np.random.rand(3).tolist(), random.gauss(0, 1), random.random()]

    with preserved_randomness():
        seed_everything(seed)
        for _ in range(drawn):
            draws()
        np.random.randn()  # leaves a second value waiting
        random.gauss(0, 1)
        folder = tmp_path_factory.mktemp("run")
        path = write_checkpoint(folder, snapshot(), 1)
        expected = draws()
        seed_everything(seed ^ 1)
        read_checkpoint(path).randomness.apply()
        assert draws() == expected


def test_an_engine_goes_on_from_disk_as_if_never_stopped(tmp_path: Path) -> None:
    seed_everything(1)
    straight = engine()
    straight.train_epoch(1)
    write_checkpoint(tmp_path, straight.capture(1, {"mine": 1}), 2)
    losses = [straight.train_epoch(epoch) for epoch in (2, 3)]
    end = straight.capture(3, {})

    seed_everything(99)
    other = engine()
    other.train_epoch(5)
    found = read_checkpoint(checkpoints(tmp_path)[-1])
    assert found.state["mine"] == 1
    other.restore(found)
    assert [other.train_epoch(epoch) for epoch in (2, 3)] == losses
    again = other.capture(3, {})
    assert again.tensors.keys() == end.tensors.keys()
    assert all(same_bits(again.tensors[name], end.tensors[name]) for name in end.tensors)
    assert again.state == end.state
    assert torch.equal(again.randomness.torch_cpu, end.randomness.torch_cpu)


# -- keeping ------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_the_newest_are_kept(tmp_path: Path, keep: int) -> None:
    for epoch in range(1, 5):
        assert write_checkpoint(tmp_path, snapshot(epoch), keep).name == f"epoch-{epoch:06d}"
    assert names(tmp_path) == [f"epoch-{epoch:06d}" for epoch in range(1, 5)][-keep:]
    assert sorted(os.listdir(tmp_path)) == names(tmp_path)


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert checkpoints(tmp_path / "nowhere") == []
    (tmp_path / ".epoch-000003.partial").mkdir()
    (tmp_path / "epoch-000004").write_text("a file")
    (tmp_path / "notes").mkdir()
    assert checkpoints(tmp_path) == []


def test_the_same_epoch_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(4, which=1), 2)
    write_checkpoint(tmp_path, snapshot(4, which=2), 2)
    assert names(tmp_path) == ["epoch-000004"]
    assert read_checkpoint(checkpoints(tmp_path)[0]).state["which"] == 2
    assert os.listdir(tmp_path) == ["epoch-000004"]


# -- crashes ------------------------------------------------------------------------------------


def failing_fsync(calls_before: int) -> Callable[[int], None]:
    left = [calls_before]
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(descriptor)

    return fsync


@pytest.mark.parametrize("calls_before", [0, 1, 2])
@pytest.mark.parametrize("epoch", [2, 1])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int, epoch: int
) -> None:
    write_checkpoint(tmp_path, snapshot(1, which="old"), 1)
    monkeypatch.setattr(os, "fsync", failing_fsync(calls_before))
    with pytest.raises(OSError, match="No space left") as caught:
        write_checkpoint(tmp_path, snapshot(epoch, which="new"), 1)
    assert caught.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert os.listdir(tmp_path) == ["epoch-000001"]
    assert read_checkpoint(checkpoints(tmp_path)[-1]).state["which"] == "old"
    write_checkpoint(tmp_path, snapshot(epoch, which="new"), 1)
    assert read_checkpoint(checkpoints(tmp_path)[-1]).state["which"] == "new"


CRASH = """
import os, sys
from pathlib import Path
import torch
from esper.execution.isolation import RandomState
from esper.services.tolaria import snapshots

folder, deaths = Path(sys.argv[1]), sys.argv[2:]

def snapshot(epoch, which):
    return snapshots.Snapshot(epoch=epoch, tensors={"w": torch.ones(8)}, structure=[],
                              state={"which": which}, randomness=RandomState.capture())

def dying(name, when):
    real, calls = getattr(os, name), [0]
    def call(*args, **kwargs):
        calls[0] += 1
        if calls[0] == when:
            os._exit(9)
        return real(*args, **kwargs)
    setattr(os, name, call)

# Each death happens in a process of its own, forked: importing torch takes seconds.
for death in deaths:
    where, when, epoch = death.split(":")
    place = folder / death
    snapshots.write_checkpoint(place, snapshot(1, "old"), 1)
    child = os.fork()
    if child == 0:
        dying(where, int(when))
        snapshots.write_checkpoint(place, snapshot(int(epoch), "new"), 1)
        os._exit(0)
    print(death, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
DEATHS = [
    f"{call}:{when}:{epoch}"
    for call in ("fsync", "rename", "unlink", "rmdir")
    for when in (1, 2, 3, 4)
    for epoch in (1, 2)
]


def test_a_death_at_any_point_leaves_a_whole_checkpoint_and_counts_no_partial_one(
    tmp_path: Path,
) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CRASH), str(tmp_path), *DEATHS],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    codes = dict(line.split() for line in ended.stdout.splitlines())
    assert codes.keys() == set(DEATHS)
    assert all(codes[death] == "9" for death in DEATHS if death.startswith("fsync"))
    for death in DEATHS:
        call, _, epoch = death.split(":")
        folder = tmp_path / death
        found = checkpoints(folder)
        assert found, death
        states = [read_checkpoint(path).state["which"] for path in found]
        assert all(torch.equal(read_checkpoint(p).tensors["w"], torch.ones(8)) for p in found)
        if call == "fsync":
            assert states == ["old"]
        # The next write cleans up what the dead process left.
        write_checkpoint(folder, snapshot(int(epoch), which="newer"), 1)
        assert read_checkpoint(checkpoints(folder)[-1]).state["which"] == "newer"
        assert os.listdir(folder) == [f"epoch-{int(epoch):06d}"], death
        shutil.rmtree(folder)


def test_tensors_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, snapshot(1), 2)
    with pytest.raises(TypeError):
        write_checkpoint(tmp_path, replace(snapshot(2), state={"what": object()}), 2)
    assert os.listdir(tmp_path) == ["epoch-000001"]
