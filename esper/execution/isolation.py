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
    if torch.accelerator.is_available():
        torch.manual_seed(seed)
    else:
        # That would note the seed, with a stack trace, for devices that might come one day: two
        # hundred times the work, for every batch of a trial.
        torch.default_generator.manual_seed(seed)
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
    with borrowed_buffers(model, {}):
        yield


@contextmanager
def borrowed_buffers(model: nn.Module, own: dict[str, Tensor]) -> Iterator[None]:
    """Inside, the model's buffers hold `own` values by name; afterwards the bits they had.

    What the buffers became inside goes back into `own`, which may start empty: so a seed on trial
    gathers the normalisation statistics that the model would have with it.
    """
    # By their place in their modules: a forward may assign a new tensor instead of writing.
    places = {
        f"{path}.{key}" if path else key: (module, key)
        for path, module in model.named_modules()
        # A scripted module's table is no dict, and is iterated by its keys alone.
        for key in module._buffers.keys()  # noqa: SIM118
    }
    kept = {}
    for name, (module, key) in places.items():
        buffer = module._buffers[key]
        kept[name] = (buffer, None if buffer is None else buffer.detach().clone())
    with torch.no_grad():
        for name, (module, key) in places.items():
            buffer = module._buffers[key]
            if name not in own:
                continue
            if buffer is not None and buffer.shape == own[name].shape and writable(buffer):
                buffer.copy_(own[name])
            else:
                _assign(module, key, own[name].clone())
    try:
        yield
    finally:
        with torch.no_grad():
            for name, (module, key) in places.items():
                became = module._buffers[key]
                if became is not None:
                    own[name] = became.detach().clone()
            for name, (module, key) in places.items():
                buffer, value = kept[name]
                _assign(module, key, buffer)
                if buffer is not None and writable(buffer):
                    buffer.copy_(value)


def _assign(module: nn.Module, key: str, buffer: Tensor | None) -> None:
    if isinstance(module, torch.jit.ScriptModule):
        # Its buffers lie behind torch's own table, which takes no new ones.
        setattr(module, key, buffer)
    else:
        module._buffers[key] = buffer


@contextmanager
def preserved_parameters(model: nn.Module) -> Iterator[None]:
    """The model's parameters hold the same bits at the end; `max_norm` writes to them.

    Those that nothing has written to are not written to here either.
    """
    with torch.no_grad():
        kept = [
            (parameter, None if parameter.is_inference() else parameter._version, parameter.clone())
            for parameter in model.parameters()
        ]
    try:
        yield
    finally:
        with torch.no_grad():
            for parameter, version, value in kept:
                # Writing through `data` moves no version.
                moved = version is None or parameter._version != version
                if moved or not _same_bits(parameter.data, value):
                    parameter.copy_(value)


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of equal shape do, where that can be told of tensors of their kind."""
    if type(one) is not Tensor or one.is_meta or one.layout is not torch.strided:
        return True
    flat, others = one.reshape(-1), other.reshape(-1)
    return torch.equal(flat.view(torch.uint8), others.view(torch.uint8))


def writable(tensor: Tensor) -> bool:
    """Whether torch writes to it: not where one element stands for many, as in an expanded one."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True) if not tensor.is_sparse else ()
    return all(stride or size <= 1 for size, stride in sizes)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model is in eval mode; each module gets its own mode back at the end."""
    with _in_mode(model, training=False):
        yield


@contextmanager
def learning(model: nn.Module) -> Iterator[None]:
    """The model is in training mode; each module gets its own mode back at the end."""
    with _in_mode(model, training=True):
        yield


@contextmanager
def _in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    # Written past nn.Module's __setattr__, which a probe of a small model would feel.
    others = [module for module in model.modules() if module.training is not training]
    model.train(training)
    try:
        yield
    finally:
        for module in others:
            if isinstance(module, torch.jit.ScriptModule):
                module.training = not training
            else:
                module.__dict__["training"] = not training
