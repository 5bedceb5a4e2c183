"""Processes that outlive whoever started them."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tools.cluster.containers.daemons import Daemon
from tools.servers.process import ServerError

SLEEP = ["sleep", "300"]


@pytest.fixture
def daemon(tmp_path):
    made = Daemon("sleeper", tmp_path / "folder")
    yield made
    made.kill()


def test_it_is_found_again_by_others(daemon):
    daemon.start(SLEEP)
    again = Daemon("sleeper", daemon.folder)
    assert again.running
    again.stop()
    assert not daemon.running
    assert not Daemon("sleeper", daemon.folder).running


def test_it_outlives_who_started_it(daemon):
    code = (
        "import sys; from pathlib import Path; "
        "from tools.cluster.containers.daemons import Daemon; "
        "Daemon('sleeper', Path(sys.argv[1])).start(['sleep', '300'])"
    )
    subprocess.run([sys.executable, "-c", code, str(daemon.folder)], check=True)
    assert daemon.running


def test_another_process_with_its_id_is_not_taken_for_it(daemon):
    process = daemon.start(SLEEP)
    told = {"pid": process.pid, "started": process.create_time() - 1}
    (daemon.folder / "sleeper.pid").write_text(json.dumps(told))
    assert not daemon.running
    daemon.stop()
    assert process.is_running()
    process.kill()


def test_the_process_that_a_command_forks_is_the_one_meant(daemon):
    process = daemon.start(["unshare", "--fork", *SLEEP], inner=True)
    assert process.parent().pid != os.getpid()
    daemon.await_(lambda: process.name() == "sleep")
    daemon.kill()
    assert not process.is_running()


def test_one_that_ends_is_told_with_its_last_words(daemon):
    daemon.start(["sh", "-c", "echo no such thing >&2; exit 3"])
    with pytest.raises(ServerError, match="sleeper has ended: no such thing"):
        daemon.await_(lambda: False)


def test_one_that_does_not_answer_is_told(daemon):
    daemon.start(SLEEP)
    with pytest.raises(ServerError, match="sleeper does not answer: it wrote nothing"):
        daemon.await_(lambda: False, seconds=0.1)


def test_one_that_does_not_end_in_order_is_ended(daemon):
    daemon.start(["sh", "-c", "trap '' TERM; echo ready; while :; do sleep 0.1; done"])
    daemon.await_(lambda: "ready" in daemon.log.read_text())
    began = time.monotonic()
    daemon.stop(seconds=0.3)
    assert not daemon.running
    assert time.monotonic() - began < 10


def test_a_stopped_one_is_forgotten(daemon):
    process = daemon.start(SLEEP)
    os.kill(process.pid, signal.SIGKILL)
    daemon.stop()
    assert not (daemon.folder / "sleeper.pid").exists()
