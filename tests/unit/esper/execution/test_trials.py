from __future__ import annotations

import copy
import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from esper.core import MorphableModel, wrap
from esper.execution.isolation import seed_everything
from esper.execution.state_layout import SeedLifecycleState as S
from esper.execution.trials import shadow_gradients
from tests.unit.esper.core.growing import grow


@dataclass(frozen=True)
class Case:
    """A net with one seed in training, and the batches it sees."""

    model: MorphableModel
    site: tuple[str, int]
    batches: list[tuple[Tensor, Tensor]]

    @property
    def seed(self) -> list[nn.Parameter]:
        return self.model.morphology.seed_parameters(*self.site)


def linear_net(width: int, dropout: float) -> tuple[nn.Module, tuple[int, ...], str]:
    model = nn.Sequential(
        nn.Linear(4, width),
        nn.BatchNorm1d(width),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.Linear(width, 3),
    )
    return model, (4,), "0"


def convolutional_net(width: int, dropout: float) -> tuple[nn.Module, tuple[int, ...], str]:
    model = nn.Sequential(
        nn.Conv2d(2, width, 3, padding=1),
        nn.BatchNorm2d(width),
        nn.Dropout2d(dropout),
        nn.ReLU(),
        nn.Conv2d(width, 2, 3, bias=False),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(32, 3),
    )
    return model, (2, 6, 6), "4"


def make(kind: str, width: int, dropout: float, seed: int, *, last: bool = False) -> Case:
    torch.manual_seed(seed)
    model, shape, layer = (linear_net if kind == "linear" else convolutional_net)(width, dropout)
    layer = {"linear": "4", "convolutional": "7"}[kind] if last else layer
    wrapped = wrap(model, torch.randn(2, *shape))
    blueprint = "bottleneck-mlp" if last or kind == "linear" else "bottleneck-conv"
    arguments = {"units": 3} if blueprint == "bottleneck-mlp" else {"channels": 2}
    grow(wrapped, layer, blueprint, (S.TRAINING,), **arguments)
    batches = [(torch.randn(5, *shape), torch.randint(3, (5,))) for _ in range(3)]
    return Case(wrapped.train(), (layer, 0), batches)


def shadow(
    case: Case, x: Tensor, y: Tensor, *, seed: int = 0, own: dict[str, Tensor] | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    with case.model.morphology.trialling(*case.site):
        return shadow_gradients(
            case.model,
            case.seed,
            lambda: F.cross_entropy(case.model(x), y),
            random_seed=seed,
            buffers={} if own is None else own,
        )


def course(case: Case, *, trying: bool) -> list[bytes]:
    """Bits of everything the host is and does over a few batches, its seed on trial or not."""
    seed_everything(11)
    hosts = case.model.morphology.host_parameters()
    optimizer = torch.optim.SGD(hosts, lr=0.1, momentum=0.9)
    own: dict[str, Tensor] = {}
    seen: list[Tensor] = []
    for number, (x, y) in enumerate(case.batches):
        if trying:
            shadow(case, x, y, seed=number, own=own)
        output = case.model(x)
        F.cross_entropy(output, y).backward()
        seen += [output, *(p.grad for p in hosts if p.grad is not None)]
        assert all(parameter.grad is None for parameter in case.seed)
        optimizer.step()
        optimizer.zero_grad()
        seen += [*hosts, *case.model.buffers(), torch.get_rng_state()]
        seen += [torch.from_numpy(np.random.rand(2)), torch.tensor(random.random())]
    return [tensor.detach().clone().numpy().tobytes() for tensor in seen]


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["linear", "convolutional"]),
    st.integers(1, 6),
    st.sampled_from([0.0, 0.3]),
    st.integers(0, 1000),
    st.booleans(),
)
def test_the_host_is_the_same_to_the_bit_with_and_without_a_trial(
    kind: str, width: int, dropout: float, seed: int, last: bool
) -> None:
    case = make(kind, width, dropout, seed, last=last)
    other = copy.deepcopy(case)
    assert course(case, trying=True) == course(other, trying=False)


@pytest.mark.parametrize("kind", ["linear", "convolutional"])
def test_the_seeds_gradients_are_those_of_a_model_that_has_it(kind: str) -> None:
    case = make(kind, 4, 0.0, 1)
    x, y = case.batches[0]
    loss, gradients = shadow(case, x, y)
    assert loss.dim() == 0
    assert not loss.requires_grad

    twin = copy.deepcopy(case)
    twin.model.morphology.transition(*twin.site, S.GRAFTING, alpha=1.0)
    twin.model.morphology.transition(*twin.site, S.FOSSILIZED)
    expected = F.cross_entropy(twin.model(x), y)
    expected.backward()
    torch.testing.assert_close(loss, expected.detach())
    for gradient, parameter in zip(gradients, twin.seed, strict=True):
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad)
    assert any(bool(gradient.any()) for gradient in gradients if gradient is not None)


def test_dropout_in_the_shadow_draws_from_its_own_stream() -> None:
    case = make("linear", 6, 0.5, 2)
    x, y = case.batches[0]
    one, same, other = (float(shadow(case, x, y, seed=n)[0]) for n in (1, 1, 2))
    assert one == same
    assert one != other


def test_the_seed_gathers_the_statistics_of_its_own_activations() -> None:
    case = make("linear", 4, 0.0, 3)
    own: dict[str, Tensor] = {}
    before = [buffer.clone() for buffer in case.model.buffers()]
    for x, y in case.batches:
        shadow(case, x, y, own=own)
    assert all(map(torch.equal, before, case.model.buffers()))
    assert int(own["1.num_batches_tracked"]) == 3
    assert not torch.equal(own["1.running_mean"], case.model.get_buffer("1.running_mean"))


def test_a_parameter_that_the_loss_does_not_depend_on_has_no_gradient() -> None:
    case = make("linear", 4, 0.0, 4)
    x, y = case.batches[0]
    apart = nn.Parameter(torch.ones(2))
    _, gradients = shadow_gradients(
        case.model,
        [apart, next(case.model.parameters())],
        lambda: F.cross_entropy(case.model(x), y),
        random_seed=0,
        buffers={},
    )
    assert gradients[0] is None
    assert gradients[1] is not None
    assert apart.grad is None


def test_gradients_have_the_layout_of_their_parameters() -> None:
    # Inputs in channels last make torch give a convolution's gradient in channels last, and a
    # sum a bias's as one number repeated; a fused optimiser would take either for something else.
    layer = nn.Conv2d(3, 4, 3)
    x = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    _, gradients = shadow_gradients(
        layer, list(layer.parameters()), lambda: layer(x).sum(), random_seed=0, buffers={}
    )
    layer(x).sum().backward()
    for gradient, parameter in zip(gradients, layer.parameters(), strict=True):
        assert gradient is not None
        assert gradient.stride() == parameter.stride()
        torch.testing.assert_close(gradient, parameter.grad)

    offset = nn.Parameter(torch.zeros(5))
    _, (spread,) = shadow_gradients(
        layer, [offset], lambda: offset.sum(), random_seed=0, buffers={}
    )
    assert spread is not None
    assert spread.stride() == (1,)
    assert spread.tolist() == [1.0] * 5


def test_streams_and_buffers_are_put_back_when_the_loss_fails() -> None:
    case = make("linear", 4, 0.3, 5)
    before = [buffer.clone() for buffer in case.model.buffers()]
    seed_everything(1)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="batch_size"):
        shadow(case, case.batches[0][0], torch.zeros(7, dtype=torch.long))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(map(torch.equal, before, case.model.buffers()))
