"""The numbers of a language group: losses by length and position, and what is found again in a long text.

A run (``recollect.train.language``) reports ``loss``, ``loss_LENGTH`` and ``TASK_LENGTH``; its details hold nats per
token by position, and the long-context suite's scores by task, length and depth.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from recollect.eval.report.data import FaceOff, Row, Run, Stat
from recollect.eval.report.metrics import LOSS, at_length

PLAIN = "none"
"""The row without attention; one that begins with it and a dash has none either, and differs in something else."""

ALL = "all"
"""The suite's own average over its tasks."""

Cases = Mapping[tuple[str, int], float]


@dataclass(frozen=True)
class Positions:
    """Nats per token by how many tokens stand before it, in bins of octaves: mean and deviation over seeds."""

    first: list[int]
    last: list[int]
    """The bins' first and last position."""
    nats: list[Stat]


class Asked(NamedTuple):
    """One task of the suite at one length."""

    task: str
    length: int


def has_attention(row: Row) -> bool:
    """Whether a row is one with attention, by its name."""
    return row.name != PLAIN and not row.name.startswith(f"{PLAIN}-")


def loss_lengths(rows: Iterable[Row]) -> list[int]:
    """The lengths whose loss any row reports."""
    found = (at_length(name) for row in rows for name in row.reported if row.metric(name))
    return sorted({at[1] for at in found if at is not None and at[0] == LOSS})


def asked(rows: Sequence[Row]) -> list[Asked]:
    """What the suite asked of any row: tasks in the suite's order, the average left out, by rising length."""
    found = {at: None for row in rows for run in row.finished for at in _answers(run) if at[0] != ALL}
    tasks = list(dict.fromkeys(task for task, _ in found))
    return [Asked(*at) for at in sorted(found, key=lambda at: (tasks.index(at[0]), at[1]))]


def suite_lengths(rows: Sequence[Row]) -> list[int]:
    """The lengths that the suite was asked at."""
    return sorted({at.length for at in asked(rows)})


def task_found(row: Row, at: Asked) -> Stat | None:
    """The share of one task's answers that is found at one length."""
    return row.metric(f"{at.task}_{at.length}")


def share_found(row: Row, length: int) -> Stat | None:
    """The share of answers found at a length: the suite's average, or the mean of the tasks that fit that length."""
    values: list[float] = []
    for run in row.finished:
        answers = _answers(run)
        mine = [value for (task, n), value in answers.items() if n == length and task != ALL]
        if (whole := answers.get((ALL, length))) is not None:
            values.append(whole)
        elif mine:
            values.append(sum(mine) / len(mine))
    return Stat.of(values) if values else None


def overall(row: Row) -> float | None:
    """The share of answers found, lengths weighing alike."""
    shares = [stat.mean for length in suite_lengths([row]) if (stat := share_found(row, length))]
    return sum(shares) / len(shares) if shares else None


def by_suite(rows: Iterable[Row]) -> list[Row]:
    """The rows that were asked, those that find most first."""
    shares = [(share, row) for row in rows if (share := overall(row)) is not None]
    return [row for _, row in sorted(shares, key=lambda pair: -pair[0])]


def chosen(rows: Sequence[Row]) -> list[tuple[Row, str]]:
    """The rows whose maps are drawn, and why: the one that finds most, the one without attention, the last."""
    ranked = by_suite(rows)
    if len(ranked) < 2:
        return [(row, "") for row in ranked]
    why = {ranked[0].name: "finds most", ranked[-1].name: "finds least"}
    shown = [row for row in ranked if row.name in why or row.name == PLAIN]
    return [(row, why.get(row.name, "without attention")) for row in shown]


def told(rows: Iterable[Row], name: str, at: Asked | None = None, length: int | None = None) -> float | None:
    """What a ``chance`` or ``guesser`` finds of a task or, each weighing alike, of all tasks of a length.

    None where a task has none.
    """
    by_task: dict[str, list[float | None]] = {}
    for row in rows:
        for case in _cases(row):
            if (case["task"], case["length"]) == at or (at is None and case["length"] == length):
                by_task.setdefault(case["task"], []).append(case.get(name))
    means: list[float] = []
    for values in by_task.values():
        numbers = [value for value in values if value is not None]
        if len(numbers) < len(values):
            return None
        means.append(sum(numbers) / len(numbers))
    return sum(means) / len(means) if means else None


def maps(row: Row) -> list[dict[str, Any]]:
    """The share found by task, length and depth, mean over seeds, as ``evaluate_long`` gives it for one."""
    cells: dict[tuple[str, int, float | None], list[float]] = {}
    for case in _cases(row):
        cells.setdefault((case["task"], case["length"], case["depth"]), []).append(float(case["found"]))
    return [
        {"task": task, "length": length, "depth": depth, "found": sum(values) / len(values)}
        for (task, length, depth), values in cells.items()
    ]


def depths(rows: Iterable[Row]) -> list[tuple[int, float]]:
    """The (length, depth) at which answers stood, shortest text first, from its beginning (0) to its end (1)."""
    return sorted(
        {(case["length"], case["depth"]) for row in rows for case in _cases(row) if case["depth"] is not None}
    )


def found_at(row: Row, length: int, depth: float) -> Stat | None:
    """The share of answers that is found where they stand at a depth of texts of a length, tasks weighing alike."""
    seeds: list[float] = []
    for suite in row.detail("suite"):
        by_task: dict[str, list[float]] = {}
        for case in suite.get("rows", ()):
            if case["status"] == "measured" and (case["length"], case["depth"]) == (length, depth):
                by_task.setdefault(case["task"], []).append(float(case["found"]))
        if by_task:
            seeds.append(sum(sum(found) / len(found) for found in by_task.values()) / len(by_task))
    return Stat.of(seeds) if seeds else None


def longest(rows: Iterable[Row]) -> int | None:
    """The greatest length whose loss by position every row reports that reports any; None where none does."""
    known = [set(map(int, seed)) for row in rows for seed in row.detail("by_position")]
    both = set.intersection(*known) if known else set[int]()
    return max(both, default=None)


def positions(row: Row, length: int, after: int = 16, less: Row | None = None) -> Positions:
    """Nats by position at a length over the seeds, without the bins that end before ``after``.

    ``less``: another row's nats are taken off, seed by seed; seeds that it lacks are left out.
    """
    mine, theirs = _octaves(row, length), {} if less is None else _octaves(less, length)
    seeds = [seed for seed in mine if less is None or seed in theirs]
    bins = [at for at in (mine[seeds[0]] if seeds else {}) if at[1] > after]
    kept = [at for at in bins if all(at in mine[s] and (less is None or at in theirs[s]) for s in seeds)]
    nats = [Stat.of([mine[s][at] - (0.0 if less is None else theirs[s][at]) for s in seeds]) for at in kept]
    return Positions([first for first, _ in kept], [end - 1 for _, end in kept], nats)


def language_data(row: Row) -> dict[str, Any]:
    """A language row's details as JSON data; nothing for rows of other families."""
    if row.family != "language":
        return {}
    return {
        "trained_params": row.field("trained_params"),
        "tokens": row.detail("tokens"),
        "by_position": row.detail("by_position"),
        "suite": [{"averages": suite.get("averages"), "rows": suite.get("rows")} for suite in row.detail("suite")],
    }


def with_value(rows: Sequence[Row], value: Callable[[Row], Stat | None]) -> list[tuple[Row, Stat]]:
    """The rows that have a value, with it, in their order."""
    return [(row, stat) for row in rows if (stat := value(row)) is not None]


def plain_row(face: FaceOff, group: str) -> Row | None:
    """The row without attention, where it has results."""
    return next((row for row in face.ranked(group) if row.name == PLAIN), None)


def _answers(run: Run) -> dict[tuple[str, int], float]:
    """(task, length) -> share found; in the order of the results."""
    answers: dict[tuple[str, int], float] = {}
    for name, value in run.results["metrics"].items():
        at = at_length(name)
        if at is not None and at[0] != LOSS and value is not None and math.isfinite(value):
            answers[at] = float(value)
    return answers


def _cases(row: Row) -> list[dict[str, Any]]:
    return [case for suite in row.detail("suite") for case in suite.get("rows", ()) if case["status"] == "measured"]


def _octaves(row: Row, length: int) -> dict[int, dict[tuple[int, int], float]]:
    """Seed -> bin (first position, the one after the last) -> nats."""
    octaves: dict[int, dict[tuple[int, int], float]] = {}
    for run in row.finished:
        result = (run.results["details"].get("by_position") or {}).get(str(length))
        if result:
            octaves[run.seed] = {(bin_["from"], bin_["to"]): float(bin_["nats"]) for bin_ in result["geometric"]}
    return octaves


def band(stats: Sequence[Stat]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Means and deviations, 0 for single seeds."""
    return np.array([stat.mean for stat in stats]), np.array([stat.std or 0.0 for stat in stats])
