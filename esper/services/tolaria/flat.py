"""Tensors as bytes: laid end to end to travel between ranks in one message, and their digest."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from esper.execution.isolation import writable

_ALIGNMENT = 16
"""Every tensor begins at a multiple of it, so that each can be looked at as numbers."""


@dataclass(frozen=True)
class Flat:
    """Where each of several tensors lies in one row of bytes."""

    likes: tuple[Tensor, ...]
    starts: tuple[int, ...]
    size: int

    @classmethod
    def of(cls, likes: Sequence[Tensor]) -> Flat:
        """A row for tensors of these shapes and types, on their device."""
        sizes = [-(-like.nbytes // _ALIGNMENT) * _ALIGNMENT for like in likes]
        ends = list(accumulate(sizes))
        starts = [end - size for end, size in zip(ends, sizes, strict=True)]
        return cls(tuple(likes), tuple(starts), ends[-1] if ends else 0)

    def zeros(self) -> Tensor:
        """An empty row [size], uint8."""
        device = self.likes[0].device if self.likes else None
        return torch.zeros(self.size, dtype=torch.uint8, device=device)

    @torch.no_grad()
    def bytes_of(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """The row [size] of these tensors; zeros where there is none."""
        row = self.zeros()
        for held, tensor in zip(self._views(row), tensors, strict=True):
            if tensor is not None:
                held.copy_(tensor)
        return row

    @torch.no_grad()
    def add(self, total: Tensor, row: Tensor) -> None:
        """Add the tensors of `row` to those of `total`, element by element."""
        for held, value in zip(self._views(total), self._views(row), strict=True):
            held += value

    def tensors_in(self, row: Tensor) -> list[Tensor]:
        """The tensors of a row, each in the strides of its model: fused optimisers need those."""
        return [
            view
            if view.stride() == like.stride()
            else torch.empty_like(like, requires_grad=False).copy_(view)
            for view, like in zip(self._views(row), self.likes, strict=True)
        ]

    @torch.no_grad()
    def write(self, row: Tensor, tensors: Sequence[Tensor]) -> None:
        """Give `tensors` the contents of the row, in place, where torch writes to them."""
        for tensor, value in zip(tensors, self._views(row), strict=True):
            if writable(tensor):
                tensor.copy_(value)

    def _views(self, row: Tensor) -> list[Tensor]:
        return [
            row[start : start + like.nbytes].view(like.dtype).view(like.shape)
            # A row without bytes may begin where no number can.
            if like.nbytes
            else torch.empty_like(like)
            for start, like in zip(self.starts, self.likes, strict=True)
        ]


@torch.no_grad()
def module_digest(module: nn.Module) -> str:
    """The SHA-256 of a module's parameters and buffers, by name, type, shape and bits."""
    digest = hashlib.sha256()
    named = [*module.named_parameters(), *module.named_buffers()]
    for name, tensor in named:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
