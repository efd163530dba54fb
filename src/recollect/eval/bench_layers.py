"""Speed, memory and state of every layer on this machine.

Speed is the median over repetitions after one warm-up, in tokens per second: batch x length / seconds. Memory is the
growth of the process's peak while one forward and backward runs, in a process of its own per measurement on a CPU
(peaks never go down within one); on a GPU it is the allocator's peak.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.table import Table

from recollect.core.errors import ConfigError, nearest
from recollect.core.layer import SequenceLayer
from recollect.core.state import nbytes
from recollect.layers import LAYERS
from recollect.train.runtime import environment, resolve_device


@dataclass(frozen=True)
class BenchRow:
    """One layer at one length."""

    layer: str
    length: int
    batch: int
    d_model: int
    threads: int
    params: int
    state_bytes: int
    """Of one sequence, after ``length`` positions."""
    forward_tokens_per_s: float
    both_tokens_per_s: float
    """Forward and backward."""
    step_tokens_per_s: float
    """One position at a time, from the state after ``length`` positions."""
    peak_bytes: int
    """Memory that forward and backward needed on top of what was there."""


def bench_layers(
    names: Sequence[str] = (),
    *,
    lengths: Sequence[int] = (256, 1024),
    d_model: int = 64,
    batch: int = 4,
    seconds: float = 1.0,
    threads: int = 1,
    device: str = "cpu",
) -> list[BenchRow]:
    """Measure each named layer (default: all) with its default config at each length.

    Raises ConfigError for an unknown name or an impossible size, RecollectError for a device that is not there.
    """
    for name in names:
        if name not in LAYERS:
            raise ConfigError(f"unknown layer '{name}'{nearest(name, LAYERS)}")
    if min((*lengths, d_model, batch, threads)) < 1 or not lengths:
        raise ConfigError("bench: lengths, d_model, batch and threads must be at least 1")
    on = resolve_device(device)
    jobs = [(name, length, d_model, batch, seconds, threads, str(on)) for name in names or LAYERS for length in lengths]
    if on.type == "cuda":
        return [_measure(*job) for job in jobs]
    # A fresh process per measurement: the peak of this one would only ever show the largest so far.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        return pool.starmap(_measure, jobs, chunksize=1)


def table(rows: Sequence[BenchRow]) -> Table:
    """The rows for a terminal."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer")
    for column in ("length", "params", "state B", "forward tok/s", "fwd+bwd tok/s", "step tok/s", "peak MiB"):
        grid.add_column(column, justify="right")
    for row in rows:
        speeds = (row.forward_tokens_per_s, row.both_tokens_per_s, row.step_tokens_per_s)
        grid.add_row(
            row.layer,
            str(row.length),
            f"{row.params:,}",
            f"{row.state_bytes:,}",
            *(f"{speed:,.0f}" for speed in speeds),
            f"{row.peak_bytes / 2**20:.1f}",
        )
    return grid


def to_json(rows: Sequence[BenchRow], device: str) -> str:
    """The rows with the commit, versions and device they were measured on."""
    facts = environment(resolve_device(device))
    return json.dumps({"environment": facts, "rows": [asdict(row) for row in rows]}, indent=2)


def _measure(name: str, length: int, d_model: int, batch: int, seconds: float, threads: int, device: str) -> BenchRow:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on = torch.device(device)
    layer: SequenceLayer = LAYERS[name].Config(d_model).build().to(on)
    x = torch.randn(batch, length, d_model, device=on)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    def both() -> None:
        layer.zero_grad(set_to_none=True)
        layer(x).y.square().mean().backward()

    with torch.no_grad():
        state, token = layer(x[:1]).state, x[:1, 0]

    def step() -> None:
        with torch.no_grad():
            layer.step(token, state)

    before = _peak(on)
    both()
    peak = _peak(on) - before
    return BenchRow(
        layer=name,
        length=length,
        batch=batch,
        d_model=d_model,
        threads=threads,
        params=sum(p.numel() for p in layer.parameters()),
        state_bytes=nbytes(state),
        forward_tokens_per_s=batch * length / _median_s(forward, seconds, on),
        both_tokens_per_s=batch * length / _median_s(both, seconds, on),
        step_tokens_per_s=1 / _median_s(step, seconds, on),
        peak_bytes=max(0, peak),
    )


def _median_s(run: Callable[[], None], seconds: float, device: torch.device) -> float:
    run()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or (time.perf_counter() < deadline and len(times) < 1000):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
