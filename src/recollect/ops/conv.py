"""Short causal depthwise convolution with a carried window and resets."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv(
    x_BLE: Tensor,
    weight_EW: Tensor,
    bias_E: Tensor,
    window_BWE: Tensor,
    *,
    reset: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, W-1-j] x_{t-j} for lags j < W, and the window to carry on with.

    ``window`` (B, W-1, E) holds the inputs before the first position, oldest first, zero where there were none. A reset
    (B, L) at t makes every tap that reaches back across t zero, in the returned window too. One position is L = 1.
    Time O(B L E W). Shifted products: a grouped ``conv1d`` on a CPU takes about three times as long.
    """
    length, taps = x_BLE.shape[1], weight_EW.shape[1]
    inputs = torch.cat([window_BWE, x_BLE], 1)
    if reset is None:
        y_BLE = torch.addcmul(bias_E, x_BLE, weight_EW[:, -1])
        for tap in reversed(range(taps - 1)):
            y_BLE = torch.addcmul(y_BLE, inputs[:, tap : tap + length], weight_EW[:, tap])
        return y_BLE, inputs[:, length:]
    segment = F.pad(reset.cumsum(1), (taps - 1, 0))
    y_BLE = torch.addcmul(bias_E, x_BLE, weight_EW[:, -1])
    for tap in reversed(range(taps - 1)):
        reached = (segment[:, tap : tap + length] == segment[:, taps - 1 :]).unsqueeze(-1)
        y_BLE = torch.addcmul(y_BLE, torch.where(reached, inputs[:, tap : tap + length], 0), weight_EW[:, tap])
    kept = (segment[:, length:] == segment[:, -1:]).unsqueeze(-1)
    return y_BLE, torch.where(kept, inputs[:, length:], 0)
