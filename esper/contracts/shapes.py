"""Output shapes of layers and pools, without batch, by torch's documented formulas.

Legend: C channels, L length, H height, W width; the shape of a Linear, a LayerNorm or what an
Embedding gives is (*, features).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from esper.contracts.ir import (
    AvgPool2dNode,
    Conv1dNode,
    Conv2dNode,
    LayerGeometry,
    LayerKind,
    MaxPool2dNode,
)
from esper.errors import BlueprintError

Sizes = tuple[int, ...]

POSITION_AXES: Mapping[LayerKind, int] = MappingProxyType(
    {"Linear": 0, "Conv1d": 1, "Conv2d": 2, "LayerNorm": 0, "BatchNorm2d": 2, "Embedding": 0}
)
"""How many axes lie behind the channels; where none do, positions are in front of them."""


def host_shape(layer: LayerGeometry, shape: Sizes) -> Sizes:
    """What the layer makes of an input of `shape`.

    Raises:
        BlueprintError: the layer can't take such an input.
    """
    if layer.kind == "Embedding":
        return (*shape, layer.outputs)
    axes = POSITION_AXES[layer.kind]
    if not axes:
        if shape[-1:] != (layer.inputs,):
            raise BlueprintError("target.inputShape", shape, f"{layer.inputs} as the last size")
        return (*shape[:-1], layer.outputs)
    if len(shape) != 1 + axes or shape[0] != layer.inputs:
        expected = ", ".join([str(layer.inputs), *_AXIS_NAMES[axes]])
        raise BlueprintError("target.inputShape", shape, f"({expected})")
    if layer.kind == "BatchNorm2d":
        return shape
    node = (Conv1dNode if axes == 1 else Conv2dNode).model_validate(
        {
            "id": "host",
            "input": "host",
            "channels": layer.outputs,
            "kernel_size": layer.kernel_size,
            "stride": layer.stride,
            "padding": layer.padding,
            "dilation": layer.dilation,
            "groups": layer.groups,
            "padding_mode": layer.padding_mode,
        }
    )
    return convolved_shape(node, layer.outputs, shape, "target.layer")


def convolved_shape(node: Conv1dNode | Conv2dNode, channels: int, shape: Sizes, path: str) -> Sizes:
    """The (channels, *) that a convolution with numbers for sizes makes of a (C, L) or (C, H, W).

    Raises:
        BlueprintError: groups don't divide the channels, or the window is larger than the input.
    """
    kernel, stride, dilation = node.kernel_size, node.stride, node.dilation
    if isinstance(kernel, str):
        raise BlueprintError(f"{path}.kernelSize", kernel, "numbers once bound")
    axes = range(len(kernel))
    _refuse_other_axes(shape, len(kernel), path)
    if shape[0] % node.groups or channels % node.groups:
        raise BlueprintError(
            f"{path}.groups",
            node.groups,
            f"a divisor of the channels in and out, {shape[0]} and {channels}",
        )
    if node.padding == "same":
        pads = tuple((dilation[axis] * (kernel[axis] - 1)) for axis in axes)
        widest: Sizes = tuple(-(-pad // 2) for pad in pads)
    else:
        widest = node.padding
        pads = tuple(2 * pad for pad in widest)
    for axis in axes:
        extent = shape[1 + axis]
        limit = {"reflect": extent - 1, "circular": extent}.get(node.padding_mode)
        if limit is not None and widest[axis] > limit:
            raise BlueprintError(
                f"{path}.padding",
                f"{widest[axis]} of {node.padding_mode} padding on {extent} elements",
                f"at most {limit}",
            )
    return (
        channels,
        *(
            _steps(shape[1 + axis] + pads[axis], kernel[axis], stride[axis], dilation[axis], path)
            for axis in axes
        ),
    )


def pooled_shape(node: MaxPool2dNode | AvgPool2dNode, shape_CHW: Sizes, path: str) -> Sizes:  # noqa: N803
    """The (C, H, W) that pooling makes of a (C, H, W).

    Raises:
        BlueprintError: the window is larger than the image.
    """
    _refuse_other_axes(shape_CHW, 2, path)
    stride = node.stride or node.kernel_size
    dilation = node.dilation if isinstance(node, MaxPool2dNode) else (1, 1)
    sizes = []
    for axis in (0, 1):
        extent, pad, step = shape_CHW[1 + axis], node.padding[axis], stride[axis]
        # A window may start in the image or its left padding, not in the right padding: with
        # ceil_mode, the last one that would is dropped.
        grown = extent + 2 * pad + (step - 1 if node.ceil_mode else 0)
        size = _steps(grown, node.kernel_size[axis], step, dilation[axis], path)
        if node.ceil_mode and (size - 1) * step >= extent + pad:
            size -= 1
        sizes.append(size)
    return (shape_CHW[0], *sizes)


def _steps(extent: int, kernel: int, stride: int, dilation: int, path: str) -> int:
    reach = dilation * (kernel - 1) + 1
    if reach > extent:
        raise BlueprintError(
            f"{path}.kernelSize", f"a window of {reach} on {extent} elements", "a smaller window"
        )
    return (extent - reach) // stride + 1


def _refuse_other_axes(shape: Sizes, axes: int, path: str) -> None:
    if len(shape) != 1 + axes:
        expected = ", ".join(["channels", *_AXIS_NAMES[axes]])
        raise BlueprintError(f"{path}.input", f"shape {shape}", f"a shape ({expected})")


_AXIS_NAMES = {1: ("length",), 2: ("height", "width")}
