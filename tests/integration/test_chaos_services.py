"""A few faults of every kind while a session trains and kernels compile: nothing is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.spirals import write_session
from tools.chaos_services import Plan, run, run_impatient


@pytest.mark.slow
def test_ten_faults_lose_nothing(tmp_path: Path) -> None:
    manifest = write_session(tmp_path / "session")
    said: list[str] = []
    plan = Plan(faults=10, blueprints=4, longest=0.6)
    outcome = run(manifest, tmp_path / "runs", plan, said.append)
    assert outcome.broken == [], "\n".join(said)
    assert len(outcome.faults) == 10
    kinds, parts = (set(words) for words in zip(*map(str.split, outcome.faults), strict=True))
    assert kinds == {"kill", "freeze"}
    assert parts == {"redis", "postgres", "s3", "urza", "tezzeret-1", "tezzeret-2", "tamiyo"}
    assert outcome.figures["transitions"] > 10
    assert outcome.figures["kernels"] >= 4


@pytest.mark.slow
def test_with_finite_patience_a_session_ends_and_says_what_it_waited_for(tmp_path: Path) -> None:
    manifest = write_session(tmp_path / "session")
    said: list[str] = []
    plan = Plan(faults=4, longest=1.0)
    outcome = run_impatient(manifest, tmp_path / "runs", plan, said.append)
    assert outcome.broken == [], "\n".join(said)
    assert outcome.figures["waitedOut"] == 7
