"""What the tests on a real cluster begin beside others, by pytest's own plan of them."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LONG = {"campaign", "demonstration"}


def begun(*words):
    """The long ones that are begun, each with the test that begins it."""
    command = [sys.executable, "-m", "pytest", "--setup-plan", "-p", "no:cacheprovider"]
    planned = subprocess.run(
        [*command, "tests/e2e", *words], cwd=ROOT, capture_output=True, text=True
    )
    assert planned.returncode == 0, planned.stdout + planned.stderr
    found, waiting = {}, set()
    for line in planned.stdout.splitlines():
        if setup := re.search(r"SETUP +S (\w+)", line):
            waiting |= {setup[1]} & LONG
        elif test := re.search(r"(test_\w+\.py)::", line):
            found |= dict.fromkeys(waiting, test[1])
            waiting = set()
    return found


def test_long_ones_begin_beside_tests_that_leave_the_machine_idle():
    assert begun() == {"campaign": "test_cluster.py", "demonstration": "test_isolation.py"}


def test_nobody_begins_what_was_not_chosen():
    assert begun("-k", "gpu or isolation") == {}
    assert begun("-k", "demo or isolation") == {"demonstration": "test_isolation.py"}
    assert begun("-k", "not chaos") == {"demonstration": "test_isolation.py"}
