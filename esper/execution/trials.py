"""Shadow learning: a seed is trained beside its host, which neither sees nor feels it.

A second forward pass on the same batch adds the seed's output at full strength; only the seed's
parameters get gradients from it. Buffers and random streams are put back, so the host's outputs,
gradients, statistics and draws are the same bits with and without the trial.

Training through a pass of its own, rather than through a straight-through estimator
(`host + seed - seed.detach()`), lets the seed see its own output: with the estimator the loss is
linear in the seed and has no bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from esper.execution.isolation import borrowed_buffers, preserved_randomness


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
        depend on it).
    """
    with preserved_randomness(random_seed), borrowed_buffers(model, buffers):
        loss = loss_of_batch()
        gradients = torch.autograd.grad(loss, list(parameters), allow_unused=True)
    return loss.detach(), [
        None if gradient is None else _laid_out_as(parameter, gradient)
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


def _laid_out_as(parameter: nn.Parameter, gradient: Tensor) -> Tensor:
    """`gradient` in the strides of `parameter`, as `backward` would have left it.

    `grad` gives them as they fall, e.g. channels last, and fused optimisers walk through memory.
    """
    if gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter, requires_grad=False).copy_(gradient)
