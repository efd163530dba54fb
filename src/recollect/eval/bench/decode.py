"""One more token after a long past: how long it takes, and what is kept, by the tokens already seen.

The past is read by ``forward`` in pieces, from random inputs, for one sequence; then ``step`` goes on from there, each
from the state of the one before, and the median counts. What a long past costs is read within one process: steps after
it take turns with steps after the shortest past. A row whose state is declared to depend on how much was seen
``grows``. The prefill's time and memory are in the record too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from recollect.core.derived import unchanging
from recollect.core.errors import ConfigError
from recollect.core.state import nbytes
from recollect.eval.bench.cases import Case, Record, Row, note, run_cases
from recollect.eval.bench.measure import peak_of, taking_turns
from recollect.eval.bench.rows import build, config_of, refusal, row_names, sizes
from recollect.train.runtime import resolve_device

PIECE = 2048
"""Positions that the past is read in at a time."""


def bench_decode(
    layers: Sequence[str] = (),
    *,
    seen: Sequence[str | int] = (1024, 16_384, 131_072),
    d_model: int = 256,
    threads: int = 2,
    device: str = "cpu",
    seconds: float = 0.5,
    budget_s: float = 60.0,
    out: Path = Path("runs/bench"),
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Record:
    """Measure each named layer (default: all) after each number of tokens seen into ``out/decode.json``.

    Raises ConfigError for an unknown name or an impossible size, RecollectError for a device that is not there and as
    ``run_cases`` does.
    """
    rows, at = row_names(layers), sizes(seen, "seen")
    if min(d_model, threads) < 1:
        raise ConfigError("bench: d_model and threads must be at least 1")
    on = resolve_device(device)
    common = {"d_model": d_model, "threads": threads, "device": str(on), "seconds": seconds}
    call = "recollect.eval.bench.decode:measure"
    return run_cases(
        "decode",
        [
            Case(row, n, call, {"row": row, "seen": n, "least": min(at), **common}, refusal=refusal(row, d_model))
            for row in rows
            for n in at
        ],
        size_name="seen",
        settings={**common, "batch": 1, "least": min(at), "piece": PIECE, "dtype": "float32"},
        out=out,
        budget_s=budget_s,
        device=on,
        fresh=fresh,
        say=say,
        derive=lambda measured: {"summary": summary(measured)},
    )


def measure(
    row: str, seen: int, *, least: int, d_model: int, threads: int, device: str, seconds: float
) -> dict[str, Any]:
    """One row after ``seen`` tokens beside the same row after ``least``, in this process."""
    torch.set_num_threads(threads)
    on = torch.device(device)
    layer = build(row, d_model, on).eval()

    def past(length: int) -> Any:
        state: Any = None
        while length:
            n = min(PIECE, length)
            state = layer(torch.randn(1, n, d_model, device=on), state).state
            length -= n
        return state

    with torch.no_grad(), unchanging():
        states = [None, past(least)]

        def prefill() -> None:
            states[0] = past(seen)

        def step(which: int) -> None:
            _, states[which] = layer.step(torch.randn(1, d_model, device=on), states[which])

        peak = peak_of(prefill, on)
        state_bytes = nbytes(states[0])
        started = time.perf_counter()
        for _ in range(3):
            step(0)
            step(1)
        warm_s = time.perf_counter() - started
        (timing, _), growth = taking_turns([lambda: step(0), lambda: step(1)], seconds, on)
    config = config_of(row, d_model)
    return {
        "step_ms": 1000 * timing.seconds,
        "growth": growth,
        "state_bytes": state_bytes,
        "grows": config.state_bytes(seen=1_000_000) != config.state_bytes(seen=2_000_000),
        "prefill_tokens_per_s": seen / peak.seconds,
        "peak_bytes": peak.bytes,
        "pass_s": peak.seconds + warm_s,
        "repeats": timing.repeats,
    }


def summary(rows: Sequence[Row]) -> list[Row]:
    """Per row, the least against the most tokens seen: how much slower a step is (the two taking turns), and how much
    larger the state.
    """
    found: list[Row] = []
    for name in dict.fromkeys(row["row"] for row in rows):
        own = sorted((r for r in rows if r["row"] == name and r["status"] == "measured"), key=lambda r: r["seen"])
        if len(own) < 2:
            continue
        first, last = own[0], own[-1]
        found.append(
            {
                **{"row": name, "grows": last["grows"], "from": first["seen"], "to": last["seen"]},
                "time_growth": last["growth"],
                "state_growth": last["state_bytes"] / first["state_bytes"] if first["state_bytes"] else 1.0,
            }
        )
    return found


def tables(record: Record, names: Sequence[str] = ()) -> list[Table]:
    """For a terminal: every case, and what depends on the past."""
    grid = Table(box=None, pad_edge=False)
    grid.add_column("layer")
    for column in ("seen", "step ms", "state B", "prefill tok/s"):
        grid.add_column(column, justify="right")
    grid.add_column("")
    for row in record.rows:
        if names and row["row"] not in names:
            continue
        cells = ("", "", "")
        if row["status"] == "measured":
            cells = (f"{row['step_ms']:.3f}", f"{row['state_bytes']:,}", f"{row['prefill_tokens_per_s']:,.0f}")
        marked = note(row) or ("state grows" if row["grows"] else "")
        grid.add_row(row["row"], f"{row['seen']:,}", *cells, marked)
    short = Table(title="most / fewest tokens seen", title_justify="left", box=None, pad_edge=False)
    short.add_column("layer")
    for column in ("seen", "step time", "state"):
        short.add_column(column, justify="right")
    for row in record.derived.get("summary", []):
        grown = (f"{row['time_growth']:.2f} x", f"{row['state_growth']:.2f} x")
        short.add_row(row["row"], f"{row['from']:,} to {row['to']:,}", *grown)
    return [grid, short]
