from __future__ import annotations

import math
import random

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from esper.execution.isolation import preserved_randomness, seed_everything
from esper.services.tolaria.snapshots import parts_of, snapshot_of
from tests.unit.esper.services.tolaria.checkpointing import snapshot
from tests.unit.esper.services.tolaria.sessions import engine


def same_bits(one: Tensor, other: Tensor) -> bool:
    return (
        one.dtype == other.dtype
        and one.shape == other.shape
        and one.contiguous()
        .view(torch.uint8 if one.dim() else one.dtype)
        .equal(other.contiguous().view(torch.uint8 if one.dim() else one.dtype))
    )


# -- round trip ---------------------------------------------------------------------------------

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


def test_tensors_of_every_type_and_layout_come_back_to_the_bit() -> None:
    base = torch.randn(4, 3, 2, 2)
    tensors = {f"of/{dtype}": (base * 50).to(dtype) for dtype in DTYPES}
    tensors |= {
        "nan": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
        "number": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
        "channels_last": base.to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 5).t(),
        "strided": torch.randn(10)[::2],
        "name.with::colons/and/slashes": torch.ones(2),
    }
    found = snapshot_of(parts_of(snapshot(tensors=tensors)))
    assert found.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert same_bits(found.tensors[name], tensor), name


def test_tied_tensors_and_views_of_one_storage_are_stored_each() -> None:
    weight = torch.randn(4, 4)
    tensors = {"embedding": weight, "head": weight, "row": weight[1], "turned": weight.t()}
    found = snapshot_of(parts_of(snapshot(tensors=tensors)))
    for name, tensor in tensors.items():
        assert torch.equal(found.tensors[name], tensor)


def test_the_rest_is_json_to_the_last_digit() -> None:
    state = {"third": 1 / 3, "nan": math.nan, "list": [1, None, "ü"], "deep": {"x": [[True]]}}
    given_snapshot = snapshot(12, **state)
    found = snapshot_of(parts_of(given_snapshot))
    assert found.epoch == 12
    assert found.structure == given_snapshot.structure
    assert math.isnan(found.state.pop("nan"))
    del state["nan"]
    assert found.state == state


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 3))
def test_every_random_stream_goes_on_where_it_stood(seed: int, drawn: int) -> None:
    def draws() -> list[float]:
        found = [*torch.rand(3).tolist(), *torch.randn(3).tolist(), float(np.random.randn())]
        return [*found, *np.random.rand(3).tolist(), random.gauss(0, 1), random.random()]

    with preserved_randomness():
        seed_everything(seed)
        for _ in range(drawn):
            draws()
        np.random.randn()  # leaves a second value waiting
        random.gauss(0, 1)
        parts = parts_of(snapshot())
        expected = draws()
        seed_everything(seed ^ 1)
        snapshot_of(parts).randomness.apply()
        assert draws() == expected


def test_an_engine_goes_on_from_a_checkpoint_as_if_never_stopped() -> None:
    seed_everything(1)
    straight = engine()
    straight.train_epoch(1)
    parts = parts_of(straight.capture(1, {"mine": 1}))
    losses = [straight.train_epoch(epoch) for epoch in (2, 3)]
    end = straight.capture(3, {})

    seed_everything(99)
    other = engine()
    other.train_epoch(5)
    found = snapshot_of(parts)
    assert found.state["mine"] == 1
    other.restore(found)
    assert [other.train_epoch(epoch) for epoch in (2, 3)] == losses
    again = other.capture(3, {})
    assert again.tensors.keys() == end.tensors.keys()
    assert all(same_bits(again.tensors[name], end.tensors[name]) for name in end.tensors)
    assert again.state == end.state
    assert torch.equal(again.randomness.torch_cpu, end.randomness.torch_cpu)
