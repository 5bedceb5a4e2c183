"""What a grafted seed costs against what a person would write, and a training one's shadow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.execution_handwritten import SEEDS, Grown, GrownBehind, Pair, Widened
from benchmarks.execution_models import CASES, CLASSES, Case
from benchmarks.execution_running import (
    BATCHES,
    LEARNING_RATE,
    Makers,
    built,
    running,
    step,
    timed_ways,
)
from benchmarks.execution_timing import Bench, Call, Timings, comparison, timed
from esper.contracts.blueprints import CATALOGUE, builtin, lower
from esper.contracts.ir import source_of
from esper.core import wrap
from esper.core.model_wrapper import MorphableModel
from esper.execution.builders import build
from esper.execution.state_layout import SeedLifecycleState
from esper.execution.trials import shadow_gradients

ALPHA = 0.5
RANK = 8
LORA = "low-rank"
LORA_LIMIT = 1.0
LIMIT = 1.05
KINDS = ("Linear", "Conv2d")
SHADOWED = {"Linear": "bottleneck-mlp", "Conv2d": "bottleneck-conv"}
"""Whose shadow is timed, by kind of host."""

# They look across positions, so their dense host has some.
POSITIONED = frozenset({"squeeze-excitation", "attention"})
WIDENING = "widen"

COMPARED = tuple((entry.name, kind) for entry in CATALOGUE for kind in KINDS if kind in entry.hosts)
"""The blueprints of the catalogue, on each of these kinds of host that they fit."""


def grafting(bench: Bench, compared: Sequence[tuple[str, str]] = COMPARED) -> dict[str, Timings]:
    """A seed at constant alpha, and what a person would write or peft has in its place.

    The arms of a comparison share all parameters, and are checked to give the same output.
    """
    found: dict[str, Timings] = {}
    for blueprint, kind in compared:
        for batch in BATCHES:
            bare, x = host_of(blueprint, kind, batch, bench.device)
            makers = grafting_makers(bare, x, blueprint, kind)
            refuse_different(built(makers, bench), x)
            for way, timings in timed_ways(makers, x, bench).items():
                found[f"{blueprint}-{kind.lower()}-{way}-{batch}"] = timings
    return found


def grafting_figures(name: str, timings: Timings) -> dict[str, Any]:
    """Of `grafting`: low-rank against peft's LoRA, the others against what is written by hand."""
    limit = LORA_LIMIT if name.startswith(LORA) else LIMIT
    return comparison(timings, "grafted", "written", "again", limit)


def shadow(bench: Bench, cases: Sequence[Case] = CASES[:2]) -> dict[str, Timings]:
    """A training step, and the shadow pass of one training seed with its optimiser's step."""
    found: dict[str, Timings] = {}
    for case in cases:
        for batch in BATCHES:
            x = case.inputs(batch).to(bench.device)
            model = wrap(case.seeded().to(bench.device), x)
            layer, host = next(iter(model.morphology.layers.items()))
            germinate(model, layer, SHADOWED[host.host_class.__name__])
            model.morphology.transition(layer, 0, SeedLifecycleState.TRAINING)
            own = model.morphology.host_parameters()
            run = step(model, torch.optim.AdamW(own, lr=LEARNING_RATE, fused=True), x)
            calls = {"step": run, "again": run, "shadow": shadow_step(model, layer, x)}
            with running("step", {"model": model}):
                found[f"{case.name}-{batch}"] = timed(calls, bench)
    return found


def shadow_figures(name: str, timings: Timings) -> dict[str, Any]:
    """Of `shadow`: its share of a step."""
    del name
    return comparison(timings, "shadow", "step", "again")


def grafting_makers(bare: nn.Module, x: Tensor, blueprint: str, kind: str) -> Makers:
    """The arms on one kind of host, all with one set of parameters of their own.

    They are `written`, the same `again`, and `grafted`.
    """
    owner = grafted_model(deepcopy(bare), x, blueprint)

    def written() -> nn.Module:
        host = deepcopy(bare)
        model = lora(host) if blueprint == LORA else handwritten(host, blueprint, kind)
        return share(owner, model.to(x.device))

    def grafted() -> nn.Module:
        return share(owner, grafted_model(deepcopy(bare), x, blueprint))

    return {"written": written, "again": written, "grafted": grafted}


def host_of(blueprint: str, kind: str, batch: int, device: str) -> tuple[nn.Module, Tensor]:
    """A model of one host (two where units are put between them), and its inputs."""
    torch.manual_seed(0)
    if kind == "Conv2d":
        x, build_host = torch.randn(batch, 32, 16, 16), lambda: nn.Conv2d(32, 32, 3, padding=1)
    elif blueprint in POSITIONED:
        x, build_host = torch.randn(batch, 16, 64), lambda: nn.Linear(64, 64)
    else:
        x, build_host = torch.randn(batch, 256), lambda: nn.Linear(256, 256)
    pair = blueprint == WIDENING
    model = Pair(build_host(), build_host()) if pair else nn.Sequential(build_host())
    return model.to(device), x.to(device)


def grafted_model(bare: nn.Module, x: Tensor, blueprint: str) -> MorphableModel:
    """`bare`, wrapped, with a seed at ALPHA in its last layer."""
    model = wrap(bare, x)
    layer = list(model.morphology.layers)[-1]
    germinate(model, layer, blueprint)
    for parameter in model.morphology.seed_parameters(layer, 0):
        nn.init.normal_(parameter, std=0.05)
    model.morphology.transition(layer, 0, SeedLifecycleState.TRAINING)
    model.morphology.transition(layer, 0, SeedLifecycleState.GRAFTING, alpha=ALPHA)
    return model


def germinate(model: MorphableModel, layer: str, blueprint: str) -> None:
    """Put a catalogue blueprint, with its default arguments, into slot 0 of a layer."""
    target = model.morphology.target(layer)
    graph = lower(builtin(blueprint, {}), target)
    model.morphology.germinate(
        layer,
        0,
        build(graph, target, generator_seed=0),
        kernel=blueprint,
        source=source_of(graph),
        graph=graph,
    )


def handwritten(bare: nn.Module, blueprint: str, kind: str) -> nn.Module:
    """What a person would make of `bare` to have the blueprint in it; it takes the host over."""
    host = list(bare.children())[-1]
    seed = SEEDS[blueprint, kind](host)
    if isinstance(bare, Pair):
        return Widened(bare.producer, bare.consumer, seed, ALPHA)
    behind = source_of(builtin(blueprint, {}).graph) == "output"
    return nn.Sequential((GrownBehind if behind else Grown)(host, seed, ALPHA))


def lora(bare: nn.Module) -> nn.Module:
    """`bare` with peft's LoRA of the same rank and scale on its layer."""
    # It takes longer to import than torch, and most processes need it not.
    from peft import LoraConfig, inject_adapter_in_model

    # lora_alpha / r is what peft multiplies with.
    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA * RANK,
        lora_dropout=0.0,
        target_modules=["0"],  # type: ignore[arg-type]
    )
    return inject_adapter_in_model(config, bare)


def share(owner: nn.Module, other: nn.Module) -> nn.Module:
    """`other`, given the parameters of `owner` one for one in order.

    Raises:
        ValueError: the two do not have parameters of the same shapes.
    """
    given, own = list(owner.parameters()), list(other.named_parameters())
    if [p.shape for p in given] != [p.shape for _, p in own]:
        shapes = [(name, tuple(p.shape)) for name, p in own]
        raise ValueError(f"parameters: got {shapes}; allowed: {[tuple(p.shape) for p in given]}")
    for parameter, (name, _) in zip(given, own, strict=True):
        path, _, key = name.rpartition(".")
        other.get_submodule(path)._parameters[key] = parameter
    return other


def refuse_different(arms: Mapping[str, nn.Module], x: Tensor) -> None:
    """Check that all arms compute the same function.

    Raises:
        AssertionError: two outputs differ by more than rounding.
    """
    with running("forward", arms):
        outputs = [model(x) for model in arms.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-4)


def shadow_step(model: MorphableModel, layer: str, x: Tensor) -> Call:
    """One shadow pass of a training seed and a step of its optimiser, as Tolaria has them."""
    targets = torch.arange(len(x), device=x.device) % CLASSES
    parameters = model.morphology.seed_parameters(layer, 0)
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, fused=True)
    buffers: dict[str, Tensor] = {}

    def run() -> None:
        with model.morphology.trialling(layer, 0):
            _, gradients = shadow_gradients(
                model,
                parameters,
                lambda: F.cross_entropy(model(x), targets),
                random_seed=0,
                buffers=buffers,
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        optimizer.zero_grad()

    return run
