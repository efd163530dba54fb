"""Time-invariant state-space models in chunks of matrix products: h_t = A h_{t-1} + b u_t, y_t = c . h_t per channel.

Inside a chunk of Q positions y = T u + O h, with T the Toeplitz matrix of the first Q taps c . A^j b and O the reads
c . A^{q+1} of the state h before the chunk; the chunk writes sum_q A^{Q-1-q} b u_q into its end state. All chunks of all
rows share these matrices, one set per channel. Rows multiply from the left here: a state is a row vector, and A acts as
h A^T. Resets are rows of ``ops.chunking``; sums are exactly causal.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops.chunking import ResetRows, reset_rows


class Basis(ABC):
    """The matrices of a system for chunks of up to ``size`` positions; N real numbers of state per channel.

    taps (D, Q); writes (D, Q, N), A^j b for j = 0..Q-1; reads (D, N, Q), A^{T (q+1)} c.
    """

    taps: Tensor
    writes: Tensor
    reads: Tensor

    @property
    def size(self) -> int:
        """Positions of a chunk, Q."""
        return self.taps.shape[1]

    @abstractmethod
    def advance(self, h_DBN: Tensor, n: int) -> Tensor:
        """States n <= Q positions later without input."""

    @property
    @abstractmethod
    def power(self) -> Tensor:
        """A^Q: complex (D, N/2) where A is diagonal, else real (D, N, N) to multiply a row vector with."""


def chunked_ssm(
    u_BLD: Tensor, basis: Basis, h_init: Tensor, *, reset: Tensor | None = None, convolved: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the last state (D, B, N) for u (B, L, D) and h_init (D, B, N), in the dtype of ``basis``.

    ``convolved`` (B, L, D) replaces the part of y that comes from u: then only the state's part is computed here.
    Time O(B L D (Q + N)), memory O(B L D (1 + N / Q)).
    """
    length, size = u_BLD.shape[1], basis.size
    whole = length // size * size
    outputs: list[Tensor] = []
    h_DBN = h_init
    for begin, end in ((0, whole), (whole, length)):
        if begin < end:
            part = slice(begin, end)
            layout = None if reset is None else reset_rows(reset[:, part], min(size, end - begin))
            y, h_DBN = _equal_chunks(u_BLD[:, part], basis, h_DBN, layout, convolve=convolved is None)
            outputs.append(y)
    y_BLD = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return (y_BLD if convolved is None else y_BLD + convolved), h_DBN


def _equal_chunks(
    u_BLD: Tensor, basis: Basis, h_DBN: Tensor, layout: ResetRows | None, *, convolve: bool
) -> tuple[Tensor, Tensor]:
    batch, length, width = u_BLD.shape
    size = min(length, basis.size)
    n_chunks = length // size
    u_DMQ = u_BLD.permute(2, 0, 1).contiguous().view(width, batch * n_chunks, size)
    writes_DQN = basis.writes[:, :size].flip(1)
    write_DMN = u_DMQ @ writes_DQN
    rows_DKQ: Tensor | None = None
    if layout is not None:
        rows_DKQ = torch.where(layout.input, u_DMQ.index_select(1, layout.chunk), 0)
        closing_DKN = rows_DKQ.index_select(1, layout.closing) @ writes_DQN
        write_DMN = write_DMN.index_copy(1, layout.chunk[layout.closing], closing_DKN)
    write_DBCN = write_DMN.view(width, batch, n_chunks, -1)
    restart, cut = (None, None) if layout is None else (layout.restart, layout.cut)
    if n_chunks == 1:
        start_DBN = h_DBN if restart is None else torch.where(restart[:, :1], 0, h_DBN)
        moved_DBN = basis.advance(start_DBN, size)
        moved_DBN = moved_DBN if cut is None else torch.where(cut[:, :1], 0, moved_DBN)
        starts_DMN, h_DBN = start_DBN, moved_DBN + write_DBCN[:, :, 0]
    elif convolve:
        starts_DBCN, h_DBN = _carry(write_DBCN, basis.power, h_DBN, restart, cut)
        starts_DMN = starts_DBCN.flatten(1, 2)
    else:
        # The convolution has the inputs' part already: what is read are states that saw no input.
        starts_DBCN, _ = _carry(torch.zeros_like(write_DBCN), basis.power, h_DBN, restart, cut)
        starts_DMN = starts_DBCN.flatten(1, 2)
        _, h_DBN = _carry(write_DBCN, basis.power, h_DBN, restart, cut)
    y_DMQ = starts_DMN @ basis.reads[:, :, :size]
    if convolve:
        toeplitz_DQQ: Tensor = _Toeplitz.apply(basis.taps[:, :size])  # pyright: ignore[reportAssignmentType]
        y_DMQ = torch.baddbmm(y_DMQ, u_DMQ, toeplitz_DQQ)
        if layout is not None and rows_DKQ is not None:
            after_DKQ = torch.where(layout.output, rows_DKQ @ toeplitz_DQQ, 0)
            y_DMQ = torch.where(layout.before, y_DMQ, 0).index_add(1, layout.chunk, after_DKQ)
    return y_DMQ.view(width, batch, length).permute(1, 2, 0).contiguous(), h_DBN


class _Toeplitz(torch.autograd.Function):
    """T_sq = taps_{q-s} for q >= s, else 0: (D, Q) to (D, Q, Q), to multiply rows of inputs with."""

    @staticmethod
    def forward(ctx: Any, taps_DQ: Tensor) -> Tensor:  # noqa: ARG004
        width, size = taps_DQ.shape
        padded = torch.cat([taps_DQ.new_zeros(width, size), taps_DQ], 1)
        # Row s' reads padded from 1 + s' on, which is row s = Q - 1 - s' of T.
        return padded.unfold(1, size, 1)[:, 1:].flip(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride] # noqa: ARG004
        grad_DQQ = grad_outputs[0]
        width, size, _ = grad_DQQ.shape
        # With rows of 2 Q - 1 numbers less one, the diagonals of T stand in columns.
        padded = torch.cat([grad_DQQ.new_zeros(width, size, size), grad_DQQ], 2)
        skewed = padded.flatten(1)[:, size:].contiguous()
        skewed = torch.cat([skewed, skewed.new_zeros(width, size)], 1).as_strided(
            (width, size, size), (2 * size * size, 2 * size + 1, 1)
        )
        return skewed.sum(1)


def _carry(
    write_DBCN: Tensor, power: Tensor, h_DBN: Tensor, restart: Tensor | None, cut: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States before every chunk (D, B, C, N), and the last one: h' = A^Q h + write, chunk after chunk."""
    out: tuple[Tensor, Tensor] = _Carry.apply(write_DBCN, power, h_DBN, restart, cut)  # pyright: ignore[reportAssignmentType]
    return out


class _Carry(torch.autograd.Function):
    """The recurrence over chunks and its adjoint; ``restart`` empties the state a chunk reads, ``cut`` what it passes."""

    @staticmethod
    def forward(
        ctx: Any, write_DBCN: Tensor, power: Tensor, h_DBN: Tensor, restart: Tensor | None, cut: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        starts_DBCN = torch.empty_like(write_DBCN, memory_format=torch.contiguous_format)
        for c, (write, start) in enumerate(zip(write_DBCN.unbind(2), starts_DBCN.unbind(2), strict=True)):
            h_DBN = _masked(h_DBN, restart, c)
            start.copy_(h_DBN)
            h_DBN = write + _masked(_times(h_DBN, power), cut, c)
        ctx.save_for_backward(starts_DBCN, power, restart, cut)
        return starts_DBCN, h_DBN

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, None, None]:
        starts_DBCN, power, restart, cut = ctx.saved_tensors
        dstarts_DBCN, g = grad_outputs
        dwrite_DBCN = torch.empty_like(starts_DBCN)
        adjoint = power.conj() if power.is_complex() else power.mT
        for c in reversed(range(starts_DBCN.shape[2])):
            dwrite_DBCN[:, :, c] = g
            g = _masked(dstarts_DBCN[:, :, c] + _times(_masked(g, cut, c), adjoint), restart, c)
        passed = dwrite_DBCN if cut is None else torch.where(cut.unsqueeze(-1), 0, dwrite_DBCN)
        if power.is_complex():
            states, grads = _as_complex(starts_DBCN), _as_complex(passed)
            dpower = (states.conj() * grads).sum((1, 2))
        else:
            dpower = starts_DBCN.flatten(1, 2).mT @ passed.flatten(1, 2)
        return dwrite_DBCN, dpower, g, None, None


def _masked(h_DBN: Tensor, mask: Tensor | None, c: int) -> Tensor:
    return h_DBN if mask is None else torch.where(mask[:, c : c + 1], 0, h_DBN)


def _times(h_DBN: Tensor, power: Tensor) -> Tensor:
    if power.is_complex():
        return torch.view_as_real(_as_complex(h_DBN) * power.unsqueeze(1)).flatten(-2)
    return h_DBN @ power


def _as_complex(h: Tensor) -> Tensor:
    return torch.view_as_complex(h.unflatten(-1, (-1, 2)))
