"""What tests of sparse attention share: small layers and fixed numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from recollect.layers.sparse import SparseAttention


def sparse(**options: Any) -> SparseAttention:
    return SparseAttention(SparseAttention.Config(8, **({"d_key": 4} | options)))


def double(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradients(layer: SparseAttention, pick: Callable[[Any], Tensor]) -> dict[str, bool]:
    """For every parameter whether a function of the layer's training output moves with it."""
    torch.manual_seed(1)
    layer = layer.double().train()
    out = layer(double(2, 40, 8))
    found = torch.autograd.grad(pick(out), list(layer.parameters()), allow_unused=True)
    names = [name.split(".")[0] for name, _ in layer.named_parameters()]
    return {name: grad is not None and bool((grad != 0).any()) for name, grad in zip(names, found, strict=True)}
