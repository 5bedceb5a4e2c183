from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from esper.errors import DataError
from esper.services.tolaria.data import (
    MEASURED_SAMPLES,
    Datasets,
    checked_datasets,
    epoch_order,
    gathered,
    measured_subset,
    ordered_batches,
)


def points(samples: int) -> TensorDataset:
    return TensorDataset(torch.arange(samples * 2.0).reshape(samples, 2), torch.arange(samples))


def splits(**other: Any) -> dict[str, Any]:
    return {"train": points(6), "validation": points(4), "test": points(1)} | other


class Failing(Dataset[Any]):
    """A dataset whose samples can't be read."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Any:
        raise FileNotFoundError("no file sample-0.png")


# -- checking -----------------------------------------------------------------------------------


def test_three_map_style_datasets_are_taken_as_they_are() -> None:
    given_splits = splits(train=[(torch.zeros(2), 1)], validation=[([1.0], 2)] * 4)
    found = checked_datasets(given_splits)
    assert found == Datasets(**given_splits)
    assert found.train is given_splits["train"]


def test_any_mapping_will_do() -> None:
    class Lazy(Mapping[str, Any]):
        def __getitem__(self, key: str) -> Any:
            return splits()[key]

        def __iter__(self) -> Any:
            return iter(splits())

        def __len__(self) -> int:
            return 3

    assert len(checked_datasets(Lazy()).validation) == 4


REFUSED = [
    (None, "spec.data.entrypoint", "NoneType", "a dict with the datasets"),
    ([points(3)], "spec.data.entrypoint", "list", "a dict with the datasets"),
    ({}, "spec.data.entrypoint", "nothing", "exactly train, validation and test"),
    ({"train": points(3)}, "spec.data.entrypoint", "a dict with train", "exactly"),
    (splits(extra=points(3)), "spec.data.entrypoint", "extra", "exactly"),
    (splits(train=iter([])), "data.train", "list_iterator", "map-style"),
    (splits(test=None), "data.test", "NoneType", "map-style"),
    (splits(validation={1, 2, 3, 4}), "data.validation", "set", "map-style"),
    (splits(train=[]), "data.train", "0 samples", "not an empty set"),
    (splits(validation=points(0)), "data.validation", "0 samples", "at least 4"),
    (splits(validation=points(3)), "data.validation", "3 samples", "at least 4"),
    (splits(test=[]), "data.test", "0 samples", "at least 1"),
    (splits(train=torch.zeros(5, 3)), "data.train[0]", "Tensor", "a pair (input, target)"),
    (splits(train=[(1, 2, 3)]), "data.train[0]", "tuple", "a pair (input, target)"),
    (splits(test=[{"x": 1, "y": 2}]), "data.test[0]", "dict", "a pair (input, target)"),
    (splits(train=Failing()), "data.train[0]", "FileNotFoundError: no file", "a pair"),
    (splits(train={"a": (1, 2)}), "data.train[0]", "KeyError", "a pair (input, target)"),
]


@pytest.mark.parametrize(("value", "field", "came", "allowed"), REFUSED)
def test_bad_datasets_are_refused(value: object, field: str, came: str, allowed: str) -> None:
    with pytest.raises(DataError) as caught:
        checked_datasets(value)
    assert caught.value.field == field
    assert came in str(caught.value.came)
    assert allowed in caught.value.allowed
    assert "\n" not in str(caught.value)


# -- batches ------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.data())
def test_whole_tensors_are_indexed_to_the_same_batch_as_sample_by_sample(
    samples: int, data: st.DataObject
) -> None:
    shape = data.draw(st.sampled_from([(), (3,), (2, 4, 4)]))
    target_shape = data.draw(st.sampled_from([(), (2,)]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.long]))
    inputs = torch.randn(samples, *shape)
    targets = (torch.randn(samples, *target_shape) * 9).to(dtype)
    order = torch.tensor(data.draw(st.lists(st.integers(0, samples - 1), min_size=1, max_size=10)))
    fast = gathered(TensorDataset(inputs, targets), order)
    # A Subset is no TensorDataset, so its samples are fetched one by one.
    slow = gathered(Subset(TensorDataset(inputs, targets), range(samples)), order)
    for one, other in zip(fast, slow, strict=True):
        assert isinstance(one, Tensor)
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_a_subclass_that_changes_its_samples_is_asked_for_each() -> None:
    class Doubled(TensorDataset):
        def __getitem__(self, index: int) -> tuple[Tensor, ...]:
            inputs, target = super().__getitem__(index)
            return inputs * 2, target

    inputs, _ = gathered(Doubled(torch.ones(3, 2), torch.zeros(3)), torch.arange(2))
    assert inputs.tolist() == [[2.0, 2.0], [2.0, 2.0]]


def test_samples_of_numbers_arrays_tuples_and_dicts_are_collated() -> None:
    numbers = [(np.float32([1, 2]), 1), (np.float32([3, 4]), 0)]
    inputs, targets = gathered(numbers, torch.tensor([1, 0]))
    assert inputs.tolist() == [[3, 4], [1, 2]]
    assert targets.tolist() == [0, 1]
    pairs = [((torch.ones(2), torch.zeros(1)), 1.0)] * 3
    (left, right), _ = gathered(pairs, torch.arange(3))
    assert (left.shape, right.shape) == ((3, 2), (3, 1))
    named = [({"x": torch.ones(2)}, 1)] * 2
    inputs, _ = gathered(named, torch.arange(2))
    assert inputs["x"].shape == (2, 2)


@pytest.mark.parametrize(
    ("size", "batch", "limit", "sizes"),
    [
        (5, 2, None, [2, 2, 1]),
        (5, 2, 3, [2, 1]),
        (5, 9, None, [5]),
        (5, 2, 99, [2, 2, 1]),
        (1, 1, None, [1]),
    ],
)
def test_ordered_batches_go_through_the_set_as_it_lies(
    size: int, batch: int, limit: int | None, sizes: list[int]
) -> None:
    found = list(ordered_batches(points(size), batch, limit))
    assert [len(targets) for _, targets in found] == sizes
    assert torch.cat([targets for _, targets in found]).tolist() == list(range(sum(sizes)))


# -- orders -------------------------------------------------------------------------------------

sizes = st.integers(1, 200)
seeds = st.integers(0, 2**32 - 1)


@given(sizes, st.integers(1, 64), seeds, st.integers(1, 100_000))
def test_an_epochs_order_is_a_pure_function_that_sees_every_sample_once(
    size: int, batch: int, seed: int, epoch: int
) -> None:
    state = torch.get_rng_state()
    found = epoch_order(size, batch, seed, epoch)
    torch.rand(3)
    again = epoch_order(size, batch, seed, epoch)
    torch.set_rng_state(state)
    assert [piece.tolist() for piece in found] == [piece.tolist() for piece in again]
    assert sorted(torch.cat(found).tolist()) == list(range(size))


@given(sizes, st.integers(1, 64), seeds)
def test_orders_draw_nothing_from_the_global_stream(size: int, batch: int, seed: int) -> None:
    state = torch.get_rng_state()
    epoch_order(size, batch, seed, 1)
    measured_subset(size, seed)
    assert torch.equal(torch.get_rng_state(), state)


@given(sizes, st.integers(1, 64))
def test_no_batch_is_of_one_sample_unless_it_must(size: int, batch: int) -> None:
    lengths = [len(piece) for piece in epoch_order(size, batch, 0, 1)]
    if batch == 1:
        assert lengths == [1] * max(0, size - 2) + [min(size, 2)]
        return
    assert all(length == batch for length in lengths[:-1])
    if size > 1:
        assert lengths[-1] in range(2, batch + 2)


@pytest.mark.parametrize(
    ("size", "batch", "expected"),
    [(9, 4, [4, 5]), (8, 4, [4, 4]), (10, 4, [4, 4, 2]), (1, 4, [1]), (5, 4, [5]), (4, 9, [4])],
)
def test_a_last_single_sample_joins_the_batch_before(
    size: int, batch: int, expected: list[int]
) -> None:
    assert [len(piece) for piece in epoch_order(size, batch, 3, 2)] == expected


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    orders = {
        tuple(torch.cat(epoch_order(50, 8, seed, epoch)).tolist())
        for seed in range(5)
        for epoch in range(1, 6)
    }
    assert len(orders) == 25


def test_the_batch_size_does_not_change_the_order() -> None:
    assert torch.equal(torch.cat(epoch_order(50, 7, 1, 2)), torch.cat(epoch_order(50, 50, 1, 2)))


@given(st.integers(1, 3000), seeds)
@settings(max_examples=30)
def test_the_measured_subset_is_fixed_distinct_and_bounded(size: int, seed: int) -> None:
    found = measured_subset(size, seed)
    assert torch.equal(found, measured_subset(size, seed))
    assert len(found) == min(size, MEASURED_SAMPLES) == len(set(found.tolist()))
    assert int(found.max()) < size
