"""A run whose checkpoints lie in a bucket goes on from there, though its directory is lost.

And what a person reads where checkpoints in the run's own directory can't be used.
"""

import json
import os
import shutil
import signal

import pytest

from tests.integration.processes import until
from tests.integration.spirals import SESSION, changed, left, status, write_session

SHORT = changed(SESSION, spec__training__epochs=5)


@pytest.fixture(scope="module")
def undisturbed(server, tmp_path_factory):
    """A run with its checkpoints in its directory, and nothing goes wrong."""
    folder = tmp_path_factory.mktemp("undisturbed")
    write_session(folder, SHORT)
    run = server.run("run", "session.yaml", "--output-dir", "D", "--quiet", folder=folder)
    assert (run.status, run.err) == (0, "")
    return folder / "D"


def without_checkpoints(directory):
    found = left(directory)
    found["files"] = [name for name in found["files"] if not name.startswith("checkpoints/")]
    return found


def settings(folder, bucket):
    """A settings file with what opens the bucket."""
    path = folder / "esper.yaml"
    names = ("endpoint_url", "region", "access_key_id", "secret_access_key")
    path.write_text(json.dumps({"storage": {name: getattr(bucket, name) for name in names}}))


def test_killed_and_its_directory_lost_a_run_goes_on_from_the_bucket(
    server, tmp_path, undisturbed, s3_bucket, s3_server
):
    uri = f"s3://{s3_bucket.name}/runs"
    write_session(tmp_path, changed(SHORT, spec__storage__uri=uri))
    settings(tmp_path, s3_bucket)
    client = s3_server.client()

    def manifests():
        found = client.list_objects_v2(Bucket=s3_bucket.name).get("Contents", [])
        return [one["Key"] for one in found if one["Key"].endswith("/checkpoint.json")]

    started = server.start("run", "session.yaml", "--output-dir", "D", "--quiet", folder=tmp_path)
    until(lambda: any("epoch-000002" in key for key in manifests()))
    started.signal(signal.SIGKILL)
    assert started.wait().status == -signal.SIGKILL
    manifest = (tmp_path / "D" / "manifest.yaml").read_bytes()
    shutil.rmtree(tmp_path / "D")
    (tmp_path / "D").mkdir()
    (tmp_path / "D" / "manifest.yaml").write_bytes(manifest)
    resumed = server.run("run", "--resume", "D", "--quiet", folder=tmp_path)
    # An upload may have been cut short by the kill; then it says so.
    lines = [json.loads(line) for line in resumed.err.splitlines()]
    assert resumed.status == 0, resumed.err
    assert all("it was cut short" in line["message"] for line in lines), resumed.err
    assert without_checkpoints(tmp_path / "D") == without_checkpoints(undisturbed)
    assert not (tmp_path / "D" / "checkpoints").exists()
    found, summary = status(tmp_path / "D")
    assert summary["reason"] == "Succeeded"
    name = found["checkpoint"]["name"]
    assert f"runs/{name}/checkpoint.json" in manifests()
    # Shown once more, it needs nothing but the bucket to say under which trace all was told.
    assert server.run("run", "--resume", "D", "--quiet", folder=tmp_path).status == 0


def interrupted(server, folder, epoch):
    """A run that was stopped in its n-th epoch, 20 steps each."""
    write_session(folder, SHORT)
    stop = "esper.services.tolaria.engine:Engine._step"
    ended = server.run(
        *("run", "session.yaml", "--output-dir", "D", "--quiet"),
        folder=folder,
        fault=["kill_before", stop, 20 * (epoch - 1) + 3, signal.SIGTERM],
    )
    assert ended.status == 130, ended.err
    return folder / "D" / "checkpoints"


def test_a_damaged_checkpoint_is_told_in_a_line_and_the_older_one_is_used(
    server, tmp_path, undisturbed
):
    checkpoints = interrupted(server, tmp_path, 4)
    assert sorted(os.listdir(checkpoints)) == ["epoch-000002", "epoch-000003"]
    tensors = checkpoints / "epoch-000003" / "tensors.safetensors"
    os.truncate(tensors, 1000)
    log = ("--set", f"component.log_file={tmp_path / 'log'}")
    resumed = server.run("run", "--resume", "D", "--quiet", *log, folder=tmp_path)
    assert resumed.status == 0
    (line,) = resumed.err.splitlines()
    assert line.startswith("esper: checkpoint epoch-000003: got tensors.safetensors of 1000 bytes;")
    assert line.endswith(
        "epoch-000002, an older one, is used and nothing was deleted (D/checkpoints)"
    )
    assert without_checkpoints(tmp_path / "D") == without_checkpoints(undisturbed)
    aside = checkpoints / "aside-epoch-000003-1" / "tensors.safetensors"
    assert aside.stat().st_size == 1000


def test_checkpoints_of_an_older_version_alone_are_refused(server, tmp_path):
    checkpoints = interrupted(server, tmp_path, 3)
    for path in checkpoints.glob("*/checkpoint.json"):
        path.unlink()
    before = (tmp_path / "D" / "metrics.jsonl").read_bytes()
    refused = server.run("run", "--resume", "D", "--quiet", folder=tmp_path)
    assert refused.status == 2
    (line,) = refused.err.splitlines()
    assert line.startswith("esper: error: checkpoints in D/checkpoints: got 2 of which none can be")
    assert "a version before schema 1 wrote it" in line
    assert (tmp_path / "D" / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("s3://No_Bucket/x", "spec.storage.uri: got s3://No_Bucket/x; allowed: s3://BUCKET"),
        ("file://{folder}/session.yaml/x", "; allowed: a writable folder; see "),
    ],
)
def test_an_address_that_can_not_be_used_is_refused_before_anything_is_written(
    server, tmp_path, uri, said
):
    uri = uri.format(folder=tmp_path)
    write_session(tmp_path, changed(SHORT, spec__storage__uri=uri))
    refused = server.run("run", "session.yaml", "--output-dir", "D", folder=tmp_path)
    assert (refused.status, refused.err.count("\n")) == (2, 1)
    assert said in refused.err
    assert not (tmp_path / "D").exists()
