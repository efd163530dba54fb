"""Attention with relative positions as in Transformer-XL (arXiv 1901.02860, section 3.3).

    A_ij = (q_i + u) . k_j + (q_i + w) . r_{i-j},    y_i = sum_j softmax_j(A_ij N^-1/2) v_j,    i - W < j <= i

u is the content bias and w the position bias of each head (the paper's u and v); r_d is the projected encoding of
distance d. The paper attends to its segment and a memory of the one before, so that what a query sees depends on where
the cut falls; here every query sees its own and the W - 1 positions before it, whatever the cut.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.causal_attention import KeyMemory, Offsets, causal_attention


class Biases(NamedTuple):
    """Content bias u and position bias w, (H, N) each."""

    content: Tensor
    position: Tensor


def sinusoids(
    n: int, width: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> Tensor:
    """Encodings of distances 0..n-1, (n, width): sines, then cosines, of d * 10000^(-2m/width). ``width`` is even."""
    frequency = 10_000.0 ** -(torch.arange(width // 2, device=device, dtype=torch.float64) * 2 / width)
    angle = torch.arange(n, device=device, dtype=torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1).to(dtype or torch.get_default_dtype())


def relative_attention_reference(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    encoding_WD: Tensor,
    project_HND: Tensor,
    biases: Biases,
    *,
    reset: Tensor | None = None,
) -> Tensor:
    """``relative_attention`` from an empty memory, as the equation is written: O(L^2) memory."""
    length, window = q_BLHN.shape[1], encoding_WD.shape[0]
    at = torch.arange(length, device=q_BLHN.device)
    distance = at[:, None] - at
    seen = (distance >= 0) & (distance < window)
    if reset is not None:
        segment = reset.cumsum(1)
        seen = seen & (segment[:, :, None] == segment[:, None])[:, None]
    r_HWN = torch.einsum("hnd,wd->hwn", project_HND, encoding_WD)
    r_HLSN = r_HWN[:, distance.clamp(0, window - 1)]
    content = torch.einsum("blhn,bshn->bhls", q_BLHN + biases.content, k_BLHN)
    place = torch.einsum("blhn,hlsn->bhls", q_BLHN + biases.position, r_HLSN)
    logits = (content + place) / math.sqrt(q_BLHN.shape[-1])
    weights = torch.softmax(logits.masked_fill(~seen, -torch.inf), -1)
    return torch.einsum("bhls,bshp->blhp", weights, v_BLHP)


def relative_attention(
    q_BLHN: Tensor,
    k_BLHN: Tensor,
    v_BLHP: Tensor,
    encoding_WD: Tensor,
    project_HND: Tensor,
    biases: Biases,
    *,
    memory: KeyMemory | None = None,
    reset: Tensor | None = None,
) -> tuple[Tensor, KeyMemory]:
    """Outputs y (B, L, H, P) and the memory after the last position; the window W is the length of ``encoding_WD``.

    ``project_HND`` maps encodings to r, or queries to where encodings can be read directly: for few queries (a single
    step) the second is cheaper, O(L H D W) against O(W D^2), and the result is the same. ``reset`` (B, L) bool. Time
    O(L (W + C) N H), memory O(L + C (W + C)) for blocks of C queries. First derivatives only.
    """
    length, heads, d_key = q_BLHN.shape[1:]
    window, width = encoding_WD.shape
    scale = 1 / math.sqrt(d_key)
    n_memory = 0 if memory is None else window - 1
    encoding_WD = encoding_WD[: n_memory + length].to(q_BLHN.dtype)
    p_BLHN = (q_BLHN + biases.position) * scale
    if length * heads * (d_key + len(encoding_WD)) < len(encoding_WD) * width:
        offsets = Offsets(torch.einsum("blhn,hnd->blhd", p_BLHN, project_HND), encoding_WD[None])
    else:
        offsets = Offsets(p_BLHN, (encoding_WD @ project_HND.flatten(0, 1).T).unflatten(1, (heads, -1)).transpose(0, 1))
    return causal_attention(
        q_BLHN + biases.content,
        k_BLHN,
        v_BLHP,
        window=window,
        memory=memory,
        reset=reset,
        scale=scale,
        offsets=offsets,
    )
