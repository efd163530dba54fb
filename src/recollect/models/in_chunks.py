"""Functions of many rows, some rows at a time: their memory is that of one chunk."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def in_chunks(fn: Callable[..., Tensor], size: int, *rows: Tensor) -> Tensor:
    """``fn(*rows)``, where every output row depends on its own input rows only, ``size`` rows at a time.

    With more rows than ``size``, activations are not kept but computed again for the gradients: a third more work, and
    memory for ``size`` rows and for the outputs. ``fn`` must not draw random numbers.
    """
    n = rows[0].shape[0]
    if n <= size:
        return fn(*rows)
    parts = zip(*(tensor.split(size) for tensor in rows), strict=True)
    if not torch.is_grad_enabled():
        return torch.cat([fn(*part) for part in parts])
    again = [checkpoint(fn, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.cat([part for part in again if isinstance(part, Tensor)])
