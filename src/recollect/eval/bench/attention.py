"""Sparse attention beside full attention by length: the operation alone, forward and backward.

Queries, keys, values and key scores are given; hashing is part of what is timed, projections are not. ``auto`` is the
execution that the library picks by itself; ``tiled`` and ``dense`` are forced, plain PyTorch. Full attention is
PyTorch's own, causal, on the same heads. Nothing in the record is extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from recollect.core.errors import ConfigError
from recollect.eval.bench.cases import Case, Record, Row, note, run_cases
from recollect.eval.bench.measure import median_time, peak_of
from recollect.eval.bench.rows import sizes
from recollect.ops.hashing import draw_planes, sign_buckets
from recollect.ops.patterns import KeySelection, Lsh, Pattern, Window, find
from recollect.ops.sparse_attention import Buckets, sparse_attention
from recollect.train.runtime import resolve_device

FULL = "sdpa"
"""The row of PyTorch's ``scaled_dot_product_attention``."""

AT, FROM, TO = 16_384, 16_384, 131_072
"""Where the speed ratio is read, and the lengths between which growth is."""

WARM_LENGTH = 512


class Kind(NamedTuple):
    """A union of patterns and the execution to take."""

    patterns: tuple[Pattern, ...]
    path: str = "auto"


_LSH, _SELECTION = Lsh(32, n_bits=8), KeySelection(32)

KINDS: dict[str, Kind] = {
    "hax": Kind((_LSH, _SELECTION)),
    "window": Kind((Window(64),)),
    "lsh": Kind((_LSH,)),
    "key-selection": Kind((_SELECTION,)),
    "hax, tiled": Kind((_LSH, _SELECTION), "tiled"),
    "hax, dense": Kind((_LSH, _SELECTION), "dense"),
}
"""Every row but ``sdpa``."""


def bench_attention(
    *,
    lengths: Sequence[str | int] = ("256..131072",),
    heads: int = 4,
    d_head: int = 32,
    batch: int = 1,
    threads: int = 2,
    device: str = "cpu",
    seconds: float = 0.5,
    budget_s: float = 60.0,
    peers: bool = True,
    out: Path = Path("runs/bench"),
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure every kind at each length into ``out/attention.json``; ``peers`` False leaves full attention out.

    Raises ConfigError for an impossible size, RecollectError for a device that is not there and as ``run_cases`` does.
    """
    at = sizes(lengths)
    if min(heads, d_head, batch, threads) < 1:
        raise ConfigError("bench: heads, d_head, batch and threads must be at least 1")
    on = resolve_device(device)
    common: dict[str, Any] = {"heads": heads, "d_head": d_head, "batch": batch, "threads": threads, "device": str(on)}
    common["seconds"] = seconds
    rows = [*KINDS, *([FULL] if peers else [])]
    call = "recollect.eval.bench.attention:measure"
    return run_cases(
        "attention",
        [Case(row, length, call, {"row": row, "length": length, **common}) for row in rows for length in at],
        size_name="length",
        settings={**common, "dtype": "float32"},
        out=out,
        budget_s=budget_s,
        device=on,
        fresh=fresh,
        say=say,
        derive=lambda measured: {"summary": summary(measured)},
    )


def measure(
    row: str, length: int, *, heads: int, d_head: int, batch: int, threads: int, device: str, seconds: float
) -> dict[str, Any]:
    """One row at one length, in this process."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    on = torch.device(device)
    warm = _task(row, min(length, WARM_LENGTH), heads, d_head, batch, on)
    for _ in range(2):
        warm()
    run = _task(row, length, heads, d_head, batch, on)
    peak = peak_of(run, on)
    timing = median_time(run, seconds, on, first_s=peak.seconds)
    return {
        "both_ms": 1000 * timing.seconds,
        "peak_bytes": peak.bytes,
        "pass_s": timing.seconds,
        "repeats": timing.repeats,
    }


def _task(row: str, length: int, heads: int, d_head: int, batch: int, device: torch.device) -> Callable[[], None]:
    """A forward and backward over inputs that are there already."""
    # Each in the memory order that its operation takes.
    shape = (batch, heads, length, d_head) if row == FULL else (batch, length, heads, d_head)
    inputs = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    score = torch.randn(batch, length, heads, device=device)
    lsh = None if row == FULL else find(KINDS[row].patterns, Lsh)
    planes = None if lsh is None else draw_planes(d_head, heads, lsh.n_rounds, lsh.n_bits).to(device)

    def attend() -> Tensor:
        q, k, v = inputs
        if row == FULL:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        patterns, path = KINDS[row]
        buckets = None if planes is None else Buckets(sign_buckets(q, planes), sign_buckets(k, planes))
        scores = score if find(patterns, KeySelection) else None
        return sparse_attention(q, k, v, patterns, score_BLH=scores, buckets=buckets, path=path)[0]

    def run() -> None:
        for each in inputs:
            each.grad = None
        attend().square().sum().backward()

    return run


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per kind: where it overtakes full attention, by how much it is faster at ``AT``, how it grows ``FROM`` - ``TO``.

    ``crossover`` is a length, or None with ``crossover_note`` saying why there is none between those measured.
    """
    measured = [row for row in rows if row["status"] == "measured"]
    times, memory = _by_length(measured, "both_ms"), _by_length(measured, "peak_bytes")
    full = times.get(FULL, {})
    return [
        {
            "row": name,
            **crossover(own, full),
            f"speed_ratio_{AT}": _quotient(full.get(AT), own.get(AT)),
            f"time_growth_{FROM}_{TO}": _quotient(own.get(TO), own.get(FROM)),
            f"memory_growth_{FROM}_{TO}": _quotient(memory[name].get(TO), memory[name].get(FROM)),
        }
        for name, own in times.items()
    ]


def crossover(ours: dict[int, float], full: dict[int, float]) -> dict[str, Any]:
    """The length from which ours stays the faster one, on the straight line between two measured lengths in log-log.

    >>> crossover({100: 2.0, 400: 4.0}, {100: 1.0, 400: 8.0})
    {'crossover': 200.0, 'crossover_note': ''}
    """
    lengths = sorted(set(ours) & set(full))
    if ours is full or ours == full or not lengths:
        return {"crossover": None, "crossover_note": ""}
    # log(ours / full): below zero, ours is faster.
    behind = {length: math.log(ours[length] / full[length]) for length in lengths}
    slower = [length for length in lengths if behind[length] >= 0]
    if not slower:
        return {"crossover": None, "crossover_note": f"below {lengths[0]:,}"}
    if slower[-1] == lengths[-1]:
        return {"crossover": None, "crossover_note": f"above {lengths[-1]:,}"}
    low = slower[-1]
    high = lengths[lengths.index(low) + 1]
    part = behind[low] / (behind[low] - behind[high])
    return {"crossover": round(low * (high / low) ** part, 1), "crossover_note": ""}


def _by_length(rows: Sequence[Row], value: str) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for row in rows:
        found.setdefault(row["row"], {})[row["length"]] = row[value]
    return found


def _quotient(a: float | None, b: float | None) -> float | None:
    return a / b if a is not None and b else None


def tables(record: Record) -> list[Table]:
    """For a terminal: every case, then the summary."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("attention")
    for column in ("length", "fwd+bwd ms", "peak MiB"):
        grid.add_column(column, justify="right")
    grid.add_column("")
    for row in record.rows:
        known = row["status"] == "measured"
        cells = (f"{row['both_ms']:,.1f}", f"{row['peak_bytes'] / 2**20:,.1f}") if known else ("", "")
        grid.add_row(row["row"], f"{row['length']:,}", *cells, note(row))
    short = Table(title="against full attention", title_justify="left", box=None, pad_edge=False)
    short.add_column("attention")
    for column in ("faster from", f"speed at {AT:,}", f"time {FROM:,} to {TO:,}", "memory"):
        short.add_column(column, justify="right")
    for row in record.derived.get("summary", []):
        faster = f"{row['crossover']:,.0f}" if row["crossover"] else row["crossover_note"]
        names = (f"speed_ratio_{AT}", f"time_growth_{FROM}_{TO}", f"memory_growth_{FROM}_{TO}")
        short.add_row(row["row"], faster, *("" if row[n] is None else f"{row[n]:.2f} x" for n in names))
    return [grid, short]
