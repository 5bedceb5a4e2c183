"""Shadow learning: a seed is trained beside its host, which neither sees nor feels it.

A second forward pass on the same batch adds the seed's output at full strength; only the seed's
parameters get gradients from it. Buffers and random streams are put back, so the host's outputs,
gradients, statistics and draws are the same bits with and without the trial.

Training through a pass of its own, rather than through a straight-through estimator
(`host + seed - seed.detach()`), lets the seed see its own output: with the estimator the loss is
linear in the seed and has no bound.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from esper.execution.isolation import borrowed_buffers, preserved_randomness

_REENTRANT = "CheckpointFunctionBackward"
"""The node that `checkpoint(..., use_reentrant=True)` leaves in a graph."""

_AFTER_GRADIENT = "_post_accumulate_grad_hooks"
"""Where torch keeps what runs once a leaf has its gradient: optimisers that step right then."""

_told = WeakTensorKeyDictionary()
"""The first parameters of the seeds that were told to learn nothing."""

_log = logging.getLogger(__name__)


def shadow_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    loss_of_batch: Callable[[], Tensor],
    *,
    random_seed: int,
    buffers: dict[str, Tensor],
) -> tuple[Tensor, list[Tensor | None]]:
    """The loss of one batch, and the gradients of `parameters` alone, leaving no other trace.

    The caller has opened the model's `trialling` context, so that `loss_of_batch` sees the seed.
    `random_seed` starts the pass's own random stream: dropout in the shadow draws its own masks.
    `buffers` are the seed's own normalisation statistics, gathered from one pass to the next: in
    eval mode the host's would not fit activations that the seed has changed.

    Returns:
        The loss, 0-d and detached, and one gradient a parameter (None where the loss does not
        depend on it; that it depends on none of them is logged).
    """
    with preserved_randomness(random_seed), borrowed_buffers(model, buffers):
        loss = loss_of_batch()
        leaves = _leaves_of_reentrant(loss)
        gradients: tuple[Tensor | None, ...]
        if leaves is None:
            gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
        else:
            with _borrowed_gradients({*leaves, *model.parameters(), *parameters}):
                loss.backward()
                gradients = tuple(parameter.grad for parameter in parameters)
    if parameters and all(gradient is None for gradient in gradients):
        _tell_once(parameters[0])
    return loss.detach(), [
        None if gradient is None else _laid_out_as(parameter, gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def _leaves_of_reentrant(loss: Tensor) -> set[Tensor] | None:
    """The leaves in the graph of `loss` if it holds a reentrant checkpoint, else None.

    `autograd.grad` does not go through one: only `backward` does, to every leaf.
    """
    leaves: set[Tensor] = set()
    reentrant = False
    seen = {loss.grad_fn}
    todo: list[Any] = [loss.grad_fn] if loss.grad_fn is not None else []
    while todo:
        node = todo.pop()
        reentrant = reentrant or node.name() == _REENTRANT
        for before, _ in node.next_functions:
            if before is not None and before not in seen:
                seen.add(before)
                todo.append(before)
        if hasattr(node, "variable"):
            leaves.add(node.variable)
    return leaves if reentrant else None


@contextmanager
def _borrowed_gradients(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Inside, `leaves` have gradients of their own, which no hook of theirs sees."""
    kept = {leaf: leaf.grad for leaf in leaves}
    hooks = [
        (found, dict(found))
        for leaf in kept
        for found in (leaf._backward_hooks, getattr(leaf, _AFTER_GRADIENT, None))
        if found
    ]
    try:
        for leaf in kept:
            leaf.grad = None
        for found, _ in hooks:
            found.clear()
        yield
    finally:
        for found, own in hooks:
            found.update(own)
        for leaf, gradient in kept.items():
            leaf.grad = gradient


def _tell_once(parameter: nn.Parameter) -> None:
    """Log, once a seed, that no gradient reaches the seed whose first parameter this is."""
    if parameter not in _told:
        _told[parameter] = True
        _log.warning(
            "a seed on trial learned nothing from a batch: the loss does not depend on it. It was "
            "left out for a fault, or lies in a checkpoint with use_reentrant=True none of whose "
            "inputs needs a gradient"
        )


def _laid_out_as(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """`gradient` in the strides of `parameter`, as `backward` would have left it.

    `grad` gives them as they fall, e.g. channels last, and fused optimisers walk through memory.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
