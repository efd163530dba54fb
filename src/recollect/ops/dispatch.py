"""The one place that picks between executions of an op, and can say why."""

from __future__ import annotations

import importlib
import os
from functools import cache, reduce
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from recollect.ops.patterns import Pattern, key_budget
from recollect.ops.streaming_attention import streams

DENSE_SOURCES = 256
"""Below this many sources one L x S product beats the bookkeeping of tiles on a CPU (``recollect bench attention``)."""

KERNEL_WIDTH = 256
"""The widest head that a tile of the Triton kernels of sparse attention holds in a multiprocessor's shared memory."""


class Choice(NamedTuple):
    """An execution and the reason it was picked."""

    path: str
    why: str


KERNELS = os.environ.get("RECOLLECT_KERNELS", "auto")
"""``auto`` uses compiled kernels where they can run: numba on a CPU, Triton on a GPU. ``torch`` uses PyTorch's own
operations everywhere. ``triton`` takes Triton for tensors on a CPU too, where its interpreter runs (slow: for tests).
"""


def explain_kernels(*tensors: Tensor, between_graphs: bool = False) -> Choice:
    """Whether ops on these tensors run as numba kernels, as Triton kernels or as PyTorch's operations, and why.

    ``between_graphs``: asked for something that ``torch.compile`` leaves out of its graphs.
    """
    if KERNELS == "torch":
        return Choice("torch", "RECOLLECT_KERNELS=torch")
    if torch.compiler.is_compiling() and not between_graphs:
        return Choice("torch", "torch.compile traces PyTorch's operations and cannot see into kernels")
    for tensor in tensors:
        if tensor.device.type == "cuda" or KERNELS == "triton":
            return explain_triton(*tensors)
        if tensor.device.type != "cpu":
            return Choice("torch", f"tensors on {tensor.device.type}: kernels are for a CPU (numba) or a GPU (Triton)")
        if tensor.dtype not in (torch.float32, torch.float64):
            return Choice("torch", f"{tensor.dtype}: numba kernels take float32 and float64")
    if missing := _is_missing("numba"):
        return Choice("torch", missing)
    return Choice("numba", "a compiled sequential kernel moves the least memory on a CPU")


def explain_triton(*tensors: Tensor) -> Choice:
    """The same where Triton's kernels are wanted."""
    for tensor in tensors:
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return Choice("torch", f"{tensor.dtype}: Triton kernels take float32, bfloat16 and float16")
        if tensor.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return Choice("torch", f"tensors on {tensor.device.type}: Triton needs a GPU, or TRITON_INTERPRET=1")
    # Its newer releases warn until this, their default, is said.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if missing := _is_missing("triton"):
        return Choice("torch", missing)
    return Choice("triton", "one kernel reads every tensor once on a GPU")


def kernels(name: str, *tensors: Tensor) -> ModuleType | None:
    """The numba kernels ``ops/kernels/<name>.py`` if ``explain_kernels`` picks them, else None. All ``tensors`` are
    the floating-point tensors that a kernel would be given.
    """
    if explain_kernels(*tensors).path != "numba":
        return None
    return importlib.import_module(f"recollect.ops.kernels.{name}")


def kernels_in_float32(name: str, *tensors: Tensor, bits: int) -> tuple[ModuleType, list[Tensor]] | None:
    """``kernels`` for floating-point tensors of any dtypes, and these as the kernels take them: half precision widened
    to float32, as a CPU has little arithmetic for it. Where no gradient is asked, bfloat16 among the first ``bits``
    tensors stays: the kernels read it as it lies.
    """
    if any(tensor.device.type != "cpu" for tensor in tensors) or KERNELS == "triton":
        return None
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
    module = kernels(name, torch.empty(0, dtype=dtype))
    if module is None:
        return None
    stays = 0 if asks_gradients(*tensors) or dtype != torch.float32 else bits
    kept = [tensor if tensor.dtype is torch.bfloat16 else tensor.to(dtype) for tensor in tensors[:stays]]
    return module, [*kept, *(tensor.to(dtype) for tensor in tensors[stays:])]


def gpu_kernels(name: str, *tensors: Tensor) -> ModuleType | None:
    """The Triton kernels ``ops/gpu/<name>.py`` if ``explain_kernels`` picks them, else None."""
    if explain_kernels(*tensors).path != "triton":
        return None
    return importlib.import_module(f"recollect.ops.gpu.{name}")


@cache
def _is_missing(package: str) -> str:
    try:
        importlib.import_module(package)
    except ImportError as error:
        return f"{package} cannot be imported: {error}"
    return ""


LIBRARIES = ("mamba-ssm", "fla")
"""Which packages ``ops.libraries`` may use on a GPU where they are installed, best first."""


class Asked(NamedTuple):
    """A call of ``ops.ssd`` or ``ops.selective_scan``: where, on what, and what of it not every library can do.

    ``dtype`` is that of x, B and C together; a selective scan has one head of ``width`` channels.
    """

    device: torch.device
    dtype: torch.dtype
    batch: int
    length: int
    heads: int
    width: int
    d_state: int
    groups: int = 1
    reset: bool = False
    h_init: bool = False
    gradients: bool = False


def asks_gradients(*tensors: Tensor | None) -> bool:
    """Whether a call on these tensors may be differentiated."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def on_gpu(device: torch.device) -> bool:
    """Where the libraries' kernels run."""
    return device.type == "cuda"


def explain_library(op: str, asked: Asked) -> Choice:
    """Which installed library carries out a call of ``ops.ssd`` or ``ops.selective_scan``, or why none (``torch``).

    ``op`` is the function's name. Compiled graphs are broken around a library's kernels.
    """
    if KERNELS == "torch":
        return Choice("torch", "RECOLLECT_KERNELS=torch")
    if not on_gpu(asked.device):
        return Choice("torch", f"tensors on {asked.device.type}: libraries are used on a GPU")
    from recollect.ops import libraries  # it needs torch's compiler, which is slow to import

    reasons: list[str] = []
    for name in LIBRARIES:
        if name in libraries.KERNELS[op]:
            reason = libraries.refusal(op, name, asked)
            if not reason:
                return Choice(name, "installed, and its kernels do all that is asked")
            reasons.append(f"{name}: {reason}")
    return Choice("torch", "; ".join(reasons))


def explain_sparse_attention(
    length: int,
    n_memory: int,
    patterns: tuple[Pattern, ...],
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    fresh: bool = False,
    width: int = 0,
) -> Choice:
    """Which execution ``ops.sparse_attention`` takes for ``length`` queries after ``n_memory`` memory slots.

    ``dtype`` is the one it computes in; ``fresh`` means that neither a memory nor resets were given; ``width`` is the
    wider of a head's key and value.
    """
    budget = key_budget(patterns)
    sources = length + n_memory
    if budget is None:
        if fresh and length > 1:
            return Choice("sdpa", "full attention of one segment: PyTorch's own")
        if length == 1 or sources <= DENSE_SOURCES:
            return Choice("dense", f"full attention over {sources} sources: one masked product is fastest")
        return Choice("tiled", "full attention in blocks of queries, recomputed in backward")
    if length == 1:
        return Choice("decode", f"one query: at most {budget} slots are read, whatever came before")
    like = torch.empty(0, device=device, dtype=dtype)
    # On a GPU the passes run between compiled graphs: what follows from the data stays out of them anyway.
    compiled = explain_kernels(like, between_graphs=like.is_cuda)
    if compiled.path == "numba" and streams(patterns):
        return Choice("streaming", f"{budget} keys per query, gathered in a loop over time: {compiled.why}")
    if sources <= DENSE_SOURCES:
        return Choice("dense", f"{sources} sources, at most {DENSE_SOURCES}: one masked product is fastest")
    why = compiled.why
    if compiled.path == "triton":
        if width > KERNEL_WIDTH:
            why = f"heads of {width}: the kernels' tiles hold at most {KERNEL_WIDTH}"
        elif torch.are_deterministic_algorithms_enabled():
            why = "deterministic algorithms are asked for, and a kernel adds gradients of keys in any order"
        else:
            return Choice("triton", f"{sources} sources, {budget} keys per query, gathered into tiles: {why}")
    return Choice("tiled", f"{sources} sources, {budget} keys per query: tiles of matrix products; {why}")


def explain_causal_attention(
    length: int, n_memory: int, window: int | None, resets: bool, position_term: bool
) -> Choice:
    """Which execution ``ops.causal_attention`` takes for ``length`` queries after ``n_memory`` remembered keys."""
    if position_term:
        return Choice("blocks", "PyTorch's attention has no position term")
    if length == 1 and n_memory:
        return Choice("query", "one query: PyTorch's attention with its row of a mask")
    if resets or n_memory:
        return Choice("blocks", "resets or remembered keys: each query has its own first key")
    if window is not None and window < length:
        return Choice("blocks", f"a window of {window} over {length} positions: blocks of queries, linear in length")
    return Choice("sdpa", "every query sees all before it: PyTorch's causal attention")


def causal_attention_block(device: torch.device, reach: int) -> int:
    """Queries in a block where each sees ``reach`` keys: few waste little and stay in a CPU's cache; elsewhere the
    number of kernels counts.
    """
    if device.type != "cpu":
        return 512
    return 64 if reach > 32 else 32
