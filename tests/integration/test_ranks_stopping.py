"""A worker that is asked to stop while the store of its checkpoints does not answer."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import yaml

from esper.cli.worker import newest_checkpoint
from tests.integration.spirals import status
from tools.rank_session import write_session
from tools.rank_worker import Worker
from tools.servers.s3 import S3Server


def test_a_frozen_store_holds_up_no_end(tmp_path: Path, private_s3: S3Server) -> None:
    private_s3.create_bucket("runs")
    manifest = write_session(tmp_path / "session", epochs=5000, checkpoint={"everyEpochs": 2})
    document = yaml.safe_load(manifest.read_text())
    document["spec"]["storage"] = {"uri": "s3://runs/here"}
    manifest.write_text(yaml.safe_dump(document))
    settings = tmp_path / "esper.yaml"
    names = ("region", "access_key_id", "secret_access_key")
    opened = {name: getattr(private_s3, name) for name in names} | {"endpoint_url": private_s3.url}
    settings.write_text(json.dumps({"storage": opened}))
    directory, log, last_word = tmp_path / "D", tmp_path / "log", tmp_path / "termination.log"
    options = ("--config", str(settings), "--termination-log", str(last_word))
    with Worker(manifest, directory, 1, log, *options) as worker:
        worker.until(lambda: newest_checkpoint(directory) >= 2)
        private_s3.freeze()
        newest = newest_checkpoint(directory)
        began = time.monotonic()
        worker.signal(signal.SIGTERM)
        assert worker.wait() == 75, log.read_text()
        assert time.monotonic() - began < 10.0
        assert worker.alive() == []
    told = json.loads(last_word.read_text())
    assert told["reason"] == "Interrupted"
    # One may have been on its way already, and have come to be complete.
    epochs = [epoch for epoch in (newest, newest + 2) if f"epoch-{epoch:06d}" in told["message"]]
    assert len(epochs) == 1, told
    assert "has not answered for 5 seconds" in told["message"]
    assert status(directory)[1]["reason"] == "Interrupted"
    assert newest_checkpoint(directory) == epochs[0]
