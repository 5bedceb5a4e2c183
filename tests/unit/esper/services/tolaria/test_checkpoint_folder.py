"""What is left in a folder of checkpoints by full disks and by deaths at any point."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from esper.errors import StorageFull
from tests.unit.esper.services.tolaria.checkpointing import in_run, newest, snapshot

ROOT = Path(__file__).parents[5]


def names(run: Path) -> list[str]:
    return sorted(os.listdir(run / "checkpoints"))


def test_a_folder_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert in_run(tmp_path / "nowhere").newest() is None
    (tmp_path / "checkpoints" / ".epoch-000003.partial").mkdir(parents=True)
    (tmp_path / "checkpoints" / "epoch-000004").write_text("a file")
    (tmp_path / "checkpoints" / "epoch-latest").mkdir()
    (tmp_path / "checkpoints" / "notes").mkdir()
    assert in_run(tmp_path).newest() is None
    in_run(tmp_path).write(snapshot(4), {})
    assert names(tmp_path) == ["aside-epoch-000004-1", "epoch-000004", "epoch-latest", "notes"]


def test_a_part_that_can_not_be_read_is_passed_over(tmp_path: Path) -> None:
    in_run(tmp_path).write(snapshot(1), {})
    in_run(tmp_path).write(snapshot(2), {})
    part = tmp_path / "checkpoints" / "epoch-000002" / "state.json"
    part.unlink()
    part.symlink_to(part)  # reading it fails, whoever reads
    found = in_run(tmp_path).newest()
    assert found is not None
    assert found.snapshot.epoch == 1


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


@pytest.mark.parametrize("calls_before", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("epoch", [2, 1])
def test_a_full_disk_leaves_the_previous_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls_before: int, epoch: int
) -> None:
    there = in_run(tmp_path, keep=1)
    there.write(snapshot(1, which="old"), {})
    monkeypatch.setattr(os, "fsync", failing_fsync(calls_before))
    with pytest.raises(StorageFull, match=rf"checkpoint epoch-00000{epoch} .*No space left"):
        there.write(snapshot(epoch, which="new"), {})
    monkeypatch.undo()
    assert names(tmp_path) == ["epoch-000001"]
    assert newest(in_run(tmp_path)).state["which"] == "old"
    there.write(snapshot(epoch, which="new"), {})
    assert newest(in_run(tmp_path)).state["which"] == "new"


CRASH = """
import os, sys
from pathlib import Path
import torch
from esper.execution.isolation import RandomState
from esper.services.tolaria.snapshots import Snapshot
from tests.unit.esper.services.tolaria.checkpointing import in_run

folder, deaths = Path(sys.argv[1]), sys.argv[2:]

def snapshot(epoch, which):
    return Snapshot(epoch=epoch, tensors={"w": torch.ones(8)}, structure=[],
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
    in_run(place, keep=1).write(snapshot(1, "old"), {})
    child = os.fork()
    if child == 0:
        dying(where, int(when))
        in_run(place, keep=1).write(snapshot(int(epoch), "new"), {})
        os._exit(0)
    print(death, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
DEATHS = [
    f"{call}:{when}:{epoch}"
    for call in ("fsync", "rename", "unlink", "rmdir")
    for when in (1, 2, 3, 4, 5)
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
        found = in_run(folder).newest()
        assert found is not None, death
        assert found.passed == (), death
        assert torch.equal(found.snapshot.tensors["w"], torch.ones(8))
        if call == "fsync":
            assert found.snapshot.state["which"] == "old"
        # The next write cleans up what the dead process left.
        in_run(folder, keep=1).write(snapshot(int(epoch), which="newer"), {})
        assert newest(in_run(folder)).state["which"] == "newer"
        assert names(folder) == [f"epoch-{int(epoch):06d}"], death
        shutil.rmtree(folder)


def test_tensors_that_cannot_be_written_leave_nothing_behind(tmp_path: Path) -> None:
    in_run(tmp_path).write(snapshot(1), {})
    with pytest.raises(TypeError):
        in_run(tmp_path).write(replace(snapshot(2), state={"what": object()}), {})
    assert names(tmp_path) == ["epoch-000001"]
