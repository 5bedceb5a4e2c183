from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from esper.configs import EsperConfig
from esper.errors import ConfigError
from esper.utils.commands import BAD_INPUT, OneLineParser, add_common, logged
from esper_operator.main import main as operator_main


def of_two_words() -> OneLineParser:
    top = OneLineParser(prog="esper", allow_abbrev=False)
    commands = top.add_subparsers(dest="command", parser_class=OneLineParser)
    add_common(commands.add_parser("do", allow_abbrev=False))
    return top


@pytest.mark.parametrize(
    ("line", "error"),
    [
        (["no"], "esper: error: argument command: invalid choice: 'no'"),
        (["do", "--no\nsuch"], "esper: error: unrecognized arguments: --no such"),
        (
            ["do", "--config"],
            "esper: error: argument --config: expected one argument (see esper do",
        ),
    ],
)
def test_what_is_wrong_with_a_line_is_one_line(capsys, line: list[str], error: str) -> None:
    with pytest.raises(SystemExit) as ended:
        of_two_words().parse_args(line)
    assert ended.value.code == BAD_INPUT
    said = capsys.readouterr().err
    assert said.startswith(error)
    assert said.endswith(" --help)\n")
    assert said.count("\n") == 1


def test_the_operator_says_so_by_its_own_name(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        operator_main(["--unknown"])
    assert ended.value.code == BAD_INPUT
    said = "unrecognized arguments: --unknown (see esper-operator --help)"
    assert capsys.readouterr().err == f"esper-operator: error: {said}\n"


def test_options_of_every_command() -> None:
    found = of_two_words().parse_args(["do", "--config", "a.yaml", "--set", "a=1", "--set", "b=2"])
    assert (found.config, found.assignments, found.debug) == (Path("a.yaml"), ["a=1", "b=2"], False)
    assert of_two_words().parse_args(["do", "--debug"]).debug


@pytest.mark.parametrize(("debug", "levels"), [(True, ["debug", "warning"]), (False, ["warning"])])
def test_the_log_is_as_the_settings_say_and_ends(tmp_path, debug: bool, levels: list[str]) -> None:
    file = tmp_path / "here.log"
    config = EsperConfig.load({"component.log_file": str(file)})
    with logged("somewhere", config, debug=debug):
        logging.getLogger("esper.somewhere").debug("in detail")
        logging.getLogger("esper.somewhere").warning("of note")
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["level"].lower() for each in found] == levels
    logging.getLogger("esper.somewhere").warning("afterwards")
    assert len(file.read_text().splitlines()) == len(levels)


def test_a_log_file_that_cannot_be_written_names_its_setting(tmp_path) -> None:
    config = EsperConfig.load({"component.log_file": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"component\.log_file"), logged("x", config, debug=False):
        raise AssertionError("it began")
