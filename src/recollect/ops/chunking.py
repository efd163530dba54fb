"""How a sequence with resets is cut into chunks of equal size, for ops whose chunks share one set of matrices.

Time-invariant systems multiply every chunk with the same matrices, so a reset cannot be masked in the matrix. Instead
every reset inside a chunk adds one **row**: a copy of the chunk in which everything before the reset is zero. Its
products are what the chunk gives from that reset on, because a causal system started from zero does not notice zeros.
From every row only the positions up to the next reset are kept, and the last row of a chunk writes its end state.
A reset at a chunk's first position needs no row: the chunk starts from an empty state. The layout depends on the resets
alone, never on values, so causality stays exact.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class ResetRows(NamedTuple):
    """Chunks are numbered B * C, row by row of the batch; there are K extra rows, one per reset inside a chunk.

    chunk (K,) the chunk a row copies; input (K, Q) true from the reset on; output (K, Q) true from the reset to the
    next; before (B C, Q) true before a chunk's first inner reset; closing (K',) the rows that write their chunk's end
    state; restart (B, C) chunks that begin with a reset; cut (B, C) chunks through which no state passes.
    """

    chunk: Tensor
    input: Tensor
    output: Tensor
    before: Tensor
    closing: Tensor
    restart: Tensor
    cut: Tensor


def reset_rows(reset: Tensor, size: int) -> ResetRows:
    """The layout for ``reset`` (B, C size) bool. O(B L + K Q) time and memory."""
    batch, length = reset.shape
    chunks_MQ = reset.reshape(-1, size)
    inner_MQ = chunks_MQ.clone()
    inner_MQ[:, 0] = False
    segment_MQ = inner_MQ.cumsum(1)
    chunk_K, at_K = inner_MQ.nonzero(as_tuple=True)
    mine_K1 = segment_MQ[chunk_K, at_K].unsqueeze(1)
    theirs_KQ = segment_MQ[chunk_K]
    last_M = segment_MQ[:, -1]
    closing = (mine_K1.squeeze(1) == last_M[chunk_K]).nonzero().squeeze(1)
    shape = (batch, length // size)
    return ResetRows(
        chunk_K,
        theirs_KQ >= mine_K1,
        theirs_KQ == mine_K1,
        segment_MQ == 0,
        closing,
        chunks_MQ[:, 0].view(shape),
        (last_M > 0).view(shape),
    )


def chunk_size_for(size: int, length: int, d_state: int, batch: int, n_resets: int) -> int:
    """The size, ``size`` halved as often as pays, that moves least: B L / Q states of N, and Q for every reset."""
    best, least = size, float("inf")
    while size >= 1:
        moved = 2 * d_state * batch * length / size + n_resets * size
        if moved < least:
            best, least = size, moved
        size //= 2
    return best


def any_reset(reset: Tensor | None) -> Tensor | None:
    """``reset`` if any position is one, else None. Waits for the device."""
    return None if reset is None or not bool(reset.any()) else reset
