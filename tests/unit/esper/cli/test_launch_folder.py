"""A worker's folder goes with it, and a killed one's with the next worker."""

import os
import signal
import subprocess
import sys
import tempfile

import pytest

from esper.cli.launch_folder import PREFIX, launch_folder

HOLDING = """
import sys
from esper.cli.launch_folder import launch_folder

with launch_folder() as folder:
    (folder / "launch-1").mkdir()
    print(folder, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_is_gone_afterwards(place):
    with launch_folder() as folder:
        (folder / "launch-1").mkdir()
        assert folder.parent == place
    assert list(place.iterdir()) == []


def test_only_what_a_dead_worker_left_is_cleared_away(place):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=os.environ | {"TMPDIR": str(place)},
        text=True,
    )
    left = holder.stdout.readline().strip()
    others = place / f"{PREFIX}of-somebody-else", place / "owner"
    others[0].mkdir()
    others[1].write_text("")
    with launch_folder() as folder:
        assert {str(path) for path in place.iterdir()} == {left, str(folder), *map(str, others)}
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    assert os.path.isdir(left)
    with launch_folder() as folder:
        assert {str(path) for path in place.iterdir()} == {str(folder), *map(str, others)}
    assert {str(path) for path in place.iterdir()} == set(map(str, others))
