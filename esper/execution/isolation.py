"""What a shadow pass must leave as it was: random streams, buffers, mode, gradients."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class RandomState:
    """The state of every random stream that model or data code can draw from."""

    torch_cpu: torch.Tensor
    torch_cuda: tuple[torch.Tensor, ...]
    numpy_keys: torch.Tensor
    numpy_rest: tuple[int, int, float]
    python: tuple[object, ...]

    @classmethod
    def capture(cls) -> RandomState:
        """The streams as they stand now."""
        _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
        cuda = tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else ()
        return cls(
            torch_cpu=torch.get_rng_state(),
            torch_cuda=cuda,
            numpy_keys=torch.from_numpy(np.asarray(keys).astype(np.int64)),
            numpy_rest=(int(position), int(has_gauss), float(cached)),
            python=random.getstate(),
        )

    def apply(self) -> None:
        """Put every stream back to this state."""
        torch.set_rng_state(self.torch_cpu)
        if self.torch_cuda:
            torch.cuda.set_rng_state_all(list(self.torch_cuda))
        keys = self.numpy_keys.numpy().astype(np.uint32)
        np.random.set_state(("MT19937", keys, *self.numpy_rest))
        random.setstate(self.python)


def seed_everything(seed: int) -> None:
    """Seed torch (all devices), numpy and Python's random with `seed`, a value in [0, 2**63)."""
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def preserved_randomness(seed: int | None = None) -> Iterator[None]:
    """Every random stream is put back at the end; inside, each starts from `seed` if given."""
    state = RandomState.capture()
    try:
        if seed is not None:
            seed_everything(seed)
        yield
    finally:
        state.apply()


@contextmanager
def preserved_buffers(model: nn.Module) -> Iterator[None]:
    """The model's buffers (BatchNorm statistics and the like) hold the same bits at the end."""
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


@contextmanager
def borrowed_buffers(model: nn.Module, own: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model's buffers hold `own` values by name; afterwards the bits they had.

    What the buffers became inside goes back into `own`, which may start empty: so a seed on trial
    gathers the normalisation statistics that the model would have with it.
    """
    named = dict(model.named_buffers())
    kept = {name: buffer.detach().clone() for name, buffer in named.items()}
    with torch.no_grad():
        for name, value in own.items():
            named[name].copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in named.items():
                own[name] = buffer.detach().clone()
                buffer.copy_(kept[name])


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode; each module gets its own mode back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
