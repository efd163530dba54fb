"""What sparse attention's queries and keys are made of: the moment around a position, and for keys the one before."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from recollect.ops.conv import causal_conv


class Past(NamedTuple):
    """What later positions look back on: the last ``span - 1`` inputs (B, S-1, E), and with ``follow`` the moment of
    the last position (B, 1, E); of length 0 where nothing is.
    """

    window: Tensor
    last: Tensor


class Moments(nn.Module):
    """m_t = sum_{j < span} w_j * x_{t-j}, elementwise; queries are made of m_t and, with ``follow``, keys of m_{t-1}.

    The weights start as N(0, 1 / span) less their mean: a random sketch, in which the product of two moments is about
    that of the inputs in them, compared lag by lag, and in which what all inputs share cancels. (Activations have a
    large mean: with it the moments of a text were within 0.98 of each other, and hashing could not tell them apart.)
    Nothing before a segment's first position is seen: its key is made of zeros.
    With ``span`` 1 and no ``follow`` both are x itself. O(L E span) time.
    """

    def __init__(self, width: int, span: int, follow: bool) -> None:
        super().__init__()
        self.width, self.span, self.follow = width, span, follow
        if span > 1:
            weight = torch.randn(width, span) / (span - 1) ** 0.5
            self.weight = nn.Parameter(weight - weight.mean(1, keepdim=True))

    def init_state(self, batch: int, *, device: torch.device | str | None, dtype: torch.dtype | None) -> Past:
        """No past: zeros."""
        window = torch.zeros(batch, self.span - 1, self.width, device=device, dtype=dtype)
        return Past(window, torch.zeros(batch, int(self.follow), self.width, device=device, dtype=dtype))

    def forward(self, x: Tensor, past: Past | None, reset: Tensor | None) -> tuple[Tensor, Tensor, Past]:
        """What queries are made of (B, L, E), what keys are made of, and the past to go on from."""
        if past is None:
            past = self.init_state(x.shape[0], device=x.device, dtype=x.dtype)
        moment, window = x, past.window
        if self.span > 1:
            moment, window = causal_conv(x, self.weight, None, window, reset=reset)
            moment = moment.to(x.dtype)
        if not self.follow:
            return moment, moment, Past(window, past.last)
        before = torch.cat([past.last, moment[:, :-1]], 1)
        if reset is not None:
            before = before.masked_fill(reset.unsqueeze(-1), 0)
        return moment, before, Past(window, moment[:, -1:])
