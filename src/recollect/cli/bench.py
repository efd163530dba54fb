"""``recollect bench``: measure, then print the tables and say where the record and the picture are."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from recollect.cli import arguments
from recollect.core.errors import RecollectError
from recollect.core.files import write_atomically
from recollect.eval.bench.cases import Record
from recollect.eval.bench.rows import row_names

NARROWEST = 150
"""Columns that the tables get where the output is no terminal."""


def bench(command: arguments.Measurement) -> int:
    """Carry out one of the benches. Returns 1 when a case failed, which its row in the table explains."""
    match command:
        case arguments.BenchLayers():
            from recollect.eval.bench.layers import bench_layers, tables
            from recollect.eval.bench.peers import peers_of

            record = bench_layers(
                command.layers,
                lengths=command.lengths,
                d_model=command.d_model,
                batch=command.batch,
                threads=command.threads,
                device=command.device,
                seconds=command.seconds,
                budget_s=command.budget_seconds,
                peers=command.peers,
                out=command.out,
                fresh=command.fresh,
                say=_say,
            )
            names = row_names(command.layers)
            beside = list(peers_of(names)) if command.peers else []
            shown = tables(record, [*names, *beside])
        case arguments.BenchAttention():
            from recollect.eval.bench.attention import bench_attention, tables

            record = bench_attention(
                lengths=command.lengths,
                heads=command.heads,
                d_head=command.d_head,
                batch=command.batch,
                threads=command.threads,
                device=command.device,
                seconds=command.seconds,
                budget_s=command.budget_seconds,
                peers=command.peers,
                out=command.out,
                fresh=command.fresh,
                say=_say,
            )
            shown = tables(record)
        case arguments.BenchDecode():
            from recollect.eval.bench.decode import bench_decode, tables

            record = bench_decode(
                command.layers,
                seen=command.seen,
                d_model=command.d_model,
                threads=command.threads,
                device=command.device,
                seconds=command.seconds,
                budget_s=command.budget_seconds,
                out=command.out,
                fresh=command.fresh,
                say=_say,
            )
            shown = tables(record, row_names(command.layers))
        case arguments.BenchWorldmodel():
            from recollect.eval.bench.worldmodel import bench_worldmodel, tables

            record = bench_worldmodel(
                command.presets,
                lengths=command.lengths,
                observation=command.observation,
                image_size=command.image_size,
                d_model=command.d_model,
                batch=command.batch,
                threads=command.threads,
                device=command.device,
                seconds=command.seconds,
                budget_s=command.budget_seconds,
                out=command.out,
                fresh=command.fresh,
                say=_say,
            )
            shown = tables(record)
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(NARROWEST, console.width))
    for table in shown:
        console.print(table, "")
    print(f"measured {record.newly} cases; {record.path}")
    _draw(record)
    return 1 if any(row["status"] == "failed" for row in record.rows) else 0


def explain(command: arguments.BenchExplain) -> int:
    """Print what ``ops.dispatch`` picks on a device."""
    from recollect.eval.bench.explain import explain, table

    rows = explain(command.device, command.dtype, command.length)
    title = f"{command.device}, {command.dtype}, {command.length:,} positions"
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(NARROWEST, console.width))
    console.print(table(rows, title))
    return 0


def _draw(record: Record) -> None:
    from recollect.eval.bench.figures import draw

    path: Path = record.path.with_suffix(".png")
    try:
        picture = draw(record)
    except RecollectError as error:
        _say(f"no picture: {error}")
        return
    if picture is None:
        _say("no picture: nothing was measured")
        return
    write_atomically(path, picture)
    print(f"picture: {path}")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
