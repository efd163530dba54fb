"""Do Triton's kernels give what PyTorch's operations give, values and gradients?

    python bench/gpu/check_kernels.py --device cuda --out check.json

Every case runs in float32 and bfloat16 with Triton, and in float64 with PyTorch's operations on the same, already
rounded, numbers. The error is the norm of the difference over the norm, for each output and each gradient. Exits with 1
when one exceeds 1e-4 in float32 or 1e-2 in bfloat16. On a CPU Triton's interpreter runs (slow; give --only).
Installed libraries (``ops.libraries``) are checked too, to 5e-2 in bfloat16; a record says ``not used`` and why if not.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


class Made(NamedTuple):
    """Inputs of a case, and its outputs from them."""

    inputs: list[Tensor]
    call: Callable[[list[Tensor]], list[Tensor]]


def attention(
    name: str,
    length: int,
    heads: int,
    d_key: int,
    d_value: int,
    *,
    n: int = 128,
    resets: bool = False,
    carried: int = 0,
) -> Callable[[torch.device], Made]:
    """``sparse_attention`` of one union of patterns; ``carried``: positions of an earlier call."""

    def make(device: torch.device) -> Made:
        from recollect.ops.hashing import draw_planes, sign_buckets
        from recollect.ops.patterns import KeySelection, Lsh, find, published_pattern, with_self
        from recollect.ops.sparse_attention import Buckets, sparse_attention

        patterns = with_self(published_pattern(name, n, max_length=length))
        total = carried + length
        inputs = [torch.randn(2, total, heads, d, device=device) for d in (d_key, d_key, d_value)]
        score = torch.randn(2, total, heads, device=device)
        lsh = find(patterns, Lsh)
        buckets = None
        if lsh:
            planes = draw_planes(d_key, heads, lsh.n_rounds, lsh.n_bits).to(device)
            buckets = Buckets(*(sign_buckets(x, planes) for x in inputs[:2]))
        reset = (torch.rand(2, total, device=device) < 3 / total) if resets else None

        def part(at: slice, given: list[Tensor], memory: Any) -> tuple[Tensor, Any]:
            return sparse_attention(
                *(x[:, at] for x in given),
                patterns,
                memory=memory,
                reset=None if reset is None else reset[:, at],
                score_BLH=score[:, at] if find(patterns, KeySelection) else None,
                buckets=None if buckets is None else Buckets(*(x[:, at] for x in buckets)),
            )

        def call(given: list[Tensor]) -> list[Tensor]:
            memory = None
            ys: list[Tensor] = []
            for at in (slice(0, carried), slice(carried, total)) if carried else (slice(0, total),):
                y, memory = part(at, given, memory)
                ys.append(y)
            return ys

        return Made(inputs, call)

    return make


def scanned(
    length: int, states: int, *, complex_: bool, constant: bool, resets: bool
) -> Callable[[torch.device], Made]:
    """``scan`` with an initial state; complex numbers are given as their real and imaginary parts."""

    def make(device: torch.device) -> Made:
        from recollect.ops.scan import scan

        tail = (2,) if complex_ else ()
        a_shape = (states, *tail) if constant else (2, length, states, *tail)
        a = torch.rand(a_shape, device=device) * (0.7 if complex_ else 1.0)
        b, h = torch.randn(2, length, states, *tail, device=device), torch.randn(2, states, *tail, device=device)
        reset = (torch.rand(2, length, device=device) < 3 / length) if resets else None

        def call(given: list[Tensor]) -> list[Tensor]:
            read = torch.view_as_complex if complex_ else (lambda x: x)
            write = torch.view_as_real if complex_ else (lambda x: x)
            states_, last = scan(*(read(x.float() if x.dtype == torch.bfloat16 else x) for x in given), reset=reset)
            return [write(states_), write(last)]

        return Made([a, b, h], call)

    return make


def per_channel(length: int, width: int, pairs: int, *, resets: bool) -> Callable[[torch.device], Made]:
    """``siso_ssm`` with an initial state; complex numbers are given as their real and imaginary parts."""

    def make(device: torch.device) -> Made:
        from recollect.ops.siso_ssm import siso_ssm

        angle = torch.randn(width, pairs, device=device)
        decay = torch.rand(width, pairs, device=device) * 0.29 + 0.7
        a = torch.view_as_real(torch.polar(decay, angle))
        shapes = [(width, pairs, 2), (width,), (2, width, pairs, 2)]
        inputs = [torch.randn(2, length, width, device=device), a, *(torch.randn(x, device=device) for x in shapes)]
        reset = (torch.rand(2, length, device=device) < 3 / length) if resets else None

        def call(given: list[Tensor]) -> list[Tensor]:
            u, *rest = given
            a, c, skip, h = (x.float() if x.dtype == torch.bfloat16 else x for x in rest)
            return list(siso_ssm(u, torch.view_as_complex(a), torch.view_as_complex(c), skip, h, reset=reset))

        return Made(inputs, call)

    return make


def convolved(length: int, width: int, taps: int, *, resets: bool) -> Callable[[torch.device], Made]:
    """``causal_conv`` with SiLU."""

    def make(device: torch.device) -> Made:
        from recollect.ops.conv import causal_conv

        shapes = [(2, length, width), (width, taps), (width,), (2, taps - 1, width)]
        inputs = [torch.randn(shape, device=device) for shape in shapes]
        reset = (torch.rand(2, length, device=device) < 3 / length) if resets else None

        def call(given: list[Tensor]) -> list[Tensor]:
            return list(causal_conv(*given, reset=reset, silu=True))

        return Made(inputs, call)

    return make


CASES: dict[str, Callable[[torch.device], Made]] = {
    **{f"attention {name}": attention(name, 2000, 4, 64, 64) for name in ("D", "SW", "SW+D", "A", "LSH", "KS", "HAX")},
    "attention HAX, resets": attention("HAX", 1999, 4, 64, 64, resets=True),
    "attention HAX, carried": attention("HAX", 1000, 4, 64, 64, carried=777, resets=True),
    "attention HAX, 16 keys": attention("HAX", 700, 3, 64, 64, n=16),
    "attention HAX, widths 33 and 20": attention("HAX", 600, 2, 33, 20),
    "attention HAX, width 128": attention("HAX", 1024, 2, 128, 128),
    "attention HAX, width 256": attention("HAX", 1024, 1, 256, 256),
    "attention KS, one row": attention("KS", 4096, 1, 64, 64),
    "scan, real": scanned(1000, 96, complex_=False, constant=False, resets=True),
    "scan, real and constant": scanned(1000, 96, complex_=False, constant=True, resets=False),
    "scan, complex": scanned(1000, 96, complex_=True, constant=False, resets=True),
    "scan, complex and constant": scanned(1000, 96, complex_=True, constant=True, resets=True),
    "one scan per channel": per_channel(1000, 96, 32, resets=True),
    "one scan per channel, 64 states, one span": per_channel(130, 750, 64, resets=False),
    "one scan per channel, 5 states": per_channel(1000, 33, 5, resets=False),
    "one scan per channel, 256 states": per_channel(300, 20, 256, resets=True),
    "convolution": convolved(1000, 200, 4, resets=True),
    "convolution, three taps": convolved(65, 33, 3, resets=False),
}


def dual(length: int, *, groups: int, resets: bool) -> Callable[[torch.device], Made]:
    """``ssd`` with an initial state: 4 heads of 64, 128 states."""

    def make(device: torch.device) -> Made:
        from recollect.ops.ssd import ssd

        shapes = [(2, length, 4, 64), (2, length, groups, 128), (2, length, groups, 128), (4,), (2, 4, 64, 128)]
        x, B, C, D, h = (torch.randn(shape, device=device) for shape in shapes)
        dt, A = torch.rand(2, length, 4, device=device) * 0.1, -16 * torch.rand(4, device=device)
        reset = (torch.rand(2, length, device=device) < 3 / length) if resets else None
        if reset is not None:
            reset[0, 0] = True

        def call(given: list[Tensor]) -> list[Tensor]:
            return list(ssd(*given[:-1], h_init=given[-1], reset=reset))

        return Made([x, dt, A, B, C, D, h], call)

    return make


def selective(length: int) -> Callable[[torch.device], Made]:
    """``selective_scan`` from zero: 96 channels, 16 states."""

    def make(device: torch.device) -> Made:
        from recollect.ops.selective_scan import selective_scan

        u, dt = (torch.randn(2, length, 96, device=device) for _ in range(2))
        B, C = (torch.randn(2, length, 16, device=device) for _ in range(2))
        inputs = [u, dt, -16 * torch.rand(96, 16, device=device), B, C, torch.randn(96, device=device)]
        return Made(inputs, lambda given: list(selective_scan(*given, softplus=True)))

    return make


LIBRARY_CASES: dict[str, tuple[str, str, Callable[[torch.device], Made]]] = {
    "mamba-ssm, ssd": ("ssd", "mamba-ssm", dual(1000, groups=1, resets=False)),
    "mamba-ssm, ssd, resets": ("ssd", "mamba-ssm", dual(1000, groups=2, resets=True)),
    "mamba-ssm, selective scan": ("selective_scan", "mamba-ssm", selective(1000)),
    "mamba-ssm, selective scan, long": ("selective_scan", "mamba-ssm", selective(2047)),
    "fla, ssd": ("ssd", "fla", dual(1000, groups=2, resets=False)),
}
"""Op and installed library; PyTorch's operations are the reference."""
LIBRARY_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""In half precision the libraries round what is read of states, too, and fla dt x."""


def outcome(made: Made, dtype: torch.dtype, weights: list[Tensor] | None) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs and gradients, in float64; ``weights``: of the outputs in the loss, ones that all runs share."""
    given = [x.detach().to(dtype).requires_grad_() for x in made.inputs]
    outputs = made.call(given)
    if weights is None:
        weights = [torch.ones_like(y) for y in outputs]
    loss = sum((y.double() * w).sum() for y, w in zip(outputs, weights, strict=True))
    assert isinstance(loss, Tensor)
    grads = torch.autograd.grad(loss, given, allow_unused=True)
    return [y.detach().double() for y in outputs], [
        torch.zeros_like(x, dtype=torch.float64) if g is None else g.double() for x, g in zip(given, grads, strict=True)
    ]


def check(make: Callable[[torch.device], Made], dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The largest error of the outputs and of the gradients, and which execution was compared."""
    from recollect.ops import dispatch

    torch.manual_seed(0)
    made = make(device)
    rounded = made._replace(inputs=[x.to(dtype).to(x.dtype) for x in made.inputs])
    before = dispatch.KERNELS
    try:
        dispatch.KERNELS = "torch"
        shapes, _ = outcome(rounded, torch.float64, None)
        torch.manual_seed(1)
        weights = [torch.randn_like(y) for y in shapes]
        wanted = outcome(rounded, torch.float64, weights)
        dispatch.KERNELS = "triton"
        found = outcome(rounded, dtype, weights)
    finally:
        dispatch.KERNELS = before
    errors = [
        max(float((x - y).norm() / y.norm().clamp(min=1e-12)) for x, y in zip(mine, theirs, strict=True))
        for mine, theirs in zip(found, wanted, strict=True)
    ]
    return {"outputs": errors[0], "gradients": errors[1]}


def check_library(
    op: str, name: str, make: Callable[[torch.device], Made], dtype: torch.dtype, device: torch.device
) -> dict[str, Any]:
    """``check`` of what an installed library does; ``not used`` says why there is nothing to check."""
    from common import only_library

    from recollect.ops import dispatch, libraries

    if missing := libraries.missing(op, name) if dispatch.on_gpu(device) else f"tensors on {device.type}":
        return {"not used": missing}
    with only_library(name) as chosen:
        found = check(make, dtype, device)
    return found if chosen[-1].path == name else {"not used": chosen[-1].why}


def main() -> int:
    """Check every case; prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--only", nargs="*", help="cases whose names contain one of these")
    parser.add_argument("--out", type=Path, default=Path("runs/bench/check-kernels.json"))
    options = parser.parse_args()
    if options.device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    from common import Cases

    from recollect.train.runtime import resolve_device

    device = resolve_device(options.device)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases = Cases(options.out, device, tolerances={str(k): v for k, v in TOLERANCES.items()})
    wrong: list[str] = []
    for name, make in CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for dtype, tolerance in TOLERANCES.items():
            case = f"{name}, {str(dtype).removeprefix('torch.')}"

            def measure(make: Any = make, dtype: torch.dtype = dtype) -> dict[str, Any]:
                try:
                    return check(make, dtype, device)
                except Exception as error:  # a kernel that does not compile is what this script is for
                    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}

            found = cases.add(case, measure)
            if "failed" in found or max(found["outputs"], found["gradients"]) > tolerance:
                wrong.append(case)
    for name, (op, library, make) in LIBRARY_CASES.items():
        if options.only and not any(part in name for part in options.only):
            continue
        for dtype, tolerance in LIBRARY_TOLERANCES.items():
            case = f"{name}, {str(dtype).removeprefix('torch.')}"

            def compare(op: str = op, library: str = library, make: Any = make, dtype: Any = dtype) -> dict[str, Any]:
                try:
                    return check_library(op, library, make, dtype, device)
                except Exception as error:
                    return {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}

            found = cases.add(case, compare)
            if "failed" in found or max(found.get("outputs", 0), found.get("gradients", 0)) > tolerance:
                wrong.append(case)
    if wrong:
        print(f"differ from PyTorch's operations: {'; '.join(wrong)}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
