"""Products of one vector with a list of rows of a table, for kernels that gather their rows.

Tables are flat, rows padded to a multiple of ``LANES``: ``blocks`` vectors each.
"""

from __future__ import annotations

from recollect.ops.kernels.compiled import Array, exp, kernel
from recollect.ops.kernels.vectors import LANES, fma, larger, load, splat, store, total


@kernel
def dots(x: Array, rows: Array, blocks: int, index: Array, n: int, out: Array) -> None:
    """out_i = x . rows[index_i] for i < n."""
    if blocks == 2:
        x0, x1, zero = load(x, 0), load(x, LANES), splat(x.dtype.type(0))
        for i in range(n):
            at = index[i] * (2 * LANES)
            out[i] = total(fma(x1, load(rows, at + LANES), fma(x0, load(rows, at), zero)))
        return
    for i in range(n):
        at = index[i] * (blocks * LANES)
        sums = splat(x.dtype.type(0))
        for j in range(blocks):
            sums = fma(load(x, j * LANES), load(rows, at + j * LANES), sums)
        out[i] = total(sums)


@kernel
def weighted(weight: Array, rows: Array, blocks: int, index: Array, n: int, out: Array) -> None:
    """out = sum of weight_i rows[index_i] over i < n."""
    zero = splat(weight.dtype.type(0))
    width = blocks * LANES
    j = 0
    while j + 4 <= blocks:
        a, b, c, d = zero, zero, zero, zero
        for i in range(n):
            at = index[i] * width + j * LANES
            w = splat(weight[i])
            a = fma(w, load(rows, at), a)
            b = fma(w, load(rows, at + LANES), b)
            c = fma(w, load(rows, at + 2 * LANES), c)
            d = fma(w, load(rows, at + 3 * LANES), d)
        store(out, j * LANES, a)
        store(out, (j + 1) * LANES, b)
        store(out, (j + 2) * LANES, c)
        store(out, (j + 3) * LANES, d)
        j += 4
    one = splat(weight.dtype.type(1))
    while j + 2 <= blocks:
        a, b, c, d = zero, zero, zero, zero
        for half in range(n // 2):
            at = index[2 * half] * width + j * LANES
            w = splat(weight[2 * half])
            a = fma(w, load(rows, at), a)
            b = fma(w, load(rows, at + LANES), b)
            at = index[2 * half + 1] * width + j * LANES
            w = splat(weight[2 * half + 1])
            c = fma(w, load(rows, at), c)
            d = fma(w, load(rows, at + LANES), d)
        if n % 2:
            at = index[n - 1] * width + j * LANES
            w = splat(weight[n - 1])
            a = fma(w, load(rows, at), a)
            b = fma(w, load(rows, at + LANES), b)
        store(out, j * LANES, fma(one, a, c))
        store(out, (j + 1) * LANES, fma(one, b, d))
        j += 2
    while j < blocks:
        a = zero
        for i in range(n):
            a = fma(splat(weight[i]), load(rows, index[i] * width + j * LANES), a)
        store(out, j * LANES, a)
        j += 1


@kernel
def spread(weight: Array, x: Array, blocks: int, index: Array, n: int, rows: Array) -> None:
    """rows[index_i] += weight_i x for i < n; the rows are distinct."""
    width = blocks * LANES
    for i in range(n):
        w, at = splat(weight[i]), index[i] * width
        for j in range(blocks):
            store(rows, at + j * LANES, fma(w, load(x, j * LANES), load(rows, at + j * LANES)))


@kernel
def softmax(logit: Array, n: int, weight: Array) -> None:
    """weight = softmax of the first n >= 1 logits, zero up to the next multiple of ``LANES``."""
    lowest = logit.dtype.type(-float("inf"))
    padded = (n + LANES - 1) // LANES * LANES
    for i in range(n, padded):
        logit[i] = lowest
    tops = load(logit, 0)
    for block in range(1, padded // LANES):
        tops = larger(load(logit, block * LANES), tops)
    store(weight, 0, tops)
    top = weight[0]
    for i in range(1, LANES):
        top = max(top, weight[i])
    exps, logits = weight[:padded], logit[:padded]
    for i in range(padded):
        exps[i] = exp(logits[i] - top)
    one = splat(logit.dtype.type(1))
    sums = splat(logit.dtype.type(0))
    for block in range(padded // LANES):
        sums = fma(one, load(weight, block * LANES), sums)
    inverse = logit.dtype.type(1) / total(sums)
    for i in range(padded):
        exps[i] *= inverse
