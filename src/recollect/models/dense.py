"""Multi-layer perceptrons with the normalisation and the initial weights of DreamerV3 (arXiv 2301.04104)."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EPS = 1e-3
"""Of every normalisation."""


def dense(n_in: int, hidden: int, n_out: int, n_hidden: int = 1, *, out_scale: float = 1.0) -> nn.Sequential:
    """``n_hidden`` times Linear, LayerNorm, SiLU, then Linear; the last one's weights are scaled by ``out_scale``.

    An ``out_scale`` of 0 starts the network at the constant 0, which is how heads of rewards begin.
    """
    blocks: list[nn.Module] = []
    width = n_in
    for _ in range(n_hidden):
        blocks += [*linear_norm(width, hidden), nn.SiLU()]
        width = hidden
    last = nn.Linear(width, n_out)
    init_weights(last, out_scale)
    return nn.Sequential(*blocks, last)


def linear_norm(n_in: int, n_out: int) -> tuple[nn.Linear, nn.LayerNorm]:
    """Linear without the bias that the LayerNorm after it makes superfluous."""
    linear = nn.Linear(n_in, n_out, bias=False)
    init_weights(linear)
    return linear, nn.LayerNorm(n_out, eps=EPS)


@torch.no_grad()
def init_weights(layer: nn.Linear | nn.Conv2d | nn.ConvTranspose2d, scale: float = 1.0) -> None:
    """A normal distribution cut at two deviations, of variance ``scale`` / mean of fan-in and fan-out; no bias."""
    space = layer.weight[0, 0].numel() if layer.weight.dim() == 4 else 1
    fan = space * (layer.weight.shape[0] + layer.weight.shape[1]) / 2
    # 0.8796 is the deviation of a unit normal that was cut at two deviations.
    std = math.sqrt(scale / fan) / 0.87962566
    if scale:
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    else:
        nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of pictures (N, C, H, W), at every place by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (nn.LayerNorm's own name for it)
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
