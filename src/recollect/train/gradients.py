"""Gradients of a batch: of all of it at once, or of one part after another."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from recollect.core.seeding import Streams
from recollect.train.compilation import Compile, compiled_step
from recollect.train.parallel.model import SharedModel
from recollect.train.problem import Share


def gradients(
    model: SharedModel,
    shares: list[Share],
    streams: Streams,
    step: int,
    bf16: bool,
    compile: Compile,  # noqa: A002
) -> tuple[Tensor, dict[str, Any]]:
    """Add the gradients of this process's shares to the parameters, as parts of the mean over all processes.

    Returns the means of the loss, detached, and of its numbers over these shares.
    """
    device = model.device
    total, sums = torch.zeros((), device=device), dict[str, Any]()
    for share in shares:
        # The same for every share: what a layer draws once for all rows is then the same for all.
        torch.manual_seed(streams.number("sample", "global", step))
        number = () if share.number is None else (share.number,)
        generator = streams.torch("sample", step, *number, device=str(device))
        weight = share.weight * model.team.size
        with compiled_step(compile), model.sharing(last=share is shares[-1]):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
                loss, numbers = model.loss(share, generator)
            loss = loss if weight == 1 else loss * weight
            loss.backward()
        if len(shares) == 1 and weight == 1:
            return loss.detach(), numbers
        total = total + loss.detach()
        for name, value in numbers.items():
            value = (value.detach() if isinstance(value, Tensor) else value) * weight
            sums[name] = sums[name] + value if name in sums else value
    return total, sums
