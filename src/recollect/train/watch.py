"""Whether every loss and gradient norm so far was finite, without making the host wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EACH_STEP: bool | None = None
"""Whether the loop looks after every step; None: on a CPU, where looking costs nothing."""


class Bad(NamedTuple):
    """The first step that went wrong, and how."""

    step: int
    loss: float
    grad_norm: float


class FiniteWatch:
    """Keeps the first step whose loss or gradient norm was not finite, on the device.

    To read a number of the device makes the host wait until all work before it is done, so that the device then waits
    for the host. ``note`` reads nothing; ``first_bad`` does. Between two looks the parameters may already be spoiled,
    which is no harm as long as a look comes before anything is written.
    """

    def __init__(self, device: torch.device) -> None:
        self.each_step = device.type == "cpu" if EACH_STEP is None else EACH_STEP
        # float64 holds every step number up to 2^53; step 0 means none.
        self._first = torch.zeros(3, dtype=torch.float64, device=device)

    @torch.no_grad()
    def note(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        """Remember this step if it is the first bad one."""
        number = torch.full((), step, dtype=torch.float64, device=self._first.device)
        now = torch.stack([number, loss.double().view(()), grad_norm.double().view(())])
        is_first = ~torch.isfinite(loss + grad_norm) & (self._first[0] == 0)
        self._first = torch.where(is_first, now, self._first)

    def first_bad(self) -> Bad | None:
        """The first bad step, None while there is none. Waits for the device."""
        step, loss, norm = self._first.tolist()
        return Bad(int(step), loss, norm) if step else None
