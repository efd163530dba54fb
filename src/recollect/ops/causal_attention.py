"""Causal softmax attention over the last W positions of a segment, or over all of it, with a memory between calls.

    y_i = sum_j softmax_j(q_i . k_j * scale + p_i . r_{i-j}) v_j,    i - W < j <= i, j in the segment of i

The term in p and r is left out, or is the position term of Transformer-XL (``ops.relative_attention``). A reset starts
a segment, so which keys a query sees is one number: how many positions back its segment reaches, at most W - 1.

``dispatch.explain_causal_attention`` picks PyTorch's own attention where every query sees everything before it, or
where there is only one query; else *blocks* of C queries against the at most W - 1 + C keys they can see, recomputed in
backward. Time O(L (W + C)) with a window and O(L^2) without, memory O(L + C (W + C)): never an L x L array.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from recollect.ops import dispatch
from recollect.ops.scan import accumulator_dtype


class KeyMemory(NamedTuple):
    """Keys and values that later queries can see, the latest last. Slots from before the segment hold zeros.

    M = window - 1 slots; without a window as many as the longest open segment has positions.
    """

    k: Tensor  # (B, G, M, N)
    v: Tensor  # (B, G, M, P)
    next_position: Tensor  # (B,) int64, within the segment


class Offsets(NamedTuple):
    """The position term p_i . r_{i-j}: p (B, L, H, N), r (H or 1, at least min(window, S), N), by distance."""

    p_BLHN: Tensor
    r_HWN: Tensor


def init_memory(
    window: int | None,
    batch: int,
    n_heads: int,
    d_key: int,
    d_value: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> KeyMemory:
    """A memory in which nothing is remembered; ``n_heads`` counts heads of keys."""
    slots = 0 if window is None else window - 1
    return KeyMemory(
        k=torch.zeros(batch, n_heads, slots, d_key, device=device, dtype=dtype),
        v=torch.zeros(batch, n_heads, slots, d_value, device=device, dtype=dtype),
        next_position=torch.zeros(batch, device=device, dtype=torch.int64),
    )


def memory_bytes(
    window: int | None, batch: int, n_heads: int, d_key: int, d_value: int, itemsize: int, seen: int
) -> int:
    """Bytes of ``KeyMemory`` after ``seen`` positions without a reset; constant with a window."""
    slots = seen if window is None else window - 1
    return batch * (n_heads * slots * (d_key + d_value) * itemsize + 8)


def positions(length: int, start_B: Tensor, reset: Tensor | None) -> Tensor:
    """Place of every position in its segment, (B, L); the first has ``start_B`` unless it is reset."""
    at = torch.arange(length, device=start_B.device)
    if reset is None:
        return start_B[:, None] + at
    last_reset = torch.where(reset, at, -1).cummax(1).values
    return torch.where(last_reset >= 0, at - last_reset, start_B[:, None] + at)


def causal_attention(
    q_BLHN: Tensor,
    k_BLGN: Tensor,
    v_BLGP: Tensor,
    *,
    window: int | None = None,
    memory: KeyMemory | None = None,
    reset: Tensor | None = None,
    scale: float | None = None,
    offsets: Offsets | None = None,
    path: str = "auto",
) -> tuple[Tensor, KeyMemory]:
    """Outputs y (B, L, H, P) and the memory after the last position.

    G divides H: heads h G/H of a group share keys and values. ``memory`` None means nothing is remembered; ``reset``
    (B, L) bool acts before its position; ``scale`` defaults to N^-1/2 and does not reach ``offsets``, which need a
    window and G = H. ``path`` is "auto" or "blocks". First derivatives only.
    """
    batch, length, heads, d_key = q_BLHN.shape
    groups = k_BLGN.shape[2]
    scale = 1 / math.sqrt(d_key) if scale is None else scale
    start = torch.zeros(batch, dtype=torch.int64, device=q_BLHN.device) if memory is None else memory.next_position
    k_BGSN, v_BGSP = k_BLGN.transpose(1, 2), v_BLGP.transpose(1, 2)
    n_memory = 0
    if memory is not None and memory.k.shape[2] and bool(start.any()):
        n_memory = memory.k.shape[2]
        k_BGSN, v_BGSP = torch.cat([memory.k, k_BGSN], 2), torch.cat([memory.v, v_BGSP], 2)
    if reset is not None and not bool(reset[:, 0 if n_memory else 1 :].any()):
        reset, start = None, start.masked_fill(reset[:, 0], 0)
    position_BL = positions(length, start, reset)

    resets = reset is not None
    chosen = dispatch.explain_causal_attention(length, n_memory, window, resets, offsets is not None).path
    # Sums of exponentials need float32 even where autocast would take half precision.
    dtype = accumulator_dtype(q_BLHN.dtype)
    with torch.autocast(q_BLHN.device.type, enabled=False):
        q_BHLN, k, v = (t.to(dtype) for t in (q_BLHN.transpose(1, 2), k_BGSN, v_BGSP))
        if chosen in ("sdpa", "query") and path == "auto":
            seen = None
            if chosen == "query":
                ages = torch.arange(n_memory, -1, -1, device=k.device)
                back_B1 = position_BL if window is None else position_BL.clamp(max=window - 1)
                seen = (ages <= back_B1)[:, None, None]
            k, v = (t if groups == heads else t.repeat_interleave(heads // groups, 1) for t in (k, v))
            y_BHLP = F.scaled_dot_product_attention(q_BHLN, k, v, attn_mask=seen, is_causal=seen is None, scale=scale)
        else:
            fresh = not resets and not n_memory
            y_BHLP = _in_blocks(q_BHLN * scale, k, v, position_BL, n_memory, window, offsets, fresh=fresh)
    y = y_BHLP.transpose(1, 2).to(v_BLGP.dtype)
    return y, _remember(k_BGSN, v_BGSP, position_BL, window, resets)


def _in_blocks(
    q_BHLN: Tensor,
    k_BGSN: Tensor,
    v_BGSP: Tensor,
    position_BL: Tensor,
    n_memory: int,
    window: int | None,
    offsets: Offsets | None,
    *,
    fresh: bool,
) -> Tensor:
    batch, heads, length, _ = q_BHLN.shape
    sources = n_memory + length
    reach = sources if window is None else min(window, sources)
    p_BHLN = r_HWN = None
    if offsets is not None:
        # Every block then finds all distances: the position term lies at fixed places of its logits.
        missing = reach - 1 - n_memory
        k_BGSN, v_BGSP = F.pad(k_BGSN, (0, 0, missing, 0)), F.pad(v_BGSP, (0, 0, missing, 0))
        n_memory += missing
        p_BHLN = offsets.p_BLHN.transpose(1, 2).to(q_BHLN.dtype)
        r_HWN = offsets.r_HWN[:, :reach].flip(1).to(q_BHLN.dtype)
    back_BL = position_BL.clamp(max=reach - 1)
    q_RJLN = q_BHLN.reshape(batch * k_BGSN.shape[1], -1, length, q_BHLN.shape[-1])
    plain = _plain(back_BL, n_memory, reach, fresh=fresh)
    y_RJLP: Tensor = _Blocks.apply(  # pyright: ignore[reportAssignmentType]
        q_RJLN, k_BGSN.flatten(0, 1), v_BGSP.flatten(0, 1), p_BHLN, r_HWN, back_BL, n_memory, reach, plain
    )
    return y_RJLP.view(batch, heads, length, -1)


def _plain(back_BL: Tensor, n_memory: int, reach: int, *, fresh: bool) -> tuple[bool, ...]:
    """For every block whether its queries, in all rows, see all that lies within ``reach``: their mask is then one of
    few. Of ``fresh`` sequences, which all begin where they begin, the host knows; else it waits for the device.
    """
    length, size = back_BL.shape[1], dispatch.causal_attention_block(back_BL.device, reach)
    begins = range(0, length, size)
    if torch.compiler.is_compiling():  # what is compiled cannot follow from the data: every block gets its own mask
        return (False,) * len(begins)
    if fresh:
        return tuple(not n_memory or begin >= reach - 1 for begin in begins)
    at = torch.arange(n_memory, n_memory + length, device=back_BL.device)
    plain_L = (back_BL == at.clamp(max=reach - 1)).all(0).cpu()
    return tuple(bool(part.all()) for part in plain_L.split(size))


def _remember(k: Tensor, v: Tensor, position_BL: Tensor, window: int | None, resets: bool) -> KeyMemory:
    sources, seen_B = k.shape[2], position_BL[:, -1] + 1
    longest = int(seen_B.max()) if resets else sources
    slots = longest if window is None else window - 1
    if slots > sources:
        k, v = F.pad(k, (0, 0, slots - sources, 0)), F.pad(v, (0, 0, slots - sources, 0))
    elif slots < sources:
        k, v = k[:, :, sources - slots :], v[:, :, sources - slots :]
        if sources > 2 * slots:  # a short slice would keep the whole sequence in memory
            k, v = k.clone(), v.clone()
    if resets:
        before = torch.arange(slots, 0, -1, device=k.device) > seen_B[:, None]
        k, v = (t.masked_fill(before[:, None, :, None], 0) for t in (k, v))
    return KeyMemory(k, v, seen_B)


class _Blocks(torch.autograd.Function):
    """R = B x G rows of keys, J query heads for each. Query i is source M + i and sees ``back_BL`` sources before it.

    Written by hand for two reasons: the weights of a block are remade in backward rather than stored, and the gradients
    of overlapping slices of k and v are added in place (autograd would make each a full tensor of zeros).
    """

    @staticmethod
    def forward(
        ctx: Any,
        q_RJLN: Tensor,
        k_RSN: Tensor,
        v_RSP: Tensor,
        p_BHLN: Tensor | None,
        r_HWN: Tensor | None,
        back_BL: Tensor,
        n_memory: int,
        reach: int,
        plain: tuple[bool, ...],
    ) -> Tensor:
        walk = _Walk(q_RJLN, k_RSN, p_BHLN, r_HWN, back_BL, n_memory, reach, plain)
        y_RJLP = q_RJLN.new_empty(*q_RJLN.shape[:3], v_RSP.shape[2])
        for begin, end, low, high in walk.blocks():
            weights, _ = walk.weights(begin, end, low, high)
            values = torch.bmm(weights, v_RSP[:, low:high])
            y_RJLP[:, :, begin:end] = values.view(*q_RJLN.shape[:2], end - begin, -1)
        ctx.save_for_backward(q_RJLN, k_RSN, v_RSP, p_BHLN, r_HWN, back_BL, y_RJLP)
        ctx.sizes = (n_memory, reach, plain)
        return y_RJLP

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        q_RJLN, k_RSN, v_RSP, p_BHLN, r_HWN, back_BL, y_RJLP = ctx.saved_tensors
        dy_RJLP = grad_outputs[0].contiguous()
        walk = _Walk(q_RJLN, k_RSN, p_BHLN, r_HWN, back_BL, *ctx.sizes)
        dq, dk, dv = torch.empty_like(q_RJLN), torch.zeros_like(k_RSN), torch.zeros_like(v_RSP)
        dp = None if p_BHLN is None else torch.empty_like(p_BHLN)
        dr = None if r_HWN is None else torch.zeros_like(r_HWN)
        mean_RJL1 = (dy_RJLP * y_RJLP).sum(-1, keepdim=True)
        rows = q_RJLN.shape[0]
        for begin, end, low, high in walk.blocks():
            weights, q = walk.weights(begin, end, low, high)
            dy = dy_RJLP[:, :, begin:end].reshape(rows, -1, v_RSP.shape[2])
            dv[:, low:high].baddbmm_(weights.mT, dy)
            dlogits = torch.bmm(dy, v_RSP[:, low:high].mT)
            dlogits.sub_(mean_RJL1[:, :, begin:end].reshape(rows, -1, 1)).mul_(weights)
            dk[:, low:high].baddbmm_(dlogits.mT, q)
            dq[:, :, begin:end] = torch.bmm(dlogits, k_RSN[:, low:high]).view_as(dq[:, :, begin:end])
            if dp is not None and dr is not None:
                walk.position_gradients(dlogits, begin, end, dp, dr)
        return dq, dk, dv, dp, dr, None, None, None, None


class _Walk:
    """The blocks of one call and the softmax weights of each; forward and backward go through them alike."""

    def __init__(
        self,
        q_RJLN: Tensor,
        k_RSN: Tensor,
        p_BHLN: Tensor | None,
        r_HWN: Tensor | None,
        back_BL: Tensor,
        n_memory: int,
        reach: int,
        plain: tuple[bool, ...],
    ) -> None:
        self.q, self.k, self.p, self.r = q_RJLN, k_RSN, p_BHLN, r_HWN
        self.back, self.n_memory, self.reach, self.plain = back_BL, n_memory, reach, plain
        self.size = dispatch.causal_attention_block(q_RJLN.device, reach)
        self.mask_of: tuple[int, int, int] | None = None
        self.mask = q_RJLN.new_empty(0)

    def blocks(self) -> list[tuple[int, int, int, int]]:
        """First query and the one after the last, first source and the one after the last."""
        length = self.q.shape[2]
        ends = [(begin, min(begin + self.size, length)) for begin in range(0, length, self.size)]
        past = self.n_memory
        return [(begin, end, max(0, past + begin - self.reach + 1), past + end) for begin, end in ends]

    def weights(self, begin: int, end: int, low: int, high: int) -> tuple[Tensor, Tensor]:
        """Softmax weights (R, J C, S) of a block, and its queries (R, J C, N)."""
        q = self.q[:, :, begin:end].reshape(self.q.shape[0], -1, self.q.shape[3])
        logits = torch.bmm(q, self.k[:, low:high].mT)
        if self.p is not None and self.r is not None:
            term = torch.bmm(self._by_offset_head(begin, end), self.r.mT)
            self._band(logits).add_(self._by_batch(term))
        batch = self.back.shape[0]
        by_query = logits.view(batch, -1, end - begin, high - low)
        by_query.add_(self._mask(begin, end, low, high))
        return torch.softmax(logits, -1), q

    def position_gradients(self, dlogits: Tensor, begin: int, end: int, dp: Tensor, dr: Tensor) -> None:
        """Write the gradient of p for a block and add that of r."""
        assert self.r is not None
        dterm = self._band(dlogits).transpose(0, 1).reshape(self.r.shape[0], -1, self.reach)
        dp[:, :, begin:end] = self._by_batch(torch.bmm(dterm, self.r))
        dr.baddbmm_(dterm.mT, self._by_offset_head(begin, end))

    def _band(self, logits: Tensor) -> Tensor:
        """The view (B, H, C, W) of (R, C, S) logits that holds, for each query, the W sources it may see in order.

        It is a parallelogram: the sources of the next query begin one place further right.
        """
        batch, (rows, size, sources) = self.back.shape[0], logits.shape
        heads, stride = rows // batch, size * sources
        return logits.as_strided((batch, heads, size, self.reach), (heads * stride, stride, sources + 1, 1))

    def _by_offset_head(self, begin: int, end: int) -> Tensor:
        """p of a block with everything that meets one matrix of r in one row: (Hr, H/Hr B C, N)."""
        assert self.p is not None
        assert self.r is not None
        return self.p[:, :, begin:end].transpose(0, 1).reshape(self.r.shape[0], -1, self.p.shape[3])

    def _by_batch(self, term: Tensor) -> Tensor:
        """The way back: (Hr, H/Hr B C, X) to (B, H, C, X)."""
        assert self.p is not None
        batch, heads = self.p.shape[:2]
        return term.view(heads, batch, -1, term.shape[2]).transpose(0, 1)

    def _mask(self, begin: int, end: int, low: int, high: int) -> Tensor:
        """0 where a source is seen, -inf elsewhere, (B or 1, 1, C, S); kept for the next block of the same form."""
        form = (self.n_memory + begin - low, end - begin, high - low)
        plain = self.plain[begin // self.size]
        if plain and form == self.mask_of:
            return self.mask
        source = torch.arange(low, high, device=self.back.device)
        age = torch.arange(self.n_memory + begin, self.n_memory + end, device=source.device)[:, None] - source
        back = (self.back[:1] if plain else self.back)[:, None, begin:end, None]
        mask = torch.zeros((), dtype=self.q.dtype, device=age.device).masked_fill((age < 0) | (age > back), -torch.inf)
        self.mask, self.mask_of = mask, form if plain else None
        return mask
