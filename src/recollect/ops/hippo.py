"""HiPPO-LegS and what state-space models start from: its matrices, its normal part, and simpler diagonals.

A = S - 1/2 - p p^T with S skew-symmetric and p_n = sqrt(n + 1/2) (S4, arXiv 2111.00396, appendix C.1; S5, arXiv
2208.04933, B.1.1). S - 1/2 is normal: a unitary V diagonalises it, and its eigenvalues come in conjugate pairs, of
which the one above the real axis is kept. Everything is computed in float64.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

DiagonalInit = Literal["legs", "lin", "inv"]


class Legs(NamedTuple):
    """The system h' = A h + B u of size N, with A = normal - p p^T: A (N, N), B (N,), p (N,)."""

    A: Tensor
    B: Tensor
    p: Tensor


class Dplr(NamedTuple):
    """A = V (diag(values) - p p^*) V^*, B = V b, one of every conjugate pair.

    values, p, b (N/2,) and V (N, N/2), complex128.
    """

    values: Tensor
    p: Tensor
    b: Tensor
    V: Tensor


def legs(size: int) -> Legs:
    """HiPPO-LegS: A_nk = -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, 0 above; B_n = sqrt(2n+1)."""
    n = torch.arange(size, dtype=torch.float64)
    root = torch.sqrt(2 * n + 1)
    A = -torch.tril(root.unsqueeze(1) * root, diagonal=-1) - torch.diag(n + 1)
    return Legs(A, root, torch.sqrt(n + 0.5))


def legs_normal(size: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues (size/2,) above the real axis and eigenvectors V (size, size/2) of the normal part of HiPPO-LegS."""
    root = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    lower = torch.tril(root.unsqueeze(1) * root, diagonal=-1)
    # The skew part S = lower.T - lower; -i S is Hermitian with eigenvalues in pairs +-w, sorted upwards.
    frequency, vectors = torch.linalg.eigh(-1j * (lower.T - lower))
    half = size // 2
    return torch.complex(torch.full_like(frequency[half:], -0.5), frequency[half:]), vectors[:, half:]


def legs_dplr(size: int) -> Dplr:
    """HiPPO-LegS as diagonal plus low rank, in the basis of its normal part; ``size`` is even."""
    _, B, p = legs(size)
    values, V = legs_normal(size)
    return Dplr(values, V.mH @ p.to(V.dtype), V.mH @ B.to(V.dtype), V)


def diagonal(init: DiagonalInit, size: int) -> Tensor:
    """Diagonals of S4D (arXiv 2206.11893, section 4.3), (size/2,) complex128, all with real part -1/2.

    ``legs``: the normal part of HiPPO-LegS; ``lin``: imaginary parts pi n; ``inv``: (N/pi) (N/(2n+1) - 1).
    """
    if init == "legs":
        return legs_normal(size)[0]
    n = torch.arange(size // 2, dtype=torch.float64)
    imag = math.pi * n if init == "lin" else size / math.pi * (size / (2 * n + 1) - 1)
    return torch.complex(torch.full_like(imag, -0.5), imag)
