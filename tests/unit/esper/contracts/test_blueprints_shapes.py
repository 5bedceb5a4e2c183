"""Output shapes agree with what torch computes, wherever torch computes at all."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from esper.contracts.ir import AvgPool2dNode, Conv2dNode, LayerGeometry, MaxPool2dNode
from esper.contracts.shapes import convolved_shape, host_shape, pooled_shape
from esper.errors import BlueprintError
from tests.unit.esper.kernel_targets import convolutions, geometry_of, module_of, pools

images = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, max_examples=100)
@given(convolutions(4), images)
def test_convolutions_have_torchs_shape_or_are_refused_with_it(
    layer: nn.Conv2d, image: tuple[int, int]
) -> None:
    try:
        expected = tuple(layer(torch.zeros(1, 4, *image)).shape[1:])
    except RuntimeError:
        with pytest.raises(BlueprintError):
            host_shape(geometry_of(layer), (4, *image))
    else:
        assert host_shape(geometry_of(layer), (4, *image)) == expected


@settings(deadline=None, max_examples=100)
@given(pools(), images)
def test_pools_have_torchs_shape_or_are_refused_with_it(op, image: tuple[int, int]) -> None:
    node_type = MaxPool2dNode if op.op == "max_pool2d" else AvgPool2dNode
    node = node_type.model_validate({**op.model_dump(), "id": "p", "input": "x"})
    try:
        expected = tuple(module_of(op)(torch.zeros(1, 2, *image)).shape[1:])
    except RuntimeError:
        with pytest.raises(BlueprintError):
            pooled_shape(node, (2, *image), "here")
    else:
        assert pooled_shape(node, (2, *image), "here") == expected


@pytest.mark.parametrize("shape", [(7,), (3, 7), (2, 3, 7)])
def test_linear_keeps_the_positions_in_front(shape: tuple[int, ...]) -> None:
    layer = LayerGeometry(kind="Linear", inputs=7, outputs=5)
    assert host_shape(layer, shape) == (*shape[:-1], 5)


@pytest.mark.parametrize(
    ("layer", "shape", "allowed"),
    [
        (LayerGeometry(kind="Linear", inputs=7, outputs=5), (6,), "7 as the last size"),
        (
            LayerGeometry(kind="Conv2d", inputs=3, outputs=5, kernel_size=3),
            (4, 8, 8),
            "(3, height, width)",
        ),
        (
            LayerGeometry(kind="Conv2d", inputs=3, outputs=5, kernel_size=3),
            (3, 8),
            "(3, height, width)",
        ),
    ],
)
def test_an_input_that_the_host_cannot_take_is_refused(
    layer: LayerGeometry, shape: tuple[int, ...], allowed: str
) -> None:
    with pytest.raises(BlueprintError) as caught:
        host_shape(layer, shape)
    assert caught.value.field == "target.inputShape"
    assert caught.value.allowed == allowed


def test_groups_must_divide_the_channels_on_both_sides() -> None:
    node = Conv2dNode(id="c", input="x", channels=6, kernel_size=1, groups=4)
    with pytest.raises(BlueprintError, match=r"here\.groups: got 4; allowed: .* 8 and 6"):
        convolved_shape(node, 6, (8, 5, 5), "here")


def test_windows_need_an_image() -> None:
    node = MaxPool2dNode(id="p", input="x", kernel_size=2)
    with pytest.raises(BlueprintError, match=r"here\.input: got shape \(8,\)"):
        pooled_shape(node, (8,), "here")


def test_a_window_larger_than_the_image_names_both() -> None:
    node = AvgPool2dNode(id="p", input="x", kernel_size=5)
    with pytest.raises(BlueprintError, match=r"here\.kernelSize: got a window of 5 on 4 elements"):
        pooled_shape(node, (1, 4, 9), "here")
