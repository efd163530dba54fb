"""Scans and convolutions on a GPU: how close to the time that their bytes need?

    python bench/gpu/time_scans.py OUT.json [--device cuda] [--lengths 1024 8192 65536]

``scan``: the diagonal recurrence of S5, complex, 256 states, batch 8; ``selective`` and ``ssd``: the scans of Mamba and
Mamba-2 at the shape of their 130m models; ``conv``: the short convolution. Each by the execution that ``ops.dispatch``
picks and by PyTorch's operations, beside mamba-ssm's kernels where they are installed. ``bytes_ms`` is the time that
reading every input and writing every output once needs at the copy rate measured on the spot; ``fraction`` is that over
what was measured (as a graph, where one could be made).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Cases, copy_rate, figures
from torch import Tensor

from recollect.ops import dispatch
from recollect.ops.conv import causal_conv
from recollect.ops.scan import scan
from recollect.ops.selective_scan import selective_scan
from recollect.ops.ssd import ssd
from recollect.train.runtime import resolve_device

BATCH, WIDTH, STATES = 8, 768, 256


class Task(NamedTuple):
    """A call on inputs that are there, and the bytes that its forward and backward must move."""

    inputs: list[Tensor]
    call: Callable[[list[Tensor]], Tensor]
    forward_bytes: int
    both_bytes: int


def _task(inputs: list[Tensor], call: Callable[[list[Tensor]], Tensor]) -> Task:
    with torch.no_grad():
        y = call(inputs)
    read, written = sum(x.numel() * x.element_size() for x in inputs), y.numel() * y.element_size()
    for x in inputs:
        x.requires_grad_()
    # Backward reads the inputs and the output's gradient and writes the inputs' gradients.
    return Task(inputs, call, read + written, (read + written) + (read + written + read))


def tasks(length: int, device: torch.device) -> dict[str, Callable[[], Task]]:
    """The operations by name."""

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    def diagonal() -> Task:
        a = 0.99 * torch.exp(1j * torch.rand(STATES, device=device))
        b = torch.complex(randn(BATCH, length, STATES), randn(BATCH, length, STATES))
        return _task([a, b], lambda given: torch.view_as_real(scan(*given)[0]))

    def convolution() -> Task:
        x = randn(BATCH, length, 2 * WIDTH, dtype=torch.bfloat16)
        rest = [randn(2 * WIDTH, 4, dtype=torch.bfloat16), randn(2 * WIDTH, dtype=torch.bfloat16)]
        window = torch.zeros(BATCH, 3, 2 * WIDTH, device=device, dtype=torch.bfloat16)
        return _task([x, *rest], lambda given: causal_conv(*given, window, silu=True)[0])

    def mamba() -> Task:
        u, dt = randn(BATCH, length, 2 * WIDTH), torch.rand(BATCH, length, 2 * WIDTH, device=device)
        A = -torch.rand(2 * WIDTH, 16, device=device)
        B, C = randn(BATCH, length, 16), randn(BATCH, length, 16)
        return _task([u, dt, A, B, C], lambda given: selective_scan(*given)[0])

    def mamba2() -> Task:
        heads = 2 * WIDTH // 64
        x, dt = randn(BATCH, length, heads, 64), torch.rand(BATCH, length, heads, device=device)
        A = -torch.rand(heads, device=device)
        B, C = randn(BATCH, length, 1, 128), randn(BATCH, length, 1, 128)
        return _task([x, dt, A, B, C], lambda given: ssd(*given)[0])

    return {"scan": diagonal, "conv": convolution, "selective": mamba, "ssd": mamba2}


def installed(length: int, device: torch.device) -> dict[str, Callable[[], Task]]:
    """The kernels of mamba-ssm on the same shapes, where they can be imported."""
    if device.type != "cuda" or find_spec("mamba_ssm") is None:
        return {}
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore

    def mamba2() -> Task:
        heads = 2 * WIDTH // 64
        x = torch.randn(BATCH, length, heads, 64, device=device, dtype=torch.bfloat16)
        dt, A = torch.rand(BATCH, length, heads, device=device), -torch.rand(heads, device=device)
        B, C = (torch.randn(BATCH, length, 1, 128, device=device, dtype=torch.bfloat16) for _ in range(2))
        return _task([x, dt, A, B, C], lambda given: mamba_chunk_scan_combined(*given, chunk_size=256))

    return {"ssd, mamba-ssm": mamba2}


def timed(make: Callable[[], Task], bytes_s: float, device: torch.device) -> dict[str, Any]:
    """Figures of one task, forward alone and with its backward."""
    try:
        task = make()
    except RuntimeError as error:
        return {"failed": " ".join(str(error).split())[:300]}
    ones = torch.ones_like(task.call(task.inputs))

    def forward() -> object:
        with torch.no_grad():
            return task.call(task.inputs)

    found: dict[str, Any] = {}
    runs: dict[str, tuple[Callable[[], object], int]] = {
        "forward": (forward, task.forward_bytes),
        "both": (lambda: torch.autograd.grad(task.call(task.inputs), task.inputs, ones), task.both_bytes),
    }
    for name, (run, n_bytes) in runs.items():
        one = figures(run, device)
        one["bytes_ms"] = 1000 * n_bytes / bytes_s
        if "ms" in one:
            one["fraction"] = one["bytes_ms"] / one.get("graph_ms", one["ms"])
        found[name] = one
    return found


def main() -> None:
    """Measure every operation at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65_536])
    options = parser.parse_args()
    device = resolve_device(options.device)
    cases = Cases(options.out, device, batch=BATCH, width=WIDTH, states=STATES)
    rate = cases.add("ceilings", lambda: {"bytes_s": copy_rate(device)})["bytes_s"]
    for length in options.lengths:
        for kernels in ("auto", "torch"):
            dispatch.KERNELS = kernels
            suffix = ", torch" if kernels == "torch" else ""
            for name, make in tasks(length, device).items():
                cases.add(f"{name}{suffix} {length}", lambda m=make: timed(m, rate, device))
        for name, make in installed(length, device).items():
            cases.add(f"{name} {length}", lambda m=make: timed(m, rate, device))


if __name__ == "__main__":
    main()
