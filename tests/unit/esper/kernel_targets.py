"""Kernel targets for tests, each with the real torch layers that it describes."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import nn

from esper.contracts.blueprints import KernelTarget, LayerGeometry, ProducerDescription
from esper.contracts.ir import (
    ActivationOp,
    AvgPool2dOp,
    ChainOp,
    DropoutOp,
    MaxPool2dOp,
)


@dataclass(frozen=True)
class Place:
    """A target, its host layer, and the layer and operations that feed the host, if traced."""

    target: KernelTarget
    host: nn.Module
    producer: nn.Module | None = None
    chain: tuple[nn.Module, ...] = ()


Host = nn.Linear | nn.Conv1d | nn.Conv2d | nn.LayerNorm | nn.BatchNorm2d | nn.Embedding


def geometry_of(layer: Host) -> LayerGeometry:
    bias = getattr(layer, "bias", None) is not None
    match layer:
        case nn.Linear():
            sizes = {"inputs": layer.in_features, "outputs": layer.out_features}
        case nn.LayerNorm():
            sizes = {"inputs": layer.normalized_shape[0], "outputs": layer.normalized_shape[0]}
        case nn.BatchNorm2d():
            sizes = {"inputs": layer.num_features, "outputs": layer.num_features}
        case nn.Embedding():
            sizes = {"inputs": layer.num_embeddings, "outputs": layer.embedding_dim}
        case _:
            sizes = {
                "inputs": layer.in_channels,
                "outputs": layer.out_channels,
                "kernel_size": layer.kernel_size,
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
                "groups": layer.groups,
                "padding_mode": layer.padding_mode,
            }
    return LayerGeometry.model_validate({"kind": type(layer).__name__, "bias": bias, **sizes})


def place(
    host: Host,
    input_shape: tuple[int, ...],
    *,
    producer: nn.Linear | nn.Conv1d | nn.Conv2d | None = None,
    chain: tuple[ChainOp, ...] = (),
    dtype: str = "float32",
) -> Place:
    """The target of `host`; `input_shape` is the producer's input where there is a producer."""
    description = None
    modules = tuple(module_of(op) for op in chain)
    layers = [] if producer is None else [producer, *modules]
    x = torch.zeros(2, *input_shape, dtype=torch.long if isinstance(host, nn.Embedding) else None)
    for layer in layers:
        x = layer(x)
    if producer is not None:
        description = ProducerDescription(
            layer=geometry_of(producer), name="feeder", input_shape=input_shape, chain=chain
        )
    target = KernelTarget(
        layer=geometry_of(host),
        input_shape=tuple(x.shape[1:]),
        output_shape=tuple(host(x).shape[1:]),
        dtype=dtype,
        producer=description,
    )
    return Place(target, host, producer, modules)


def module_of(op: ChainOp) -> nn.Module:
    """The torch module that a traced operation was."""
    match op:
        case ActivationOp():
            return {"relu": nn.ReLU(), "gelu": nn.GELU(), "tanh": nn.Tanh()}[op.kind]
        case DropoutOp():
            return nn.Dropout(op.p)
        case MaxPool2dOp():
            return nn.MaxPool2d(
                op.kernel_size, op.stride, op.padding, op.dilation, ceil_mode=op.ceil_mode
            )
        case AvgPool2dOp():
            return nn.AvgPool2d(op.kernel_size, op.stride, op.padding, op.ceil_mode)


def linear_place(inputs: int = 40, outputs: int = 16) -> Place:
    return place(nn.Linear(inputs, outputs), (inputs,))


def linear_pair(*chain: ChainOp) -> Place:
    """Linear(40, 24) -> chain -> Linear(24, 10)."""
    return place(nn.Linear(24, 10), (40,), producer=nn.Linear(40, 24), chain=chain)


def conv_pair(*chain: ChainOp) -> Place:
    """Conv2d(3, 8, 3, padding 1) -> chain -> Conv2d(8, 6, 3, stride 2) on 3 x 16 x 16."""
    return place(
        nn.Conv2d(8, 6, 3, stride=2),
        (3, 16, 16),
        producer=nn.Conv2d(3, 8, 3, padding=1),
        chain=chain,
    )


def a_place_of_each_kind(dtype: str = "float32") -> dict[str, Place]:
    """One host of every kind, with positions; "vector" is a Linear without."""
    return {
        "vector": place(nn.Linear(6, 5), (6,), dtype=dtype),
        "Linear": place(nn.Linear(6, 5), (4, 6), dtype=dtype),
        "Conv1d": place(nn.Conv1d(6, 5, 3, stride=2, padding=1), (6, 9), dtype=dtype),
        "Conv2d": place(nn.Conv2d(6, 5, 3, padding=1), (6, 5, 4), dtype=dtype),
        "LayerNorm": place(nn.LayerNorm(6), (2, 3, 6), dtype=dtype),
        "BatchNorm2d": place(nn.BatchNorm2d(6), (6, 4, 3), dtype=dtype),
        "Embedding": place(nn.Embedding(7, 5), (4,), dtype=dtype),
    }


_small = st.integers(1, 7)
_activations = st.sampled_from([(), (ActivationOp(kind="relu"),), (ActivationOp(kind="tanh"),)])
_dropouts = st.sampled_from([(), (DropoutOp(p=0.25),)])


def pools() -> st.SearchStrategy[ChainOp]:
    """Pools of every window, padding and rounding that torch takes."""
    return st.builds(
        lambda pool, kernel, stride, padded, ceil: pool(
            kernel_size=kernel, stride=stride, padding=kernel // 2 * padded, ceil_mode=ceil
        ),
        st.sampled_from([MaxPool2dOp, AvgPool2dOp]),
        st.integers(1, 3),
        st.none() | st.integers(1, 3),
        st.booleans(),
        st.booleans(),
    )


@st.composite
def convolutions(draw: st.DrawFn, inputs: int, *, grouped: bool = True) -> nn.Conv2d:
    """A convolution of any geometry that torch accepts, over `inputs` channels."""
    divisors = [group for group in range(1, inputs + 1) if inputs % group == 0]
    groups = draw(st.sampled_from(divisors)) if grouped else 1
    stride = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    paddings: st.SearchStrategy[object] = st.tuples(st.integers(0, 2), st.integers(0, 2))
    paddings |= st.just("valid")
    if stride == (1, 1):
        paddings |= st.just("same")
    return nn.Conv2d(
        inputs,
        groups * draw(st.integers(1, 3)),
        draw(st.tuples(st.integers(1, 4), st.integers(1, 4))),
        stride=stride,
        padding=draw(paddings),
        dilation=draw(st.tuples(st.integers(1, 2), st.integers(1, 2))),
        groups=groups,
        bias=draw(st.booleans()),
        padding_mode=draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"])),
    )


@st.composite
def sequence_convolutions(draw: st.DrawFn, inputs: int, *, grouped: bool = True) -> nn.Conv1d:
    """A 1-d convolution of any geometry that torch accepts, over `inputs` channels."""
    flat = draw(convolutions(inputs, grouped=grouped))
    return nn.Conv1d(
        inputs,
        flat.out_channels,
        flat.kernel_size[:1],
        stride=flat.stride[:1],
        padding=flat.padding if isinstance(flat.padding, str) else flat.padding[:1],
        dilation=flat.dilation[:1],
        groups=flat.groups,
        bias=flat.bias is not None,
        padding_mode=flat.padding_mode,
    )


@st.composite
def linear_places(draw: st.DrawFn, *, fed: bool = False) -> Place:
    """A Linear host anywhere, with positions in front of its features."""
    positions = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    widths = [draw(_small) for _ in range(3 if fed else 2)]
    layers = [nn.Linear(a, b, bias=draw(st.booleans())) for a, b in pairwise(widths)]
    chain = draw(_activations) + draw(_dropouts) if fed else ()
    return place(
        layers[-1],
        (*positions, widths[0]),
        producer=layers[0] if fed else None,
        chain=chain,
    )


@st.composite
def conv_places(draw: st.DrawFn, *, fed: bool = False) -> Place:
    """A Conv2d host anywhere; a fed one has no groups, as its producer."""
    channels = draw(st.integers(1, 6))
    shape = (channels, draw(st.integers(4, 9)), draw(st.integers(4, 9)))
    producer, chain = None, ()
    if fed:
        producer = draw(convolutions(channels, grouped=False))
        chain = draw(_activations) + draw(_dropouts) + draw(st.just(()) | st.tuples(pools()))
        channels = producer.out_channels
    host = draw(convolutions(channels, grouped=not fed))
    try:
        return place(host, shape, producer=producer, chain=chain)
    except RuntimeError:  # torch refuses: a window larger than what it is laid on
        assume(False)
        raise


@st.composite
def sequence_places(draw: st.DrawFn, *, fed: bool = False) -> Place:
    """A Conv1d host anywhere; a fed one has no groups, as its producer."""
    channels = draw(st.integers(1, 6))
    shape = (channels, draw(st.integers(4, 9)))
    producer, chain = None, ()
    if fed:
        producer = draw(sequence_convolutions(channels, grouped=False))
        chain = draw(_activations) + draw(_dropouts)
        channels = producer.out_channels
    host = draw(sequence_convolutions(channels, grouped=not fed))
    try:
        return place(host, shape, producer=producer, chain=chain)
    except RuntimeError:  # torch refuses: a window larger than what it is laid on
        assume(False)
        raise


@st.composite
def norm_places(draw: st.DrawFn) -> Place:
    """A LayerNorm, BatchNorm2d or Embedding host, with or without positions and bias."""
    size = draw(_small)
    positions = tuple(draw(st.lists(st.integers(1, 4), max_size=2)))
    match draw(st.sampled_from(["LayerNorm", "BatchNorm2d", "Embedding"])):
        case "LayerNorm":
            return place(nn.LayerNorm(size, bias=draw(st.booleans())), (*positions, size))
        case "BatchNorm2d":
            return place(nn.BatchNorm2d(size), (size, draw(_small), draw(_small)))
        case _:
            return place(nn.Embedding(draw(_small), size), positions)
