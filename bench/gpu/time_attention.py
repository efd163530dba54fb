"""Sparse attention against full attention on a GPU: forward, backward, one more token, and the peak of memory.

    python bench/gpu/time_attention.py OUT.json [--device cuda] [--lengths 1024 ... 262144] [--keys 128]

Eight heads of width 64 in bfloat16, one sequence. Rows: ``hax`` (half hashed, half selected) and ``window``, by the
execution that ``ops.dispatch`` picks and, named ``torch``, by PyTorch's operations; ``flash`` is PyTorch's causal
attention, ``flex`` FlexAttention under the mask of the same key sets (its mask is made outside of the clock; up to
32,768 tokens). Hashing and sorting are part of ``hax``, projections of no row. Of each: milliseconds and peak bytes of
the forward alone and of forward and backward, and the same as one CUDA graph, without the host's share. ``step``: one
more token after the length.

``floor`` is what the bytes need at the copy rate measured on the spot: q, k, v read and y written once in the forward;
in the backward those, dy, and dq, dk, dv written; with the products at the measured rate of bfloat16 products, each
query meeting its budget of keys rounded up to tiles.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Cases, copy_rate, figures, product_rate
from torch import Tensor
from torch.nn import functional as F

from recollect.ops import dispatch
from recollect.ops.hashing import draw_planes, sign_buckets
from recollect.ops.patterns import KeySelection, Lsh, Pattern, Window
from recollect.ops.sparse_attention import Buckets, sparse_attention
from recollect.train.runtime import resolve_device

HEADS, WIDTH = 8, 64
FLEX_UP_TO = 32_768
FLASH_UP_TO = 262_144
TORCH_UP_TO = 65_536


class Inputs:
    """One sequence's queries, keys, values, scores and hash planes."""

    def __init__(self, length: int, device: torch.device) -> None:
        torch.manual_seed(0)
        kind = {"device": device, "dtype": torch.bfloat16}
        self.q, self.k, self.v, self.dy = (torch.randn(1, length, HEADS, WIDTH, **kind) for _ in range(4))
        self.score = torch.randn(1, length, HEADS, device=device)
        self.planes = draw_planes(WIDTH, HEADS, 1, 8).to(device)
        for x in (self.q, self.k, self.v):
            x.requires_grad_()

    def buckets(self) -> Buckets:
        """Hashed anew, as a layer does."""
        return Buckets(sign_buckets(self.q, self.planes), sign_buckets(self.k, self.planes))

    def sparse(self, patterns: tuple[Pattern, ...]) -> Tensor:
        """Our attention."""
        hashed = self.buckets() if any(isinstance(p, Lsh) for p in patterns) else None
        return sparse_attention(self.q, self.k, self.v, patterns, score_BLH=self.score, buckets=hashed)[0]

    def flash(self) -> Tensor:
        """PyTorch's causal attention."""
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def flex(self, patterns: tuple[Pattern, ...]) -> Callable[[], Tensor]:
        """FlexAttention under the mask of the same sets."""
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        from recollect.ops.key_sets import key_sets
        from recollect.ops.lifetimes import timeline

        length = self.q.shape[1]
        time = timeline(length, 0, torch.zeros(1, dtype=torch.int64, device=self.q.device), None)
        q, k, v = (x.transpose(1, 2) for x in (self.q, self.k, self.v))
        hashed = self.buckets() if any(isinstance(p, Lsh) for p in patterns) else None
        sets = key_sets(patterns, time, None, q, self.score.transpose(1, 2), hashed)
        death, rounds = sets.death_RS, sets.rounds

        def admits(_: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
            mask = i < death[h, j]
            for each in rounds:
                mask = mask | ((each.q_code_RL[h, i] == each.code_RS[h, j]) & (i < each.death_RS[h, j]))
            return mask & (j <= i)

        mask = create_block_mask(admits, 1, HEADS, length, length, device=str(self.q.device), _compile=True)
        compiled = torch.compile(flex_attention)
        return lambda: compiled(q, k, v, block_mask=mask).transpose(1, 2)


def both(inputs: Inputs, attend: Callable[[], Tensor]) -> Callable[[], object]:
    """Forward and backward."""
    given = (inputs.q, inputs.k, inputs.v)
    return lambda: torch.autograd.grad(attend(), given, inputs.dy)


def row(inputs: Inputs, attend: Callable[[], Tensor], device: torch.device, *, backward: bool = True) -> dict[str, Any]:
    """Figures of the forward alone, and of forward and backward."""

    def forward() -> object:
        with torch.no_grad():
            return attend()

    found = {"forward": figures(forward, device)}
    return {**found, "both": figures(both(inputs, attend), device)} if backward else found


def step(patterns: tuple[Pattern, ...], length: int, device: torch.device) -> dict[str, Any]:
    """One more token, after a memory that ``length`` tokens left."""
    inputs = Inputs(length, device)
    with torch.no_grad():
        hashed = inputs.buckets() if any(isinstance(p, Lsh) for p in patterns) else None
        _, memory = sparse_attention(inputs.q, inputs.k, inputs.v, patterns, score_BLH=inputs.score, buckets=hashed)
        one = Inputs(1, device)
        buckets = one.buckets() if hashed else None
        return figures(
            lambda: sparse_attention(
                one.q, one.k, one.v, patterns, memory=memory, score_BLH=one.score, buckets=buckets
            ),
            device,
        )


def flash_step(length: int, device: torch.device) -> dict[str, Any]:
    """One query against all ``length`` keys."""
    inputs = Inputs(length, device)
    q = inputs.q[:, -1:].transpose(1, 2).detach()
    k, v = (x.detach().transpose(1, 2).contiguous() for x in (inputs.k, inputs.v))
    return figures(lambda: F.scaled_dot_product_attention(q, k, v), device)


def floor(length: int, keys: int, bytes_s: float, products_s: float) -> dict[str, float]:
    """Milliseconds that bytes and products need, forward alone and with the backward."""
    tensor = length * HEADS * WIDTH * 2
    met = keys + 64  # a tile of 64 queries meets the union of their keys and its own
    product = 2 * length * HEADS * WIDTH * met
    return {
        "forward_bytes_ms": 1000 * 4 * tensor / bytes_s,
        "both_bytes_ms": 1000 * (4 + 5 + 3) * tensor / bytes_s,
        "forward_products_ms": 1000 * 2 * product / products_s,
        "both_products_ms": 1000 * 7 * product / products_s,
    }


def main() -> None:
    """Measure every row at every length, shortest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1 << i for i in range(10, 19)])
    parser.add_argument("--keys", type=int, default=128)
    parser.add_argument("--kernels", default="auto", help="auto, or triton for the interpreter on a CPU")
    options = parser.parse_args()
    if options.kernels == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    device = resolve_device(options.device)
    half = options.keys // 2
    kinds: dict[str, tuple[Pattern, ...]] = {
        "hax": (Lsh(half, n_bits=8), KeySelection(half)),
        "window": (Window(options.keys),),
    }
    cases = Cases(options.out, device, keys=options.keys, heads=HEADS, width=WIDTH, dtype="bfloat16")
    rates = cases.add(
        "ceilings",
        lambda: {"bytes_s": copy_rate(device), "products_s": product_rate(device, torch.bfloat16)},
    )
    for length in options.lengths:
        cases.add(f"floor {length}", lambda n=length: floor(n, options.keys, rates["bytes_s"], rates["products_s"]))
        made = Inputs(length, device)
        for name, patterns in kinds.items():
            dispatch.KERNELS = options.kernels
            cases.add(f"{name} {length}", lambda p=patterns, x=made: row(x, lambda: x.sparse(p), device))
            cases.add(f"{name}, step {length}", lambda p=patterns, n=length: step(p, n, device))
            if length <= TORCH_UP_TO:
                dispatch.KERNELS = "torch"
                cases.add(f"{name}, torch {length}", lambda p=patterns, x=made: row(x, lambda: x.sparse(p), device))
            if length <= FLEX_UP_TO and device.type == "cuda":
                cases.add(f"{name}, flex {length}", lambda p=patterns, x=made: flexed(x, p, device))
        if length <= FLASH_UP_TO:
            cases.add(f"flash {length}", lambda x=made: row(x, x.flash, device))
            cases.add(f"flash, step {length}", lambda n=length: flash_step(n, device))


def flexed(inputs: Inputs, patterns: tuple[Pattern, ...], device: torch.device) -> dict[str, Any]:
    """FlexAttention's row; its mask may not fit."""
    try:
        attend = inputs.flex(patterns)
    except Exception as error:
        return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return row(inputs, attend, device)


if __name__ == "__main__":
    main()
