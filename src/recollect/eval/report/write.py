"""The report of a face-off: one self-contained page, a JSON, a picture, and the same tables for terminal and README.

``write_report`` writes into the face-off directory:

- ``report.html``: everything, in one file that needs no network;
- ``report.json``: the same data;
- ``rows.json``: the published rows (``result_rows``);
- ``summary.png``: one 1600 x 900 picture.

Every sentence is computed from the numbers. Nothing is written before everything has been rendered, and each file is
written beside its place and then renamed, so a reader never meets half a file. Cost: seconds;
half a minute for two dozen rows.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from recollect.core.errors import RecollectError
from recollect.core.files import write_atomically
from recollect.eval.report.data import (
    METRICS,
    FaceOff,
    Row,
    binned,
    mean_table,
    plain,
    rows_of,
)
from recollect.eval.report.page import chapters, provenance, reels
from recollect.eval.report.published import published_for
from recollect.eval.report.rates import rate_data, rate_tables
from recollect.eval.report.read import load_faceoff, result_rows
from recollect.eval.report.strips import films, summary_png
from recollect.eval.report.text import LEVELS, Table, answer, sentences, steps_to, tables

__all__ = ["answer_of", "markdown_tables", "result_rows", "terminal_table", "write_report"]

QUESTION = "Which backbone remembers?"

TERMINAL_COLUMNS = {
    "accuracy, %": "accuracy, %",
    "published, %": "paper, %",
    "whole tables right, %": "whole, %",
    "reward, imagining, %": "imagining, %",
    "reward, observing, %": "observing, %",
    "state": "state",
    "time": "time",
    "seeds": "seeds",
}
"""The columns a terminal of 80 has room for, and what they are called there."""


def write_report(directory: Path) -> Path:
    """Write ``report.html``, ``report.json``, ``rows.json`` and ``summary.png`` into a face-off directory.

    Returns the path of the page. Raises RunError naming the file when the directory or ``faceoff.json`` is missing,
    something in it is damaged, or no run has finished; RecollectError without the extra ``report``.
    """
    face = load_faceoff(directory)
    files = {
        "report.html": _page(face).encode(),
        "report.json": _json(_data(face)),
        "rows.json": _json(rows_of(face)),
        "summary.png": summary_png(face, QUESTION, " ".join(answer(face))),
    }
    for name, content in files.items():
        write_atomically(face.directory / name, content)
    return face.directory / "report.html"


def terminal_table(directory: Path) -> RenderableType:
    """The answer and a table for each group, for ``rich.print``. Raises as ``write_report`` does."""
    face = load_faceoff(directory)
    return Group(Text(" ".join(answer(face)), style="bold"), *(_rich(table) for table in tables(face)))


def markdown_tables(directory: Path) -> str:
    """A Markdown table for each group, best in bold. Raises as ``write_report`` does."""
    return "\n".join(_markdown(table) for table in tables(load_faceoff(directory)))


def answer_of(directory: Path) -> str:
    """The answer in one or two sentences, as the terminal prints it. Raises as ``write_report`` does."""
    return " ".join(answer(load_faceoff(directory)))


def _page(face: FaceOff) -> str:
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError:
        raise RecollectError("the report needs matplotlib and jinja2: pip install 'recollect[report]'") from None
    source = resources.files("recollect.eval.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(source).render(
        title=face.title,
        question=QUESTION,
        answer=answer(face),
        sentences=sentences(face),
        tables=[*tables(face), *rate_tables(face)],
        chapters=chapters(face),
        reels=reels(films(face)),
        provenance=provenance(face),
    )


def _data(face: FaceOff) -> dict[str, Any]:
    """Everything on the page as JSON data."""
    return {
        "name": face.name,
        "title": face.title,
        "answer": " ".join(answer(face)),
        "sentences": sentences(face),
        "lines": {"oracles": face.oracles(), "chance": face.line("world") if "world" in face.groups else None},
        "groups": {group: [_row_data(row) for row in rows] for group, rows in face.groups.items()},
        "provenance": provenance(face),
        "rows": rows_of(face),
        "published": None if (paper := published_for(face.name)) is None else asdict(paper),
    }


def _row_data(row: Row) -> dict[str, Any]:
    shown = {name: row.metric(name) for name in METRICS[row.group]}
    names = {name for run in row.runs for line in run.log for name in line.get("eval") or {}}
    curves = {"loss": row.mean_curve("loss", "step")}
    curves |= {f"eval.{name}": row.mean_curve(name, "step", evaluation=True) for name in sorted(names)}
    return {
        "row": row.name,
        **rate_data(row),
        "runs": [{"seed": run.seed, "status": run.status, "last_step": run.last_step} for run in row.runs],
        "metrics": {name: {"mean": s.mean, "std": s.std, "n": s.n} for name, s in shown.items() if s is not None},
        "params": row.field("params"),
        "state_bytes": row.field("state_bytes"),
        "steps": row.field("steps"),
        "wall_s": row.field("wall_s"),
        "steps_per_s": row.steps_per_s,
        "cells": mean_table(row.detail("cells")),
        "steps_to": {str(level): found[0] for level in LEVELS if (found := steps_to(row, level))},
        "attended": row.detail("attended"),
        "generation_mse_curve": row.detail("generation_mse_curve"),
        "curves": {name: dict(zip(("step", "value"), binned(*curve), strict=True)) for name, curve in curves.items()},
    }


def _rich(table: Table) -> Group:
    shown = RichTable(title=Text(f"\n{table.title}", style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
    shown.add_column("backbone", min_width=min(24, max((len(row.name) for row in table.rows), default=0)))
    left_out = {"time", "seeds"} if "published, %" in table.columns else set[str]()
    kept = [i for i, name in enumerate(table.columns) if name in TERMINAL_COLUMNS and name not in left_out]
    for i in kept:
        shown.add_column(TERMINAL_COLUMNS[table.columns[i]], justify="right", no_wrap=True)
    for row in table.rows:
        if row.form != "waiting":
            cells = [Text(row.cells[i].text, style="bold" if row.cells[i].best else "") for i in kept]
            shown.add_row(Text(row.name), *cells, style="dim" if row.form == "line" else "")
    waiting = [Text(f"{row.name}: {row.cells[0].text}", style="dim") for row in table.rows if row.form == "waiting"]
    return Group(shown, *waiting, Text(table.note, style="dim"))


def _markdown(table: Table) -> str:
    def cells(*texts: str) -> str:
        return f"| {' | '.join(texts)} |"

    def escape(text: str) -> str:
        return text.replace("\u00a0", " ").replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")

    lines = [f"**{escape(table.title)}**", "", cells("backbone", *map(escape, table.columns))]
    lines.append(cells("---", *["---:"] * len(table.columns)))
    for row in table.rows:
        texts = [f"**{escape(cell.text)}**" if cell.best else escape(cell.text) for cell in row.cells]
        lines.append(cells(escape(row.name) if row.form == "row" else f"*{escape(row.name)}*", *texts))
    return "\n".join([*lines, "", escape(table.note), ""])


def _json(data: Any) -> bytes:
    return (json.dumps(plain(data), indent=1, allow_nan=False) + "\n").encode()
