"""A few faults of every kind while a session trains and kernels compile: nothing is lost."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.spirals import write_session
from tools.chaos_services import SETTINGS, Plan, run, run_impatient
from tools.stack import Stack

# One worker starts the services, once for both tests.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("chaos-services")]


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with Stack(tmp_path_factory.mktemp("failing"), workers=2, settings=SETTINGS) as running:
        yield running


def test_a_fault_of_every_part_loses_nothing(failing: Stack, tmp_path: Path) -> None:
    manifest = write_session(tmp_path / "session")
    said: list[str] = []
    plan = Plan(faults=10, blueprints=4, seed=2, longest=0.6)
    outcome = run(failing, manifest, tmp_path / "runs", plan, said.append)
    assert outcome.broken == [], "\n".join(said)
    assert len(outcome.faults) == 10
    kinds, parts = (set(words) for words in zip(*map(str.split, outcome.faults), strict=True))
    assert kinds == {"kill", "freeze"}
    assert parts == {"redis", "postgres", "s3", "urza", "tezzeret-1", "tezzeret-2", "tamiyo"}
    assert outcome.figures["transitions"] > 10
    assert outcome.figures["kernels"] >= 4


def test_with_finite_patience_a_session_ends_and_says_what_it_waited_for(
    failing: Stack, tmp_path: Path
) -> None:
    manifest = write_session(tmp_path / "session")
    said: list[str] = []
    plan = Plan(faults=4, seed=3, longest=1.0)
    outcome = run_impatient(failing, manifest, tmp_path / "runs", plan, said.append)
    assert outcome.broken == [], "\n".join(said)
    assert outcome.figures["waitedOut"] == 7
