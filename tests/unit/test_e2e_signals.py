"""End-to-end tests that are broken off end what they have begun."""

import os
import signal
import subprocess
import sys
import time

CONFTEST = """
from pathlib import Path
import pytest
from tests.e2e.conftest import ended_by_a_signal

@pytest.fixture(scope="session")
def cluster():
    Path("up").touch()
    yield
    Path("down").touch()
"""
TEST = """
import subprocess

def test_it(cluster):
    subprocess.run(["sleep", "60"])
"""


def test_a_signal_ends_the_cluster(tmp_path):
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(TEST)
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:schemathesis", "--rootdir=.", "test_it.py"]
    running = subprocess.Popen(
        [sys.executable, "-m", "pytest", *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "up").exists():
        assert running.poll() is None, running.stdout.read()
        time.sleep(0.05)
    running.send_signal(signal.SIGTERM)
    said, _ = running.communicate(timeout=60)
    assert (tmp_path / "down").exists(), said
    assert "KeyboardInterrupt" in said
    assert running.returncode == 2
