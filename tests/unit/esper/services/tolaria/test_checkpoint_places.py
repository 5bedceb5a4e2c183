from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from esper.configs import StorageConfig
from esper.errors import ConfigError, ManifestError, StorageFull, StoreUnavailable
from esper.services.tolaria.checkpoint_manifest import Owner
from esper.services.tolaria.checkpoint_places import StorageAddress, open_checkpoints
from esper.services.tolaria.checkpoints import Checkpoints
from esper.utils.s3_client import OptimizedS3Client
from tests.unit.esper.services.tolaria.checkpointing import OWNER, in_run, newest, snapshot


def test_addresses_are_read() -> None:
    parse = StorageAddress.parse
    assert parse("file:///data/runs%20of%20mine").folder == Path("/data/runs of mine")
    assert (parse("s3://runs").bucket, parse("s3://runs").prefix) == ("runs", "")
    deep = parse("s3://runs/team/a/")
    assert (deep.bucket, deep.prefix, deep.folder) == ("runs", "team/a", None)


@pytest.mark.parametrize(
    "uri",
    [
        "file://host/path", "file:runs", "file://", "file:///nul%00", "s3://", "s3:///prefix",
        "s3://UPPER/x", "s3://bucket/../up", "s3://bucket/a//b", "s3://bucket/x?y=z",
        "s3://user:secret@bucket/x", "gs://bucket/x", "http://bucket/x", "runs", "s3://[bucket/x",
    ],
)  # fmt: skip
def test_what_is_no_address_is_refused(uri: str) -> None:
    with pytest.raises(ManifestError, match=r"^spec\.storage\.uri: got .*; allowed: s3://BUCKET"):
        StorageAddress.parse(uri)


@pytest.mark.parametrize("uid", ["../../up", "a/b", "", ".hidden", "ü", "x" * 500])
def test_a_strange_uid_stays_below_the_address(tmp_path: Path, uid: str) -> None:
    owner = Owner(session="small", uid=uid)
    there = in_run(tmp_path / "run", owner=owner, uri=f"file://{tmp_path}/place")
    there.write(snapshot(1), {})
    assert newest(there).epoch == 1
    (own,) = (tmp_path / "place").iterdir()
    assert [path.name for path in own.iterdir()] == ["checkpoints"]


def bucket_checkpoints(bucket: Any, uri: str, **changes: Any) -> Checkpoints:
    names = ("endpoint_url", "region", "access_key_id", "secret_access_key")
    settings = {name: getattr(bucket, name) for name in names} | {"attempts": 1} | changes
    storage = StorageConfig(**settings)
    return open_checkpoints(Path("unused"), OWNER, 2, uri=uri, storage=storage)


def test_a_bucket_that_can_not_be_used_is_told_by_what_mends_it(s3_bucket: Any) -> None:
    good = f"s3://{s3_bucket.name}/x"
    bucket_checkpoints(s3_bucket, good).check()
    with pytest.raises(ManifestError, match=r"spec\.storage\.uri: got s3://none-such; allowed: a "):
        bucket_checkpoints(s3_bucket, "s3://none-such").check()
    with pytest.raises(ConfigError, match=r"storage\.secret_access_key"):
        bucket_checkpoints(s3_bucket, good, secret_access_key="wrong").check()
    nobody = bucket_checkpoints(s3_bucket, good, endpoint_url="http://127.0.0.1:9")
    for ask in (nobody.check, nobody.newest, lambda: nobody.write(snapshot(1), {})):
        with pytest.raises(StoreUnavailable, match="no answer"):
            ask()


def test_a_place_that_is_away_is_no_place_without_checkpoints(tmp_path: Path) -> None:
    """What can't be looked at may hold all the work: nothing starts over."""
    (tmp_path / "checkpoints").write_text("a file")
    assert in_run(tmp_path).newest() is None
    with pytest.raises(StoreUnavailable, match="can't be used"):
        in_run(tmp_path).write(snapshot(1), {})
    there = in_run(tmp_path, uri=f"file://{tmp_path}/checkpoints/deeper")
    with pytest.raises(ConfigError, match="a writable folder"):
        there.check()


@pytest.mark.parametrize("part", ["tensors.safetensors", "state.json", "checkpoint.json"])
def test_a_full_store_leaves_the_older_one(
    s3_bucket: Any, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    there = bucket_checkpoints(s3_bucket, f"s3://{s3_bucket.name}")
    there.write(snapshot(1), {})
    put = OptimizedS3Client._put

    def refusing(self: Any, key: str, *rest: Any) -> bool:
        if key.endswith(part):
            raise StorageFull(f"object {key}: no room left")
        return put(self, key, *rest)

    monkeypatch.setattr(OptimizedS3Client, "_put", refusing)
    with pytest.raises(StorageFull, match="no room left"):
        there.write(snapshot(2), {})
    monkeypatch.undo()
    found = bucket_checkpoints(s3_bucket, f"s3://{s3_bucket.name}").newest()
    assert found is not None
    assert found.snapshot.epoch == 1
    # What came there before stays, and a later write of the epoch is none of its business.
    there.write(snapshot(2), {})
    assert newest(bucket_checkpoints(s3_bucket, f"s3://{s3_bucket.name}")).epoch == 2
