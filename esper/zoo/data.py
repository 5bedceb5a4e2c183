"""Real data that needs no download."""

from __future__ import annotations

import contextlib
import functools
import io
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset


def mnist1d(
    train: int = 4000,
    validation: int = 1000,
    test: int = 1000,
    seed: int = 42,
    image: bool = False,
) -> dict[str, TensorDataset]:
    """MNIST-1D (Greydanus & Kobak 2024): ten classes of signals [40], made on the spot.

    `seed` draws the set; `image` gives signals as [1, 1, 40] for convolutions. The three splits
    are disjoint samples of one draw.
    """
    x, y = _mnist1d_signals(train + validation + test, seed)
    if image:
        x = x[:, None, None, :]
    return _split(x, y, train, validation, test)


@functools.lru_cache(maxsize=1)
def _mnist1d_signals(samples: int, seed: int) -> tuple[Tensor, Tensor]:
    """At least `samples` signals [N, 40] and their classes [N]; kept, as making them is slow."""
    from mnist1d.data import get_dataset_args, make_dataset

    arguments = get_dataset_args()
    # The generator makes num_samples rounded down to tens, a tenth a class, in random order.
    arguments.num_samples = -(-samples // 10) * 10
    arguments.train_split = 1.0
    arguments.seed = seed
    with contextlib.redirect_stdout(io.StringIO()):
        made = make_dataset(arguments)
    x = torch.from_numpy(np.asarray(made["x"])).float()
    return x, torch.from_numpy(np.asarray(made["y"])).long()


def digits(
    train: int = 200, validation: int = 400, test: int = 800, seed: int = 0, image: bool = True
) -> dict[str, TensorDataset]:
    """Scikit-learn's 1,797 handwritten digits of 8×8 pixels, with few labels.

    Inputs are scaled to [0, 1]: [1, 8, 8] as images, [64] without. `seed` draws the splits.
    """
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    x = torch.from_numpy(bunch.data).float() / 16.0
    y = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    x, y = x[order], y[order]
    if image:
        x = x.reshape(-1, 1, 8, 8)
    return _split(x, y, train, validation, test)


def _split(
    x: Tensor, y: Tensor, train: int, validation: int, test: int
) -> dict[str, TensorDataset]:
    total = train + validation + test
    if min(train, validation, test) < 1 or total > len(x):
        raise ValueError(
            f"got {train} + {validation} + {test} samples; allowed: each at least 1, "
            f"{len(x)} in all"
        )
    sizes = {"train": train, "validation": validation, "test": test}
    start, splits = 0, {}
    for name, size in sizes.items():
        splits[name] = TensorDataset(x[start : start + size], y[start : start + size])
        start += size
    return splits
