"""Batches in parts: rows for every process, and for every part of a step that accumulates gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from recollect.core.errors import ConfigError
from recollect.train.batches import map_leaves, tensors_of
from recollect.train.problem import Problem, Share


@dataclass(frozen=True)
class Cut:
    """Which parts of a batch a process computes: ``n`` from ``first`` on, of ``of`` parts in all."""

    of: int = 1
    first: int = 0
    n: int = 1

    def __call__(self, problem: Problem, batch: Any) -> list[Share]:
        """The process's parts of a batch. Raises ConfigError as ``Problem.shares`` does."""
        if self.of == 1:
            return [Share(batch)]
        return problem.shares(batch, self.of)[self.first : self.first + self.n]


def share_rows(batch: Any, n: int) -> list[Share]:
    """``batch`` in ``n`` parts of equally many rows; see ``Problem.shares``."""
    rows = n_rows(batch)
    if rows % n:
        raise ConfigError(
            f"a batch of {rows} rows cannot be shared equally by {n} parts (processes times --accumulate); choose a "
            f"batch size that is a multiple of {n}"
        )
    each = rows // n
    parts = [_rows(batch, start, start + each) for start in range(0, rows, each)]
    masks = [_mask(part) for part in parts]
    counts = [rows / n if mask is None else float(np.asarray(mask).sum()) for mask in masks]
    # Of nothing at all there is no mean, in parts as in one.
    total = sum(counts) or float("nan")
    return [Share(part, 1 / n, n * counts[i] / total, i) for i, part in enumerate(parts)]


def n_rows(batch: Any) -> int:
    """The length that the first axis of every tensor in a batch has. Raises ConfigError naming those that differ."""
    lengths = {name: tensor.shape[0] for name, tensor in tensors_of(batch) if tensor.ndim}
    if not lengths:
        raise ConfigError("a batch without tensors has no rows to share; this problem cannot run in parts")
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} has {length}" for name, length in lengths.items())
        raise ConfigError(f"a batch whose tensors differ in their first axis cannot be shared by rows ({found})")
    return next(iter(lengths.values()))


def _rows(batch: Any, start: int, stop: int) -> Any:
    def cut(leaf: Any) -> Any:
        return leaf[start:stop] if isinstance(leaf, (torch.Tensor, np.ndarray)) and leaf.ndim else leaf

    return map_leaves(batch, cut)


def _mask(batch: Any) -> Any:
    """What the batch calls its mask, if it has one."""
    return batch.get("mask") if isinstance(batch, Mapping) else getattr(batch, "mask", None)
