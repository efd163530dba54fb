"""Gated recurrent cells over a sequence, with resets inside it: GRU (arXiv 1406.1078) and LSTM (with forget gates).

Both in PyTorch's form and order of gates. A reset at t empties the state before position t is consumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recollect.ops import dispatch
from recollect.ops.scan import accumulator_dtype

FEW_CUTS = 128
"""An LSTM with at most one reset position in so many is run by PyTorch's kernel, piece by piece."""


class CellWeights(NamedTuple):
    """Of G gates on top of each other: input (GE, D), recurrent (GE, E), and their biases (GE,)."""

    w_ih: Tensor
    w_hh: Tensor
    b_ih: Tensor
    b_hh: Tensor


def gru_step(u_BD: Tensor, weights: CellWeights, h_BE: Tensor) -> Tensor:
    """r, z = sigmoid(W u + U h), n = tanh(W_n u + r * (U_n h)), next state (1 - z) * n + z * h. O(B E (D + E))."""
    input_r, input_z, input_n = F.linear(u_BD, weights.w_ih, weights.b_ih).chunk(3, -1)
    recurrent_r, recurrent_z, recurrent_n = F.linear(h_BE, weights.w_hh, weights.b_hh).chunk(3, -1)
    n = torch.tanh(input_n + torch.sigmoid(input_r + recurrent_r) * recurrent_n)
    return n + torch.sigmoid(input_z + recurrent_z) * (h_BE - n)


def lstm_step(u_BD: Tensor, weights: CellWeights, h_BE: Tensor, c_BE: Tensor) -> tuple[Tensor, Tensor]:
    """i, f, o = sigmoid(W u + U h), g = tanh(W_g u + U_g h), c' = f * c + i * g, h' = o * tanh(c'); h' and c'."""
    gates = F.linear(u_BD, weights.w_ih, weights.b_ih) + F.linear(h_BE, weights.w_hh, weights.b_hh)
    i, f, g, o = gates.chunk(4, -1)
    c_BE = torch.sigmoid(f) * c_BE + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c_BE), c_BE


def gru_reference(
    u_BLD: Tensor, weights: CellWeights, h_init: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``gru`` one position after the other, as the equation is written."""
    h_BE, states = h_init, []
    for u_BD, reset_B in zip(u_BLD.unbind(1), _steps(u_BLD, reset), strict=True):
        h_BE = gru_step(u_BD, weights, h_BE if reset_B is None else h_BE.masked_fill(reset_B.unsqueeze(-1), 0))
        states.append(h_BE)
    return torch.stack(states, 1), h_BE


def lstm_reference(
    u_BLD: Tensor, weights: CellWeights, h_init: Tensor, c_init: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """``lstm`` one position after the other, as the equation is written."""
    h_BE, c_BE, states = h_init, c_init, []
    for u_BD, reset_B in zip(u_BLD.unbind(1), _steps(u_BLD, reset), strict=True):
        if reset_B is not None:
            h_BE, c_BE = (state.masked_fill(reset_B.unsqueeze(-1), 0) for state in (h_BE, c_BE))
        h_BE, c_BE = lstm_step(u_BD, weights, h_BE, c_BE)
        states.append(h_BE)
    return torch.stack(states, 1), h_BE, c_BE


def _steps(u_BLD: Tensor, reset: Tensor | None) -> Sequence[Tensor | None]:
    return (None,) * u_BLD.shape[1] if reset is None else reset.unbind(1)


def gru(u_BLD: Tensor, weights: CellWeights, h_init: Tensor, *, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """All states (B, L, E) of ``gru_step`` and the last one (B, E), in the dtypes of u and h_init.

    u (B, L, D) with L >= 1; h_init (B, E); reset (B, L) bool. Computed in at least float32. Time O(B L E (D + E)), of
    which E^2 per position is sequential; memory for backward: 5 B L E numbers. On a CPU a matrix product and a compiled
    pass per position, elsewhere PyTorch's kernel on the pieces between positions where some row is reset. First
    derivatives only.
    """
    dtype = accumulator_dtype(u_BLD.dtype)
    u, h = u_BLD.to(dtype), h_init.to(dtype)
    weights = CellWeights(*(w.to(dtype) for w in weights))
    with torch.autocast(u.device.type, enabled=False):
        if dispatch.explain_kernels(u, h).path == "numba":
            h_BLE: Tensor = _Gru.apply(u, *weights, _emptied(h, reset), reset)  # pyright: ignore[reportAssignmentType]
            last_BE = h_BLE[:, -1]
        else:
            outputs: list[Tensor] = []
            for piece, begins in _pieces(u, reset):
                h = h if begins is None else h.masked_fill(begins, 0)
                y, last = torch.gru(piece, h.unsqueeze(0), weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
                outputs.append(y)
                h = last[0]
            h_BLE, last_BE = torch.cat(outputs, 1), h
    return h_BLE.to(u_BLD.dtype), last_BE.to(h_init.dtype)


def lstm(
    u_BLD: Tensor, weights: CellWeights, h_init: Tensor, c_init: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """All states h (B, L, E) of ``lstm_step`` and the last h and c (B, E); otherwise as ``gru``, with 7 B L E numbers.

    PyTorch's kernel is the faster one on whole sequences, so on a CPU too it runs those with few resets.
    """
    dtype = accumulator_dtype(u_BLD.dtype)
    u, h, c = u_BLD.to(dtype), h_init.to(dtype), c_init.to(dtype)
    weights = CellWeights(*(w.to(dtype) for w in weights))
    with torch.autocast(u.device.type, enabled=False):
        many = reset is not None and FEW_CUTS * len(_cuts(reset)) > reset.shape[1]
        if many and dispatch.explain_kernels(u, h).path == "numba":
            starts = _emptied(h, reset), _emptied(c, reset)
            h_BLE, last_BE, c_BE = _Lstm.apply(u, *weights, *starts, reset)  # pyright: ignore[reportGeneralTypeIssues]
        else:
            outputs: list[Tensor] = []
            for piece, begins in _pieces(u, reset):
                if begins is not None:
                    h, c = h.masked_fill(begins, 0), c.masked_fill(begins, 0)
                state = [h.unsqueeze(0), c.unsqueeze(0)]
                y, h, c = torch.lstm(piece, state, weights, True, 1, 0.0, torch.is_grad_enabled(), False, True)
                outputs.append(y)
                h, c = h[0], c[0]
            h_BLE, last_BE, c_BE = torch.cat(outputs, 1), h, c
    return h_BLE.to(u_BLD.dtype), last_BE.to(h_init.dtype), c_BE.to(c_init.dtype)


def _emptied(state_BE: Tensor, reset: Tensor | None) -> Tensor:
    """The state the first position starts from."""
    return state_BE if reset is None else state_BE.masked_fill(reset[:, :1], 0)


def _pieces(u: Tensor, reset: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
    """``u`` cut where some row is reset, each piece with the rows (B, 1) that begin afresh in it."""
    if reset is None:
        yield u, None
        return
    edges = [0, *_cuts(reset), u.shape[1]]
    sizes = [after - before for before, after in pairwise(edges)]
    # split, because the gradient of every slice u[:, i:j] would be a full tensor of zeros.
    for piece, at in zip(u.split(sizes, 1), edges, strict=False):
        yield piece, reset[:, at : at + 1]


def _cuts(reset: Tensor) -> list[int]:
    """Positions after the first at which some row is reset."""
    return (reset[:, 1:].any(0).nonzero().flatten() + 1).tolist()


def _before(state_BLE: Tensor, first_BE: Tensor, reset: Tensor | None) -> Tensor:
    """The state every position started from (B, L, E)."""
    before = torch.cat([first_BE.unsqueeze(1), state_BLE[:, :-1]], 1)
    return before if reset is None else before.masked_fill_(reset.unsqueeze(-1), 0)


class _Gru(torch.autograd.Function):
    """With q = U_n h + b kept beside the gates r, z, n; backward gives n, r, z, q their gradients, then the weights."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        first: Tensor,
        reset: Tensor | None,
    ) -> Tensor:
        module = dispatch.kernels("recurrent", u, w_hh)
        assert module is not None
        width = first.shape[1]
        bias = b_ih.clone()
        bias[: 2 * width] += b_hh[: 2 * width]
        gates = F.linear(u, w_ih, bias)
        h, q = module.gru_forward(gates, w_hh, b_hh[2 * width :], first.clone(), reset)
        ctx.save_for_backward(u, w_ih, w_hh, first, reset, gates, q, h)
        return h

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        u, w_ih, w_hh, first, reset, gates, q, h = ctx.saved_tensors
        module = dispatch.kernels("recurrent", u, w_hh)
        assert module is not None
        width = first.shape[1]
        before = _before(h, first, reset)
        carry = torch.zeros_like(first)
        grads, dfirst = module.gru_backward(grad_outputs[0].contiguous(), carry, gates, q, before, w_hh, reset)
        # Columns n, r, z, q: the inputs' gates are the first three, the recurrent ones the last three.
        grads_RG = grads.flatten(0, 1)
        input_RG, recurrent_RG = grads_RG[:, : 3 * width], grads_RG[:, width:]
        dw_hh = recurrent_RG.t() @ before.flatten(0, 1)
        dw_ih = (input_RG.t() @ u.flatten(0, 1)).roll(-width, 0)
        sums = grads_RG.sum(0)
        du = (input_RG @ w_ih.roll(width, 0)).view_as(u) if ctx.needs_input_grad[0] else None
        return du, dw_ih, dw_hh, sums[: 3 * width].roll(-width), sums[width:], dfirst, None


class _Lstm(torch.autograd.Function):
    """Keeps the gates i, f, g, o and both states; both products of a position have the same gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        w_ih: Tensor,
        w_hh: Tensor,
        b_ih: Tensor,
        b_hh: Tensor,
        first: Tensor,
        first_c: Tensor,
        reset: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        module = dispatch.kernels("recurrent", u, w_hh)
        assert module is not None
        gates = F.linear(u, w_ih, b_ih + b_hh)
        h, c = module.lstm_forward(gates, w_hh, first.clone(), first_c.clone(), reset)
        ctx.save_for_backward(u, w_ih, w_hh, first, first_c, reset, gates, h, c)
        return h, h[:, -1].clone(), c[:, -1].clone()

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        u, w_ih, w_hh, first, first_c, reset, gates, h, c = ctx.saved_tensors
        module = dispatch.kernels("recurrent", u, w_hh)
        assert module is not None
        dh, dlast, dcell = grad_outputs
        grads, dfirst, dfirst_c = module.lstm_backward(
            dh.contiguous(),
            dlast.clone(memory_format=torch.contiguous_format),
            dcell.clone(memory_format=torch.contiguous_format),
            gates,
            c,
            _before(c, first_c, reset),
            w_hh,
            reset,
        )
        grads_RG = grads.flatten(0, 1)
        dw_hh = grads_RG.t() @ _before(h, first, reset).flatten(0, 1)
        dw_ih = grads_RG.t() @ u.flatten(0, 1)
        sums = grads_RG.sum(0)
        du = (grads_RG @ w_ih).view_as(u) if ctx.needs_input_grad[0] else None
        return du, dw_ih, dw_hh, sums, sums, dfirst, dfirst_c, None
