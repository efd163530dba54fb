"""Helpers over states: trees of NamedTuples and tuples whose leaves are tensors, batch first.

None of these writes to its arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from recollect.core.types import State


def map_state(fn: Callable[..., Tensor], state: State, *others: State) -> State:
    """Apply ``fn`` leaf by leaf to one or several states of the same structure."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    if isinstance(state, tuple):
        parts = [map_state(fn, part, *(other[i] for other in others)) for i, part in enumerate(state)]
        return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)
    raise TypeError(f"a state is made of tensors and tuples, not {type(state).__name__}")


def leaves(state: State, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a state with its dotted name, in a fixed order."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(state, "_fields", range(len(state)))
    for name, part in zip(names, state, strict=True):
        yield from leaves(part, f"{prefix}.{name}" if prefix else str(name))


def where_reset(reset: Tensor, fresh: State, state: State) -> State:
    """``fresh`` in the rows where ``reset`` (B,) is true, ``state`` elsewhere."""

    def pick(new: Tensor, old: Tensor) -> Tensor:
        return torch.where(reset.view(-1, *(1,) * (old.dim() - 1)), new, old)

    return map_state(pick, fresh, state)


def index_batch(state: State, index: Tensor) -> State:
    """Rows ``index`` (int64, any order, repeats allowed) of every leaf: for beams, samples and sub-batches."""
    return map_state(lambda leaf: leaf.index_select(0, index), state)


def detach(state: State) -> State:
    """The same values, cut from the graph that made them (truncated back-propagation)."""
    return map_state(lambda leaf: leaf.detach(), state)


def nbytes(state: State) -> int:
    """Bytes held by every leaf of a state."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(state))
