"""`training.compile` with inductor: real code, whole sessions, a process that is killed."""

from __future__ import annotations

import copy
import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from esper.core.compilation import compile_blocks, compiled_blocks, uncompiled
from esper.core.model_wrapper import MorphableModel, wrap
from esper.execution.state_layout import SeedLifecycleState as S
from esper.services.tolaria.trainer import TrainingResult
from esper.zoo.models import CNN, MLP
from tests.integration.sessions import Watching, trained
from tests.integration.spirals import SESSION, changed, left, status, write_session
from tests.unit.esper.core.growing import FOSSIL, grow

# One worker imports inductor.
pytestmark = pytest.mark.xdist_group("compile")


def mlp() -> tuple[nn.Module, Tensor]:
    return MLP(6, [8, 8], 3), torch.randn(5, 6)


def cnn() -> tuple[nn.Module, Tensor]:
    return CNN(1, [3, 4], 3), torch.randn(4, 1, 8, 8)


def encoder() -> tuple[nn.Module, Tensor]:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.2, batch_first=True)
    return nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), torch.randn(3, 4, 8)


MODELS = {"mlp": mlp, "cnn": cnn, "encoder": encoder}


def passes(model: nn.Module, x: Tensor) -> list[Tensor]:
    """Output and gradients in training, statistics, output in evaluation: from the same draws."""
    torch.manual_seed(1)
    out = model.train()(x)
    gradients = torch.autograd.grad(out.square().mean(), [p for _, p in own_parameters(model)])
    with torch.no_grad():
        evaluated = model.eval()(x)
    return [out.detach(), *gradients, *(b.clone() for b in model.buffers()), evaluated]


def own_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in model.named_parameters() if ".grown." not in name]


@pytest.mark.parametrize("name", MODELS)
def test_dormant_is_bit_identical_to_the_bare_model_compiled_alike(name: str) -> None:
    torch.manual_seed(0)
    bare, x = MODELS[name]()
    model = wrap(copy.deepcopy(bare), x)
    blocks = [*compile_blocks(bare).values(), *compile_blocks(model).values()]
    expected = passes(bare, x)
    found = passes(model, x)
    assert len(found) == len(expected)
    assert all(map(torch.equal, found, expected))
    assert all(block.graph_calls == block.calls == 2 for block in blocks)


def tanh_stack() -> tuple[MorphableModel, Tensor]:
    torch.manual_seed(0)
    halves = [nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)) for _ in range(2)]
    x = torch.randn(4, 6)
    return wrap(nn.Sequential(*halves), x), x


def test_after_fifty_transitions_every_block_still_runs_compiled() -> None:
    model, x = tanh_stack()
    blocks = compile_blocks(model)
    dormant = passes(model, x)
    transitions = 0
    for turn in range(10):
        layer = ("0.0", "1.2")[turn % 2]
        grow(model, layer, "low-rank", ())
        for state in (S.TRAINING, S.GRAFTING, S.CULLED, S.DORMANT):
            model.morphology.transition(layer, 0, state)
            if state is S.GRAFTING:
                model.morphology.set_alpha(layer, 0, 0.5)
            calls = [block.graph_calls for block in blocks.values()]
            found = passes(model, x)
            assert [block.graph_calls for block in blocks.values()] == [n + 2 for n in calls]
            if state is S.GRAFTING:
                with uncompiled(model):
                    torch.testing.assert_close(found, passes(model, x))
            else:
                assert all(map(torch.equal, found, dormant))
            transitions += 1
        transitions += 1  # germinated
    assert transitions == 50
    assert all(block.eager_calls == 0 for block in blocks.values())


def test_under_autocast_compiled_agrees_with_eager() -> None:
    model, x = tanh_stack()
    compile_blocks(model)
    grow(model, "0.0", "bottleneck-mlp", FOSSIL)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = model(x)
        with uncompiled(model):
            expected = model(x)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


# -- sessions -------------------------------------------------------------------------------------

SMALL = {
    "model": {
        "entrypoint": "esper.zoo.models:MLP",
        "arguments": {"inputs": 64, "hidden": [3], "outputs": 10},
    },
    "training": {"compile": True, "epochs": 6, "batchSize": 100},
    "growth": {
        "layers": {"include": ["hidden.0"]},
        "blueprints": {"matchLabels": {"esper.dev/blueprint": "bottleneck-mlp"}},
        "budget": {"parametersPercent": 2000},
        "gates": {"passes": 1, "dwellEpochs": 1, "rampEpochs": 0},
    },
}
"""A session whose one seed is grafted and kept."""


def test_a_session_grows_while_its_blocks_run_compiled(tmp_path: Path) -> None:
    """It decides and learns what an eager one does, and costs its probes' own forwards more."""
    result, watching, prepared = trained({"spec": SMALL}, tmp_path)
    assert "fossilized" in [move.current for move in watching.transitions]
    (block,) = compiled_blocks(prepared.model).values()
    assert block.eager_calls == 0
    assert block.graph_calls == block.calls > 6 * 3
    training = SMALL["training"] | {"compile": False}
    plain, seen, _ = trained({"spec": SMALL | {"training": training}}, tmp_path / "eager")

    def moves(told: Watching) -> list[tuple[object, ...]]:
        return [(t.layer, t.slot, t.epoch, t.current) for t in told.transitions]

    def costs(ended: TrainingResult) -> tuple[int, ...]:
        return ended.flops - ended.flops_trials, ended.flops_monitoring

    assert moves(watching) == moves(seen)
    assert costs(result) == costs(plain)
    assert 0 < result.flops_trials - plain.flops_trials < 0.05 * plain.flops
    for row, other in zip(watching.rows, seen.rows, strict=True):
        assert row["trainLoss"] == pytest.approx(other["trainLoss"], rel=1e-3)
        for layer, other_layer in zip(row["layers"], other["layers"], strict=True):
            # Hooks see what compiled code would hide: without them a layer reads as dead.
            assert layer["activationRank"] == pytest.approx(other_layer["activationRank"], rel=0.05)
            assert layer["activationRank"] > 0


def test_a_killed_run_ends_as_if_it_had_not_been(server, tmp_path: Path) -> None:
    session = changed(
        SESSION,
        spec__training__compile=True,
        spec__growth__layers={"include": ["second"]},
    )
    manifest = write_session(tmp_path, session)

    def run(*argv: object, fault: list[object] | None = None) -> tuple[int, str]:
        ended = server.run(*argv, "--quiet", folder=tmp_path, fault=fault)
        return ended.status, ended.err

    assert run("run", manifest, "--output-dir", "whole") == (0, "")
    fault = ["kill_in_arm", "without", 7]
    assert run("run", manifest, "--output-dir", "killed", fault=fault) == (-signal.SIGKILL, "")
    assert run("run", "--resume", "killed") == (0, "")
    expected, found = left(tmp_path / "whole"), left(tmp_path / "killed")
    assert found == expected
    assert status(tmp_path / "killed")[1]["reason"] == "Succeeded"


def test_without_a_compiler_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import torch._inductor.config as inductor

    from esper.cli.main import main

    monkeypatch.chdir(tmp_path)
    manifest = write_session(tmp_path, changed(SESSION, spec__training__compile=True))
    before = sorted(tmp_path.iterdir())
    with inductor.patch({"cpp.cxx": (str(tmp_path / "no-compiler"),)}):
        assert main(["run", str(manifest), "--output-dir", "D", "--quiet"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        "esper: error: spec.training.compile: got true, and torch.compile does not"
    )
    assert "No working C++ compiler" in line
    assert line.endswith("C++ compiler and Python's headers, and Triton for a GPU")
    assert [p for p in sorted(tmp_path.iterdir()) if p.name != "__pycache__"] == before
