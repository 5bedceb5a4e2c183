from __future__ import annotations

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

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


# -- under reentrant checkpointing, which autograd.grad does not reach ----------------------------


class Checkpointed(nn.Module):
    """A stem, and blocks in checkpoints; the last one is called twice, once outside of any."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 5)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5), nn.Tanh()) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(5))
        self.head = nn.Linear(5, 3)
        self.reentrant = reentrant

    def scaled(self, scale: Tensor) -> Tensor:
        return scale * 2

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = self._run(block, x)
        return self.head(self.blocks[1][0](x) * self._run(self.scaled, self.scale))

    def _run(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.reentrant is None:
            return function(x)
        return checkpoint(function, x, use_reentrant=self.reentrant)


def checkpointed(reentrant: bool | None, layer: str) -> Case:
    torch.manual_seed(0)
    model = wrap(Checkpointed(reentrant), torch.randn(2, 4))
    grow(model, layer, "bottleneck-mlp", (S.TRAINING,), units=3)
    batches = [(torch.randn(5, 4), torch.randint(3, (5,))) for _ in range(3)]
    return Case(model.train(), (layer, 0), batches)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["stem", "blocks.0.0", "blocks.1.0", "head"])
def test_a_seed_learns_the_same_with_and_without_checkpoints(layer: str, reentrant: bool) -> None:
    case, plain = checkpointed(reentrant, layer), checkpointed(None, layer)
    for x, y in case.batches:
        loss, gradients = shadow(case, x, y)
        expected_loss, expected = shadow(plain, x, y)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(gradients, expected)
        assert all(gradient is not None and bool(gradient.any()) for gradient in gradients)
    assert case.model.morphology.record(layer, 0).fallbacks == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("layer", ["stem", "blocks.0.0", "blocks.1.0", "head"])
def test_the_host_is_the_same_to_the_bit_beside_a_trial_in_checkpoints(
    layer: str, reentrant: bool
) -> None:
    case = checkpointed(reentrant, layer)
    other = copy.deepcopy(case)
    assert course(case, trying=True) == course(other, trying=False)


def test_a_trial_in_checkpoints_leaves_every_gradient_and_its_hooks_alone() -> None:
    case = checkpointed(True, "blocks.0.0")
    model = case.model
    (x, y), stepped = case.batches[0], []
    x.requires_grad_()
    F.cross_entropy(model(x), y).backward()
    for parameter in model.morphology.host_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: stepped.append(p))
        parameter.register_hook(lambda gradient: stepped.append(gradient))
    for parameter in case.seed:
        parameter.grad = torch.full_like(parameter, 7.0)
    before = {leaf: (leaf.grad, leaf.grad.clone()) for leaf in (x, *model.parameters())}
    model.head.weight.requires_grad_(False)
    shadow(case, x, y)
    for leaf, (gradient, value) in before.items():
        assert leaf.grad is gradient
        assert torch.equal(gradient, value)
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert stepped == []

    model.stem.register_forward_hook(lambda _m, _i, out: out.register_hook(_fail) and None)
    with pytest.raises(ZeroDivisionError):
        shadow(case, x, y)
    for leaf, (gradient, value) in before.items():
        assert leaf.grad is gradient
        assert torch.equal(gradient, value)
    F.cross_entropy(model.head(torch.randn(5, 5)), y).backward()
    assert len(stepped) == 2, "the hooks are back"


def _fail(gradient: Tensor) -> Tensor:
    raise ZeroDivisionError


def test_a_seed_that_no_gradient_reaches_is_told_of_once(caplog: pytest.LogCaptureFixture) -> None:
    class Unreached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block, self.head = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(checkpoint(self.block, x, use_reentrant=True))

    model = wrap(Unreached(), torch.randn(2, 4, requires_grad=True))
    grow(model, "block", "bottleneck-mlp", (S.TRAINING,))
    case = Case(model, ("block", 0), [])
    for _ in range(3):
        _, gradients = shadow(case, torch.randn(2, 4), torch.randint(3, (2,)))
        assert gradients == [None] * len(case.seed)
    assert [record.message for record in caplog.records if "learned nothing" in record.message]
    assert len(caplog.records) == 1
