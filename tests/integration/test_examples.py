"""Every example, run as a person would run it, and what it leaves."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from esper.contracts.manifests import load_manifest, parse_resource
from esper.contracts.resources import TrainingSession
from esper.services.tolaria.config import EntryPointConfig
from esper.services.tolaria.entrypoints import called, make_importable
from tests.integration.processes import ROOT, Server
from tests.outside import run_outside

# One worker runs each example, once for all tests that look at it.
pytestmark = pytest.mark.xdist_group("examples")

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
import json
import torch, grown
model = grown.load()
inputs = torch.load("test.pt", weights_only=True)
with torch.no_grad():
    right = (model(inputs["x"]).argmax(dim=1) == inputs["y"]).double().mean()
parameters = sum(p.numel() for p in model.parameters())
with open("outside.json", "w") as file:
    json.dump({"accuracy": float(right), "parameters": parameters}, file)
"""

Ran = Callable[[str], tuple[Path, dict[str, Any]]]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def ran(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """Runs an example once for all tests of this module: its directory and its result."""
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def get(example: str) -> tuple[Path, dict[str, Any]]:
        if example not in done:
            directory = tmp_path_factory.mktemp("runs") / example
            manifest = f"examples/{example}/session.yaml"
            told = ("--output-dir", directory, "--json")
            ended = server.run("run", manifest, *told, folder=ROOT, plots=True)
            assert ended.status == 0, ended.err
            done[example] = directory, json.loads(ended.out.splitlines()[-1])
        return done[example]

    return get


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_grows_and_leaves_everything(example: str, ran: Ran) -> None:
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
def test_every_fossil_went_through_a_recovery_trial(example: str, ran: Ran) -> None:
    directory, _ = ran(example)
    events = [e for e in lines(directory / "events.jsonl") if e["type"] == "transition"]
    fossils = [e for e in events if e["current"] == "fossilized"]
    assert fossils
    for event in fossils:
        assert event["previous"] == "grafting"
        assert event["reason"].startswith("recovery trial:")
        assert event["measurement"]["lower"] > event["measurement"]["rent"]


def test_a_seed_that_is_not_the_placebo_is_culled(
    ran: Ran,
) -> None:
    directory, result = ran("01-mnist1d-mlp")
    culled = [e for e in lines(directory / "events.jsonl") if e.get("current") == "culled"]
    assert result["seeds"]["culled"] == len(culled)
    assert {e["blueprint"] for e in culled} - {"noop"}
    assert "noop" in {e["blueprint"] for e in culled}


@pytest.mark.parametrize("example", EXAMPLES)
def test_the_grown_model_computes_the_same_where_esper_is_not(
    example: str, ran: Ran, tmp_path: Path
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
    left = shutil.copytree(directory, tmp_path / "left")
    torch.save({"x": x, "y": y}, left / "test.pt")
    run_outside(OUTSIDE, left)
    outside = json.loads((left / "outside.json").read_text())
    assert outside["accuracy"] == pytest.approx(result["accuracy"], abs=0.002)
    assert outside["parameters"] == result["parameters"]


def test_the_same_manifest_twice_gives_the_same_metrics(
    ran: Ran, server: Server, tmp_path: Path
) -> None:
    directory, result = ran("02-digits-cnn")
    manifest = "examples/02-digits-cnn/session.yaml"
    told = ("--output-dir", tmp_path / "again", "--json", "--quiet")
    again = server.run("run", manifest, *told, folder=ROOT)
    assert again.status == 0, again.err

    def timeless(path: Path) -> list[dict[str, Any]]:
        return [
            {key: value for key, value in line.items() if key not in ("time", "seconds")}
            for line in lines(path)
        ]

    for name in ("metrics.jsonl", "events.jsonl", "decisions.jsonl"):
        assert timeless(directory / name) == timeless(tmp_path / "again" / name)
    repeated = json.loads(again.out.splitlines()[-1])
    assert result | {"seconds": 0} == repeated | {"seconds": 0}
    one, two = (folder / "model.safetensors" for folder in (directory, tmp_path / "again"))
    assert one.read_bytes() == two.read_bytes()


def test_resuming_a_finished_run_says_the_same_again(ran: Ran, server: Server) -> None:
    directory, result = ran("03-own-model")
    again = server.run("run", "--resume", directory, "--json", folder=ROOT)
    assert again.status == 0, again.err
    assert json.loads(again.out.splitlines()[-1]) == result
