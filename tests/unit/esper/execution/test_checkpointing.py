"""Activation checkpointing runs a forward twice; a seed is healthy or at fault in both alike."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint

from esper.core import MorphableModel, wrap
from esper.execution.checkpointing import current_region
from esper.execution.state_layout import SeedLifecycleState as S
from esper.execution.state_layout import SlotRecord
from tests.unit.esper.core.growing import GRAFTING, grow

REENTRANT = pytest.mark.parametrize("reentrant", [False, True])


def pair(layer: str, blueprint: str | nn.Module) -> tuple[nn.Module, MorphableModel, SlotRecord]:
    """A bare net, and its copy with a grafting seed that counts by half."""
    torch.manual_seed(0)
    bare = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    model = wrap(bare, torch.randn(2, 6), copy=True)
    graft(model, layer, blueprint)
    return bare, model, model.morphology.record(layer, 0)


def graft(model: MorphableModel, layer: str, blueprint: str | nn.Module, slot: int = 0) -> None:
    if isinstance(blueprint, str):
        grow(model, layer, blueprint, GRAFTING, slot=slot)
    else:
        model.morphology.germinate(layer, slot, blueprint, kernel="k")
        for state in GRAFTING:
            model.morphology.transition(layer, slot, state)
    model.morphology.set_alpha(layer, slot, 0.5)


def gradients(model: nn.Module, run: Callable[[], torch.Tensor]) -> list[torch.Tensor | None]:
    """The host's gradients after `run` and a backward."""
    model.zero_grad()
    run().square().sum().backward()
    return [p.grad for name, p in model.named_parameters() if ".grown." not in name]


class Unsteady(nn.Module):
    """Raises in the calls, counted from 0, that `raises` names, having saved a tensor before."""

    def __init__(self, raises: Callable[[int], bool], inputs: int = 6, outputs: int = 4) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs)
        self.second = nn.Linear(outputs, outputs)
        self.raises = raises
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        call, self.calls = self.calls, self.calls + 1
        hidden = torch.tanh(self.first(x))
        if self.raises(call):
            raise torch.OutOfMemoryError("no room")
        return self.second(hidden)


def always(call: int) -> bool:
    return True


# -- healthy seeds ------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize(
    ("layer", "blueprint"),
    [(layer, name) for name in ("bottleneck-mlp", "low-rank", "affine") for layer in "02"]
    + [("2", "widen")],
)
def test_a_healthy_seed_has_no_faults(layer, blueprint, early_stop, reentrant) -> None:
    _, model, record = pair(layer, blueprint)
    for _ in range(4):
        x = torch.randn(2, 6, requires_grad=True)
        plain = gradients(model, lambda x=x: model(x))
        with checkpointing.set_checkpoint_early_stop(early_stop):
            again = gradients(model, lambda x=x: checkpoint(model, x, use_reentrant=reentrant))
        torch.testing.assert_close(plain, again)
    assert (record.errors, record.fallbacks, record.fault) == (0, 0, None)


@REENTRANT
def test_two_seeds_of_one_layer_have_no_faults(reentrant: bool) -> None:
    model = wrap(nn.Sequential(nn.Linear(6, 3)), torch.randn(2, 6), seeds_per_layer=2)
    for slot in (0, 1):
        graft(model, "0", "bottleneck-mlp", slot)
    for _ in range(4):
        x = torch.randn(2, 6, requires_grad=True)
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    assert [model.morphology.record("0", slot).fallbacks for slot in (0, 1)] == [0, 0]


class Shared(nn.Module):
    """Calls one block four times, each in a checkpoint of its own."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 6)
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.reentrant = reentrant
        self.checkpointed = True

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(4):
            if self.checkpointed:
                x = checkpoint(self.block, x, use_reentrant=self.reentrant)
            else:
                x = self.block(x)
        return x


def shared(seed: str | nn.Module, *, reentrant: bool = False) -> tuple[MorphableModel, SlotRecord]:
    torch.manual_seed(0)
    model = wrap(Shared(reentrant), torch.randn(2, 6))
    graft(model, "block.2", seed)
    return model, model.morphology.record("block.2", 0)


@REENTRANT
def test_a_seed_in_a_block_called_four_times_has_no_faults(reentrant: bool) -> None:
    model, record = shared("bottleneck-mlp", reentrant=reentrant)
    for _ in range(3):
        x = torch.randn(2, 6)
        again = gradients(model, lambda x=x: model(x))
        model.checkpointed = False
        torch.testing.assert_close(gradients(model, lambda x=x: model(x)), again)
        model.checkpointed = True
    assert (record.errors, record.fallbacks) == (0, 0)


# -- faults -------------------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("layer", ["0", "2"])
def test_the_host_answers_for_a_seed_that_always_raises(layer: str, reentrant: bool) -> None:
    seed = Unsteady(always, *((6, 4) if layer == "0" else (4, 3)))
    bare, model, record = pair(layer, seed)
    for step in range(5):
        x = torch.randn(2, 6, requires_grad=True)
        got = gradients(model, lambda x=x: checkpoint(model, x, use_reentrant=reentrant))
        assert all(map(torch.equal, got, gradients(bare, lambda x=x: bare(x))))
        assert record.errors == record.fallbacks == min(step + 1, 3), "each fault counts once"
    assert record.circuit_open
    assert seed.calls == (5 if reentrant else 3), "an open circuit asks no more"
    model.morphology.transition(layer, 0, S.CULLED)
    assert model.morphology.layers[layer].live == ()


def test_a_fault_of_the_first_run_alone_leaves_the_seed_out_of_both() -> None:
    seed = Unsteady(lambda call: call == 0)
    bare, model, record = pair("0", seed)
    x = torch.randn(2, 6, requires_grad=True)
    got = gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert all(map(torch.equal, got, gradients(bare, lambda: bare(x))))
    assert (seed.calls, record.errors) == (1, 1)
    gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert (record.errors, record.fallbacks) == (0, 1), "it works again"


def test_a_fault_of_the_first_run_alone_does_no_harm_to_a_reentrant_checkpoint() -> None:
    _, model, record = pair("0", Unsteady(lambda call: call == 0))
    x = torch.randn(2, 6, requires_grad=True)
    gradients(model, lambda: checkpoint(model, x, use_reentrant=True))
    assert (record.errors, record.fallbacks) == (1, 1), "repeating a forward clears nothing"


def test_a_fault_of_a_reentrant_second_run_alone_is_answered_and_counted() -> None:
    _, model, record = pair("0", Unsteady(lambda call: call == 1))
    x = torch.randn(2, 6, requires_grad=True)
    gradients(model, lambda: checkpoint(model, x, use_reentrant=True))
    assert record.fallbacks == 1


def test_a_fault_of_the_second_run_alone_is_raised_for_the_output_has_the_seed_already() -> None:
    _, model, record = pair("0", Unsteady(lambda call: call == 1))
    x = torch.randn(2, 6, requires_grad=True)
    with pytest.raises(torch.OutOfMemoryError):
        gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
    assert record.fault == "OutOfMemoryError: no room"


@pytest.mark.parametrize("faulty", [{1}, {0, 2}, {1, 2, 3}, {0, 1, 2}, {0, 1, 2, 3}])
def test_each_run_of_a_shared_block_leaves_out_what_its_first_one_did(faulty: set[int]) -> None:
    model, record = shared(Unsteady(lambda call: call in faulty, 6, 6))
    seed = model.morphology.seed_module("block.2", 0)
    x = torch.randn(2, 6)
    got = gradients(model, lambda: model(x))
    faults = record.fallbacks
    assert faults == min(3, len(faulty))
    opened = record.circuit_open

    # Without checkpoints, the same calls left out.
    seed.calls = 0
    model.checkpointed = False
    model.morphology.clear_faults("block.2", 0)
    for part in model.morphology.layers["block.2"].live:
        part.failing = False
    torch.testing.assert_close(got, gradients(model, lambda: model(x)))
    assert record.circuit_open == opened
    assert faulty != {1, 2, 3} or opened


def test_steps_gathered_before_one_backward_are_each_run_again_as_they_were() -> None:
    seed = Unsteady(lambda call: call in {1, 2, 3})
    _, model, record = pair("0", seed)
    batches = [torch.randn(2, 6, requires_grad=True) for _ in range(6)]
    model.zero_grad()
    losses = [checkpoint(model, x, use_reentrant=False).square().sum() for x in batches]
    assert record.circuit_open
    torch.stack(losses).sum().backward()
    assert seed.calls == 5, "asked in the first four runs, and again in the one that it is part of"


def test_a_checkpoint_inside_a_checkpoint() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Linear(6, 6)
            self.inner = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

        def outer(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tanh(checkpoint(self.inner, x, use_reentrant=False))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return checkpoint(self.outer, self.stem(x), use_reentrant=False)

    torch.manual_seed(0)
    bare = Nested()
    x = torch.randn(2, 6)
    for seed in ("bottleneck-mlp", Unsteady(always, 6, 6)):
        model = wrap(bare, x, copy=True)
        graft(model, "inner.2", seed)
        record = model.morphology.record("inner.2", 0)
        for step in range(5):
            got = gradients(model, lambda model=model: model(x))
            assert record.fallbacks == (0 if isinstance(seed, str) else min(3, step + 1))
            if not isinstance(seed, str):
                assert all(map(torch.equal, got, gradients(bare, lambda: bare(x))))


def test_a_widening_seed_whose_producer_lies_in_another_region() -> None:
    _, model, record = pair("2", "widen")
    x = torch.randn(2, 6, requires_grad=True)

    def run() -> torch.Tensor:
        hidden = checkpoint(model[0], x, use_reentrant=False)
        return checkpoint(lambda h: model[2](model[1](h)), hidden, use_reentrant=False)

    torch.testing.assert_close(gradients(model, run), gradients(model, lambda: model(x)))
    assert record.fallbacks == 0


# -- torch's own --------------------------------------------------------------------------------


def test_a_region_is_found_where_torch_has_one_and_nowhere_else() -> None:
    """What torch keeps of a region is private to it: this tells when it has moved."""
    seen: list[bool | None] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        region = current_region()
        seen.append(region and region.recomputing)
        return x.square().sum()

    x = torch.ones(2, requires_grad=True)
    checkpoint(look, x, use_reentrant=False).backward()
    checkpoint(look, x, use_reentrant=True).backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
        look(x)
    look(x)
    assert seen == [False, True, None, None, None, None]


def test_where_torch_records_regions_otherwise_a_seed_is_asked_again(monkeypatch) -> None:
    monkeypatch.setattr("esper.execution.checkpointing._top_hooks", None)
    bare, model, record = pair("0", Unsteady(always))
    x = torch.randn(2, 6, requires_grad=True)
    for _ in range(2):
        got = gradients(model, lambda: checkpoint(model, x, use_reentrant=False))
        assert all(map(torch.equal, got, gradients(bare, lambda: bare(x))))
    assert record.fallbacks == 2
