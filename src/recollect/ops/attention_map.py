"""Attention written out for looking at: which pattern admits which key, and the weight of every key, as L x L arrays.

Nothing computes with these; layers that attend hand out ``AttentionInputs``, and evaluations of a few short sequences
draw them. O(B H L^2) time and memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.attention_memory import Buckets
from recollect.ops.key_sets import key_sets
from recollect.ops.lifetimes import timeline
from recollect.ops.patterns import Pattern
from recollect.ops.scan import accumulator_dtype


class AttentionInputs(NamedTuple):
    """What one layer attends with over fresh sequences: softmax_j(``scale`` q_i . k_j) over the patterns' union."""

    q_BLHN: Tensor
    k_BLHN: Tensor
    patterns: tuple[Pattern, ...]
    scale: float
    score_BLH: Tensor | None = None
    """Priorities of the keys, for ``KeySelection``."""
    buckets: Buckets | None = None
    """For ``Lsh``."""


def admitted_by(inputs: AttentionInputs) -> Tensor:
    """The key set of each pattern on its own, (n_patterns, B, H, L, L) bool; any over the first axis is the union."""
    q = inputs.q_BLHN.transpose(1, 2)
    batch, heads, length, _ = q.shape
    score = None if inputs.score_BLH is None else inputs.score_BLH.detach().transpose(1, 2)
    time = timeline(length, 0, torch.zeros(batch, dtype=torch.int64, device=q.device), None)
    masks = [key_sets((p,), time, None, q, score, inputs.buckets).admits() for p in inputs.patterns]
    return torch.stack([mask.view(batch, heads, length, length) for mask in masks])


def attention_weights(inputs: AttentionInputs, admitted_BHLS: Tensor) -> Tensor:
    """Weights (B, H, L, L) over the admitted keys; a query without any has zeros."""
    dtype = accumulator_dtype(inputs.q_BLHN.dtype)
    logits = torch.einsum("blhn,bshn->bhls", inputs.q_BLHN.to(dtype), inputs.k_BLHN.to(dtype)) * inputs.scale
    return logits.masked_fill(~admitted_BHLS, -torch.inf).softmax(-1).nan_to_num(0.0)
