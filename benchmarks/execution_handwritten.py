"""The catalogue's blueprints as a person would write them, to hold grafted seeds against.

Each has its parameters in the order of the seed's, so that both arms can share them. Shapes:
B samples, C channels, T positions (one for a vector), D features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Grown(nn.Module):
    """A host with a seed that reads what the host reads."""

    def __init__(self, host: nn.Module, seed: nn.Module, alpha: float) -> None:
        super().__init__()
        self.host = host
        self.seed = seed
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """As the host's."""
        out: Tensor = self.host(x) + self.alpha * self.seed(x)
        return out


class GrownBehind(Grown):
    """A host with a seed that reads the host's own output."""

    def forward(self, x: Tensor) -> Tensor:
        """As the host's."""
        out: Tensor = self.host(x)
        return out + self.alpha * self.seed(out)


class Pair(nn.Module):
    """A producer, ReLU and a consumer."""

    def __init__(self, producer: nn.Module, consumer: nn.Module) -> None:
        super().__init__()
        self.producer = producer
        self.consumer = consumer

    def forward(self, x: Tensor) -> Tensor:
        """The producer's input to the consumer's output."""
        out: Tensor = self.consumer(F.relu(self.producer(x)))
        return out


class Widened(nn.Module):
    """A Pair with more units between the two."""

    def __init__(
        self, producer: nn.Module, consumer: nn.Module, more: nn.Module, alpha: float
    ) -> None:
        super().__init__()
        self.producer = producer
        self.consumer = consumer
        self.more = more
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        """The producer's input to the consumer's output."""
        out: Tensor = self.consumer(F.relu(self.producer(x))) + self.alpha * self.more(x)
        return out


class Zeros(nn.Module):
    """Zeros, beside a host with as many outputs as inputs."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape to the same."""
        return torch.zeros_like(x)


class Scaling(nn.Module):
    """A scale and a shift for each channel, which lies in front of `positions` dimensions."""

    def __init__(self, channels: int, positions: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(channels, *(1,) * positions))
        self.bias = nn.Parameter(torch.empty(channels, *(1,) * positions))

    def forward(self, x: Tensor) -> Tensor:
        """Any shape with the channels in their place to the same."""
        return x * self.weight + self.bias


class Bottleneck(nn.Module):
    """Two layers with an activation between them."""

    def __init__(
        self, down: nn.Module, up: nn.Module, activation: Callable[[Tensor], Tensor] = F.gelu
    ) -> None:
        super().__init__()
        self.down = down
        self.up = up
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """As `down` takes it to as `up` gives it."""
        out: Tensor = self.up(self.activation(self.down(x)))
        return out


class SqueezeExcitation(nn.Module):
    """A gate for each channel, from the channels' means (Hu et al. 2018)."""

    def __init__(self, channels: int, units: int) -> None:
        super().__init__()
        self.down = nn.Linear(channels, units)
        self.up = nn.Linear(units, channels)


class GatedFeatures(SqueezeExcitation):
    """Squeeze and excitation for (B, T, D)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        gate = torch.tanh(self.up(F.relu(self.down(x.mean(dim=1)))))
        return x * gate[:, None]


class GatedImage(SqueezeExcitation):
    """Squeeze and excitation for (B, C, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to the same."""
        gate = torch.tanh(self.up(F.relu(self.down(x.mean(dim=(2, 3))))))
        return x * gate[:, :, None, None]


class SelfAttention(nn.Module):
    """Attention of a few heads among T positions (Vaswani et al. 2017)."""

    def __init__(self, features: int, channels: int, heads: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(features, 3 * channels)
        self.out = nn.Linear(channels, features)
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to the same."""
        batch, positions, _ = x.shape
        qkv = self.qkv(x).view(batch, positions, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value)
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, positions, -1))
        return out


class ImageAttention(SelfAttention):
    """Attention among the places of an image (Wang et al. 2018)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, height, width) to the same."""
        out = super().forward(x.flatten(2).transpose(1, 2))
        return out.transpose(1, 2).reshape(x.shape)


def _linear_bottleneck(host: nn.Linear) -> nn.Module:
    return Bottleneck(nn.Linear(host.in_features, 36), nn.Linear(36, host.out_features))


def _conv_bottleneck(host: nn.Conv2d) -> nn.Module:
    return Bottleneck(
        nn.Conv2d(host.in_channels, 16, 1), nn.Conv2d(16, host.out_channels, 3, padding=1)
    )


def _depthwise_separable(host: nn.Conv2d) -> nn.Module:
    channels = host.in_channels
    return Bottleneck(
        nn.Conv2d(channels, channels, 3, padding=1, groups=channels),
        nn.Conv2d(channels, host.out_channels, 1),
    )


def _more_units(host: nn.Linear) -> nn.Module:
    return Bottleneck(
        nn.Linear(host.in_features, 16), nn.Linear(16, host.out_features, bias=False), F.relu
    )


def _more_channels(host: nn.Conv2d) -> nn.Module:
    return Bottleneck(
        nn.Conv2d(host.in_channels, 16, 3, padding=1),
        nn.Conv2d(16, host.out_channels, 3, padding=1, bias=False),
        F.relu,
    )


SEEDS: Mapping[tuple[str, str], Callable[..., nn.Module]] = {
    ("noop", "Linear"): lambda _: Zeros(),
    ("noop", "Conv2d"): lambda _: Zeros(),
    ("affine", "Linear"): lambda host: Scaling(host.out_features, 0),
    ("affine", "Conv2d"): lambda host: Scaling(host.out_channels, 2),
    ("bottleneck-mlp", "Linear"): _linear_bottleneck,
    ("bottleneck-conv", "Conv2d"): _conv_bottleneck,
    ("depthwise-separable-conv", "Conv2d"): _depthwise_separable,
    ("squeeze-excitation", "Linear"): lambda host: GatedFeatures(host.out_features, 16),
    ("squeeze-excitation", "Conv2d"): lambda host: GatedImage(host.out_channels, 16),
    ("attention", "Linear"): lambda host: SelfAttention(host.out_features, 32, 4),
    ("attention", "Conv2d"): lambda host: ImageAttention(host.out_channels, 32, 4),
    ("widen", "Linear"): _more_units,
    ("widen", "Conv2d"): _more_channels,
}
"""By blueprint and kind of host: the seed's module with the catalogue's default arguments."""
