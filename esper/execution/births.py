"""Births that look at data: first weights along which the loss falls fastest.

A seed's last layer is zero at birth, so its first layer is free to choose. GradMax (Evci et al.,
ICLR 2022, "GradMax: Growing Neural Networks using Gradient Information") chooses it such that the
last layer's first gradient is as large as it can be. To first order, with the functions between
the two taken for the identity, that gradient is linear in the rows of the first layer: row u gives
A u, where A is the cross-covariance of the loss gradient at the host's output and what the first
layer reads. Under a bound on the rows' norm the leading right singular vectors of A are best.

Shapes: F entries of a row of the first layer (its window times its input channels), U rows,
O outputs of the host, K places of the last layer's window.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

from esper.contracts.ir import (
    ActivationNode,
    AvgPool2dNode,
    Conv1dNode,
    Conv2dNode,
    DropoutNode,
    Graph,
    LinearNode,
    MaxPool2dNode,
    Node,
    inputs_of,
    source_of,
)
from esper.errors import BlueprintError
from esper.execution.builders import submodule_name
from esper.execution.calls import host_input, unfused
from esper.execution.isolation import (
    preserved_buffers,
    preserved_parameters,
    preserved_randomness,
)
from esper.execution.kasmina_layer import KasminaLayer

Layer = LinearNode | Conv1dNode | Conv2dNode
Pool = MaxPool2dNode | AvgPool2dNode

ROW_NORM = 1 / math.sqrt(3)
"""The root mean square norm of a row of a layer that torch initialises: F · 1 / (3 F) is its
square, whatever F."""
MAX_PATCH_ELEMENTS = 2**24
EXACT_SIZE = 512
"""Up to this many rows or columns all singular vectors are computed, beyond only the leading."""


@dataclass(frozen=True)
class Birth:
    """A layer to be initialised from data: it, the pools behind it, and the layer they feed."""

    first: Layer
    pools: tuple[Pool, ...]
    last: Layer


def births(bound: Graph) -> tuple[Birth, ...]:
    """The layers of a bound graph that ask for weights from data (`init: gradient`).

    Raises:
        BlueprintError: between such a layer and the graph's output there is something else than
            activations, dropout and pools, and one layer.
    """
    return tuple(
        _traced(bound, node, f"spec.graph.nodes[{index}].init")
        for index, node in enumerate(bound.nodes)
        if isinstance(node, LinearNode | Conv1dNode | Conv2dNode) and node.init == "gradient"
    )


def moments(
    model: nn.Module,
    host: KasminaLayer,
    bound: Graph,
    losses: Iterable[Callable[[], Tensor]],
    *,
    random_seed: int,
) -> dict[str, Tensor]:
    """For each layer in `births(bound)`, by node id, its matrix A [O K, F], float64 on the CPU.

    Each of `losses` runs `model` on a batch and gives the sum of its samples' losses; its own
    random streams start from `random_seed`. Buffers, random streams and gradients stay as they
    were.

    Raises:
        BlueprintError: as `births`.
    """
    wanted = births(bound)
    found: dict[str, Tensor] = {}
    source = source_of(bound)
    with (
        preserved_randomness(random_seed),
        preserved_buffers(model),
        preserved_parameters(model),
        unfused(),
    ):
        for loss_of_batch in losses:
            with _listening(host, source) as calls:
                loss = loss_of_batch()
            # A checkpointed block calls its layers anew in the backward pass: no hook is left then.
            leaves = [leaf for _, leaf in calls]
            gradients: tuple[Tensor | None, ...] = ()
            if leaves:
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for (read, _), gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    continue
                for birth in wanted:
                    matrix = _cross_covariance(birth, read, gradient)
                    matrix = matrix.to("cpu", torch.float64)
                    before = found.get(birth.first.id)
                    found[birth.first.id] = matrix if before is None else before + matrix
    return found


@torch.no_grad()
def apply_births(module: nn.Module, bound: Graph, found: Mapping[str, Tensor]) -> None:
    """Give the layers in `births(bound)` their rows; `module` was built from `bound`.

    Where A has a lower rank than there are rows, or is not finite, the rest keep what they drew;
    so do biases. The rows have the norm that torch's own law gives in expectation.

    Raises:
        BlueprintError: as `births`.
    """
    for birth in births(bound):
        part = module.get_submodule(submodule_name(birth.first.id))
        weight = part.get_parameter("weight")
        if birth.first.id in found:
            rows = leading_directions(found[birth.first.id], weight.shape[0])
            weight[: len(rows)] = (ROW_NORM * rows).reshape(-1, *weight.shape[1:]).to(weight)


def leading_directions(matrix: Tensor, count: int) -> Tensor:
    """At most `count` leading right singular vectors [U, F] of `matrix` [M, F], signs fixed.

    Those of singular values that float32 can't tell from zero are left out. The largest entry of
    each is positive. Large matrices are first projected on a random subspace, refined by power
    iterations (Halko et al. 2011, "Finding structure with randomness").
    """
    if not bool(torch.isfinite(matrix).all()):
        return matrix.new_empty(0, matrix.shape[1])
    basis = None
    reduced = matrix
    if min(matrix.shape) > EXACT_SIZE:
        basis = _leading_subspace(matrix, count + 8)
        reduced = matrix @ basis
    _, values, directions = torch.linalg.svd(reduced, full_matrices=False)
    if basis is not None:
        directions = directions @ basis.T
    least = values[0] * max(matrix.shape) * torch.finfo(torch.float32).eps
    directions = directions[: min(count, int((values > least).sum()))]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    signed: Tensor = directions * largest.sign()
    return signed


def _leading_subspace(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis [F, size] close to the leading right singular vectors' span."""
    generator = torch.Generator().manual_seed(0)
    size = min(size, *matrix.shape)
    sketch = torch.randn(len(matrix), size, generator=generator, dtype=matrix.dtype)
    basis: Tensor = torch.linalg.qr(matrix.T @ sketch).Q
    for _ in range(8):
        basis = torch.linalg.qr(matrix.T @ (matrix @ basis)).Q
    return basis


# -- what the graph says ------------------------------------------------------------------------


def _traced(bound: Graph, first: Layer, path: str) -> Birth:
    pools: list[Pool] = []
    at: Node = first
    while True:
        readers = [node for node in bound.nodes if at.id in inputs_of(node)]
        match readers:
            case [ActivationNode() | DropoutNode() as reader]:
                at = reader
            case [AvgPool2dNode() | MaxPool2dNode(dilation=(1, 1)) as reader]:
                pools.append(reader)
                at = reader
            case [LinearNode() | Conv1dNode() | Conv2dNode() as last] if last.id == bound.output:
                _refuse_groups(first, path)
                _refuse_groups(last, path)
                return Birth(first, tuple(pools), last)
            case _:
                raise BlueprintError(
                    path,
                    "gradient",
                    "default here: between this layer and the last only elementwise functions "
                    "and pools without dilation may stand",
                )


def _refuse_groups(node: Layer, path: str) -> None:
    if not isinstance(node, LinearNode) and node.groups != 1:
        raise BlueprintError(path, f"gradient with groups {node.groups}", "groups 1")


# -- what the model shows -----------------------------------------------------------------------


@contextmanager
def _listening(host: KasminaLayer, source: str) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Inside, each call of `host` adds what the seed would read, and a zero added to the output.

    The loss gradient of that zero is the one at the host's output, also where what follows writes
    into the output in place, or where nothing before it has parameters that learn.
    """
    calls: list[tuple[Tensor, Tensor]] = []
    fed: list[Tensor] = []

    def keep(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        fed.append(host_input(args, kwargs).detach())

    def hook(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> Tensor:
        leaf = torch.zeros_like(output, requires_grad=True)
        read = host_input(args, kwargs).detach()
        if source == "producer":
            read = fed.pop(0)
        elif source == "output":
            with torch.no_grad():
                read = host.host_class.forward(host, read)
        calls.append((read, leaf))
        return output + leaf

    handles = [host.register_forward_hook(hook, with_kwargs=True)]
    if source == "producer":
        producer = host.site.producer
        assert producer is not None, "bind refuses a graph without a producer to read"
        handles.append(producer.register_forward_pre_hook(keep, with_kwargs=True))
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _cross_covariance(birth: Birth, read: Tensor, gradient: Tensor) -> Tensor:
    """The sum over samples and positions of gradient times entry, [O K, F], in float32 at least.

    The gradient of a layer over windows is its input's patches against the output's gradient; so
    A is what the last layer's gradient would be, had the first one a unit for each entry of its
    window.
    """
    wide = torch.promote_types(read.dtype, torch.float32)
    read, gradient = read.to(wide), gradient.to(wide)
    first, last = birth.first, birth.last
    if isinstance(first, LinearNode) or isinstance(last, LinearNode):
        outputs = gradient.reshape(-1, gradient.shape[-1])
        return outputs.T @ read.reshape(-1, read.shape[-1])
    reading, writing = _Window.of(first), _Window.of(last)
    images = read.reshape(-1, *_image_shape(first, read))
    gradients = gradient.reshape(-1, *_image_shape(last, gradient))
    entries = images.shape[1] * math.prod(reading.kernel)
    share = max(1, MAX_PATCH_ELEMENTS // (entries * math.prod(images.shape[2:])))
    size = (gradients.shape[1], entries, *writing.kernel)
    total = images.new_zeros(size)
    for part, errors in zip(images.split(share), gradients.split(share), strict=True):
        hidden = reading.patches(part)
        for pool in birth.pools:
            hidden = _pooled(hidden, pool)
        total += conv2d_weight(
            writing.padded(hidden), size, errors, stride=writing.stride, dilation=writing.dilation
        )
    return total.permute(0, 2, 3, 1).reshape(-1, entries)


@dataclass(frozen=True)
class _Window:
    """A convolution's window over two axes; Conv1d's first axis has the size 1."""

    kernel: tuple[int, int]
    stride: tuple[int, int]
    dilation: tuple[int, int]
    pads: tuple[int, int, int, int]
    mode: str

    @classmethod
    def of(cls, node: Conv1dNode | Conv2dNode) -> _Window:
        """The window of a bound convolution, its padding written out, the last axis first."""
        assert not isinstance(node.kernel_size, str), "a bound graph has no symbolic sizes"
        kernel, stride, dilation = (
            _two_axes(size, 1) for size in (node.kernel_size, node.stride, node.dilation)
        )
        if node.padding == "same":
            whole = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
            before = whole[0] // 2, whole[1] // 2
            after = whole[0] - before[0], whole[1] - before[1]
        else:
            before = after = _two_axes(node.padding, 0)
        return cls(
            kernel=kernel,
            stride=stride,
            dilation=dilation,
            pads=(before[1], after[1], before[0], after[0]),
            mode="constant" if node.padding_mode == "zeros" else node.padding_mode,
        )

    def padded(self, images: Tensor) -> Tensor:
        """`images` [B, C, H, W] with their padding."""
        return F.pad(images, self.pads, mode=self.mode) if any(self.pads) else images

    def patches(self, images: Tensor) -> Tensor:
        """What the window sees of `images` [B, C, H, W] at each place: [B, F, H', W']."""
        images = self.padded(images)
        height, width = (
            (extent - d * (k - 1) - 1) // s + 1
            for extent, k, s, d in zip(
                images.shape[2:], self.kernel, self.stride, self.dilation, strict=True
            )
        )
        seen = F.unfold(images, self.kernel, dilation=self.dilation, stride=self.stride)
        return seen.reshape(len(images), -1, height, width)


def _two_axes(sizes: tuple[int, ...], missing: int) -> tuple[int, int]:
    return (sizes[0], sizes[1]) if len(sizes) == 2 else (missing, sizes[0])


def _image_shape(node: Layer, tensor: Tensor) -> tuple[int, ...]:
    """Channels, height and width of what lies beside a convolution."""
    if isinstance(node, Conv1dNode):
        return (tensor.shape[-2], 1, tensor.shape[-1])
    return tuple(tensor.shape[-3:])


def _pooled(images: Tensor, pool: Pool) -> Tensor:
    """What a pool makes of `images` [B, C, H, W], taken for linear.

    Which entry will be a window's maximum is not known before birth: the mean stands for it.
    """
    mean = pool if isinstance(pool, AvgPool2dNode) else None
    return F.avg_pool2d(
        images,
        pool.kernel_size,
        stride=pool.stride or pool.kernel_size,
        padding=pool.padding,
        ceil_mode=pool.ceil_mode,
        count_include_pad=mean is not None and mean.count_include_pad,
        divisor_override=None if mean is None else mean.divisor_override,
    )
