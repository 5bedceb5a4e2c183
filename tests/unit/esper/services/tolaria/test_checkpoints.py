"""What checkpoints promise wherever they lie: in a folder, in a bucket of S3, and at the hub."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from esper.configs import StorageConfig
from esper.errors import CheckpointError
from esper.services.tolaria.checkpoint_manifest import LOGS, MANIFEST, Owner
from esper.services.tolaria.checkpoint_places import open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints, Found
from esper.services.tolaria.snapshots import PARTS
from tests.unit.esper.services.tolaria.checkpointing import OWNER, newest, snapshot
from tests.unit.esper.services.tolaria.places import Folder, Place

OTHER = Owner(session="small", uid="uid-2")
LOG_BYTES = {name: f"{name}\n".encode() for name in LOGS}


def wrote(checkpoints: Checkpoints, *epochs: int, **state: Any) -> None:
    for epoch in epochs:
        checkpoints.write(snapshot(epoch, **state), LOG_BYTES)


def found(checkpoints: Checkpoints) -> Found:
    result = checkpoints.newest()
    assert result is not None
    return result


def test_one_that_is_found_tells_what_was_told_when_it_was_written(place: Place) -> None:
    written = place.open().write(snapshot(4), LOG_BYTES)
    assert found(place.open()).written == written


def test_the_newest_complete_one_wins_and_a_number_is_kept(place: Place) -> None:
    assert place.open().newest() is None
    writing = place.open(keep=2)
    for epoch in (1, 2, 9, 10):
        written = writing.write(snapshot(epoch, which=epoch), LOG_BYTES)
        assert written.epoch == epoch
        assert f"checkpoints/epoch-{epoch:06d}" in written.where
    assert [name[:12] for name in place.names()] == ["epoch-000009", "epoch-000010"]
    result = found(place.open())
    assert (result.snapshot.epoch, result.snapshot.state, result.passed) == (10, {"which": 10}, ())


def test_the_manifest_says_whose_it_is_and_what_belongs_to_it(place: Place) -> None:
    wrote(place.open(), 7)
    files = place.files()
    manifest = json.loads(files[place.file_of(7, MANIFEST)])
    assert manifest["schemaVersion"] == 1
    assert manifest["session"] == {"name": "small", "uid": "uid-1"}
    assert manifest["epoch"] == 7
    assert set(PARTS) <= manifest["parts"].keys()
    for part, record in manifest["parts"].items():
        assert record["bytes"] == len(files[place.file_of(7, part)])
    assert len(files) == len(manifest["parts"]) + 1


def test_logs_go_along_only_where_the_run_directory_may_be_lost(place: Place) -> None:
    wrote(place.open(), 1)
    expected = {} if isinstance(place, Folder) else LOG_BYTES
    assert found(place.open()).logs == expected


def test_the_same_epoch_again_takes_the_place_of_the_first(place: Place) -> None:
    writing = place.open(keep=2)
    wrote(writing, 3, 4, which="first")
    wrote(writing, 4, which="second")
    wrote(place.open(keep=2), 4, which="third")
    assert [name[:12] for name in place.names()] == ["epoch-000003", "epoch-000004"]
    assert newest(place.open()).state["which"] == "third"


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


def edited(**changes: Any) -> Callable[[bytes], bytes]:
    return lambda data: json.dumps(json.loads(data) | changes).encode()


def without(part: str) -> Callable[[bytes], bytes]:
    def change(data: bytes) -> bytes:
        fields = json.loads(data)
        del fields["parts"][part]
        return json.dumps(fields).encode()

    return change


def consistent(part: str, data: bytes) -> Callable[[bytes], bytes]:
    """A manifest that vouches for those bytes of a part."""
    import hashlib

    def change(manifest: bytes) -> bytes:
        fields = json.loads(manifest)
        digest = hashlib.sha256(data).hexdigest()
        fields["parts"][part] = {"bytes": len(data), "sha256": digest}
        return json.dumps(fields).encode()

    return change


BROKEN: dict[str, tuple[str, Callable[[bytes], bytes | None], str]] = {
    "tensors cut short": (PARTS[0], lambda data: data[:-5], "tensors.safetensors of "),
    "structure missing": (PARTS[1], lambda _: None, "got no structure.json; allowed: structure"),
    "a log missing": ("metrics.jsonl", lambda _: None, "got no metrics.jsonl"),
    "tensors changed": (PARTS[0], flipped, "tensors.safetensors with SHA-256"),
    "state changed": (PARTS[2], flipped, "state.json with SHA-256"),
    "no manifest": (MANIFEST, lambda _: None, "got no checkpoint.json, so it was cut short"),
    "half a manifest": (MANIFEST, lambda data: data[:40], "checkpoint.json that is no JSON"),
    "empty manifest": (MANIFEST, lambda _: b"", "checkpoint.json that is no JSON"),
    "a list as manifest": (MANIFEST, lambda _: b"[]", "checkpoint.json that is no JSON object"),
    "a huge manifest": (MANIFEST, lambda _: b" " * 2**21, "checkpoint.json of 2097152 bytes"),
    "manifest without a part": (MANIFEST, without(PARTS[2]), "checkpoint.json without state.json"),
    "manifest with a strange part": (
        MANIFEST,
        consistent("../../etc", b""),
        "checkpoint.json with a part ../../etc",
    ),
    "older schema": (MANIFEST, edited(schemaVersion=0), "got schema version 0; allowed: 1"),
    "newer schema": (MANIFEST, edited(schemaVersion=2), "got schema version 2; allowed: 1"),
    "schema true": (MANIFEST, edited(schemaVersion=True), "got schema version True; allowed: 1"),
    "another session": (
        MANIFEST,
        edited(session={"name": "big", "uid": "uid-9"}),
        "got one of session big with uid uid-9; allowed: session small with uid uid-1",
    ),
    "a namesake": (
        MANIFEST,
        edited(session={"name": "small", "uid": "uid-2"}),
        "got one of session small with uid uid-2",
    ),
    "another epoch": (MANIFEST, edited(epoch=4), "checkpoint.json of epoch 4"),
    "a wrong time": (MANIFEST, edited(time="soon"), "checkpoint.json with a wrong time"),
}


@pytest.mark.parametrize("case", BROKEN, ids=[name.replace(" ", "-") for name in BROKEN])
def test_what_is_broken_is_passed_over_in_one_line_and_stays(
    place: Place, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    part, change, said = BROKEN[case]
    if part in LOGS and isinstance(place, Folder):
        part, said = "state.json", "got no state.json"
    wrote(place.open(), 1, 2)
    name = place.change(2, part, change)
    before = place.files()
    with caplog.at_level(logging.WARNING, logger="esper"):
        result = found(place.open())
    assert result.snapshot.epoch == 1
    (line,) = result.passed
    assert line.startswith(f"checkpoint {name}: got ")
    assert said in line
    assert f"; {result.name}, an older one, is used and nothing was deleted (" in line
    assert "\n" not in line
    assert [record.getMessage() for record in caplog.records] == [line]
    assert place.files() == before


def test_parts_that_are_vouched_for_and_yet_no_snapshot_are_passed_over(place: Place) -> None:
    for part, data in (("state.json", b"{}"), ("tensors.safetensors", b"x" * 40)):
        wrote(place.open(), 1, 2)
        place.put(place.file_of(2, part), data)
        place.change(2, MANIFEST, consistent(part, data))
        result = found(place.open())
        assert result.snapshot.epoch == 1
        assert "parts that are no snapshot" in result.passed[0]
        for file in place.files():
            place.put(file, None)


def test_several_broken_ones_are_passed_over_in_a_line_each(place: Place) -> None:
    wrote(place.open(), 1, 2, 3, 4)
    for epoch in (3, 4):
        place.change(epoch, PARTS[0], flipped)
    result = found(place.open())
    assert result.snapshot.epoch == 2
    assert [line[:23] for line in result.passed] == [
        "checkpoint epoch-000004",
        "checkpoint epoch-000003",
    ]


def test_where_none_is_good_nothing_starts_over(place: Place) -> None:
    wrote(place.open(), 1, 2)
    place.change(1, PARTS[0], flipped)
    name = place.change(2, MANIFEST, edited(schemaVersion=7))
    before = place.files()
    with pytest.raises(CheckpointError) as caught:
        place.open().newest()
    said = str(caught.value)
    assert "got 2 of which none can be used; allowed: one complete checkpoint" in said
    assert f"the newest, {name}, has schema version 7 where 1 is allowed" in said
    assert "start a new run in another output directory" in said
    assert (caught.value.exit_code, "\n" in said) == (2, False)
    assert place.files() == before


def test_a_version_before_manifests_is_told_from_what_was_cut_short(place: Place) -> None:
    wrote(place.open(), 1)
    place.change(1, MANIFEST, lambda _: None)
    with pytest.raises(CheckpointError, match=r"a version before schema 1 wrote it"):
        place.open().newest()


def test_only_own_complete_ones_count_and_go(place: Place) -> None:
    """Broken and foreign ones stay for ever; the name of one that is in the way is given up."""
    wrote(place.open(), 1, 2, 3, 4)
    for epoch, part, change in (
        (1, MANIFEST, edited(session={"name": "big", "uid": "uid-9"})),
        (2, PARTS[0], flipped),
        (3, MANIFEST, edited(schemaVersion=0)),
    ):
        place.change(epoch, part, change)
    broken = {file: data for file, data in place.files().items() if "epoch-000004" not in file}
    again = place.open(keep=2)
    assert newest(again).epoch == 4
    wrote(again, 5, 6, 7)
    names = [name[:12] for name in place.names()]
    assert names == [f"epoch-{epoch:06d}" for epoch in (1, 2, 3, 6, 7)]
    assert place.files().items() >= broken.items()


def test_a_broken_one_of_the_same_epoch_is_kept_beside_the_new_one(place: Place) -> None:
    wrote(place.open(), 1, 2)
    place.change(2, PARTS[0], flipped)
    broken = place.files()[place.file_of(2, PARTS[0])]
    again = place.open()
    assert newest(again).epoch == 1
    wrote(again, 2, which="new")
    result = found(place.open())
    assert (result.snapshot.epoch, result.snapshot.state, result.passed) == (
        2,
        {"which": "new"},
        (),
    )
    assert broken in place.files().values()
    assert len([name for name in place.names() if "epoch-000002" in name]) == 2
    if isinstance(place, Folder):
        assert "aside-epoch-000002-1" in place.names()


def test_the_checkpoints_of_a_run_directory_are_read_where_the_address_has_none(
    tmp_path: Path,
) -> None:
    wrote(Folder(tmp_path / "run").open(), 5)
    uri = f"file://{tmp_path}/elsewhere"
    there = open_checkpoints(tmp_path / "run", OWNER, 2, uri=uri, storage=StorageConfig())
    assert newest(there).epoch == 5
    there.write(snapshot(6), LOG_BYTES)
    result = found(there)
    assert (result.snapshot.epoch, result.logs) == (6, LOG_BYTES)
    assert (tmp_path / "elsewhere" / "small-uid-1" / "checkpoints" / "epoch-000006").is_dir()
    assert newest(Folder(tmp_path / "run").open()).epoch == 5


def test_sessions_that_share_an_address_do_not_see_each_other(tmp_path: Path) -> None:
    def at(owner: Owner) -> Checkpoints:
        uri = f"file://{tmp_path}/shared"
        return open_checkpoints(tmp_path / "run", owner, 1, uri=uri, storage=StorageConfig())

    wrote(at(OWNER), 1)
    assert at(OTHER).newest() is None
    wrote(at(OTHER), 2, 3)
    assert newest(at(OWNER)).epoch == 1


def test_many_checkpoints_close_together_stay_in_order(place: Place) -> None:
    writing = place.open(keep=1)
    for which in range(5):
        wrote(writing, 3, which=which)
        assert newest(place.open()).state["which"] == which
