"""Data for a session: the user's datasets, checked, and the batches drawn from them.

An epoch's order is a pure function of the session's seed and the epoch, so that a resumed run
sees the same batches without any sampler state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

from esper.errors import BadInput, DataError, EntryPointError, one_line

SPLITS = ("train", "validation", "test")
MEASURED_SAMPLES = 1024

FAILURES = (Exception, SystemExit)
"""What code of the user's may raise: a script may exit, which must not end Esper without a word."""

Batch = tuple[Any, Tensor]


@dataclass(frozen=True)
class Datasets:
    """The three splits; `validation` is all that gates and controller see, `test` is read once."""

    train: Any
    validation: Any
    test: Any


def checked_datasets(value: object) -> Datasets:
    """What a data entry point returned, as `Datasets`.

    Raises:
        DataError: it is no dict of the three splits, or a split is empty or not map-style.
    """
    if not isinstance(value, Mapping):
        raise DataError(
            "spec.data.entrypoint",
            type(value).__name__,
            "a dict with the datasets train, validation and test",
        )
    missing = [name for name in SPLITS if name not in value]
    extra = [str(name) for name in value if name not in SPLITS]
    if missing or extra:
        raise DataError(
            "spec.data.entrypoint",
            f"a dict with {', '.join(map(str, value)) or 'nothing'}",
            "exactly train, validation and test",
        )
    for name in SPLITS:
        dataset = value[name]
        if not (isinstance(dataset, Sized) and hasattr(dataset, "__getitem__")):
            raise DataError(
                f"data.{name}", type(dataset).__name__, "a map-style dataset of (input, target)"
            )
        least = {"train": 1, "validation": 4, "test": 1}[name]
        if len(dataset) < least:
            raise DataError(
                f"data.{name}", f"{len(dataset)} samples", f"at least {least}, not an empty set"
            )
        try:
            first = dataset[0]
        except FAILURES as error:
            came = f"{type(error).__name__}: {one_line(str(error))}"
            raise DataError(f"data.{name}[0]", came, "a pair (input, target)") from error
        if not (isinstance(first, (tuple, list)) and len(first) == 2):
            raise DataError(f"data.{name}[0]", type(first).__name__, "a pair (input, target)")
    return Datasets(**{name: value[name] for name in SPLITS})


def gathered(dataset: Any, indices: Tensor) -> Batch:
    """The samples at `indices` [B] as one batch (inputs [B, ...], targets [B, ...])."""
    if type(dataset) is TensorDataset:
        # Indexing whole tensors is the same batch some fifty times faster than sample by sample.
        inputs, targets = dataset.tensors
        return inputs[indices], targets[indices]
    try:
        samples = [dataset[i] for i in indices.tolist()]
    except SystemExit as error:
        raise exited("spec.data.entrypoint", error) from error
    inputs, targets = default_collate(samples)
    return inputs, targets


def epoch_order(
    size: int, batch_size: int, seed: int, epoch: int, *, shards: int = 1
) -> list[Tensor]:
    """One epoch's batches as sample indices, in an order drawn from (`seed`, `epoch`).

    Each is cut into `shards`. A last batch with fewer than two samples for each joins the one
    before it: BatchNorm can't train on a single sample.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
    order = torch.randperm(size, generator=generator)
    pieces = list(order.split(batch_size))
    if len(pieces) > 1 and len(pieces[-1]) < 2 * shards:
        pieces[-2:] = [torch.cat(pieces[-2:])]
    return pieces


def ordered_batches(dataset: Any, batch_size: int, limit: int | None = None) -> Iterator[Batch]:
    """The first `limit` samples (all by default) in their own order."""
    count = len(dataset) if limit is None else min(limit, len(dataset))
    for start in range(0, count, batch_size):
        yield gathered(dataset, torch.arange(start, min(start + batch_size, count)))


def measured_subset(size: int, seed: int) -> Tensor:
    """The fixed validation samples that gates measure on: at most 1,024, drawn once from `seed`."""
    generator = torch.Generator().manual_seed(seed % 2**63)
    return torch.randperm(size, generator=generator)[:MEASURED_SAMPLES]


def forwarded(model: nn.Module, inputs: Any) -> Tensor:
    """The model's output: a tuple or list of inputs is spread, a dict gives keyword arguments."""
    try:
        if isinstance(inputs, dict):
            output: Tensor = model(**inputs)
        elif isinstance(inputs, (tuple, list)):
            output = model(*inputs)
        else:
            output = model(inputs)
    except SystemExit as error:
        raise exited("spec.model.entrypoint", error) from error
    return output


def exited(field: str, error: SystemExit) -> BadInput:
    """What it means that code named by `field` asked the process to exit while it was at work."""
    return EntryPointError(
        field, f"code that exits: SystemExit: {error}", "code that returns, or raises an error"
    )


def moved_batch(batch: Batch, device: torch.device) -> Batch:
    """The batch on `device`; its inputs are a tensor, or a tuple, list or dict of tensors."""
    return _moved(batch[0], device), batch[1].to(device)


def wide(outputs: Tensor) -> Tensor:
    """`outputs` as the loss is computed on them: in single precision at least."""
    return outputs if outputs.dtype is torch.float64 else outputs.float()


def shape_of(inputs: Any) -> object:
    """The shapes in `inputs`, as what work on them is counted under."""
    if isinstance(inputs, dict):
        return tuple((key, tuple(value.shape)) for key, value in inputs.items())
    if isinstance(inputs, (tuple, list)):
        return tuple(tuple(value.shape) for value in inputs)
    return tuple(inputs.shape)


def _moved(inputs: Any, device: torch.device) -> Any:
    """`inputs`, a tensor or a tuple, list or dict of tensors, on `device`."""
    if isinstance(inputs, dict):
        return {key: value.to(device) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return type(inputs)(value.to(device) for value in inputs)
    return inputs.to(device)
