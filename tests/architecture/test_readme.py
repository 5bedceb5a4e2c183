"""Every command of README.md is run by a test, and every campaign by a quick form of it."""

import ast
import re
import subprocess

import pytest

from tests.readme import (
    CAMPAIGNS,
    README,
    ROOT,
    STAY,
    blocks,
    checkout,
    commands,
    readers,
    sections,
)
from tools.cluster.containers.source import PROGRAMS
from tools.cluster.programs import SETS

PLAYERS = (
    "tests/integration/test_readme.py",
    *(f"tests/e2e/test_{name}.py" for name in ("readme", "demo", "cluster_down")),
    "tests/e2e/conftest.py",
)
"""Tests that play sections, and fixtures that they ask for: of `make test`, and of `make e2e`."""
TEXT = README.read_text()


def played():
    """The sections that tests play, by what they call, or what fixtures of theirs do."""
    bodies = [node for path in PLAYERS for node in ast.parse((ROOT / path).read_text()).body]
    functions = [node for node in bodies if isinstance(node, ast.FunctionDef)]
    tests = [function for function in functions if function.name.startswith("test_")]
    asked = {argument.arg for test in tests for argument in test.args.args}
    found = set()
    for function in (*tests, *(each for each in functions if each.name in asked)):
        calls = (node for node in ast.walk(function) if isinstance(node, ast.Call))
        found |= {
            call.args[0].value
            for call in calls
            if isinstance(call.func, ast.Name) and call.func.id == "play"
        }
    return found


def recipe(target):
    """The lines of a target of the Makefile."""
    pattern = rf"^{target}:(?: [^\n]*)?\n((?:\t[^\n]*\n)+)"
    return re.search(pattern, (ROOT / "Makefile").read_text(), re.MULTILINE)


def module(command):
    """The module that a target of make runs."""
    target = command.removeprefix("make ")
    found = recipe(target)
    if found is None:
        return f"benchmarks.{target.removeprefix('bench-')}"
    return re.search(r"-m ([\w.]+)", found[1])[1]


def test_each_section_with_commands_is_played():
    assert {name for name in sections() if commands(name)} == played()


def test_all_that_play_are_run_by_commands():
    assert "make test" in (ROOT / ".ci/run").read_text().splitlines()
    assert "--ignore=tests/e2e" in recipe("test")[1]
    assert "tests/e2e" in recipe("e2e")[1]


def test_what_takes_long_is_made_before_tests_need_it():
    lines = recipe("e2e")[1].splitlines()
    (programs,) = (line for line in lines if "tools.cluster.programs" in line)
    built = {name for each in SETS if each in programs.split() for name in SETS[each].packages}
    assert {*PROGRAMS, "helm"} <= built
    (images,) = (line for line in lines if "tools.images" in line)
    (tests,) = (line for line in lines if "tests/e2e" in line)
    assert lines.index(programs) < lines.index(tests) > lines.index(images)


def test_a_readers_copy_leaves_the_environment_of_the_tests_alone(tmp_path):
    # Set up anew through the link, its commands would be those of a folder that goes.
    folder = checkout(tmp_path / "esper")
    assert all((folder / name).stat().st_mtime == 0 for name in ("pyproject.toml", "Makefile"))
    assert subprocess.run(["make", "--question", ".venv/.ready"], cwd=folder).returncode == 0


def test_whatever_is_to_be_typed_is_found():
    every = re.findall(r"^```(.*)\n(?:.*\n)*?```$", TEXT, re.MULTILINE)
    assert set(every) <= {"sh", "yaml", "python"}
    assert sum(len(blocks(name, "sh")) for name in sections()) == every.count("sh") > 5


def test_campaigns_are_those_of_the_readme_and_no_more():
    named = {command for name in sections() for command in commands(name)}
    named |= set(re.findall(r"`(make [a-z0-9-]+)", TEXT))
    run = {command for name in sections() for command in commands(name)}
    assert named - run <= CAMPAIGNS.keys()
    assert CAMPAIGNS.keys() <= named
    assert STAY.keys() <= run


@pytest.mark.parametrize("command", CAMPAIGNS)
def test_a_campaign_is_run_in_ci_or_has_a_quick_form_that_is_a_test(command):
    runner = (ROOT / CAMPAIGNS[command]).read_text()
    if CAMPAIGNS[command] == ".ci/run":
        assert command in runner.splitlines()
        return
    imports = [n for n in ast.walk(ast.parse(runner)) if isinstance(n, ast.ImportFrom)]
    imported = {node.module for node in imports}
    imported |= {f"{node.module}.{name.name}" for node in imports for name in node.names}
    assert module(command) in imported


def test_what_a_make_was_given_that_runs_the_tests_does_not_reach_a_reader_s(tmp_path, monkeypatch):
    inner = tmp_path / "Makefile"
    inner.write_text("all:\n\t@echo given $(ARGUMENTS)\n")
    monkeypatch.setenv("MAKEFLAGS", " -- ARGUMENTS=-k\\ demo")
    monkeypatch.setenv("MAKEOVERRIDES", "ARGUMENTS=-k\\ demo")
    monkeypatch.setenv("ARGUMENTS", "-k demo")

    def said(**given):
        words = ["make", "--no-print-directory", "-f", str(inner)]
        return subprocess.run(
            words, env=readers(given), check=True, capture_output=True, text=True
        ).stdout

    assert said() == "given\n"
    assert said(ARGUMENTS="--session=s.yaml") == "given --session=s.yaml\n"
