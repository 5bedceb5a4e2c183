"""Blueprints built for a place, and what must hold of every one of them."""

from __future__ import annotations

import math

import torch
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from esper.contracts.blueprints import (
    Graph,
    KernelTarget,
    builtin,
    infer,
    input_shape,
    lower,
    source_of,
)
from esper.contracts.ir import AffineNode, Conv1dNode, Conv2dNode
from esper.contracts.values import values_of
from esper.execution.builders import build, parameter_shapes


def built(
    name: str, target: KernelTarget, seed: int = 0, **arguments: int | str
) -> tuple[Graph, fx.GraphModule]:
    """A blueprint of the catalogue, bound and built."""
    bound = lower(builtin(name, arguments), target)
    return bound, build(bound, target, generator_seed=seed)


def input_of(graph: Graph, target: KernelTarget, *batch: int) -> torch.Tensor:
    """A batch of what the graph reads."""
    shape = (*batch, *input_shape(graph, target))
    if target.layer.kind == "Embedding" and source_of(graph) == "host":
        return torch.randint(target.layer.inputs, shape)
    return torch.randn(shape, dtype=getattr(torch, target.dtype))


def wake(module: nn.Module) -> nn.Module:
    """The module, every weight of it far from zero."""
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


def check_everything(name: str, target: KernelTarget) -> None:
    """Zero at birth, as costly as inferred, finite, in train and eval mode."""
    bound, module = built(name, target)
    cost = infer(bound, target)
    batch = input_of(bound, target, 2)
    assert not batch.requires_grad
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = module(batch)
        if output.requires_grad:
            output.sum().backward()
    assert output.shape == (2, *target.output_shape)
    assert output.dtype == getattr(torch, target.dtype)
    assert not output.count_nonzero()
    assert not module.eval()(batch).count_nonzero()
    assert counter.get_total_flops() == 2 * (cost.flops + _miscounted(bound, target))
    assert sum(parameter.numel() for parameter in module.parameters()) == cost.parameters
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == parameter_shapes(
        bound, target
    )
    assert all(parameter.grad.isfinite().all() for parameter in module.parameters())


def _miscounted(bound: Graph, target: KernelTarget) -> int:
    """What torch's counter has too much of: it knows no groups in the gradient of a weight, and
    no products but those of matrices, so no scale for each channel."""
    values, extra = values_of(bound, target), 0
    for node in bound.nodes:
        value = values[node.id]
        if isinstance(node, AffineNode):
            extra -= 4 * math.prod(value.shape)
        if isinstance(node, Conv1dNode | Conv2dNode):
            window = math.prod(node.kernel_size)
            weights = values[node.input].channels // node.groups * value.channels * window
            extra += 2 * weights * value.num_positions * (node.groups - 1)
    return extra
