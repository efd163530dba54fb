"""The records of ``kernels.sh`` as Markdown tables, on standard output.

    python bench/gpu/tables.py FOLDER

Times are those of a CUDA graph where there is one, marked ``*`` where not. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ERRORS = ("outputs", "gradients")
ATTENTION_ROWS = ("hax", "window", "hax, torch", "window, torch", "hax, flex", "window, flex", "flash")


def _ms(figure: Mapping[str, Any] | None) -> float | None:
    return None if figure is None or "failed" in figure else figure.get("graph_ms", figure["ms"])


def _cell(figure: Mapping[str, Any] | None) -> str:
    if figure is None:
        return "-"
    if "failed" in figure:
        return "failed"
    return f"{_ms(figure):.3f}{'' if 'graph_ms' in figure else '*'}"


def _ratio(over: float | None, below: float | None) -> str:
    return "-" if over is None or below is None else f"{over / below:.1f}"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _lengths(cases: Mapping[str, Any]) -> list[int]:
    return sorted({int(last) for name in cases if (last := name.rpartition(" ")[2]).isdigit()})


def attention(record: Mapping[str, Any]) -> str:
    """Forward and backward of every row by length, beside full attention; steps; peaks."""
    cases = record["cases"]
    lengths = _lengths(cases)
    parts = [f"## Attention: {record['keys']} keys, {record['heads']} heads of {record['width']}, {record['dtype']}"]
    for what, title in (("both", "forward and backward, ms"), ("forward", "forward, ms")):
        rows = [
            [name, *(_cell(cases.get(f"{name} {n}", {}).get(what)) for n in lengths)]
            for name in ATTENTION_ROWS
            if any(f"{name} {n}" in cases for n in lengths)
        ]
        ratio = [_ratio(*(_ms(cases.get(f"{name} {n}", {}).get(what)) for name in ("flash", "hax"))) for n in lengths]
        needed = [max(cases[f"floor {n}"][f"{what}_{by}_ms"] for by in ("bytes", "products")) for n in lengths]
        rows += [["flash / hax", *ratio], ["floor of hax", *(f"{ms:.3f}" for ms in needed)]]
        parts.append(_table([title, *(f"{n:,}" for n in lengths)], rows))
    steps = [[name, *(_cell(cases.get(f"{name}, step {n}")) for n in lengths)] for name in ("hax", "window", "flash")]
    parts.append(_table(["one more token, ms", *(f"{n:,}" for n in lengths)], steps))
    peaks = [
        [name, *(_mib(cases.get(f"{name} {n}", {}).get("both")) for n in lengths)]
        for name in ATTENTION_ROWS
        if any(f"{name} {n}" in cases for n in lengths)
    ]
    parts.append(_table(["peak of both, MiB", *(f"{n:,}" for n in lengths)], peaks))
    return "\n\n".join(parts)


def _mib(figure: Mapping[str, Any] | None) -> str:
    return "-" if figure is None or "failed" in figure else f"{figure['peak_bytes'] / 2**20:.0f}"


def scans(record: Mapping[str, Any]) -> str:
    """Every operation's times, and the share of the copy rate that they reach."""
    rows: list[list[str]] = []
    for name, case in record["cases"].items():
        if name != "ceilings":
            figures = [case.get(what, None if "not used" in case else {"failed": ""}) for what in ("forward", "both")]
            reached = (f"{one['fraction']:.2f}" if one and "fraction" in one else "-" for one in figures)
            rows.append([name, *map(_cell, figures), *reached])
    columns = ["operation, length", "forward, ms", "both, ms", "of the copy rate: forward", "both"]
    return f"## Scans, batch {record['batch']}\n\n{_table(columns, rows)}"


def steps(record: Mapping[str, Any]) -> str:
    """Every training step's speed, and what a profile saw."""
    rows = [
        [name, "failed", *["-"] * 5]
        if "failed" in case
        else [
            name,
            f"{case['steps_per_s']:.1f}",
            f"{case['positions_per_s']:,.0f}",
            f"{case['peak_bytes'] / 2**20:,.0f}",
            *(f"{case[field]:.2f}" if field in case else "-" for field in ("kernels", "idle", "waits")),
        ]
        for name, case in record["cases"].items()
    ]
    columns = ["step", "steps/s", "positions/s", "peak, MiB", "kernels", "idle share", "waits"]
    return f"## Training steps, {record['autocast']}\n\n{_table(columns, rows)}"


def check(record: Mapping[str, Any]) -> str:
    """The largest errors against PyTorch's operations."""
    rows = [
        [name, *(f"{case[k]:.1e}" if k in case else "-" if "not used" in case else "failed" for k in ERRORS)]
        for name, case in record["cases"].items()
    ]
    return f"## Kernels against PyTorch's operations\n\n{_table(['case', 'outputs', 'gradients'], rows)}"


def main() -> None:
    """Print what there is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    kinds = {"check-kernels": check, "attention": attention, "scans": scans, "steps": steps}
    for name, table in kinds.items():
        path = folder / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            print(f"{table(record)}\n\n{record['device']}, torch {record['torch']}, commit {record['commit']}\n")


if __name__ == "__main__":
    main()
