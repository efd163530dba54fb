"""Encoders and decoders of observations: pixels by convolutions, tile codes by an MLP over one-hot codes.

Channels lie last in memory, as pictures are stored. Both come in pairs with one interface. An encoder maps observations
(N, ...) to features (N, F). A decoder maps features (N, F) to predictions, and knows its ``loss`` (N,) against the
truth and the ``observation`` a prediction stands for.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recollect.core.config import Config
from recollect.core.errors import ConfigError
from recollect.models.dense import ChannelNorm, dense, init_weights, linear_norm


@dataclass(frozen=True)
class VisionConfig(Config, ABC):
    """Base of what a world model looks at."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Of one observation."""

    @abstractmethod
    def encoder(self) -> tuple[nn.Module, int]:
        """The encoder and the width F of its features."""

    @abstractmethod
    def decoder(self, features: int) -> Decoder:
        """The decoder from features of that width."""

    @property
    def n_values(self) -> int:
        """An observation's numbers lie below it."""
        return 256


class Decoder(nn.Module, ABC):
    """From features to a predicted observation."""

    @abstractmethod
    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        """Negative log-likelihood up to a constant, summed over the observation: (N,)."""

    @abstractmethod
    def observation(self, prediction: Tensor) -> Tensor:
        """The observation a prediction stands for, in the observation's own type."""


@dataclass(frozen=True)
class Tiles(VisionConfig, kind="tiles"):
    """Grids of integer codes, (rows, columns) uint8 below ``n_codes``. Loss: cross-entropy, summed over tiles."""

    rows: int = 5
    columns: int = 5
    n_codes: int = 16
    hidden: int = 128

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.rows, self.columns)

    @property
    def n_values(self) -> int:
        return self.n_codes

    def encoder(self) -> tuple[nn.Module, int]:
        return _TileEncoder(self), self.hidden

    def decoder(self, features: int) -> Decoder:
        return _TileDecoder(self, features)


@dataclass(frozen=True)
class Pixels(VisionConfig, kind="pixels"):
    """Square RGB images, (size, size, 3) uint8. Loss: squared error on [0, 1], summed over pixels and channels.

    Strided 4 x 4 convolutions halve the image until it is 5 wide or less, channels doubling from ``depth``.
    """

    size: int = 40
    depth: int = 16

    def __post_init__(self) -> None:
        if self.stages < 1 or self.size % (1 << self.stages):
            raise ConfigError(f"pixels: size {self.size} cannot be halved to 5 or less; use 40 or 64")

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.size, self.size, 3)

    @property
    def stages(self) -> int:
        """How often the image is halved."""
        stages, size = 0, self.size
        while size > 5:
            stages, size = stages + 1, size // 2
        return stages

    def encoder(self) -> tuple[nn.Module, int]:
        encoder = _PixelEncoder(self)
        return encoder, encoder.features

    def decoder(self, features: int) -> Decoder:
        return _PixelDecoder(self, features)


class _TileEncoder(nn.Module):
    """A linear map of the one-hot codes, which are never written out: it is the sum of a column for every tile."""

    first: Tensor

    def __init__(self, config: Tiles) -> None:
        super().__init__()
        n_tiles = config.rows * config.columns
        self.net = nn.Sequential(*linear_norm(n_tiles * config.n_codes, config.hidden), nn.SiLU())
        self.register_buffer("first", torch.arange(n_tiles) * config.n_codes, persistent=False)

    def forward(self, codes: Tensor) -> Tensor:
        linear, *rest = self.net
        columns = linear.get_parameter("weight").t().contiguous()
        x = F.embedding_bag(codes.flatten(1).long() + self.first, columns, mode="sum")
        for module in rest:
            x = module(x)
        return x


class _TileDecoder(Decoder):
    def __init__(self, config: Tiles, features: int) -> None:
        super().__init__()
        self.shape = (config.rows, config.columns, config.n_codes)
        width = config.rows * config.columns * config.n_codes
        self.net = dense(features, config.hidden, width, 2)

    def forward(self, features: Tensor) -> Tensor:
        return self.net(features).unflatten(-1, self.shape)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        each = F.cross_entropy(_exact(prediction.flatten(0, -2)), truth.long().flatten(), reduction="none")
        return each.view(truth.shape).sum((-2, -1))

    def observation(self, prediction: Tensor) -> Tensor:
        return prediction.argmax(-1).to(torch.uint8)


class _PixelEncoder(nn.Module):
    def __init__(self, config: Pixels) -> None:
        super().__init__()
        channels = [3, *(config.depth << i for i in range(config.stages))]
        blocks: list[nn.Module] = []
        for before, after in itertools.pairwise(channels):
            convolution = nn.Conv2d(before, after, 4, 2, 1, bias=False)
            init_weights(convolution)
            blocks += [convolution, ChannelNorm(after), nn.SiLU()]
        self.net = _channels_last(blocks)
        self.features = channels[-1] * (config.size >> config.stages) ** 2

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images.permute(0, 3, 1, 2).to(next(self.parameters()).dtype) / 255).flatten(1)


class _PixelDecoder(Decoder):
    def __init__(self, config: Pixels, features: int) -> None:
        super().__init__()
        channels = [*(config.depth << i for i in reversed(range(config.stages))), 3]
        self.seed = (config.size >> config.stages, config.size >> config.stages, channels[0])
        self.linear = nn.Linear(features, self.seed[0] * self.seed[1] * self.seed[2])
        init_weights(self.linear)
        blocks: list[nn.Module] = []
        for i, (before, after) in enumerate(itertools.pairwise(channels)):
            last = i == config.stages - 1
            convolution = nn.ConvTranspose2d(before, after, 4, 2, 1, bias=last)
            init_weights(convolution)
            blocks += [convolution] if last else [convolution, ChannelNorm(after), nn.SiLU()]
        self.net = _channels_last(blocks)

    def forward(self, features: Tensor) -> Tensor:
        return self.net(self.linear(features).view(-1, *self.seed).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)

    def loss(self, prediction: Tensor, truth: Tensor) -> Tensor:
        return (_exact(prediction) - truth / 255).square().sum((-3, -2, -1))

    def observation(self, prediction: Tensor) -> Tensor:
        return (prediction.clamp(0, 1) * 255).round().to(torch.uint8)


def _channels_last(blocks: list[nn.Module]) -> nn.Sequential:
    """In that order, with the weights of convolutions laid out as the pictures are."""
    net = nn.Sequential(*blocks)
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    return net


def _exact(x: Tensor) -> Tensor:
    """At least float32: sums over thousands of pixels are not for bfloat16."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
