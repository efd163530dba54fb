"""Time-invariant state-space models in chunks of matrix products: h_t = A h_{t-1} + b u_t, y_t = c . h_t per channel.

Inside a chunk of Q positions y = T u + O h, with T the Toeplitz matrix of the first Q taps c . A^j b and O the reads
c . A^{q+1} of the state h before the chunk; the chunk writes sum_q A^{Q-1-q} b u_q into its end state. All chunks of
all rows share these matrices, one set per channel. A state is a row vector here, and A acts as h A^T. Resets
are rows of ``ops.chunking``; sums are exactly causal.
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


def chunked_ssm(u_BLD: Tensor, basis: Basis, h_init: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """y (B, L, D) and the last state (D, B, N) for u (B, L, D) and h_init (D, B, N), in the dtype of ``basis``.

    Time O(B L D (Q + N)), memory O(B L D (1 + N / Q)).
    """
    outputs: list[Tensor] = []
    h_DBN = h_init
    for part in _parts(u_BLD.shape[1], basis.size):
        size = min(basis.size, part.stop - part.start)
        layout = None if reset is None else reset_rows(reset[:, part], size)
        y, h_DBN = _equal_chunks(u_BLD[:, part], basis, h_DBN, layout)
        outputs.append(y)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), h_DBN


def last_state(u_BLD: Tensor, basis: Basis, h_init: Tensor) -> Tensor:
    """The last state of ``chunked_ssm`` alone, without resets."""
    h_DBN = h_init
    for part in _parts(u_BLD.shape[1], basis.size):
        u_DMQ, batch = _in_chunks(u_BLD[:, part], basis.size)
        write_DMN = u_DMQ @ basis.writes[:, : u_DMQ.shape[2]].flip(1)
        _, h_DBN = _carry(write_DMN.unflatten(1, (batch, -1)), basis, u_DMQ.shape[2], h_DBN, None)
    return h_DBN


def free_response(basis: Basis, h_init: Tensor, length: int) -> Tensor:
    """What ``chunked_ssm`` gives for no input, (B, L, D): the part of the output that comes from the state."""
    outputs: list[Tensor] = []
    h_DBN = h_init
    width, batch, d_state = h_init.shape
    for part in _parts(length, basis.size):
        size = min(basis.size, part.stop - part.start)
        no_write = h_init.new_zeros(()).expand(width, batch, (part.stop - part.start) // size, d_state)
        starts_DBCN, h_DBN = _carry(no_write, basis, size, h_DBN, None)
        y_DMQ = starts_DBCN.flatten(1, 2) @ basis.reads[:, :, :size]
        outputs.append(_in_time(y_DMQ, batch))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)


def _parts(length: int, size: int) -> list[slice]:
    """All whole chunks, then what is left."""
    whole = length // size * size
    return [slice(begin, end) for begin, end in ((0, whole), (whole, length)) if begin < end]


def _in_chunks(u_BLD: Tensor, size: int) -> tuple[Tensor, int]:
    batch, length, width = u_BLD.shape
    return u_BLD.permute(2, 0, 1).contiguous().view(width, -1, min(size, length)), batch


def _in_time(y_DMQ: Tensor, batch: int) -> Tensor:
    return y_DMQ.view(y_DMQ.shape[0], batch, -1).permute(1, 2, 0).contiguous()


def _equal_chunks(u_BLD: Tensor, basis: Basis, h_DBN: Tensor, layout: ResetRows | None) -> tuple[Tensor, Tensor]:
    u_DMQ, batch = _in_chunks(u_BLD, basis.size)
    size = u_DMQ.shape[2]
    toeplitz_DQQ: Tensor = _Toeplitz.apply(basis.taps[:, :size])  # pyright: ignore[reportAssignmentType]
    writes_DQN = basis.writes[:, :size].flip(1)
    write_DMN = u_DMQ @ writes_DQN
    rows_DKQ = u_DMQ
    if layout is not None:
        rows_DKQ = torch.where(layout.input, u_DMQ.index_select(1, layout.chunk), 0)
        closing_DKN = rows_DKQ.index_select(1, layout.closing) @ writes_DQN
        write_DMN = write_DMN.index_copy(1, layout.chunk[layout.closing], closing_DKN)
    starts_DBCN, h_DBN = _carry(write_DMN.unflatten(1, (batch, -1)), basis, size, h_DBN, layout)
    y_DMQ = torch.baddbmm(starts_DBCN.flatten(1, 2) @ basis.reads[:, :, :size], u_DMQ, toeplitz_DQQ)
    if layout is not None:
        after_DKQ = torch.where(layout.output, rows_DKQ @ toeplitz_DQQ, 0)
        y_DMQ = torch.where(layout.before, y_DMQ, 0).index_add(1, layout.chunk, after_DKQ)
    return _in_time(y_DMQ, batch), h_DBN


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
    write_DBCN: Tensor, basis: Basis, size: int, h_DBN: Tensor, layout: ResetRows | None
) -> tuple[Tensor, Tensor]:
    """States before every chunk (D, B, C, N), and the last one: h' = A^size h + write, chunk after chunk."""
    restart, cut = (None, None) if layout is None else (layout.restart, layout.cut)
    if write_DBCN.shape[2] == 1:
        start_DBN = _masked(h_DBN, restart, 0)
        h_DBN = _masked(basis.advance(start_DBN, size), cut, 0) + write_DBCN[:, :, 0]
        return start_DBN.unsqueeze(2), h_DBN
    assert size == basis.size
    out: tuple[Tensor, Tensor] = _Carry.apply(write_DBCN, basis.power, h_DBN, restart, cut)  # pyright: ignore[reportAssignmentType]
    return out


class _Carry(torch.autograd.Function):
    """Over chunks, and its adjoint; ``restart`` empties the state a chunk reads, ``cut`` what passes through it."""

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
