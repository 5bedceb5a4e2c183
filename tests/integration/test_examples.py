"""Every example, run as a person would run it, and what it leaves."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.contracts.manifests import load_manifest, parse_resource
from esper.contracts.resources import TrainingSession
from esper.services.tolaria.config import EntryPointConfig
from esper.services.tolaria.entrypoints import called, make_importable

# One worker runs each example, once for all tests that look at it.
pytestmark = pytest.mark.xdist_group("examples")

ROOT = Path(__file__).parents[2]
EXAMPLES = ("01-mnist1d-mlp", "02-digits-cnn", "03-own-model")
LEFT = {
    "manifest.yaml",
    "status.yaml",
    "events.jsonl",
    "decisions.jsonl",
    "metrics.jsonl",
    "checkpoints",
    "model.safetensors",
    "grown.py",
    "report.html",
    "growth.png",
}
FIELDS = {
    "session",
    "outcome",
    "accuracy",
    "parametersBase",
    "parameters",
    "flops",
    "epochs",
    "seconds",
    "seeds",
    "grown",
}

# Loads what a run left where Esper can't be imported, and says what it computes.
OUTSIDE = """
import json, sys
sys.modules["esper"] = None
sys.path.insert(0, sys.argv[1])
import torch, grown
model = grown.load()
inputs = torch.load(sys.argv[2], weights_only=True)
with torch.no_grad():
    right = (model(inputs["x"]).argmax(dim=1) == inputs["y"]).double().mean()
parameters = sum(p.numel() for p in model.parameters())
print(json.dumps({"accuracy": float(right), "parameters": parameters}))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "esper", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Runs an example once for all tests of this module: its directory and its result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(example: str) -> tuple[Path, dict[str, Any]]:
        if example not in done:
            directory = tmp_path_factory.mktemp("runs") / example
            manifest = f"examples/{example}/session.yaml"
            ended = run("run", manifest, "--output-dir", str(directory), "--json")
            assert ended.returncode == 0, ended.stderr
            done[example] = directory, json.loads(ended.stdout.splitlines()[-1])
        return done[example]

    return get


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_grows_and_leaves_everything(
    example: str, ran: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    directory, result = ran(example)
    assert {path.name for path in directory.iterdir()} >= LEFT
    assert result.keys() >= FIELDS
    assert result["outcome"] == "Succeeded"
    assert result["seeds"]["fossilized"] == len(result["grown"]) >= 1
    assert result["parameters"] > result["parametersBase"]
    for part in result["grown"]:
        contribution = part["contribution"]
        assert contribution["mean"] >= contribution["lower"] > part["rent"] > 0
        assert part["samples"] > 100
    status = parse_resource(
        (directory / "status.yaml").read_text(), "status.yaml", TrainingSession
    ).status
    assert status is not None
    assert status.seeds.fossilized == len(result["grown"])
    assert (status.epoch, status.parameters) == (result["epochs"], result["parameters"])


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_fossil_went_through_a_recovery_trial(
    example: str, ran: Callable[[str], tuple[Path, dict[str, Any]]]
) -> None:
    directory, _ = ran(example)
    events = [e for e in lines(directory / "events.jsonl") if e["type"] == "transition"]
    fossils = [e for e in events if e["current"] == "fossilized"]
    assert fossils
    for event in fossils:
        assert event["previous"] == "grafting"
        assert event["reason"].startswith("recovery trial:")
        assert event["measurement"]["lower"] > event["measurement"]["rent"]


def test_a_seed_that_is_not_the_placebo_is_culled(
    ran: Callable[[str], tuple[Path, dict[str, Any]]],
) -> None:
    directory, result = ran("01-mnist1d-mlp")
    culled = [e for e in lines(directory / "events.jsonl") if e.get("current") == "culled"]
    assert result["seeds"]["culled"] == len(culled)
    assert {e["blueprint"] for e in culled} - {"noop"}
    assert "noop" in {e["blueprint"] for e in culled}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_grown_model_computes_the_same_where_esper_is_not(
    example: str, ran: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    directory, result = ran(example)
    manifest = load_manifest(ROOT / "examples" / example / "session.yaml")
    make_importable(ROOT / "examples" / example)
    data = manifest.session.spec.data
    test = called(
        "spec.data",
        EntryPointConfig(entrypoint=data.entrypoint, arguments=dict(data.arguments)),
    )["test"]
    x, y = test.tensors
    torch.save({"x": x, "y": y}, tmp_path / "test.pt")
    ended = subprocess.run(
        [sys.executable, "-I", "-c", OUTSIDE, str(directory), str(tmp_path / "test.pt")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    outside = json.loads(ended.stdout)
    assert outside["accuracy"] == pytest.approx(result["accuracy"], abs=0.002)
    assert outside["parameters"] == result["parameters"]


def test_the_same_manifest_twice_gives_the_same_metrics(
    ran: Callable[[str], tuple[Path, dict[str, Any]]], tmp_path: Path
) -> None:
    directory, result = ran("02-digits-cnn")
    again = run(
        "run", "examples/02-digits-cnn/session.yaml", "--output-dir", str(tmp_path / "again"),
        "--json", "--quiet",
    )  # fmt: skip
    assert again.returncode == 0, again.stderr

    def timeless(path: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if key not in ("time", "seconds")}
            for line in lines(path)
        ]

    for name in ("metrics.jsonl", "events.jsonl", "decisions.jsonl"):
        assert timeless(directory / name) == timeless(tmp_path / "again" / name)
    repeated = json.loads(again.stdout.splitlines()[-1])
    assert result | {"seconds": 0} == repeated | {"seconds": 0}
    one, two = (folder / "model.safetensors" for folder in (directory, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_resuming_a_finished_run_says_the_same_again(
    ran: Callable[[str], tuple[Path, dict[str, Any]]],
) -> None:
    directory, result = ran("03-own-model")
    again = run("run", "--resume", str(directory), "--json")
    assert again.returncode == 0, again.stderr
    assert json.loads(again.stdout.splitlines()[-1]) == result
