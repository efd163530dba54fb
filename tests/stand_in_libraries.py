"""What ``mamba-ssm`` and ``fla`` compute, one position after the other, behind the arguments that they take.

Written from what ``ops.libraries`` says of them; they stand in for packages that need a GPU.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops import libraries

CALLS: list[str] = []
"""The functions called since the stand-ins were installed."""


def mamba_chunk_scan_combined(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: None = None,
    dt_bias: None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    cu_seqlens: None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    return_varlen_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """``seq_idx`` names sequences; the initial state is that of sequence 0 and of no other."""
    CALLS.append("mamba_chunk_scan_combined")
    assert x.dtype == B.dtype == C.dtype, "products of one type"
    batch, length, heads, width = x.shape
    groups, d_state = B.shape[2:]
    assert dt.shape == (batch, length, heads)
    assert A.shape == (heads,)
    assert B.shape == C.shape == (batch, length, groups, d_state)
    assert D is None or D.shape == (heads,)
    assert not any((dt_softplus, cu_seqlens, return_varlen_states, z, dt_bias))
    assert chunk_size & (chunk_size - 1) == 0
    h = torch.zeros(batch, heads, width, d_state)
    if initial_states is not None:
        assert initial_states.shape == h.shape
        h = initial_states.float()
    if seq_idx is not None:
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == (batch, length)
    before = torch.zeros(batch, dtype=torch.int32)
    ys: list[Tensor] = []
    for t in range(length):
        if seq_idx is not None:
            h = torch.where((seq_idx[:, t] == before)[:, None, None, None], h, 0)
            before = seq_idx[:, t]
        key, query = (v[:, t].float().repeat_interleave(heads // groups, 1) for v in (B, C))
        step = dt[:, t].float()
        h = torch.exp(step * A)[..., None, None] * h
        h = h + (step[..., None] * x[:, t].float())[..., None] * key[:, :, None]
        y = (h * query[:, :, None]).sum(-1)
        ys.append(y if D is None else y + D[:, None] * x[:, t].float())
    out = torch.stack(ys, 1).to(x.dtype)
    return (out, h) if return_final_states else out


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Every head its own queries and keys; states (B, H, K, V)."""
    CALLS.append("chunk_simple_gla")
    assert not kwargs
    assert g is not None
    assert q.dtype == k.dtype == v.dtype, "products of one type"
    batch, length, heads, d_key = k.shape
    assert q.shape == k.shape
    assert v.shape[:3] == g.shape == (batch, length, heads)
    assert g.dtype == torch.float32
    factor = d_key**-0.5 if scale is None else scale
    h = torch.zeros(batch, heads, d_key, v.shape[3])
    if initial_state is not None:
        assert initial_state.shape == h.shape
        assert initial_state.is_contiguous()
        h = initial_state.float()
    ys: list[Tensor] = []
    for t in range(length):
        h = torch.exp(g[:, t])[..., None, None] * h + k[:, t].float()[..., None] * v[:, t].float()[..., None, :]
        ys.append(factor * (h * q[:, t].float()[..., None]).sum(2))
    return torch.stack(ys, 1).to(q.dtype), h if output_final_state else None


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: None = None,
    delta_bias: None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Time last; no gradient goes through the last state."""
    CALLS.append("selective_scan_fn")
    assert z is None
    assert delta_bias is None
    batch, width, length = u.shape
    d_state = A.shape[1]
    assert u.dtype == delta.dtype == B.dtype == C.dtype
    assert A.dtype == torch.float32
    assert delta.shape == u.shape
    assert B.shape == C.shape == (batch, d_state, length)
    assert D is None or (D.dtype == torch.float32 and D.shape == (width,))
    assert d_state <= 256
    delta = F.softplus(delta) if delta_softplus else delta
    h = torch.zeros(batch, width, d_state)
    ys: list[Tensor] = []
    for t in range(length):
        step = delta[..., t, None]
        h = torch.exp(step * A) * h + step * u[..., t, None] * B[:, None, :, t]
        ys.append((h * C[:, None, :, t]).sum(-1))
    out = torch.stack(ys, -1)
    out = out if D is None else out + D[:, None] * u
    return (out, h.detach()) if return_last_state else out


PLACES = {
    "mamba-ssm": (
        ("mamba_ssm.ops.triton.ssd_combined", mamba_chunk_scan_combined),
        ("mamba_ssm.ops.selective_scan_interface", selective_scan_fn),
    ),
    "fla": (("fla.ops.simple_gla", chunk_simple_gla),),
}


def install(patch: pytest.MonkeyPatch, *names: str) -> None:
    """Make the stand-ins of these libraries what ``import`` finds, and no others."""
    libraries.lookup.cache_clear()
    CALLS.clear()
    for package in ("mamba_ssm", "fla"):
        patch.delitem(sys.modules, package, raising=False)
    for name in names:
        for place, function in PLACES[name]:
            put(patch, place, **{function.__name__: function})


def put(patch: pytest.MonkeyPatch, place: str, **functions: Any) -> None:
    """A module of this name that holds ``functions``, and the package that it is in."""
    package = place.partition(".")[0]
    for path in (package, place):
        module = ModuleType(path)
        module.__spec__ = ModuleSpec(path, None)
        vars(module).update(functions if path == place else {})
        patch.setitem(sys.modules, path, module)
