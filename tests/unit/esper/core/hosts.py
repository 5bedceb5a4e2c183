"""A model with a host of every kind."""

from __future__ import annotations

import torch
from torch import Tensor, nn

KINDS = ("Linear", "Conv1d", "Conv2d", "LayerNorm", "BatchNorm2d", "Embedding")
LAYERS = {
    "Embedding": "words",
    "LayerNorm": "norm",
    "Conv1d": "second",
    "Conv2d": "image",
    "BatchNorm2d": "batchnorm",
    "Linear": "head",
}


class EveryKind(nn.Module):
    """Words to an image and back to rows, through a layer of every kind."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(9, width, padding_idx=0)
        self.norm = nn.LayerNorm(width, eps=1e-4)
        self.first = nn.Conv1d(width, 6, 3, padding=1, bias=False)
        self.second = nn.Conv1d(6, 5, 3, padding="same", padding_mode="circular")
        self.image = nn.Conv2d(1, 3, 3, padding=1, stride=2)
        self.batchnorm = nn.BatchNorm2d(3, momentum=0.2)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, length) indices to (batch, height, width, 2)."""
        rows = self.norm(self.words(x))
        rows = self.second(torch.tanh(self.first(rows.transpose(1, 2))))
        image = self.batchnorm(self.image(rows[:, None]))
        return self.head(image.movedim(1, -1))
