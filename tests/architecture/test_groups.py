"""What a group of tests shares ends with its last test, and a further group has its own."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.groups import group_of
from tests.integration.processes import environment

CONFTEST = """
import pytest
from tests.groups import Groups, group

def pytest_configure(config):
    config.pluginmanager.register(Groups())

def say(word):
    with open("said", "a") as file:
        file.write(word + " ")

@pytest.fixture(scope="session")
def server(group):
    say("begins")
    yield
    say("ends")

@pytest.fixture(scope="session")
def client(server):
    say("connects")
    yield
    say("leaves")
"""
TESTS = """
import pytest
from conftest import say

@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.xdist_group("a")
def test_of_a(client, number):
    say(f"a{number}")

@pytest.mark.xdist_group("b")
def test_of_b(client):
    say("b")

def test_of_none():
    say("none")
"""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            ["-n1", "--dist=loadgroup"],
            "begins connects a1 a2 leaves ends begins connects b leaves ends none",
        ),
        # Where no groups are kept together nothing ends early.
        (["-pno:xdist"], "begins connects a1 a2 b none leaves ends"),
    ],
)
def test_what_is_shared_ends_with_the_group(tmp_path, options, said):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = xdist_group: of xdist")
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_them.py").write_text(TESTS)
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-pno:cacheprovider", *options],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert "4 passed" in ended.stdout, ended.stdout
    assert (tmp_path / "said").read_text().split() == said.split()


def test_a_group_is_one_that_xdist_has_heard_of():
    def item(name, group=None):
        marker = group and pytest.mark.xdist_group(group).mark
        return SimpleNamespace(nodeid=name, get_closest_marker=lambda _: marker)

    assert group_of(item("a@cluster", "cluster")) == "@cluster"
    assert group_of(item("a", "cluster")) == group_of(item("b")) == group_of(item("c[@]")) == ""
