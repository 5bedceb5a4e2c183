"""How a run ends, as `--json` and the files of the run tell it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from esper.cli.main import main
from esper.cli.preparing import prepare
from esper.cli.trainers import embedded_trainer
from esper.configs import EsperConfig
from esper.contracts.enums import SessionOutcome
from esper.contracts.manifests import parse_manifest
from esper.errors import Interrupted
from esper.services.urza.client import in_process_urza
from tests.integration.sessions import document

OBJECTIVES = '''
from torch import nn


class WithoutMetric:
    """A metric that is never a number."""

    def loss(self, outputs, targets):
        return nn.functional.cross_entropy(outputs, targets)

    def metric(self, outputs, targets):
        return float("nan")


class Breaking(WithoutMetric):
    """Breaks off in the middle of an epoch."""

    calls = 0

    def loss(self, outputs, targets):
        type(self).calls += 1
        if type(self).calls > 12:
            raise RuntimeError("the objective gave up")
        return super().loss(outputs, targets)
'''


def refuse_constant(name: str) -> None:
    raise AssertionError(f"{name} is no JSON")


def strict(line: str) -> dict[str, Any]:
    """One line of JSON as the standard has it, without NaN and Infinity."""
    found: dict[str, Any] = json.loads(line, parse_constant=refuse_constant)
    return found


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def written(place: Path, module: str, changes: Mapping[str, Any]) -> str:
    """A small manifest of the base session with `changes`, and its module beside it."""
    (place / f"{module}.py").write_text(OBJECTIVES)
    (place / "session.yaml").write_text(yaml.safe_dump(document(changes)))
    return str(place / "session.yaml")


def test_a_metric_that_is_not_a_number_is_null(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"epochs": 2, "objective": "objectives_a:WithoutMetric"}
    manifest = written(place, "objectives_a", {"spec": {"training": training}})
    assert main(["run", manifest, "--output-dir", "D", "--json"]) == 0
    shown = capsys.readouterr()
    result = strict(shown.out.splitlines()[-1])
    assert (result["outcome"], result["accuracy"]) == ("Succeeded", None)
    assert strict((place / "D" / "result.json").read_text())["accuracy"] is None
    rows = [strict(line) for line in (place / "D" / "metrics.jsonl").read_text().splitlines()]
    assert [row["validationMetric"] for row in rows] == [None, None]
    assert "metric not finite on the test set" in shown.err
    assert main(["report", "D"]) == 0


def test_a_run_that_breaks_off_says_so_in_json(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    training = {"epochs": 3, "objective": "objectives_b:Breaking"}
    manifest = written(place, "objectives_b", {"spec": {"training": training}})
    assert main(["run", manifest, "--output-dir", "D", "--json"]) == 1
    shown = capsys.readouterr()
    result = strict(shown.out.splitlines()[-1])
    assert result == {"session": "small", "outcome": "Failed", "reason": "the objective gave up"}
    assert shown.err.splitlines()[-1].startswith("esper: error: unexpected RuntimeError: ")
    assert (place / "D" / "report.html").is_file()


def test_a_part_of_the_spec_that_would_be_passed_over_is_refused(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = written(
        place, "objectives_c", {"spec": {"training": {"checkpoint": {"resumeFrom": "elsewhere"}}}}
    )
    assert main(["run", manifest, "--output-dir", "D"]) == 2
    told = "spec.training.checkpoint.resumeFrom: got elsewhere; allowed: nothing"
    assert told in capsys.readouterr().err
    assert not (place / "D").exists()


def test_the_hub_knows_how_a_session_stands(tmp_path: Path) -> None:
    prepared = prepare(parse_manifest(yaml.safe_dump(document({})), "test"), tmp_path)
    config = EsperConfig().inside(tmp_path)

    async def outcome() -> tuple[SessionOutcome, bool]:
        async with in_process_urza(config.database, config.storage) as hub:
            session = (await hub.read_session(prepared.asset().uid)).item
            return session.outcome, session.ended_at is None

    async def lives(end: BaseException | None) -> None:
        async with embedded_trainer(prepared, config):
            assert await outcome() == (SessionOutcome.RUNNING, True)
            if end is not None:
                raise end

    async def life() -> None:
        with pytest.raises(Interrupted):
            await lives(Interrupted("asked to stop"))
        assert await outcome() == (SessionOutcome.INTERRUPTED, True)
        with pytest.raises(RuntimeError):
            await lives(RuntimeError("the objective gave up"))
        assert await outcome() == (SessionOutcome.FAILED, False)
        await lives(None)
        assert await outcome() == (SessionOutcome.SUCCEEDED, False)

    asyncio.run(life())
