"""Tiles of masked softmax attention, as the kernels of sparse attention share them.

Logits are kept in base 2: with z_ij = scale log2(e) q_i . k_j a weight is 2^(z_ij - lse_i), lse_i = log2 sum_j 2^z_ij,
and lse_i is -inf for a query with no admitted key. A pass over some of a query's keys goes on from what earlier passes
left, their output y and lse alone: total y, sum of weights 1 and peak lse give the same sums up to a common factor. So
passes over disjoint keys need no merge of their own, and every pass of backward takes the lse of all:

    w_ij = 2^(z_ij - lse_i)    delta_i = dy_i . y_i    s_ij = w_ij (dy_i . v_j - delta_i)
    dv_j = sum_i w_ij dy_i     dq_i = scale sum_j s_ij k_j    dk_j = scale sum_i s_ij q_i

Products take operands of the inputs' dtype (weights are rounded to it) and sum in float32.
"""

# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportCallIssue=false

from __future__ import annotations

import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


class Tiling(NamedTuple):
    """Widths of a tile that are powers of two, and how many warps and pipeline stages work on it."""

    d_key: int
    d_value: int
    queries: int  # at most
    keys: int
    warps: int
    stages: int


def tiling(q: Tensor, v: Tensor, *, backward: bool) -> Tiling:
    """Tiles whose operands fit the 227 KiB of shared memory of an H100's multiprocessor; heads of at most 256."""
    key, value = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))
    row = max(key, value) * q.dtype.itemsize
    exact = q.dtype == torch.float32
    if row <= 128:
        return Tiling(key, value, 64, 64, 4, 2)
    if row <= 256:
        return Tiling(key, value, 64, 32 if exact and backward else 64, 8 if backward else 4, 2)
    if row <= 512:
        return Tiling(key, value, 32 if exact else 64, 32, 8, 1)
    return Tiling(key, value, 16, 16, 8, 1)


@triton.jit
def product(left, right):
    """left right, summed in float32. float32 operands are split into parts that a tensor core multiplies, to a relative
    error of about 1e-6 (by plain arithmetic the tiles would not fit the registers). Triton's interpreter knows no
    products of bfloat16.
    """
    if INTERPRETED:
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, input_precision="tf32x3")


@triton.jit
def take_rows(base, index, stride, present, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Rows ``index`` of a matrix whose elements are contiguous within a row; zeros where not ``present``."""
    column = tl.arange(0, BLOCK)
    at = index.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(base + at, mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def put_rows(base, index, stride, present, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    at = index.to(tl.int64)[:, None] * stride + column[None, :]
    mask = present[:, None] & (column < WIDTH)[None, :]
    tl.store(base + at, value.to(base.dtype.element_ty), mask=mask)


@triton.jit
def extend(total, weight, peak, q, k, v, mask, scale):
    """Take a tile of keys into the sums of a tile of queries; ``scale`` times log2(e) is on the logits."""
    logits = product(q, tl.trans(k)) * scale
    logits = tl.where(mask, logits, float("-inf"))
    highest = tl.maximum(peak, tl.max(logits, 1))
    origin = tl.where(highest == float("-inf"), 0.0, highest)
    factor = tl.exp2(peak - origin)
    weights = tl.exp2(logits - origin[:, None])
    weight = weight * factor + tl.sum(weights, 1)
    total = total * factor[:, None] + product(weights.to(v.dtype), v)
    return total, weight, highest


@triton.jit
def normalise(total, weight, peak):
    """y and lse; zeros and -inf where no key was admitted."""
    some = weight > 0
    weight = tl.where(some, weight, 1.0)
    return total / weight[:, None], tl.where(some, peak + tl.log2(weight), float("-inf"))


@triton.jit
def weigh_again(left, right, left_value, right_value, lse, delta, mask, scale):
    """w and s (see the module) of a tile, (queries, keys) or its transpose as q, dy or k, v come first."""
    logits = product(left, tl.trans(right)) * scale
    weights = tl.where(mask, tl.exp2(logits - lse), 0.0)
    return weights, weights * (product(left_value, tl.trans(right_value)) - delta)


@triton.jit
def _deltas(y, dy, delta, n, length, heads, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    present = at < n
    product = take_rows(y, at, P, present, P, BLOCK_P).to(tl.float32)
    product *= take_rows(dy, at, P, present, P, BLOCK_P).to(tl.float32)
    batch, within = at // (length * heads), at % (length * heads)
    row = batch * heads + within % heads
    tl.store(delta + row.to(tl.int64) * length + within // heads, tl.sum(product, 1), mask=present)


def deltas(y_BLHP: Tensor, dy_BLHP: Tensor) -> Tensor:
    """dy . y of every query, (B, H, L) float32. Both are contiguous."""
    batch, length, heads, width = y_BLHP.shape
    delta = torch.empty(batch, heads, length, dtype=torch.float32, device=y_BLHP.device)
    n, block = batch * length * heads, 32
    grid = (triton.cdiv(n, block),)
    padded = triton.next_power_of_2(width)
    _deltas[grid](y_BLHP, dy_BLHP, delta, n, length, heads, width, padded, block, num_warps=4)
    return delta
