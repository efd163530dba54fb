"""Scans and convolutions on a GPU: how close to the time that their bytes need?

    python bench/gpu/time_scans.py OUT.json [--device cuda] [--lengths 1024 8192 65536]

``scan``: the diagonal recurrence of S5, complex, 256 states, batch 8; ``siso``: S4D's scan, 32 complex states for
each of 512 channels, bound by operations: ``operations_ms`` is what those need at the rate of a float32 product,
``of_operations`` their share of what was measured; ``selective`` and ``ssd``: the scans of Mamba and Mamba-2 at the
shape of their 130m models; ``conv``: the short convolution. Each by the execution that ``ops.dispatch``
picks without libraries and by PyTorch's operations, and by mamba-ssm and fla where they are installed; where not, a
record says ``not used`` and why. ``bytes_ms`` is the time that reading every input and writing every output once needs
at the copy rate measured on the spot; ``fraction`` is that over what was measured (as a graph, where one can be made).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import Cases, copy_rate, figures, only_library, product_rate
from torch import Tensor

from recollect.ops import dispatch, libraries
from recollect.ops.conv import causal_conv
from recollect.ops.scan import scan
from recollect.ops.selective_scan import selective_scan
from recollect.ops.siso_ssm import siso_ssm
from recollect.ops.ssd import ssd
from recollect.train.runtime import resolve_device

BATCH, WIDTH, STATES = 8, 768, 256


class Task(NamedTuple):
    """A call on inputs that are there, and the bytes that its forward and backward must move."""

    inputs: list[Tensor]
    call: Callable[[list[Tensor]], Tensor]
    forward_bytes: int
    both_bytes: int
    multiply_adds: tuple[int, int] | None = None
    """Of forward and both, where they need longer than the bytes."""


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

    def per_channel() -> Task:
        width, pairs = 512, 32
        a = 0.99 * torch.exp(1j * torch.rand(width, pairs, device=device))
        c = torch.complex(randn(width, pairs), randn(width, pairs))
        start = torch.zeros(BATCH, width, pairs, 2, device=device)
        given = [randn(BATCH, length, width), a, c, randn(width)]
        n = BATCH * length * width * pairs
        task = _task(given, lambda given: siso_ssm(given[0], given[1], given[2], given[3], start)[0])
        return task._replace(multiply_adds=(6 * n, 20 * n))

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

    def mamba2(dtype: torch.dtype = torch.float32) -> Task:
        heads = 2 * WIDTH // 64
        x, dt = randn(BATCH, length, heads, 64, dtype=dtype), torch.rand(BATCH, length, heads, device=device)
        A = -torch.rand(heads, device=device)
        B, C = (randn(BATCH, length, 1, 128, dtype=dtype) for _ in range(2))
        return _task([x, dt, A, B, C], lambda given: ssd(*given)[0])

    half = {"ssd, bfloat16": lambda: mamba2(torch.bfloat16)}
    return {"scan": diagonal, "siso": per_channel, "conv": convolution, "selective": mamba, "ssd": mamba2, **half}


LIBRARY_TASKS = (
    ("ssd, bfloat16", "ssd", "mamba-ssm"),
    ("ssd, bfloat16", "ssd", "fla"),
    ("selective", "selective_scan", "mamba-ssm"),
)
"""Task, op, library."""


def timed(
    make: Callable[[], Task], bytes_s: float, device: torch.device, operations_s: float | None = None
) -> dict[str, Any]:
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
    for nth, (name, (run, n_bytes)) in enumerate(runs.items()):
        one = figures(run, device)
        one["bytes_ms"] = 1000 * n_bytes / bytes_s
        if "ms" in one:
            one["fraction"] = one["bytes_ms"] / one.get("graph_ms", one["ms"])
        if task.multiply_adds is not None and operations_s is not None:
            one["operations_ms"] = 1000 * 2 * task.multiply_adds[nth] / operations_s
            if "ms" in one:
                one["of_operations"] = one["operations_ms"] / one.get("graph_ms", one["ms"])
        found[name] = one
    return found


def timed_library(op: str, name: str, make: Callable[[], Task], bytes_s: float, device: torch.device) -> dict[str, Any]:
    """``timed`` by an installed library; ``not used`` says why not."""
    if missing := libraries.missing(op, name) if dispatch.on_gpu(device) else f"tensors on {device.type}":
        return {"not used": missing}
    with only_library(name) as chosen:
        found = timed(make, bytes_s, device)
    return found if chosen[-1].path == name else {"not used": chosen[-1].why}


def main() -> None:
    """Measure every operation at every length."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192, 65_536])
    options = parser.parse_args()
    device = resolve_device(options.device)
    cases = Cases(options.out, device, batch=BATCH, width=WIDTH, states=STATES)
    torch.backends.cuda.matmul.allow_tf32 = False
    ceilings = {"bytes_s": lambda: copy_rate(device), "operations_s": lambda: product_rate(device, torch.float32)}
    found = cases.add("ceilings", lambda: {name: measure() for name, measure in ceilings.items()})
    rate, operations = found["bytes_s"], found["operations_s"]
    dispatch.LIBRARIES = ()
    for length in options.lengths:
        for kernels in ("auto", "torch"):
            dispatch.KERNELS = kernels
            suffix = ", torch" if kernels == "torch" else ""
            for name, make in tasks(length, device).items():
                cases.add(f"{name}{suffix} {length}", lambda m=make: timed(m, rate, device, operations))
        dispatch.KERNELS = "auto"
        for name, op, library in LIBRARY_TASKS:
            make = tasks(length, device)[name]
            measure = partial(timed_library, op, library, make, rate, device)
            cases.add(f"{name}, {library} {length}", measure)


if __name__ == "__main__":
    main()
