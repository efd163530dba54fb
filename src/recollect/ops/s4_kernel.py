"""S4 (arXiv 2111.00396) per channel: a compiled loop, chunks of matrix products, or the convolution of the paper.

The discretised system is ``ops.dplr.Discrete``. A reset at t empties the state before position t is consumed. Sums are
taken in at least float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from recollect.ops import dispatch
from recollect.ops.chunking import any_reset, chunk_size_for
from recollect.ops.dplr import Discrete, cast, compiled_s4, discretise
from recollect.ops.lti import Basis, chunked_ssm, free_response, last_state
from recollect.ops.scan import accumulator_dtype


def s4_step(u_BD: Tensor, system: Discrete, skip_D: Tensor, h_BDP: Tensor) -> tuple[Tensor, Tensor]:
    """One position: y (B, D) and the next state, complex (B, D, P). O(B D P)."""
    h_BDP = _move(system, h_BDP) + system.b * u_BD.unsqueeze(-1).to(h_BDP.real.dtype)
    return 2 * (system.c * h_BDP).sum(-1).real + skip_D * u_BD, h_BDP


def _move(system: Discrete, h: Tensor) -> Tensor:
    s = 2 * (system.v * h).sum(-1, keepdim=True).real
    return system.e * h - system.w * s


def s4_reference(
    u_BLD: Tensor, system: Discrete, skip_D: Tensor, h_init: Tensor, *, reset: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``s4`` one position after the other, as the equation is written."""
    h_BDP = torch.view_as_complex(h_init)
    outputs: list[Tensor] = []
    reset_steps = (None,) * u_BLD.shape[1] if reset is None else reset.unbind(1)
    for u_BD, reset_B in zip(u_BLD.unbind(1), reset_steps, strict=True):
        if reset_B is not None:
            h_BDP = h_BDP.masked_fill(reset_B[:, None, None], 0)
        y_BD, h_BDP = s4_step(u_BD, system, skip_D, h_BDP)
        outputs.append(y_BD)
    return torch.stack(outputs, 1), torch.view_as_real(h_BDP)


def s4(
    u_BLD: Tensor,
    system: Discrete,
    skip_D: Tensor,
    h_init: Tensor,
    *,
    reset: Tensor | None = None,
    chunk_size: int = 64,
    taps_DL: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs y (B, L, D) and the last state (B, D, P, 2), parallel over time.

    u (B, L, D) real; ``system`` (D, P) complex; skip (D,); h_init (B, D, P, 2), real and imaginary parts; reset (B, L)
    bool; ``chunk_size`` a power of two. With ``taps_DL``, the first L taps from ``s4_taps``, u is convolved by FFT,
    causal to rounding, unless there are resets; the state's part and the last state are exact either way.

    On a CPU a compiled loop over the positions: O(B L D N) time, O(B L D (1 + N / 32)) memory. Elsewhere in chunks of
    Q: O(B L D (Q + N) + D N^2 (N log Q + Q)) time, O(B L D (1 + N / Q) + D N (N + Q)) memory. First derivatives only.
    """
    dtype = accumulator_dtype(u_BLD.dtype)
    u_BLD, h_init, skip_D = u_BLD.to(dtype), h_init.to(dtype), skip_D.to(dtype)
    system = cast(system, dtype.to_complex())
    if taps_DL is None and dispatch.kernels("dplr_ssm", u_BLD, h_init, skip_D) is not None:
        return compiled_s4(u_BLD, system, skip_D, h_init, reset)
    with torch.autocast(u_BLD.device.type, enabled=False):
        reset = any_reset(reset)
        batch, length, _ = u_BLD.shape
        if reset is not None:
            chunk_size = chunk_size_for(chunk_size, length, 2 * system.e.shape[1], batch, int(reset.sum()))
        basis = DplrBasis(system, min(chunk_size, 1 << (length - 1).bit_length()))
        start_DBN = h_init.flatten(2).transpose(0, 1)
        if taps_DL is None or reset is not None:
            y_BLD, h_DBN = chunked_ssm(u_BLD, basis, start_DBN, reset=reset)
        else:
            y_BLD = fft_convolve(u_BLD, taps_DL.to(dtype)) + free_response(basis, start_DBN, length)
            h_DBN = last_state(u_BLD, basis, start_DBN)
        return torch.addcmul(y_BLD, skip_D, u_BLD), h_DBN.transpose(0, 1).unflatten(2, (-1, 2))


class DplrBasis(Basis):
    """The matrices of chunks of ``size`` = 2^k positions; dense powers by squaring, Krylov vectors by doubling.

    Everything is taken in float64 and rounded once: an error in A^Q counts once per chunk, for all chunks alike.
    """

    def __init__(self, system: Discrete, size: int) -> None:
        dtype = system.e.real.dtype
        system = cast(system, torch.complex128)
        n_pairs = system.e.shape[1]
        unit_NP = torch.view_as_complex(
            torch.eye(2 * n_pairs, dtype=torch.float64, device=system.e.device).view(-1, n_pairs, 2)
        )
        moved_DNP = _move(Discrete(*(t.unsqueeze(1) for t in system)), unit_NP)
        square_DNN = torch.view_as_real(moved_DNP).flatten(2)
        self.squares = [square_DNN]
        writes_DQN = torch.view_as_real(system.b).flatten(1).unsqueeze(1)
        read_DN1 = torch.view_as_real((2 * system.c).conj().resolve_conj()).flatten(1).unsqueeze(-1)
        reads_DNQ = square_DNN @ read_DN1
        while writes_DQN.shape[1] < size:
            writes_DQN = torch.cat([writes_DQN, writes_DQN @ square_DNN], 1)
            reads_DNQ = torch.cat([reads_DNQ, square_DNN @ reads_DNQ], 2)
            square_DNN = square_DNN @ square_DNN
            self.squares.append(square_DNN)
        self.taps = (writes_DQN @ read_DN1).squeeze(-1).to(dtype)
        self.writes, self.reads = writes_DQN.to(dtype), reads_DNQ.to(dtype)
        self.squares = [square.to(dtype) for square in self.squares]

    @property
    def power(self) -> Tensor:
        return self.squares[-1]

    def advance(self, h_DBN: Tensor, n: int) -> Tensor:
        for k, square_DNN in enumerate(self.squares):
            if n >> k & 1:
                h_DBN = h_DBN @ square_DNN
        return h_DBN


def fft_convolve(u_BLD: Tensor, taps_DL: Tensor) -> Tensor:
    """Causal convolution along L, to rounding. O(B D L log L)."""
    length = u_BLD.shape[1]
    spectrum = torch.fft.rfft(u_BLD.transpose(1, 2), n=2 * length) * torch.fft.rfft(taps_DL, n=2 * length)
    return torch.fft.irfft(spectrum, n=2 * length)[..., :length].transpose(1, 2)


def s4_taps(values_DP: Tensor, p_DP: Tensor, B_DP: Tensor, C_DP: Tensor, dt_D: Tensor, length: int) -> Tensor:
    """The first L taps of the continuous system's convolution, (D, L) real, in the precision given (use complex128).

    The generating function of the taps at the L-th roots of unity z is (S4, algorithm 1 and appendix C.3)

    sum_k K_k z^k = Ct (I - z A)^{-1} b = Ct [(1-z) I - (1+z) dt/2 (Lambda - p p^*)]^{-1} dt B,  Ct = C (I - A^L),

    whose inverse Woodbury's identity turns into four Cauchy products. Taken in blocks of channels that are run again in
    backward: O(D P L) time, O(D L) memory, and A^L in O(D N^3 log L).
    """
    system = discretise(values_DP, p_DP, B_DP, C_DP, dt_D)
    truncated_DP = _truncate(system, length)
    block = max(1, 1 << 18 >> (length * values_DP.shape[1]).bit_length() - 1)
    parts: list[Tensor] = []
    for given in zip(*(t.split(block) for t in (values_DP, p_DP, B_DP, truncated_DP, dt_D)), strict=True):
        part = checkpoint(_generating_function, *given, length, use_reentrant=False)
        assert isinstance(part, Tensor)
        parts.append(part)
    return torch.fft.irfft(torch.cat(parts), n=length)


def _truncate(system: Discrete, length: int) -> Tensor:
    """C (I - A^L), complex (D, P)."""
    basis = DplrBasis(system, 1 << length.bit_length() - 1)
    read_DN = torch.view_as_real(system.c.conj().resolve_conj()).flatten(1)
    moved_DN1 = read_DN.unsqueeze(-1)
    for k, square_DNN in enumerate(basis.squares):
        if length >> k & 1:
            moved_DN1 = square_DNN @ moved_DN1
    left_DN = read_DN - moved_DN1.squeeze(-1)
    return torch.view_as_complex(left_DN.unflatten(-1, (-1, 2))).conj()


def _generating_function(
    values_DP: Tensor, p_DP: Tensor, B_DP: Tensor, C_DP: Tensor, dt_D: Tensor, length: int
) -> Tensor:
    """At the roots exp(-2 pi i k / L), k = 0..L/2: complex (D, L // 2 + 1)."""
    k = torch.arange(length // 2 + 1, dtype=torch.float64, device=dt_D.device)
    z_F = torch.exp(-2j * torch.pi * k / length)
    half_D11 = dt_D[:, None, None] / 2
    minus_F, plus_DF = 1 - z_F, (1 + z_F) * half_D11.squeeze(-1)
    values_DPF, plus_D1F = values_DP.unsqueeze(-1), plus_DF.unsqueeze(1)
    pole_DPF = 1 / (minus_F - plus_D1F * values_DPF)
    mirror_DPF = 1 / (minus_F - plus_D1F * values_DPF.conj())

    def product(left_DP: Tensor, right_DP: Tensor) -> Tensor:
        """Sum over both states of every pair of left * right / (1 - z - (1 + z) dt/2 lambda)."""
        weight_D1P = (left_DP * right_DP).unsqueeze(1)
        return (weight_D1P @ pole_DPF + weight_D1P.conj() @ mirror_DPF).squeeze(1)

    p_bar = p_DP.conj()
    feedback_DF = product(C_DP, p_DP) * plus_DF * product(p_bar, B_DP) / (1 + plus_DF * product(p_bar, p_DP))
    return dt_D.unsqueeze(-1) * (product(C_DP, B_DP) - feedback_DF)
