"""What `make chaos-services` looks at, and that nothing of it outlives it."""

import subprocess
import sys
import time

from tests.alive import alive
from tools import chaos_services
from tools.chaos_checks import Outcome
from tools.chaos_services import Session, check_database, note_results
from tools.stack import DATABASE

ROWS = """CREATE TABLE compiled_kernels
    (kernel text UNIQUE, state text, artifact_digest text, lease_token text)"""
ACCEPT = """UPDATE compiled_kernels SET state = 'characterized', artifact_digest = 'd',
    lease_token = '{lease}' WHERE kernel = '{kernel}'"""


def test_a_second_accepted_result_is_found(private_postgres):
    def told():
        outcome = Outcome()
        check_database(private_postgres, outcome)
        return outcome.broken

    def run(statement):
        private_postgres.execute(statement, DATABASE)

    private_postgres.create_database(DATABASE)
    run(ROWS)
    note_results(private_postgres)
    for kernel in ("a", "b"):
        run(f"INSERT INTO compiled_kernels VALUES ('{kernel}', 'proposed', NULL, NULL)")
        run(f"UPDATE compiled_kernels SET state = 'compiling' WHERE kernel = '{kernel}'")
    run(ACCEPT.format(kernel="a", lease="one"))
    assert any("without an artifact" in line for line in told())
    run(ACCEPT.format(kernel="b", lease="two"))
    assert told() == []
    run(ACCEPT.format(kernel="b", lease="three"))
    assert told() == ["3 results were accepted for 2 kernels"]
    run("UPDATE accepted_results SET lease = 'three' WHERE lease = 'two'")
    assert "kernel b: 2 accepted results of its lease" in told()


class Endless(Session):
    """A session that never ends."""

    def _command(self, stack, manifest, directory):
        return ["sleep", "600"]


def test_a_session_is_not_waited_for_for_ever_and_ends_with_its_block(tmp_path, monkeypatch):
    monkeypatch.setattr(chaos_services, "SESSION_SECONDS", 0.1)
    with Endless(None, None, tmp_path / "run") as session:
        assert session.running
        assert session.wait() is None
        pid = session.pid
    assert not alive(pid)


def test_a_session_does_not_outlive_who_began_it(tmp_path):
    program = (
        "import time; from pathlib import Path\n"
        "from tests.unit.tools.test_chaos_services import Endless\n"
        f"print(Endless(None, None, Path({str(tmp_path / 'run')!r})).pid, flush=True)\n"
        "time.sleep(600)"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as owner:
        pid = int(owner.stdout.readline())
        assert alive(pid)
        owner.kill()
    deadline = time.monotonic() + 60
    while alive(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)
