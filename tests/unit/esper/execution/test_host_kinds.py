"""Every kind of host through a seed's life, and what happens when a seed fails."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from esper.core import unwrap, wrap
from esper.core.model_wrapper import LayerSelection
from esper.core.morphology import ROOT
from esper.errors import KernelError
from esper.execution.kasmina_layer import KasminaLinear
from esper.execution.state_layout import SeedLifecycleState as S
from tests.unit.esper.core.growing import GRAFTING
from tests.unit.esper.core.growing import grow as grow_blueprint
from tests.unit.esper.execution.seeds import (
    DORMANT_TO_GRAFTING,
    TO_FOSSIL,
    Scaling,
    grow,
    linear_pair,
)

same = torch.equal

# -- the other kinds of host --------------------------------------------------------------------

KINDS = ("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d", "Embedding")


def every_kind(kind: str) -> tuple[nn.Module, torch.Tensor]:
    """A layer of the kind, not as torch first makes it, and an input for it."""
    layer, x = {
        "Linear": lambda: (nn.Linear(5, 4), torch.randn(3, 7, 5)),
        "Conv1d": lambda: (nn.Conv1d(5, 4, 3, stride=2, padding=1), torch.randn(3, 5, 9)),
        "Conv2d": lambda: (nn.Conv2d(5, 4, 3, groups=1, padding=1), torch.randn(3, 5, 6, 7)),
        "LayerNorm": lambda: (nn.LayerNorm(5), torch.randn(3, 7, 5)),
        "BatchNorm2d": lambda: (nn.BatchNorm2d(5), torch.randn(3, 5, 6, 7)),
        "Embedding": lambda: (nn.Embedding(11, 4, padding_idx=0), torch.randint(11, (3, 7))),
    }[kind]()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer, x


class ReadsOutput(nn.Module):
    """Reads the host's output: a scale a unit, far from zero."""

    def __init__(self, units: int, axis: int) -> None:
        super().__init__()
        self.axis = axis
        self.scale = nn.Parameter(torch.randn(units))

    def forward(self, output: torch.Tensor) -> torch.Tensor:
        shape = [1] * output.dim()
        shape[self.axis] = -1
        return output * self.scale.view(shape)


@pytest.mark.parametrize("alone", [False, True], ids=["inside", "is the model"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_host_through_a_whole_life(kind: str, alone: bool) -> None:
    layer, x = every_kind(kind)
    bare = layer if alone else nn.Sequential(layer)
    wrapped = wrap(bare, x, layers=LayerSelection(types=KINDS), seeds_per_layer=2, copy=True)
    name = ROOT if alone else "0"
    host = wrapped.morphology.layers[name]
    assert type(host).forward is type(layer).forward, "the host's own code"
    assert same(wrapped(x), bare(x))
    axis = 1 if "Conv" in kind or kind == "BatchNorm2d" else -1
    first, second = (ReadsOutput(bare(x).shape[axis], axis) for _ in range(2))
    for slot, seed in enumerate((first, second)):
        wrapped.morphology.germinate(name, slot, seed, kernel="k", source="output")
        wrapped.morphology.transition(name, slot, S.TRAINING)
        assert same(wrapped(x), bare(x))
    for slot in range(2):
        wrapped.morphology.transition(name, slot, S.GRAFTING, alpha=0.5)
    own = bare(x)
    expected = own + 0.5 * first(own) + 0.5 * second(own)
    if kind != "BatchNorm2d":  # whose buffers the two have moved differently by now
        assert torch.allclose(wrapped(x), expected)
    wrapped.eval()
    bare.eval()
    bare.load_state_dict({k: v for k, v in wrapped.state_dict().items() if "grown" not in k})
    own = bare(x)
    grown = wrapped(x)
    assert torch.allclose(grown, own + 0.5 * first(own) + 0.5 * second(own), atol=1e-6)
    for copied in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert same(copied(x), grown)
        copied.morphology.set_alpha(name, 0, 1.0)
        assert not same(copied(x), grown)
        assert same(wrapped(x), grown), "the copy has a layout of its own"
    for slot in range(2):
        wrapped.morphology.transition(name, slot, S.CULLED)
        wrapped.morphology.remove(name, slot)
    assert same(wrapped(x), own)
    assert type(host).forward is type(layer).forward
    assert type(unwrap(wrapped)) is type(bare)


def test_a_class_made_of_a_hosts_class_keeps_its_own_when_seeds_come_and_go() -> None:
    # As sharding does it: the module's class becomes a subclass of what it was.
    bare, wrapped = linear_pair()
    sharded = type("ShardedLinear", (KasminaLinear,), {"sharded": True})
    wrapped[0].__class__ = sharded
    x = torch.randn(3, 5)
    grow(wrapped, "0", Scaling(5, 4), TO_FOSSIL)
    assert wrapped[0].sharded
    assert not same(wrapped(x), bare(x))
    wrapped.morphology.layers["0"].shed()
    assert type(wrapped[0]) is sharded
    assert same(wrapped(x), bare(x))


# -- faults -------------------------------------------------------------------------------------


class Failing(nn.Module):
    """Adds a constant; raises while `broken`."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(()))
        self.broken = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.broken:
            raise torch.OutOfMemoryError("no room\non the device")
        return self.shift + x[..., :4]


def test_the_host_answers_for_a_seed_on_trial_that_raises() -> None:
    bare, wrapped = linear_pair()
    seed = Failing()
    grow(wrapped, "0", seed, DORMANT_TO_GRAFTING)
    wrapped.morphology.set_alpha("0", 0, 1.0)
    record = wrapped.morphology.record("0", 0)
    x = torch.randn(3, 5)
    for faults in (1, 2):
        assert same(wrapped(x), bare(x))
        assert (record.errors, record.fault) == (faults, "OutOfMemoryError: no room on the device")
    seed.broken = False
    assert torch.allclose(wrapped[0](x), bare[0](x) + seed(x))
    assert (record.errors, record.fallbacks) == (0, 2), "faults are counted in a row"
    seed.broken = True
    for _ in range(3):
        assert same(wrapped(x), bare(x))
    assert record.circuit_open
    seed.broken = False
    assert same(wrapped(x), bare(x)), "the circuit stays open"
    assert isinstance(wrapped[0], KasminaLinear)


@pytest.mark.parametrize("states", [DORMANT_TO_GRAFTING, TO_FOSSIL])
@pytest.mark.parametrize("shape", [(3, 3, 4), (1, 3, 4), (3, 1), (4,), ()])
def test_a_seed_whose_output_has_another_shape_than_its_hosts_is_at_fault(shape, states) -> None:
    class Misshapen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scale * torch.ones(shape)

    bare, wrapped = linear_pair()
    grow(wrapped, "0", Misshapen(), states)
    x = torch.randn(3, 5)
    if states is TO_FOSSIL:
        with pytest.raises(KernelError, match="the seed's output is"):
            wrapped(x)
        return
    wrapped.morphology.set_alpha("0", 0, 1.0)
    assert same(wrapped(x), bare(x))
    assert wrapped.morphology.record("0", 0).fault == (
        f"KernelError: the seed's output is {shape}, its host's (3, 4)"
    )


def test_what_a_fossilized_seed_raises_is_raised() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Failing(), TO_FOSSIL)
    with pytest.raises(torch.OutOfMemoryError):
        wrapped(torch.randn(3, 5))
    assert wrapped.morphology.record("0", 0).errors == 0


def test_what_the_host_raises_is_raised_and_no_seeds_fault() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), DORMANT_TO_GRAFTING)
    wrapped.morphology.set_alpha("0", 0, 1.0)
    with pytest.raises(RuntimeError):
        wrapped(torch.randn(3, 6))
    assert wrapped.morphology.record("0", 0).errors == 0


def test_a_model_that_moves_takes_its_alphas_along() -> None:
    _, wrapped = linear_pair()
    grow(wrapped, "0", Scaling(5, 4), DORMANT_TO_GRAFTING)
    wrapped.morphology.set_alpha("0", 0, 0.5)
    x = torch.randn(3, 5)
    half = wrapped(x)
    wrapped.double().float()
    wrapped.morphology.set_alpha("0", 0, 1.0)
    assert not same(wrapped(x), half)


# -- what people do with models -----------------------------------------------------------------


@pytest.mark.parametrize("blueprint", ["bottleneck-mlp", "widen", "squeeze-excitation"])
def test_activation_checkpointing_runs_grafting_seeds_again(blueprint: str) -> None:
    model = wrap(nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4)), torch.randn(2, 3, 5))
    grow_blueprint(model, "2", blueprint, GRAFTING)
    model.morphology.set_alpha("2", 0, 0.5)
    x = torch.randn(2, 3, 5, requires_grad=True)
    found = []
    for checkpointed in (False, True):
        model.zero_grad()
        x.grad = None
        if checkpointed:
            hidden = checkpoint(model[:2], x, use_reentrant=False)
            out = checkpoint(model[2], hidden, use_reentrant=False)
        else:
            out = model(x)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in model.parameters())])
    for plain, again in zip(*found, strict=True):
        assert same(plain, again)


@pytest.mark.parametrize("states", [(), GRAFTING], ids=["dormant", "grafting"])
def test_channels_last_stays_channels_last(states) -> None:
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    bare = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(
        memory_format=torch.channels_last
    )
    model = wrap(bare, x)
    if states:
        grow_blueprint(model, "0", "bottleneck-conv", states)
        model.morphology.set_alpha("0", 0, 0.5)
    assert model(x).is_contiguous(memory_format=torch.channels_last)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
