"""Every kind of host with every argument that torch gives it, under every blueprint that fits."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn

from esper.contracts.catalogue import CATALOGUE
from esper.core import MorphableModel, unwrap, wrap
from esper.core.model_wrapper import LayerSelection
from esper.errors import BlueprintError
from esper.execution.builders import build
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import FOSSIL, GRAFTING, grow

ALL = LayerSelection(types=("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d", "Embedding"))
SMALL: dict[str, dict[str, int]] = {
    "low-rank": {"rank": 2},
    "bottleneck-mlp": {"units": 3},
    "bottleneck-conv": {"channels": 3},
    "squeeze-excitation": {"units": 3},
    "attention": {"channels": 4, "heads": 2},
}
PAIRS = [
    (kind, entry.name)
    for entry in CATALOGUE
    for kind in entry.hosts
    if entry.name not in ("noop", "widen")  # the one adds nothing, the other needs a producer
]
GENERATED = settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.filter_too_much]
)

Case = tuple[nn.Module, torch.Tensor]


@st.composite
def windows(draw: Callable[..., Any], axes: int) -> dict[str, Any]:
    """Arguments of a convolution over `axes` axes, as people write them."""

    def sizes(least: int, most: int) -> Any:
        one = st.integers(least, most)
        return draw(one | st.tuples(*[one] * axes))

    groups = draw(st.sampled_from([(4, 6, 1), (4, 6, 2), (4, 4, 4), (3, 6, 3)]))
    padding = draw(st.sampled_from(["same", "valid", "number"]))
    return {
        "in_channels": groups[0],
        "out_channels": groups[1],
        "groups": groups[2],
        "kernel_size": sizes(1, 3),
        "stride": 1 if padding == "same" else sizes(1, 3),
        "padding": sizes(0, 2) if padding == "number" else padding,
        "dilation": sizes(1, 2),
        "padding_mode": draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
        "bias": draw(st.booleans()),
    }


@st.composite
def cases(draw: Callable[..., Any], kind: str) -> Case:
    """A layer of the kind, its parameters anything but new, and an input with a batch."""
    torch.manual_seed(draw(st.integers(0, 99)))
    batch = draw(st.integers(1, 3))
    long, wide = draw(st.integers(7, 9)), draw(st.integers(7, 9))
    places = draw(st.sampled_from([(), (5,), (2, 3)]))
    if kind == "Linear":
        layer: nn.Module = nn.Linear(5, draw(st.integers(2, 6)), bias=draw(st.booleans()))
        x = torch.randn(batch, *places, 5)
    elif kind == "Conv1d":
        layer = nn.Conv1d(**draw(windows(1)))
        x = torch.randn(batch, layer.in_channels, long)
    elif kind == "Conv2d":
        layer = nn.Conv2d(**draw(windows(2)))
        x = torch.randn(batch, layer.in_channels, long, wide)
        if draw(st.booleans()):
            layer, x = (part.to(memory_format=torch.channels_last) for part in (layer, x))
    elif kind == "LayerNorm":
        layer = nn.LayerNorm(6, eps=draw(st.sampled_from([1e-5, 0.1])), bias=draw(st.booleans()))
        x = torch.randn(batch, *places, 6)
    elif kind == "BatchNorm2d":
        layer = nn.BatchNorm2d(
            4,
            momentum=draw(st.sampled_from([None, 0.1])),
            track_running_stats=draw(st.booleans()),
        )
        x = torch.randn(batch + 1, 4, long, wide)
    else:
        layer = nn.Embedding(
            9,
            6,
            padding_idx=draw(st.sampled_from([None, 0, -1])),
            **draw(st.sampled_from([{}, {"scale_grad_by_freq": True}, {"sparse": True}])),
        )
        x = torch.randint(9, (batch, *places))
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, x


def wrapped_with(case: Case, blueprint: str, states: tuple[S, ...] = GRAFTING) -> MorphableModel:
    """A wrapped copy of the layer with one seed; the example is dropped where none fits."""
    layer, x = case
    wrapped = wrap(nn.Sequential(layer), x, layers=ALL, copy=True)
    try:
        grow(wrapped, "0", blueprint, states, **SMALL.get(blueprint, {}))
    except BlueprintError:
        assume(False)
    return wrapped


def bare(case: Case) -> nn.Module:
    return nn.Sequential(copy.deepcopy(case[0]))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output, and the host's gradients of a step."""
    out = model(x)
    out.square().sum().backward()
    own = [p.grad.to_dense() for n, p in model.named_parameters() if "grown" not in n]
    return [out.detach(), *own]


def seeds_part(wrapped: MorphableModel, x: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
    branch = wrapped.morphology.layers["0"].site.branch(0)
    return branch.module(host if branch.source == "output" else x)


@pytest.mark.parametrize(("kind", "blueprint"), PAIRS)
@GENERATED
@given(data=st.data())
def test_alpha_at_its_ends_is_exact(kind: str, blueprint: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    wrapped, reference = wrapped_with(case, blueprint), bare(case)
    x = case[1]
    for one, other in zip(gradients(wrapped, x), gradients(reference, x), strict=True):
        assert torch.equal(one, other), "at 0 the host, to the bit"
    wrapped.morphology.set_alpha("0", 0, 1.0)
    host = reference(x)
    grown = wrapped(x)
    assert torch.equal(grown, host + seeds_part(wrapped, x, host).to(host.dtype))
    wrapped.morphology.transition("0", 0, S.CULLED)
    wrapped.morphology.remove("0", 0)
    wrapped.zero_grad()
    reference.zero_grad()
    for one, other in zip(gradients(wrapped, x), gradients(reference, x), strict=True):
        assert torch.equal(one, other), "once culled the host, to the bit"


@contextlib.contextmanager
def mode(name: str, *models: nn.Module) -> Iterator[None]:
    for model in models:
        model.train(name != "eval")
    with (
        torch.no_grad() if name == "no_grad" else contextlib.nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"),
    ):
        yield


@pytest.mark.parametrize(("kind", "blueprint"), PAIRS)
@GENERATED
@given(data=st.data())
def test_a_grafted_seed_counts_in_every_mode(
    kind: str, blueprint: str, data: st.DataObject
) -> None:
    case = data.draw(cases(kind))
    wrapped, reference = wrapped_with(case, blueprint), bare(case)
    wrapped.morphology.set_alpha("0", 0, 0.5)
    for name in ("train", "eval", "no_grad", "autocast"):
        with mode(name, wrapped, reference):
            host, grown = reference(case[1]), wrapped(case[1])
            expected = host + 0.5 * seeds_part(wrapped, case[1], host).to(host.dtype)
        assert not torch.equal(grown, host), name
        assert grown.dtype == host.dtype
        scale = float(expected.abs().max())
        assert torch.allclose(
            grown.float(), expected.float(), atol=scale * (0.02 if name == "autocast" else 1e-5)
        ), name


@pytest.mark.parametrize(("kind", "blueprint"), PAIRS)
@GENERATED
@given(data=st.data())
def test_what_is_saved_is_what_is_loaded(kind: str, blueprint: str, data: st.DataObject) -> None:
    case = data.draw(cases(kind))
    wrapped = wrapped_with(case, blueprint, FOSSIL)
    wrapped.eval()
    expected = wrapped(case[1])
    state = wrapped.state_dict()
    dense = {name: tensor.contiguous() for name, tensor in state.items()}
    for loaded in (state, safetensors.torch.load(safetensors.torch.save(dense))):
        fresh = wrap(nn.Sequential(case[0]), case[1], layers=ALL, copy=True)
        target = fresh.morphology.target("0")
        graph = wrapped.morphology.seed_graph("0", 0)
        assert graph is not None
        fresh.morphology.restore(
            wrapped.morphology.structure(),
            lambda _, graph=graph, target=target: build(graph, target, generator_seed=5),
        )
        fresh.load_state_dict(loaded)
        assert torch.equal(fresh.eval()(case[1]), expected)


@pytest.mark.parametrize(("kind", "blueprint"), PAIRS)
@GENERATED
@given(data=st.data())
def test_copied_and_unwrapped_in_any_order(kind: str, blueprint: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(("copy", "cull", "fossilize")))
    case = data.draw(cases(kind))
    layer, x = case
    model = wrap(nn.Sequential(layer), x, layers=ALL, seeds_per_layer=2, copy=True)
    try:
        for slot in range(2):
            grow(model, "0", blueprint, GRAFTING, slot=slot, **SMALL.get(blueprint, {}))
    except BlueprintError:
        assume(False)
    for step in order:
        if step == "copy":
            model = copy.deepcopy(model)
        elif step == "cull":
            model.morphology.transition("0", 0, S.CULLED)
            model.morphology.remove("0", 0)
        else:
            model.morphology.transition("0", 1, S.FOSSILIZED)
    model.eval()
    expected = model(x)
    left = copy.deepcopy(model)
    plain = unwrap(model)
    assert not isinstance(plain, MorphableModel)
    scale = max(1.0, float(expected.abs().max()))
    assert torch.allclose(plain(x), expected, atol=1e-5 * scale)
    assert torch.equal(left(x), expected), "the copy is still wrapped"
    left.morphology.layers["0"].shed()
    assert torch.equal(unwrap(left)(x), bare(case).eval()(x))
