"""Columns that every results table has: what a row cost, its rows without results, and what its note begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from recollect.eval.report.data import Row
from recollect.eval.report.text import (
    ABSENT,
    Cell,
    TableRow,
    describe_unfinished,
    human_bytes,
    human_count,
    human_seconds,
    significant,
)

Column = tuple[str, Callable[[Row], str]]
"""What it is called, and a row's text in it."""

PARAMETERS: Column = ("parameters", lambda row: human_count(row.field("params")))
STATE: Column = ("state", lambda row: human_bytes(row.field("state_bytes")))
STEPS: Column = ("steps", lambda row: human_count(row.field("steps")))

SPEED: tuple[Column, ...] = (
    ("time", lambda row: human_seconds(row.field("wall_s"))),
    ("steps/s", lambda row: ABSENT if row.steps_per_s is None else significant(row.steps_per_s)),
    ("seeds", lambda row: f"{len(row.finished)} of {len(row.runs)}"),
)
"""The last ones."""


def waiting_rows(rows: Sequence[Row], n_columns: int) -> list[TableRow]:
    """Rows without results, which say how far they are."""
    return [TableRow(row.name, (Cell(_progress(row)), *[Cell()] * (n_columns - 1)), "waiting") for row in rows]


def spread_note(ranked: Sequence[Row]) -> str:
    """What a table's numbers are means of."""
    counts = sorted({len(row.finished) for row in ranked})
    if not counts:
        return "No run of this group has finished."
    if counts == [1]:
        return "One seed per row, so no spread is given. Best in bold. State: bytes carried per sequence."
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± sample standard deviation over {seeds} seeds. Best in bold. State: bytes carried per sequence."


def _progress(row: Row) -> str:
    return "; ".join(describe_unfinished(run.status, run.seed, run.last_step) for run in row.runs)
