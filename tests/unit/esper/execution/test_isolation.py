from __future__ import annotations

import random
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.execution.isolation import (
    RandomState,
    borrowed_buffers,
    evaluating,
    preserved_buffers,
    preserved_randomness,
    seed_everything,
)


def draws() -> list[float]:
    """A few draws from every stream; numpy's and Python's normal laws cache one value each."""
    return [
        *torch.rand(3).tolist(),
        *np.random.rand(2).tolist(),
        float(np.random.randn()),
        random.random(),
        random.gauss(0, 1),
    ]


class Counting(nn.Module):
    """Keeps buffers in every way modules do: in place, assigned anew, absent, replaced in shape."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("last", None)
        self.calls: Tensor
        self.average: Tensor
        self.last: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.detach().mean(dim=0)
        self.last = x.detach()[0]
        out: Tensor = self.norm(x)
        return out


def buffer_bits(model: nn.Module) -> dict[str, bytes]:
    return {name: b.detach().numpy().tobytes() for name, b in model.named_buffers()}


# -- random streams -----------------------------------------------------------------------------


def test_without_an_accelerator_no_seed_is_noted_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def stack(*_: object) -> list[str]:
        raise AssertionError("a stack trace, for a device that is not there")

    with preserved_randomness():
        torch.manual_seed(7)
        expected = torch.rand(3)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
        monkeypatch.setattr(traceback, "format_stack", stack)
        seed_everything(7)
        assert torch.equal(torch.rand(3), expected)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 700))
def test_a_captured_state_is_put_back_to_the_bit(seed: int, drawn: int) -> None:
    with preserved_randomness():
        seed_everything(seed)
        for _ in range(drawn % 7):
            draws()
        np.random.rand(drawn)
        state = RandomState.capture()
        first = draws()
        state.apply()
        assert draws() == first


def test_a_captured_state_is_a_copy() -> None:
    with preserved_randomness(1):
        state = RandomState.capture()
        kept = state.torch_cpu.clone(), state.numpy_keys.clone(), state.python
        draws()
        assert torch.equal(state.torch_cpu, kept[0])
        assert torch.equal(state.numpy_keys, kept[1])
        assert state.python == kept[2]


def test_the_same_seed_starts_every_stream_the_same() -> None:
    with preserved_randomness():
        seed_everything(2**63 - 1)
        first = draws()
        seed_everything(2**63 - 1)
        assert draws() == first
        seed_everything(2**63 - 2)
        assert draws() != first


@settings(max_examples=15, deadline=None)
@given(st.none() | st.integers(0, 2**63 - 1))
def test_what_is_drawn_inside_is_not_felt_outside(seed: int | None) -> None:
    with preserved_randomness(99):
        expected = draws()
        seed_everything(99)
        with preserved_randomness(seed):
            inside = draws()
        assert draws() == expected
        # Without a seed the streams go on inside from where they stand.
        assert (inside == expected) == (seed is None or seed == 99)


def test_the_streams_are_put_back_after_an_error() -> None:
    with preserved_randomness(4):
        expected = draws()
        seed_everything(4)
        with pytest.raises(ZeroDivisionError), preserved_randomness(5):
            raise ZeroDivisionError(draws())
        assert draws() == expected


# -- buffers ------------------------------------------------------------------------------------


def with_preserved(model: nn.Module, forward: Callable[[], object]) -> None:
    with preserved_buffers(model):
        forward()


def with_borrowed(model: nn.Module, forward: Callable[[], object]) -> None:
    with borrowed_buffers(model, {}):
        forward()


both = pytest.mark.parametrize("kept", [with_preserved, with_borrowed])


@both
def test_buffers_hold_the_same_bits_whether_changed_in_place_or_assigned(
    kept: Callable[[nn.Module, Callable[[], object]], None],
) -> None:
    model = Counting()
    model(torch.randn(4, 3))
    model.last = None
    before = buffer_bits(model)
    objects = dict(model.named_buffers())
    kept(model, lambda: model(torch.randn(4, 3)))
    assert buffer_bits(model) == before
    assert model.last is None
    assert all(buffer is objects[name] for name, buffer in model.named_buffers())


@both
def test_buffers_are_put_back_after_an_error(
    kept: Callable[[nn.Module, Callable[[], object]], None],
) -> None:
    model = Counting()
    before = buffer_bits(model)

    def failing() -> None:
        model(torch.randn(4, 3))
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kept(model, failing)
    assert buffer_bits(model) == before


@both
def test_a_buffer_that_two_modules_share_stays_shared(
    kept: Callable[[nn.Module, Callable[[], object]], None],
) -> None:
    one, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    other.running_mean = one.running_mean
    model = nn.Sequential(one, other)
    before = buffer_bits(model)
    kept(model, lambda: model(torch.randn(4, 3)))
    assert buffer_bits(model) == before
    assert other.running_mean is one.running_mean


def test_borrowed_buffers_gather_from_one_pass_to_the_next() -> None:
    torch.manual_seed(0)
    model, alone = Counting(), Counting()
    before = buffer_bits(model)
    own: dict[str, Tensor] = {}
    for _ in range(3):
        x = torch.randn(4, 3)
        alone(x)
        with borrowed_buffers(model, own):
            model(x)
        assert buffer_bits(model) == before
    gathered = {name: value for name, value in own.items() if name != "last"}
    expected = {name: value for name, value in alone.named_buffers() if name != "last"}
    assert gathered.keys() == expected.keys()
    assert all(torch.equal(gathered[name], expected[name]) for name in expected)


def test_what_was_borrowed_is_a_copy_of_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2))
    own: dict[str, Tensor] = {}
    with borrowed_buffers(model, own):
        model(torch.randn(4, 2))
    kept = {name: value.clone() for name, value in own.items()}
    model(torch.randn(4, 2) + 5)
    assert all(torch.equal(own[name], kept[name]) for name in own)


# -- modes --------------------------------------------------------------------------------------


def test_each_module_gets_its_own_mode_back() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Dropout())
    model.train()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert [module.training for module in model.modules()] == modes == [True, True, False, True]


def test_modes_come_back_after_an_error() -> None:
    model = nn.Sequential(nn.Dropout())
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert model.training
    assert model[0].training


@both
def test_an_expanded_buffer_is_no_obstacle(kept: Callable[..., None]) -> None:
    model = nn.Linear(2, 2)
    buffer = torch.ones(1).expand(3)
    model.register_buffer("wide", buffer)
    kept(model, lambda: None)
    assert model.wide is buffer


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_a_scripted_module_gets_its_mode_and_its_buffers_back() -> None:
    model = nn.Sequential(torch.jit.script(nn.BatchNorm1d(3)), nn.Linear(3, 3))
    before, own = buffer_bits(model), {}
    with borrowed_buffers(model, own):
        model(torch.randn(4, 3))
    assert buffer_bits(model) == before
    with borrowed_buffers(model, own):
        assert buffer_bits(model) != before
    with evaluating(model):
        assert not model[0].training
    assert model[0].training
