"""The report of a face-off: one self-contained page, a JSON, a picture, and the same tables for terminal and README.

``write_report`` writes into the face-off directory:

- ``report.html``: everything, in one file that needs no network;
- ``report.json``: the same data;
- ``rows.json``: the published rows (``result_rows``);
- ``summary.png``: one 1600 x 900 picture;
- ``dreams-GROUP.webp``: for every world whose runs stored films, the truth and every dream side by side.

Every sentence is computed from the numbers. Nothing is written before everything has been rendered, and each file is
written beside its place and then renamed, so a reader never meets half a file. Cost: seconds;
half a minute for two dozen rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from recollect.core.errors import RecollectError, RunError, nearest
from recollect.core.files import write_atomically
from recollect.eval.report.animation import Animation, animation
from recollect.eval.report.browse import most_episodes
from recollect.eval.report.data import FaceOff, Row, binned, mean_table, plain, rows_of
from recollect.eval.report.language import language_data
from recollect.eval.report.page import chapters, provenance
from recollect.eval.report.published import published_for, published_worlds
from recollect.eval.report.rates import rate_data, rate_tables
from recollect.eval.report.read import load_faceoff, result_rows
from recollect.eval.report.summary import summary_png
from recollect.eval.report.tables import LEVELS, frame_tables, tables
from recollect.eval.report.text import Table, answer, sentences, steps_to

__all__ = ["answer_of", "markdown_tables", "result_rows", "terminal_table", "write_report"]

QUESTION = "Which backbone remembers?"

TERMINAL_COLUMNS = {
    "accuracy, %": "accuracy, %",
    "published, %": "paper, %",
    "whole tables right, %": "whole, %",
    "reward, imagining, %": "imagining, %",
    "reward, observing, %": "observing, %",
    "generation error": "dream",
    "doors, %": "doors, %",
    "walls probed, %": "walls, %",
    "objects probed, squared error": "objects",
    "published: reward, imagining, %": "paper, %",
    "published: generation error": "paper",
    "published: walls probed, %": "paper, %",
    "state": "state",
    "time": "time",
    "seeds": "seeds",
}
"""The columns a terminal of 80 has room for, and what they are called there."""

FIRST_ONLY = ("generation error",)
"""Shown there only where it ranks the rows."""

COSTS = ("state", "seeds")
"""A table without these is a small one, and has room for all its columns."""


def write_report(directory: Path) -> Path:
    """Write ``report.html``, ``report.json``, ``rows.json`` and ``summary.png`` into a face-off directory.

    Returns the path of the page. Raises RunError naming the file when the directory or ``faceoff.json`` is missing,
    something in it is damaged, or no run has finished; RecollectError without the extra ``report``.
    """
    face = load_faceoff(directory)
    moving = {group: found for group in face.groups_of("world") if (found := animation(face, group)) is not None}
    files = {
        "report.html": _page(face, moving).encode(),
        "report.json": _json(_data(face)),
        "rows.json": _json(rows_of(face)),
        "summary.png": summary_png(face, QUESTION, " ".join(answer(face))),
        **{found.name: found.content for found in moving.values()},
    }
    for name, content in files.items():
        write_atomically(face.directory / name, content)
    return face.directory / "report.html"


def terminal_table(directory: Path) -> RenderableType:
    """The answer and a table for each group, for ``rich.print``. Raises as ``write_report`` does."""
    face = load_faceoff(directory)
    return Group(
        Text(" ".join(answer(face)), style="bold"), *(_rich(table) for table in tables(face) if table.terminal != ())
    )


def markdown_tables(directory: Path, only: str | None = None) -> str:
    """A Markdown table for each group, best in bold, or the one called ``only``.

    Raises RunError when there is none of that name, and as ``write_report`` does.
    """
    found = {table.group: table for table in tables(load_faceoff(directory))}
    if only is not None and only not in found:
        raise RunError(f"{directory} has no table '{only}'{nearest(only, found)}: it has {', '.join(found)}")
    return "\n".join(_markdown(table) for name, table in found.items() if only in (None, name))


def answer_of(directory: Path) -> str:
    """The answer in one or two sentences, as the terminal prints it. Raises as ``write_report`` does."""
    return " ".join(answer(load_faceoff(directory)))


def _page(face: FaceOff, moving: Mapping[str, Animation]) -> str:
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
        tables=[*tables(face), *frame_tables(face), *rate_tables(face)],
        chapters=(made := chapters(face, moving)),
        episodes=max((most_episodes(chapter.browsers) for chapter in made), default=0),
        provenance=provenance(face),
    )


def _data(face: FaceOff) -> dict[str, Any]:
    """Everything on the page as JSON data."""
    chances = [line for group in face.groups_of("world") if (line := face.line(group)) is not None]
    worlds = {group: published_worlds(face.environment(group)) for group in face.groups_of("world")}
    return {
        "name": face.name,
        "title": face.title,
        "answer": " ".join(answer(face)),
        "sentences": sentences(face),
        "lines": {"oracles": face.oracles(), "chance": next(iter(chances), None)},
        "groups": {group: [_row_data(row) for row in rows] for group, rows in face.groups.items()},
        "provenance": provenance(face),
        "rows": rows_of(face),
        "published": None if (paper := published_for(face.name)) is None else asdict(paper),
        "published_worlds": {group: asdict(found) for group, found in worlds.items() if found is not None},
        "headlines": {group: face.headline(group) for group in face.groups},
    }


def _row_data(row: Row) -> dict[str, Any]:
    every = {name: row.metric(name) for name in row.reported}
    names = {name for run in row.runs for line in run.log for name in line.get("eval") or {}}
    curves = {"loss": row.mean_curve("loss", "step")}
    curves |= {f"eval.{name}": row.mean_curve(name, "step", evaluation=True) for name in sorted(names)}
    return {
        "row": row.name,
        **rate_data(row),
        "runs": [{"seed": run.seed, "status": run.status, "last_step": run.last_step} for run in row.runs],
        "metrics": {name: {"mean": s.mean, "std": s.std, "n": s.n} for name, s in every.items() if s is not None},
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
        **language_data(row),
    }


def _rich(table: Table) -> Group:
    shown = RichTable(title=Text(f"\n{table.title}", style="bold"), box=box.SIMPLE_HEAD, title_justify="left")
    shown.add_column(table.corner, min_width=min(24, max((len(row.name) for row in table.rows), default=0)))
    kept = [i for i, name in enumerate(table.columns) if name in TERMINAL_COLUMNS and not (i and name in FIRST_ONLY)]
    if len(kept) > 5 or "published, %" in table.columns:
        kept = [i for i in kept if table.columns[i] not in ("time", "seeds")]
    if not any(name in COSTS for name in table.columns) and len(table.columns) < 6:
        kept = list(range(len(table.columns)))
    kept = kept if table.terminal is None else list(table.terminal)
    for i in kept:
        name = table.columns[i]
        shown.add_column(TERMINAL_COLUMNS.get(name, name), justify="right", no_wrap=name in TERMINAL_COLUMNS)
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

    lines = [f"**{escape(table.title)}**", "", cells(table.corner, *map(escape, table.columns))]
    lines.append(cells("---", *["---:"] * len(table.columns)))
    for row in table.rows:
        texts = [f"**{escape(cell.text)}**" if cell.best else escape(cell.text) for cell in row.cells]
        lines.append(cells(escape(row.name) if row.form == "row" else f"*{escape(row.name)}*", *texts))
    return "\n".join([*lines, "", escape(table.note), ""])


def _json(data: Any) -> bytes:
    return (json.dumps(plain(data), indent=1, allow_nan=False) + "\n").encode()
