"""Tensors as bytes, there and back, and their sum in a fixed order."""

from __future__ import annotations

import torch
from torch import nn

from esper.services.tolaria.flat import Flat, module_digest

MIXED = [
    torch.arange(6, dtype=torch.float32).reshape(2, 3),
    torch.tensor(7, dtype=torch.int64),
    torch.randn(3, 2, 2, 2).to(memory_format=torch.channels_last),
    torch.tensor([True, False, True]),
    torch.zeros(0, 4),
    torch.tensor([1.5, float("nan")], dtype=torch.bfloat16),
    torch.randn(5, dtype=torch.float64),
]


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().reshape(-1).view(torch.uint8),
        other.contiguous().reshape(-1).view(torch.uint8),
    )


def test_tensors_of_any_kind_come_back_to_the_bit_in_their_strides() -> None:
    flat = Flat.of(MIXED)
    for found, tensor in zip(flat.tensors_in(flat.bytes_of(MIXED)), MIXED, strict=True):
        assert same(found, tensor)
        assert found.stride() == tensor.stride()


def test_what_is_not_there_is_zeros() -> None:
    flat = Flat.of(MIXED)
    row = flat.bytes_of([MIXED[0], *[None] * (len(MIXED) - 1)])
    first, *rest = flat.tensors_in(row)
    assert same(first, MIXED[0])
    assert all(not part.any() for part in rest)


def test_rows_are_added_one_after_the_other() -> None:
    likes = [torch.zeros(1), torch.zeros(2, dtype=torch.float64)]
    flat = Flat.of(likes)
    rows = [
        flat.bytes_of([torch.tensor([value]), torch.tensor([value, 2 * value]).double()])
        for value in (1e8, 1.0, -1e8)
    ]
    total = flat.zeros()
    for row in rows:
        flat.add(total, row)
    single, double = flat.tensors_in(total)
    assert single.tolist() == [0.0], "float32 loses the 1 in this order"
    assert double.tolist() == [1.0, 2.0]


def test_writing_leaves_tensors_that_torch_does_not_write_to() -> None:
    expanded, plain = torch.zeros(1).expand(3), torch.zeros(3)
    flat = Flat.of([expanded, plain])
    flat.write(flat.bytes_of([torch.ones(3), torch.ones(3)]), [expanded, plain])
    assert expanded.tolist() == [0.0] * 3
    assert plain.tolist() == [1.0] * 3


def test_a_digest_is_of_names_types_shapes_and_bits() -> None:
    def layer(*, value: float = 0.0, dtype: torch.dtype = torch.float32) -> nn.Module:
        made = nn.BatchNorm1d(2)
        nn.init.constant_(made.weight, value)
        return made.to(dtype)

    first = module_digest(layer())
    assert module_digest(layer()) == first
    assert module_digest(layer(value=-0.0)) != first
    assert module_digest(layer(dtype=torch.float64)) != first
    assert module_digest(nn.Sequential(layer())) != first
    counted = layer()
    counted.get_buffer("num_batches_tracked").add_(1)
    assert module_digest(counted) != first
