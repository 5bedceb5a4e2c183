"""The models that execution is measured and tested on, in plain torch, and a wrapper to beat.

Shapes: B samples, C classes, T positions, D features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CLASSES = 10


@dataclass(frozen=True)
class Case:
    """A model and what it reads: `build` makes it, `draw(B)` gives inputs for B samples."""

    name: str
    build: Callable[[], nn.Module]
    draw: Callable[[int], Tensor]

    def seeded(self, seed: int = 0) -> nn.Module:
        """The model with weights that follow from `seed`."""
        torch.manual_seed(seed)
        return self.build()

    def inputs(self, batch: int, seed: int = 0) -> Tensor:
        """Inputs for `batch` samples that follow from `seed`."""
        torch.manual_seed(seed)
        return self.draw(batch)


class BasicBlock(nn.Module):
    """Two 3 by 3 convolutions around a shortcut (He et al. 2016)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """(B, inputs, H, W) to (B, outputs, H / stride, W / stride)."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + shortcut)


class ResNet18(nn.Module):
    """ResNet-18 as for ImageNet (He et al. 2016), with C classes; its own width is 64."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        widths = (width, width, 2 * width, 4 * width, 8 * width)
        self.layers = nn.Sequential(
            *(
                nn.Sequential(
                    BasicBlock(before, after, 1 if before == after else 2),
                    BasicBlock(after, after, 1),
                )
                for before, after in pairwise(widths)
            )
        )
        self.fc = nn.Linear(8 * width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) to logits (B, C)."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        out: Tensor = self.fc(self.layers(x).mean(dim=(2, 3)))
        return out


class SequenceClassifier(nn.Module):
    """A transformer encoder of 4 layers over embedded positions, averaged, and a Linear."""

    def __init__(self, dropout: float = 0.1) -> None:
        super().__init__()
        self.embed = nn.Linear(16, 64)
        layer = nn.TransformerEncoderLayer(64, 4, 128, dropout=dropout, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 4)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 16) to logits (B, C)."""
        out: Tensor = self.head(self.encoder(self.embed(x)).mean(dim=1))
        return out


class GRUClassifier(nn.Module):
    """A GRU, and a hidden layer over its last state."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(16, 64, batch_first=True)
        self.hidden = nn.Linear(64, 64)
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, 16) to logits (B, C)."""
        states, _ = self.gru(x)
        out: Tensor = self.head(F.relu(self.hidden(states[:, -1])))
        return out


def mlp() -> nn.Module:
    """Six Linear layers, 256 wide, with ReLU between them; (B, 256) to (B, 256)."""
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(256, 256), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def cnn() -> nn.Module:
    """Three convolutions with BatchNorm and a Linear; (B, 3, 32, 32) to (B, C)."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


CASES: tuple[Case, ...] = (
    Case("mlp", mlp, lambda batch: torch.randn(batch, 256)),
    Case("cnn", cnn, lambda batch: torch.randn(batch, 3, 32, 32)),
    # The smallest even images that leave BatchNorm more than one position at batch 1.
    Case("resnet18", ResNet18, lambda batch: torch.randn(batch, 3, 40, 40)),
    Case("transformer", SequenceClassifier, lambda batch: torch.randn(batch, 16, 16)),
    Case("gru", GRUClassifier, lambda batch: torch.randn(batch, 16, 16)),
)


class FlagWrapper(nn.Module):
    """A layer inside another module, beside a seed that may be there: the usual way to host one."""

    def __init__(self, layer: nn.Module, seed: nn.Module | None = None) -> None:
        super().__init__()
        self.layer = layer
        self.active = seed is not None
        self.seed = seed

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output, with the seed's where it is active."""
        out: Tensor = self.layer(x)
        if self.active and self.seed is not None:
            out = out + self.seed(x)
        return out


def flag_wrapped(model: nn.Module, names: Iterable[str]) -> nn.Module:
    """`model` itself, with the layers of these names put into FlagWrappers.

    Layers of a TransformerEncoderLayer stay: its fused path reads their weights by name.
    """
    for name in names:
        path, _, key = name.rpartition(".")
        parent = model.get_submodule(path)
        if not isinstance(parent, nn.TransformerEncoderLayer):
            setattr(parent, key, FlagWrapper(model.get_submodule(name)))
    return model


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the very same parameters and buffers.

    Arms that share their tensors differ in nothing but their Python: no arm has the better place
    in memory.
    """
    tensors = [*model.parameters(), *model.buffers()]
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})
