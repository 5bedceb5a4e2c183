"""A model and data of one's own: nothing here knows of Esper."""

import math

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset


class Spiral(nn.Module):
    """Says on which of three spiral arms a point of the plane lies: [B, 2] → [B, 3]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.lift = nn.Linear(2, width)
        self.mix = nn.Linear(width, width)
        self.out = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, 3]."""
        x = torch.tanh(self.lift(x))
        x = torch.tanh(self.mix(x))
        return self.out(x)


def spirals(points: int = 3000, noise: float = 0.15, seed: int = 0) -> dict[str, TensorDataset]:
    """Points on three noisy spiral arms, split into train, validation and test."""
    generator = torch.Generator().manual_seed(seed)
    arm = torch.randint(3, (points,), generator=generator)
    radius = torch.rand(points, generator=generator)
    jitter = noise * torch.randn(points, generator=generator)
    angle = 2 * math.pi * arm / 3 + 7.0 * radius + jitter
    x = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1) * 2
    parts = {"train": (0, 0.6), "validation": (0.6, 0.8), "test": (0.8, 1.0)}
    return {
        name: TensorDataset(
            x[int(a * points) : int(b * points)], arm[int(a * points) : int(b * points)]
        )
        for name, (a, b) in parts.items()
    }
