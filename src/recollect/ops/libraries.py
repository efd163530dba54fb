"""Kernels of other packages that ``ops.ssd`` and ``ops.selective_scan`` use on a GPU where they are installed.

``mamba-ssm`` (read in the sources of state-spaces/mamba, 2.0 to 2.3; nothing here was run on a GPU):

* ``mamba_ssm.ops.triton.ssd_combined.mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, D, z, dt_bias,
  initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit, return_final_states, ...)``, from 2.0. x (B, L, H, P), dt
  (B, L, H), A (H,), B, C (B, L, G, N), D (H,), states (B, H, P, N), any strides; y in the dtype of x, the last state in
  float32. Gradients of everything, of the first and the last state too. ``seq_idx`` (B, L) int32 names the sequence of
  a position, and nothing crosses a change of it; the initial state belongs to the sequence that is called 0. States
  between chunks are summed in float32 and read in the dtype of C. ``ddt`` is added with atomics.
* ``mamba_ssm.ops.selective_scan_interface.selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
  return_last_state)``, from 1.0, a CUDA extension. u, delta (B, E, L), B, C (B, N, L), all of one dtype; A (E, N), D
  (E,) float32; N at most 256; sums in float32. It starts from zero, knows no resets, and passes no gradient through
  the last state (B, E, N) that it returns. dA, dB, dC and dD are added with atomics.

``flash-linear-attention`` (fla-org/flash-linear-attention, 0.3 to 0.5): ``fla.ops.simple_gla.chunk_simple_gla(q, k, v,
g, scale, initial_state, output_final_state, cu_seqlens)``: h_t = exp(g_t) h_{t-1} + k_t v_t^T, y_t = scale h_t^T q_t,
which is the dual with q = C, k = B, v = dt x, g = dt A and scale 1. q, k (B, L, H, N) for every head, v (B, L, H, P),
g (B, L, H); states (B, H, N, P) float32; the last state always, gradients of everything. Its sequences in a row are
lengths that the host must know. Triton 3.4.0 to 3.7.0 compiles its backward wrongly for Hopper; from 0.5 it refuses
there. Up to 0.1 heads came before time unless ``head_first=False`` was said.

How what they lack is had exactly: a reset at position 0 empties ``h_init`` before it is handed over; the last state of
the selective scan is read by N more positions that take no step (dt = 0) and have C_n = e_n, so it is an output with a
gradient. The rest is refused, and the reason said (``refusal``); PyTorch's operations run then.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recollect.ops.dispatch import Asked, asks_gradients

MAX_STATE = 256
"""The selective scan's own bound on N; the largest that the others are taken for."""
MAX_GRID = 65_535
"""Blocks along the second and third axis of a launch."""
MAX_OFFSET = 2**31
"""Kernels count elements in 32 bits."""
MAMBA_CHUNK = 256
"""Positions in a chunk of ``mamba_chunk_scan_combined``: what the package's own layer takes."""
FLA_CHUNK = 64
"""The smallest count of positions that ``chunk_simple_gla`` joins in long sequences."""
NO_STEP = -1e4
"""Its softplus is 0, and so is its gradient."""


class Kernel(NamedTuple):
    """A function of a package, with the arguments that it must take."""

    package: str
    module: str
    function: str
    arguments: tuple[str, ...]
    refuses: Callable[[Asked], str]


def refusal(op: str, name: str, asked: Asked) -> str:
    """Why library ``name`` cannot carry out what is asked of ``op`` (``ssd``, ``selective_scan``); empty if it can."""
    kernel = KERNELS[op].get(name)
    if kernel is None:
        return "has no kernel for it"
    return missing(op, name) or kernel.refuses(asked)


@torch.compiler.assume_constant_result
def missing(op: str, name: str) -> str:
    """Why the kernel cannot be called here, whatever is asked; empty if it can. Imports it, once."""
    found = lookup(op, name)
    return found if isinstance(found, str) else ""


@cache
def lookup(op: str, name: str) -> Callable[..., Any] | str:
    """The kernel, or why there is none, whatever is asked."""
    kernel = KERNELS[op][name]
    try:
        if find_spec(kernel.package) is None:
            return "not installed"
        function = getattr(importlib.import_module(kernel.module), kernel.function, None)
    except Exception as error:  # another Python, torch or CUDA than it was built for fails in any way
        return f"cannot be imported: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if function is None:
        return f"has no {kernel.function}: another version"
    takes = inspect.signature(function).parameters
    if lacks := [argument for argument in kernel.arguments if argument not in takes]:
        return f"{kernel.function} takes no {', '.join(lacks)}: another version"
    if "head_first" in takes and takes["head_first"].default is not False:
        return f"{kernel.function} takes heads before time: too old"
    return function


def _too_large(sizes: Mapping[str, int], grid: Mapping[str, int]) -> str:
    for what, n in sizes.items():
        if n >= MAX_OFFSET:
            return f"{n:,} numbers in {what}: its kernels count to {MAX_OFFSET:,}"
    for what, n in grid.items():
        if n > MAX_GRID:
            return f"{n:,} {what}: a launch holds {MAX_GRID:,}"
    return ""


def _unfit(asked: Asked, dtypes: tuple[torch.dtype, ...], unordered: str) -> str:
    if asked.dtype not in dtypes:
        return f"{asked.dtype}: it takes {', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}"
    if asked.d_state > MAX_STATE:
        return f"{asked.d_state} states: at most {MAX_STATE}"
    if torch.are_deterministic_algorithms_enabled():
        return f"deterministic algorithms are asked for, and it {unordered}"
    return ""


HALF = (torch.bfloat16, torch.float16)


@torch.compiler.assume_constant_result
def tf32_allowed() -> bool:
    """Whether products of float32 may be taken in TF32, as Triton takes them unless told otherwise."""
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


def _products(asked: Asked) -> str:
    if asked.dtype == torch.float32 and not tf32_allowed():
        return "float32: its products are TF32, which PyTorch's setting for matrix products does not allow"
    return ""


@torch.compiler.assume_constant_result
def wrong_backward(device: torch.device) -> bool:
    """Whether Triton compiles the backward of fla's chunks wrongly: 3.4.0 to 3.7.0 on Hopper."""
    import triton

    version = tuple(int(part) for part in triton.__version__.split("+")[0].split(".")[:3] if part.isdigit())
    return torch.cuda.get_device_capability(device)[0] == 9 and (3, 4) <= version < (3, 7, 1)


def _mamba_ssd(asked: Asked) -> str:
    batch, length, heads, width, d_state = asked[2:7]
    chunks = batch * -(-length // MAMBA_CHUNK)
    sizes = {
        "x": batch * length * heads * width,
        "the states of chunks": chunks * heads * width * d_state,
        "B": batch * length * asked.groups * d_state,
        "the products C B of chunks": chunks * asked.groups * MAMBA_CHUNK**2,
    }
    return (
        _unfit(asked, (*HALF, torch.float32), "adds gradients of steps in any order")
        or _products(asked)
        or _too_large(sizes, {"heads": heads})
    )


def _fla_ssd(asked: Asked) -> str:
    batch, length, heads, width, d_state = asked[2:7]
    chunks = -(-length // FLA_CHUNK)
    sizes = {
        "x": batch * length * heads * width,
        "the keys of all heads": batch * length * heads * d_state,
        "the states of chunks": batch * chunks * heads * width * d_state,
    }
    if asked.reset:
        return "resets: it takes sequences in a row by lengths that the host would have to wait for"
    if reason := _unfit(asked, (*HALF, torch.float32), "picks its tiles by timing them"):
        return reason
    if asked.gradients and wrong_backward(asked.device):
        return "gradients: Triton 3.4.0 to 3.7.0 compiles its backward wrongly for Hopper"
    return _products(asked) or _too_large(sizes, {"chunks": chunks, "heads in all": batch * heads})


def _mamba_scan(asked: Asked) -> str:
    length = asked.length + (asked.d_state if asked.gradients else 0)
    if asked.reset:
        return "resets: its scan cannot empty the state"
    if asked.h_init:
        return "an initial state: its scan starts from zero"
    sizes = {"u": asked.batch * asked.width * length, "B": asked.batch * asked.d_state * length}
    return _unfit(asked, (*HALF, torch.float32), "adds gradients in any order") or _too_large(
        sizes, {"channels": asked.width}
    )


KERNELS: Mapping[str, Mapping[str, Kernel]] = MappingProxyType(
    {
        "ssd": {
            "mamba-ssm": Kernel(
                "mamba_ssm",
                "mamba_ssm.ops.triton.ssd_combined",
                "mamba_chunk_scan_combined",
                ("x", "dt", "A", "B", "C", "chunk_size", "D", "initial_states", "seq_idx", "return_final_states"),
                _mamba_ssd,
            ),
            "fla": Kernel(
                "fla",
                "fla.ops.simple_gla",
                "chunk_simple_gla",
                ("q", "k", "v", "g", "scale", "initial_state", "output_final_state"),
                _fla_ssd,
            ),
        },
        "selective_scan": {
            "mamba-ssm": Kernel(
                "mamba_ssm",
                "mamba_ssm.ops.selective_scan_interface",
                "selective_scan_fn",
                ("u", "delta", "A", "B", "C", "D", "delta_softplus", "return_last_state"),
                _mamba_scan,
            ),
        },
    }
)
"""Op -> library, best first -> its kernel."""


def _call(op: str, name: str, *args: Any, **options: Any) -> Any:
    function = lookup(op, name)
    assert not isinstance(function, str), f"{name} {function}"
    return function(*args, **options)


@torch.compiler.disable  # a compiler cannot see into these kernels: they run between its graphs
def ssd(
    name: str,
    x_BLHP: Tensor,
    dt_BLH: Tensor,
    A_H: Tensor,
    B_BLGN: Tensor,
    C_BLGN: Tensor,
    D_H: Tensor | None,
    h_init: Tensor | None,
    reset: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``ops.ssd`` by library ``name``, which has not refused it; y may be in half precision.

    fla reads B and C once for every head: G times H / G copies of them are made.
    """
    dtype = torch.promote_types(x_BLHP.dtype, torch.promote_types(B_BLGN.dtype, C_BLGN.dtype))
    x, B, C = x_BLHP.to(dtype), B_BLGN.to(dtype), C_BLGN.to(dtype)
    dt, A = dt_BLH.float(), A_H.float()
    D = None if D_H is None else D_H.float()
    h = None if h_init is None else h_init.float()
    if h is not None and reset is not None:
        h = h.masked_fill(reset[:, 0, None, None, None], 0)
    if name == "mamba-ssm":
        sequence = None
        if reset is not None:
            sequence = reset.cumsum(1, dtype=torch.int32)
            sequence = sequence - sequence[:, :1]  # the initial state belongs to sequence 0
        y, last = _call(
            "ssd",
            name,
            *(x, dt, A, B, C, MAMBA_CHUNK),
            D=D,
            initial_states=h,
            seq_idx=sequence,
            return_final_states=True,
        )
        return _first_derivatives(y, last)
    assert reset is None, f"{name} takes no resets"
    per_head = x.shape[2] // B.shape[2]
    y, last = _call(
        "ssd",
        name,
        q=C.repeat_interleave(per_head, 2),
        k=B.repeat_interleave(per_head, 2),
        v=(x * dt.unsqueeze(-1)).to(dtype),
        g=dt * A,
        scale=1.0,
        initial_state=None if h is None else h.mT.contiguous(),
        output_final_state=True,
    )
    y = y if D is None else torch.addcmul(y.float(), x.float(), D.unsqueeze(-1))
    return _first_derivatives(y, last.mT)


@torch.compiler.disable
def selective_scan(
    name: str,
    u_BLE: Tensor,
    dt_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor | None,
    softplus: bool,
) -> tuple[Tensor, Tensor]:
    """``ops.selective_scan`` from zero and without resets by library ``name``, in float32."""
    u, dt, B, C = (t.float().mT for t in (u_BLE, dt_BLE, B_BLN, C_BLN))
    A, D = A_EN.float(), None if D_E is None else D_E.float()
    length, d_state = u_BLE.shape[1], A.shape[1]
    reads = asks_gradients(u, dt, A, B, C, D)
    given = u, dt, A, B, C
    if reads:
        more = (0, d_state)
        still = F.pad(dt, more, value=NO_STEP if softplus else 0.0)
        each = torch.eye(d_state, dtype=C.dtype, device=C.device).expand(C.shape[0], -1, -1)
        given = F.pad(u, more), still, A, F.pad(B, more), torch.cat([C, each], 2)
    y, last = _call("selective_scan", name, *given, D=D, delta_softplus=softplus, return_last_state=True)
    last = y[..., length:] if reads else last
    return _first_derivatives(y[..., :length].mT, last.contiguous())


def _first_derivatives(y: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    return cast(tuple[Tensor, Tensor], _FirstDerivatives.apply(y, last))


class _FirstDerivatives(torch.autograd.Function):
    """Identity. The libraries' gradients are numbers to autograd: second derivatives would lack them unnoticed."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ARG004
        return y.view_as(y), last.view_as(last)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dlast: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride] # noqa: ARG004
        if torch.is_grad_enabled():
            raise RuntimeError("the scans of mamba-ssm and fla have first derivatives only: no create_graph=True")
        return dy, dlast
