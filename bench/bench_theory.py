"""The theory beside measurements: what the hand-built model costs, and what a bounded state can know at most.

    python bench/bench_theory.py [OUTPUT.json] [--publish .] [--results results/recall-mini.json] [--only bound|cost]

*cost* builds ``models.constructed`` for growing tables, checks its answers, and times it: the least processor time of
several runs in float32, one thread. *bound* draws ``eval.counting.accuracy_bound`` with the recall rows of a results
file (any that ``recollect report --publish`` wrote) as points. ``--publish ROOT`` writes ROOT/docs/theory-cost.png,
ROOT/docs/theory-bound.png and the table between the markers of ROOT/docs/theory.md.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recollect.core.files import write_atomically
from recollect.eval.counting import accuracy_bound, table_bits
from recollect.eval.report.figures import PRINT, require_matplotlib, settings
from recollect.eval.report.rows import MARKERS
from recollect.models.constructed import ConstructedRecall
from recollect.tasks import JointRecall
from recollect.tasks.batch import accuracy

SIZES = ((1, 1), (2, 2), (5, 5), (8, 8), (7, 64), (16, 16), (32, 32), (64, 64))
TOKENS = 16384
"""Tokens of a timed call: small tables come in batches."""
BOUND_SIZES = ((5, 5), (8, 8), (16, 16))
N_VALUES = 16


@torch.no_grad()
def measure(size: tuple[int, int], planes: Any, seconds: float = 3.0) -> dict[str, Any]:
    """Sizes of the construction for one table size, share of right answers, and microseconds per token."""
    (n_contexts, n_keys), config = size, ConstructedRecall.Config(size, N_VALUES, planes=planes)
    task = JointRecall(JointRecall.Config((n_contexts, n_contexts), (n_keys, n_keys), n_values=N_VALUES))
    length = task.length(size)
    batch = task.batch(np.random.default_rng(0), max(1, TOKENS // length))
    model, tokens = ConstructedRecall(config), torch.from_numpy(batch.tokens)
    right = accuracy(model(tokens)[0].argmax(-1).numpy(), batch)
    best, until = np.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        start = time.process_time()
        model.hidden(tokens)
        best = min(best, time.process_time() - start)
    return {
        "size": size,
        "planes": planes,
        "cells": config.n_cells,
        "length": length,
        "state": config.d_model,
        "keys": config.keys,
        "buckets": 1 << config.bits,
        "slots": config.slots,
        "crowd_mean": model.crowd.mean,
        "crowd_worst": model.crowd.worst,
        "answers": int(batch.mask.sum()),
        "accuracy": float(right.mean()),
        "us_per_token": 1e6 * best / tokens.numel(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown: the random planes' numbers, and the digit planes' where they differ in kind."""
    digits = {tuple(row["size"]): row for row in rows if row["planes"] == "digits"}
    lines = [
        "| table | cells n | tokens | state of layer 1 | keys per query | buckets | remembered keys, at most "
        "| right answers | us per token | digits: keys | us per token |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        if row["planes"] == "random":
            other, share = digits[tuple(row["size"])], f"{100 * row['accuracy']:.6g} % of {row['answers']:,}"
            lines.append(
                f"| {row['size'][0]} x {row['size'][1]} | {row['cells']:,} | {row['length']:,} | {row['state']} "
                f"| {row['keys']} | {row['buckets']:,} | {row['slots']:,} | {share} | {row['us_per_token']:.3g} "
                f"| {other['keys']} | {other['us_per_token']:.3g} |"
            )
    return "\n".join(lines) + "\n"


def draw_cost(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Growth of state, keys and buckets' crowds with the table; and time per token with it."""
    matplotlib = require_matplotlib()
    with matplotlib.rc_context(settings(PRINT, 12)):
        figure = matplotlib.figure.Figure(figsize=(13, 5.2), facecolor="white", layout="constrained")
        growth, cost = figure.subplots(1, 2)
        square = [row for row in rows if row["size"][0] == row["size"][1]]
        random = [row for row in square if row["planes"] == "random"]
        digits = [row for row in square if row["planes"] == "digits"]
        lines = [
            (growth, random, "keys", "keys per query, K", "o-", 0, 11),
            (growth, random, "state", "numbers of layer 1's state", "s-", 1, -2),
            (growth, random, "crowd_worst", "worst bucket, any order", "^--", 2, -13),
            (growth, random, "crowd_mean", "mean bucket", "v--", 3, 0),
            (growth, digits, "keys", "keys per query, digits", "D-", 4, 0),
            (cost, random, "us_per_token", "random planes", "o-", 0, 9),
            (cost, digits, "us_per_token", "digits", "D-", 4, -10),
        ]
        for ax, chosen, field, name, style, colour, up in lines:
            ax.plot([r["cells"] for r in chosen], [r[field] for r in chosen], style, color=PRINT.rows[colour], ms=5)
            end = (chosen[-1]["cells"], chosen[-1][field])
            ax.annotate(name, end, (8, up), textcoords="offset points", va="center", color=PRINT.rows[colour])
        fitted = [row for row in random if row["cells"] >= 64]
        n, us = (np.array([row[key] for row in fitted], float) for key in ("cells", "us_per_token"))
        design = np.stack([np.ones_like(n), np.log2(n) ** 2], 1)
        offset, slope = np.linalg.lstsq(design, us, rcond=None)[0]
        cost.plot(n, offset + slope * np.log2(n) ** 2, ":", color=PRINT.muted, zorder=1)
        cost.set_title(f"dots: {offset:.1f} + {slope:.2f} (log2 n)^2 through n >= 64", loc="left", fontsize=11)
        growth.set_title("solid: formulas of log n; dashed: the buckets of the planes drawn", loc="left", fontsize=11)
        for ax, label in ((growth, "a number of"), (cost, "microseconds of one thread per token")):
            ax.set_xscale("log", base=2)
            ax.set_xlim(0.8, 4096 * 60)
            ticks = [4**i for i in range(7)]
            ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            ax.set_ylim(0, 1.06 * ax.get_ylim()[1])
            ax.set_xlabel("cells n of a square table")
            ax.set_ylabel(label)
            ax.minorticks_off()
        figure.savefig(path, dpi=110)


def draw_bound(results: Path, path: Path) -> None:
    """The most accuracy that b bits of state allow, and where measured models stand."""
    matplotlib = require_matplotlib()
    rows = [row for row in json.loads(results.read_text()) if row.get("group", "recall") == "recall"]
    metric = "accuracy_largest" if all("accuracy_largest" in row["metrics"] for row in rows) else "accuracy"
    of = "on the largest tables of its task" if metric == "accuracy_largest" else "over all sizes of its task"
    with matplotlib.rc_context(settings(PRINT, 12)):
        figure = matplotlib.figure.Figure(figsize=(13.5, 6.6), facecolor="white")
        ax = figure.add_axes((0.06, 0.23, 0.72, 0.68))
        most = max((8 * row["state_bytes"] for row in rows), default=1 << 17)
        bits = np.geomspace(4, 4 * max(most, 1 << 17), 600)
        for (n_contexts, n_keys), colour in zip(BOUND_SIZES, ("#7f9db9", "#4f7ca8", "#1d4e7f"), strict=True):
            needed = table_bits(n_contexts * n_keys, N_VALUES)
            ax.plot(bits, 100 * accuracy_bound(bits, n_contexts * n_keys, N_VALUES), color=colour)
            name = f"{n_contexts} x {n_keys}\n{needed:,.0f} bits"
            ax.annotate(name, (needed, 100), (0, 6), textcoords="offset points", ha="center", color=colour, fontsize=9)
            ax.plot(needed, 100, "|", color=colour, ms=12)
        ax.axhline(100 / N_VALUES, color=PRINT.muted, linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate("chance", (bits[-1], 100 / N_VALUES), (0, 4), textcoords="offset points", ha="right")
        for i, row in enumerate(sorted(rows, key=lambda row: -row["metrics"][metric])):
            x, y, error = 8 * row["state_bytes"], 100 * row["metrics"][metric], 100 * row["spread"].get(metric, 0)
            colour, marker = PRINT.rows[i % len(PRINT.rows)], MARKERS[i % len(MARKERS)]
            label = f"{row['row']}  {y:.0f} %"
            ax.errorbar(x, y, yerr=error, fmt=marker, color=colour, ms=8, elinewidth=1, zorder=3, label=label)
        ax.legend(
            loc="upper left",
            bbox_to_anchor=(1.0, 1.1),
            frameon=False,
            fontsize=9.5,
            labelspacing=0.35,
            title=f"measured, {results.stem}",
        )
        ax.set_xscale("log", base=2)
        ticks = [1 << i for i in range(2, int(np.log2(bits[-1])) + 1, 2)]
        ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=20)
        ax.minorticks_off()
        ax.set_xlim(bits[0], bits[-1])
        ax.set_ylim(0, 112)
        ax.set_yticks(range(0, 101, 20))
        ax.set_xlabel("bits of state per sequence")
        ax.set_ylabel("right cells, %")
        ax.set_title("The most that any model with so much state can answer, by table size", loc="left", pad=14)
        figure.text(
            0.07,
            0.02,
            f"Points: accuracy {of}, mean and spread over seeds; state of all layers, 8 bits to a byte.\n"
            "The bound does not bind: the largest table of the published grid, 16 x 16, needs 256 x 4 = 1,024 bits; "
            "a Mamba-2 layer there has 4,096 floats.\n"
            "What is measured is what can be learned, not what could be stored.",
            fontsize=10.5,
            color=PRINT.muted,
        )
        figure.savefig(path, dpi=110)


def main() -> None:
    """Measure, print, draw, publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", nargs="?", type=Path, help="JSON file to write the measured rows to")
    parser.add_argument("--results", type=Path, default=Path("results/recall-mini.json"))
    parser.add_argument("--publish", type=Path, metavar="ROOT", help="write pictures and table below ROOT/docs")
    parser.add_argument("--only", choices=("bound", "cost"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.only != "bound":
        rows = [measure(size, planes) for size in SIZES for planes in ("random", "digits")]
        print(table(rows))
        if args.output is not None:
            args.output.write_text(json.dumps(rows, indent=1) + "\n")
        if args.publish is not None:
            draw_cost(rows, args.publish / "docs" / "theory-cost.png")
            page = args.publish / "docs" / "theory.md"
            marked = re.compile(r"(<!-- results theory -->\n).*?(<!-- end results -->)", re.S)
            filled = marked.sub(lambda found: f"{found[1]}{table(rows)}{found[2]}", page.read_text(encoding="utf-8"))
            write_atomically(page, filled.encode())
    if args.only != "cost" and args.publish is not None:
        draw_bound(args.results, args.publish / "docs" / "theory-bound.png")


if __name__ == "__main__":
    main()
