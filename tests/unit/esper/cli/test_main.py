import argparse
import json
import logging
import subprocess
import sys

import pytest

from esper.cli import main as cli
from esper.errors import Interrupted, LossNotFinite, ManifestError

log = logging.getLogger("esper.somewhere")


class Command:
    """A real command with an outcome of the test's choice."""

    HELP = "what a test asks"

    def __init__(self, outcome):
        self.outcome = outcome

    def add_arguments(self, command):
        command.add_argument("words", nargs="*")

    def execute(self, arguments, config):
        self.config = config
        log.debug("in detail")
        if isinstance(self.outcome, BaseException):
            raise self.outcome
        return self.outcome


@pytest.fixture
def given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def give(outcome):
        command = Command(outcome)
        monkeypatch.setitem(cli.COMMANDS, "do", command)
        return command

    return give


@pytest.mark.parametrize("status", [0, 1, 2, 130])
def test_the_status_of_the_command_is_the_exit_code(given, status):
    given(status)
    assert cli.main(["do"]) == status


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            ManifestError("spec.epochs", -1, "1 or more"),
            2,
            "esper: error: spec.epochs: got -1; allowed: 1 or more\n",
        ),
        (LossNotFinite("loss\nis nan"), 1, "esper: error: loss is nan\n"),
        (Interrupted("resume with X"), 130, "esper: resume with X\n"),
        (KeyboardInterrupt(), 130, "esper: interrupted\n"),
        (
            ZeroDivisionError("by\nzero"),
            1,
            "esper: error: unexpected ZeroDivisionError: by zero (--debug shows where)\n",
        ),
        (
            ModuleNotFoundError("No module named 'torch'", name="torch"),
            1,
            "esper: error: torch is not installed; install it with: pip install 'esper[runtime]'\n",
        ),
        (
            ModuleNotFoundError("No module named 'mine'", name="mine"),
            1,
            "esper: error: unexpected ModuleNotFoundError: No module named 'mine' "
            "(--debug shows where)\n",
        ),
    ],
)
def test_an_error_is_one_line_and_no_trace(given, capsys, error, status, line):
    given(error)
    assert cli.main(["do"]) == status
    captured = capsys.readouterr()
    assert captured.err == line
    assert captured.out == ""


def test_debug_shows_the_trace_and_every_record(given, capsys):
    given(ZeroDivisionError("inside"))
    assert cli.main(["do", "--debug"]) == 1
    error = capsys.readouterr().err
    assert "Traceback" in error
    assert '"message": "in detail"' in error
    assert error.endswith("esper: error: unexpected ZeroDivisionError: inside\n")


def test_settings_come_from_the_line_and_the_named_file(given, tmp_path):
    command = given(0)
    (tmp_path / "mine.yaml").write_text("database: {pool_size: 3}\n")
    given_line = ["do", "--config", "mine.yaml", "--set", "component.log_level=info"]
    assert cli.main([*given_line, "--set", "database.pre_ping=false"]) == 0
    assert command.config.database.pool_size == 3
    assert command.config.database.pre_ping is False
    assert command.config.component.log_level == "info"


@pytest.mark.parametrize("assignment", ["nothing", "no.such=1", "database.pool_size=x"])
def test_a_bad_setting_ends_with_two_before_any_work(given, capsys, assignment):
    command = given(0)
    assert cli.main(["do", "--set", assignment]) == 2
    assert capsys.readouterr().err.startswith("esper: error: ")
    assert not hasattr(command, "config")


def test_the_log_goes_to_the_file_that_a_setting_names(given, tmp_path, capsys):
    given(0)
    settings = ["--set", "component.log_file=here.log", "--set", "component.log_level=debug"]
    assert cli.main(["do", *settings]) == 0
    (line,) = (tmp_path / "here.log").read_text().splitlines()
    assert json.loads(line)["component"] == "do"
    assert capsys.readouterr().err == ""


def test_a_log_file_that_cannot_be_made_is_bad_input(given, capsys):
    given(0)
    assert cli.main(["do", "--set", "component.log_file=no/such/folder"]) == 2
    assert "component.log_file: got no/such/folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (["dance"], "invalid choice: 'dance'"),
        (["run"], "FILE --resume is required"),
        (["run", "a", "--resume", "b"], "not allowed with"),
        (["run", "a", "--outp", "b"], "unrecognized arguments"),
        (["crds", "--check", "a", "--output-dir", "b"], "not allowed with"),
        (["report"], "required: D"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_two(capsys, line, part):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("esper: error: ")
    assert error.count("\n") == 1
    assert part in error


@pytest.mark.parametrize("line", [["--help"], ["run", "--help"], ["doctor", "-h"]])
def test_help_ends_with_zero(capsys, line):
    with pytest.raises(SystemExit) as ended:
        cli.main(line)
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith("usage: esper")


def test_without_a_command_the_help_is_shown(capsys):
    assert cli.main([]) == 0
    assert "COMMAND" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    from esper import __version__

    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"esper {__version__}\n"


def test_every_option_has_help():
    top = cli.parser()
    (commands,) = [a for a in top._actions if isinstance(a, argparse._SubParsersAction)]
    for command in commands.choices.values():
        assert all(action.help for action in command._actions)


def test_a_reader_that_leaves_early_causes_no_complaint(tmp_path):
    lines = "import sys; from esper.cli.main import main; sys.exit(main(['crds']))"
    process = subprocess.Popen(
        [sys.executable, "-c", lines], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(60) in {0, 1}
    assert error == b""
