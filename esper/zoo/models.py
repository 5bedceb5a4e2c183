"""Small models in plain torch: this file is copied beside what a run leaves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """A multilayer perceptron: Linear and ReLU in turn, a Linear at the end.

    Takes [B, ...], flattened to [B, inputs]; gives [B, outputs].
    """

    def __init__(self, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        self.hidden = nn.ModuleList(nn.Linear(before, after) for before, after in pairwise(widths))
        self.head = nn.Linear(widths[-1], outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, outputs]."""
        x = x.flatten(1)
        for layer in self.hidden:
            x = layer(x).relu()
        out: Tensor = self.head(x)
        return out


class CNN(nn.Module):
    """A small convolutional network: Conv2d, BatchNorm, ReLU and max-pooling, then a Linear.

    Takes [B, channels, H, W]; gives [B, outputs]. `kernel` and `pool` are (height, width), so
    that a signal [B, 1, 1, W] is served by kernels of height 1.
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int],
        outputs: int,
        kernel: Sequence[int] = (3, 3),
        pool: Sequence[int] = (2, 2),
    ) -> None:
        super().__init__()
        size = (int(kernel[0]), int(kernel[1]))
        padding = (size[0] // 2, size[1] // 2)
        layers: list[nn.Module] = []
        before = channels
        for index, after in enumerate(widths):
            layers += [nn.Conv2d(before, after, size, padding=padding), nn.BatchNorm2d(after)]
            layers += [nn.ReLU()]
            if index < len(widths) - 1:
                layers.append(nn.MaxPool2d((int(pool[0]), int(pool[1]))))
            before = after
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(before, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, outputs]."""
        out: Tensor = self.head(self.features(x).mean(dim=(2, 3)))
        return out
