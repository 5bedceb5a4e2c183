"""Output shapes of layers and pools, without batch, by torch's documented formulas.

Legend: C channels, H height, W width; a Linear layer's shape is (*, features).
"""

from __future__ import annotations

from esper.contracts.ir import AvgPool2dNode, Conv2dNode, LayerGeometry, MaxPool2dNode
from esper.errors import BlueprintError

Sizes = tuple[int, ...]


def host_shape(layer: LayerGeometry, shape: Sizes) -> Sizes:
    """What the layer makes of an input of `shape`.

    Raises:
        BlueprintError: the layer can't take such an input.
    """
    if layer.kind == "Linear":
        if shape[-1] != layer.inputs:
            raise BlueprintError("target.inputShape", shape, f"{layer.inputs} as the last size")
        return (*shape[:-1], layer.outputs)
    if len(shape) != 3 or shape[0] != layer.inputs:
        raise BlueprintError("target.inputShape", shape, f"({layer.inputs}, height, width)")
    node = Conv2dNode.model_validate(
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


def convolved_shape(node: Conv2dNode, channels: int, shape_CHW: Sizes, path: str) -> Sizes:  # noqa: N803
    """The (channels, H, W) that a convolution with numbers for sizes makes of a (C, H, W).

    Raises:
        BlueprintError: groups don't divide the channels, or the window is larger than the image.
    """
    _refuse_flat(shape_CHW, path)
    if shape_CHW[0] % node.groups or channels % node.groups:
        raise BlueprintError(
            f"{path}.groups",
            node.groups,
            f"a divisor of the channels in and out, {shape_CHW[0]} and {channels}",
        )
    kernel, stride, dilation = node.kernel_size, node.stride, node.dilation
    if isinstance(kernel, str):
        raise BlueprintError(f"{path}.kernelSize", kernel, "two numbers once bound")
    if node.padding == "same":
        pads = tuple((dilation[axis] * (kernel[axis] - 1)) for axis in (0, 1))
        widest = tuple(-(-pad // 2) for pad in pads)
    else:
        widest = node.padding
        pads = tuple(2 * pad for pad in widest)
    for axis in (0, 1):
        extent = shape_CHW[1 + axis]
        limit = {"reflect": extent - 1, "circular": extent}.get(node.padding_mode)
        if limit is not None and widest[axis] > limit:
            raise BlueprintError(
                f"{path}.padding",
                f"{widest[axis]} of {node.padding_mode} padding on {extent} elements",
                f"at most {limit}",
            )
    height, width = (
        _steps(shape_CHW[1 + axis] + pads[axis], kernel[axis], stride[axis], dilation[axis], path)
        for axis in (0, 1)
    )
    return (channels, height, width)


def pooled_shape(node: MaxPool2dNode | AvgPool2dNode, shape_CHW: Sizes, path: str) -> Sizes:  # noqa: N803
    """The (C, H, W) that pooling makes of a (C, H, W).

    Raises:
        BlueprintError: the window is larger than the image.
    """
    _refuse_flat(shape_CHW, path)
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


def _refuse_flat(shape: Sizes, path: str) -> None:
    if len(shape) != 3:
        raise BlueprintError(f"{path}.input", f"shape {shape}", "a shape (channels, height, width)")
