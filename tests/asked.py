"""What the host asks of a tensor's numbers. On a GPU, each answer waits for all work before it."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten

ASKS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.is_nonzero.default,
    aten.equal.default,
}
"""What gives the host a number, or a shape that only the numbers tell."""


class Asked(TorchDispatchMode):
    """Names of the operations by which the host learns of a tensor's numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default) and any(
            part is not None and part.dtype in (torch.bool, torch.uint8) for part in args[1]
        )
        if func in ASKS or masks:
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))
