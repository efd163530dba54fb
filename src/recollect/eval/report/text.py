"""What a report says in words and tables, computed from the numbers: verdicts, sentences, cells.

The HTML page, the terminal and the README all print the same ``Table``s and sentences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from recollect.eval.report.data import LOWER_IS_BETTER, METRICS, FaceOff, Row, Stat
from recollect.eval.report.published import published_for, published_note

ABSENT = "-"

TIE = 0.02
"""Accuracies within this of the best one, or within its standard deviation, are called level with it."""

MARGIN = 0.05
"""A row is above chance or above the context-blind oracle when its mean less one deviation clears it by this much."""

LABELS = {
    "accuracy": "accuracy, %",
    "accuracy_largest": "largest table, %",
    "all_correct": "whole tables right, %",
    "binding_gap": "binding gap, %",
    "imagination_accuracy": "reward, imagining, %",
    "inference_accuracy": "reward, observing, %",
    "reconstruction_mse": "reconstruction error",
    "generation_mse": "generation error",
}

LEVELS = (0.5, 0.9)
"""Accuracies on held-out data whose first step is tabulated."""


@dataclass(frozen=True)
class Cell:
    """One table cell; ``best`` marks the best of its column."""

    text: str = ""
    best: bool = False


@dataclass(frozen=True)
class TableRow:
    """A backbone ("row"), a reference such as an oracle or chance ("line"), or one without results ("waiting")."""

    name: str
    cells: tuple[Cell, ...]
    form: Literal["row", "line", "waiting"] = "row"


@dataclass(frozen=True)
class Table:
    """Results of one group. The first column, the backbone's name, is not among ``columns``."""

    group: str
    title: str
    columns: tuple[str, ...]
    rows: tuple[TableRow, ...]
    note: str


@dataclass(frozen=True)
class Verdict:
    """Who leads a group: every row that is level with the best, and whether the best clears the line at all."""

    leaders: tuple[Row, ...]
    others: tuple[Row, ...]
    clears: bool
    below: tuple[Row, ...]


def percent(value: float) -> str:
    """0.971 -> "97.1 %" (with a no-break space)."""
    return f"{number(100 * value, 1)}\u00a0%"


def number(value: float, digits: int) -> str:
    """Fixed digits, or a dash for what is not finite."""
    return f"{value:.{digits}f}" if math.isfinite(value) else ABSENT


def significant(value: float) -> str:
    """Three significant digits without an exponent where that stays readable."""
    if not math.isfinite(value):
        return ABSENT
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e4 or value == 0 else f"{value:.2e}"


def human_bytes(value: float | None) -> str:
    """4096 -> "4.0 KiB"."""
    if value is None:
        return ABSENT
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.0f}\u00a0B" if unit == "B" else f"{value:.1f}\u00a0{unit}"
        value /= 1024
    return f"{value:.1f}\u00a0GiB"


def human_seconds(value: float | None) -> str:
    """200 -> "3 min 20 s"."""
    if value is None:
        return ABSENT
    if value < 60:
        return f"{value:.0f}\u00a0s" if value >= 10 else f"{value:.1f}\u00a0s"
    minutes, seconds = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}\u00a0h\u00a0{minutes:02d}\u00a0min" if hours else f"{minutes}\u00a0min\u00a0{seconds:02d}\u00a0s"


def human_count(value: float | None) -> str:
    """100594 -> "100,594"; millions are rounded to "1.23 M"."""
    if value is None:
        return ABSENT
    return f"{value / 1e6:.2f}\u00a0M" if value >= 1e6 else f"{value:,.0f}"


def listed(names: Sequence[str]) -> str:
    """["a", "b", "c"] -> "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def task_name(face: FaceOff) -> str:
    """What the recall rows are trained on: "joint recall"; "recall" where runs differ or do not say."""
    return face.tasks[0].replace("-", " ") if len(face.tasks) == 1 else "recall"


def group_title(face: FaceOff, group: str) -> str:
    """The heading of a group's table."""
    return f"Words: {task_name(face)}" if group == "recall" else "Worlds: reward and frames in imagination"


def guesser_phrase(face: FaceOff) -> str:
    """The guesser that recall is held against, in words."""
    name = face.guesser[0] if face.guesser else "context-blind"
    return "a guesser that ignores the context" if name == "context-blind" else f"the guesser '{name}'"


def steps_to(row: Row, level: float) -> tuple[float, int] | None:
    """Steps until held-out accuracy first reached ``level``: mean over the finished seeds that did, and how many."""
    firsts: list[float] = []
    for run in row.finished:
        steps, accuracy = run.curve("accuracy", "step", evaluation=True)
        firsts += steps[accuracy >= level][:1].tolist()
    return (sum(firsts) / len(firsts), len(firsts)) if firsts else None


def verdict(face: FaceOff, group: str) -> Verdict | None:
    """Who leads ``group``; None while it has no results."""
    ranked = face.ranked(group)
    if not ranked:
        return None
    best, line = _score(ranked[0]), face.line(group)
    leaders = tuple(row for row in ranked if _level(best, _score(row)))
    below = tuple(row for row in ranked if line is not None and _score(row).low <= line + MARGIN)
    return Verdict(leaders, tuple(row for row in ranked if row not in leaders), ranked[0] not in below, below)


def answer(face: FaceOff) -> list[str]:
    """The shortest true answer to "which backbone remembers?", one sentence per group, or one where they agree."""
    found = {group: verdict(face, group) for group in METRICS}
    names = {group: _names(v.leaders) if v.clears else "none yet" for group, v in found.items() if v is not None}
    if len(names) == 2 and names["recall"] == names["world"]:
        return [f"In words and in worlds, {names['recall']}."]
    return [f"In {'words' if group == 'recall' else 'worlds'}, {name}." for group, name in names.items()]


def sentences(face: FaceOff) -> list[str]:
    """The headline in paragraphs: one per group (who leads, by how much, at what price), then what is still missing."""
    said = [" ".join(found) for group in METRICS if (found := _group_sentences(face, group))]
    notes: list[str] = []
    unfinished = [run for run in face.runs if run.status != "finished"]
    if unfinished:
        notes.append(f"Not everything is in: {len(unfinished)} of {len(face.runs)} runs have not finished.")
    if all(len(row.finished) <= 1 for rows in face.groups.values() for row in rows):
        notes.append("One seed each: small differences mean little.")
    return [*said, " ".join(notes)] if notes else said


def table(face: FaceOff, group: str) -> Table:
    """The results table of one group: rows best first, then reference lines, then rows without results."""
    ranked = face.ranked(group)
    metrics = [m for i, m in enumerate(METRICS[group]) if i == 0 or any(row.metric(m) for row in ranked)]
    bests = {metric: _best(ranked, metric) for metric in metrics}
    costs: list[tuple[str, Callable[[Row], str]]] = [
        ("parameters", lambda row: human_count(row.field("params"))),
        ("state", lambda row: human_bytes(row.field("state_bytes"))),
        ("steps", lambda row: human_count(row.field("steps"))),
        *_reached(ranked),
        ("time", lambda row: human_seconds(row.field("wall_s"))),
        ("steps/s", lambda row: ABSENT if row.steps_per_s is None else significant(row.steps_per_s)),
        ("seeds", lambda row: f"{len(row.finished)} of {len(row.runs)}"),
    ]
    if any(_budget(row) != ABSENT for row in ranked):
        costs.insert(2, ("keys per query", _budget))
    published = published_for(face.name) if group == "recall" else None
    if published is not None:
        paper = published.accuracy
        costs.insert(0, ("published, %", lambda row: f"{100 * paper[row.name]:.1f}" if row.name in paper else ABSENT))
    rows: list[TableRow] = []
    for row in ranked:
        cells = [
            Cell(_metric_text(metric, stat := row.metric(metric)), _same(stat, bests[metric])) for metric in metrics
        ]
        rows.append(TableRow(row.name, (*cells, *(Cell(text(row)) for _, text in costs))))
    blank = len(metrics) + len(costs)
    for name, values in _lines(face, group):
        cells = [Cell(f"{100 * values[m]:.1f}" if m in values else "") for m in metrics]
        rows.append(TableRow(name, (*cells, *[Cell()] * (blank - len(cells))), "line"))
    waiting = face.waiting(group)
    rows += [TableRow(row.name, (Cell(_progress(row)), *[Cell()] * (blank - 1)), "waiting") for row in waiting]
    note = _note(ranked) + (
        " Errors: squared, summed over the pixels of a frame; less is better." if group == "world" else ""
    )
    if published is not None:
        note += f" {published_note(face.name)}"
    if any(name.startswith("steps to") for name, _ in costs):
        note += (
            " Steps to: first evaluation during training at or above that accuracy, mean of the seeds that got there."
        )
    columns = (*(LABELS[metric] for metric in metrics), *(name for name, _ in costs))
    return Table(group, group_title(face, group), columns, tuple(rows), note)


def tables(face: FaceOff) -> list[Table]:
    """The results table of every group."""
    return [table(face, group) for group in face.groups]


def _score(row: Row) -> Stat:
    score = row.score
    assert score is not None, f"{row.name} has no results"
    return score


def _level(best: Stat, other: Stat) -> bool:
    # The other's spread does not count: a row whose seeds scatter is not level with one whose seeds agree.
    return best.mean - other.mean <= max(TIE, best.std or 0.0)


def _names(rows: Sequence[Row]) -> str:
    return listed([row.name for row in rows])


def _group_sentences(face: FaceOff, group: str) -> list[str]:
    found = verdict(face, group)
    if found is None:
        return []
    line = face.line(group)
    best = found.leaders[0]
    task = f"On {task_name(face)}" if group == "recall" else "Asked for the reward after imagining the way to it"
    unit = "of the values" if group == "recall" else "of the rewards"
    reference = guesser_phrase(face) if group == "recall" else "chance"
    against = f"; {reference} gets {percent(line)}" if line is not None else ""
    if not found.clears:
        first = f"{task}, no backbone remembers yet: {best.name}, the best, gets {_spread(_score(best))} {unit} right"
        return [f"{first}{against}."]
    if len(found.leaders) > 1:
        worst = _score(found.leaders[-1])
        first = (
            f"{task}, {_names(found.leaders)} are level: between {percent(worst.mean)} and "
            f"{percent(_score(best).mean)} {unit} right"
        )
    else:
        first = f"{task}, {best.name} gets {_spread(_score(best))} {unit} right"
    if found.others:
        first += f", {found.others[0].name} {percent(_score(found.others[0]).mean)}"
    said = [f"{first}{against}."]
    if found.below:
        verb = "is" if len(found.below) == 1 else "are"
        said.append(f"{_names(found.below)} {verb} not clearly better than {reference}.")
    return [*said, *_state_sentence(face.ranked(group), found.leaders)]


def _state_sentence(ranked: Sequence[Row], leaders: Sequence[Row]) -> list[str]:
    """What the most frugal leader carries against the row with the largest state."""
    sizes = {row.name: size for row in ranked if (size := row.field("state_bytes")) is not None}
    frugal = min((row.name for row in leaders if row.name in sizes), key=sizes.__getitem__, default=None)
    if frugal is None or len(sizes) < 2:
        return []
    largest = max(sizes, key=sizes.__getitem__)
    if largest == frugal:
        return [f"{frugal} also carries the largest state, {human_bytes(sizes[frugal])} per sequence."]
    mine, theirs = human_bytes(sizes[frugal]), human_bytes(sizes[largest])
    return [f"{frugal} carries {mine} of state per sequence; the largest, {largest}, {theirs}."]


def _spread(stat: Stat) -> str:
    if stat.std is None:
        return percent(stat.mean)
    return f"{number(100 * stat.mean, 1)}\u00a0±\u00a0{number(100 * stat.std, 1)}\u00a0%"


def _metric_text(metric: str, stat: Stat | None) -> str:
    if stat is None:
        return ABSENT
    if metric in LOWER_IS_BETTER:
        return significant(stat.mean) + ("" if stat.std is None else f"\u00a0±\u00a0{significant(stat.std)}")
    return number(100 * stat.mean, 1) + ("" if stat.std is None else f"\u00a0±\u00a0{number(100 * stat.std, 1)}")


def _best(rows: Sequence[Row], metric: str) -> float | None:
    means = [stat.mean for row in rows if (stat := row.metric(metric))]
    if len(means) < 2:
        return None
    return min(means) if metric in LOWER_IS_BETTER else max(means)


def _same(stat: Stat | None, best: float | None) -> bool:
    return stat is not None and best is not None and stat.mean == best


def _lines(face: FaceOff, group: str) -> list[tuple[str, dict[str, float]]]:
    """Reference lines under a table: the oracles of recall, the chance of worlds."""
    if group == "recall":
        return [(name, {"accuracy": value}) for name, value in face.oracles().items()]
    chance = face.line(group)
    return [] if chance is None else [("chance", {"imagination_accuracy": chance, "inference_accuracy": chance})]


def _budget(row: Row) -> str:
    """Most keys one query may read: "all" without a bound (null in the results), a dash without any attention (0)."""
    found = [run.results["details"]["key_budget"] for run in row.finished if "key_budget" in run.results["details"]]
    return (
        ", ".join(dict.fromkeys("all" if keys is None else str(keys) if keys else ABSENT for keys in found)) or ABSENT
    )


def _reached(ranked: Sequence[Row]) -> list[tuple[str, Callable[[Row], str]]]:
    """A column for every level that some row of recall reached."""
    if not ranked or ranked[0].group != "recall":
        return []

    def column(level: float) -> Callable[[Row], str]:
        def text(row: Row) -> str:
            found = steps_to(row, level)
            if found is None:
                return ABSENT
            share = f" ({found[1]} of {len(row.finished)})" if found[1] < len(row.finished) else ""
            return human_count(found[0]) + share

        return text

    levels = [level for level in LEVELS if any(steps_to(row, level) for row in ranked)]
    return [(f"steps to {100 * level:.0f}\u00a0%", column(level)) for level in levels]


def _progress(row: Row) -> str:
    return "; ".join(describe_unfinished(run.status, run.seed, run.last_step) for run in row.runs)


def describe_unfinished(status: str, seed: int, last_step: int) -> str:
    """Where a run stands, as in "seed 1: unfinished, at step 130"."""
    return f"seed {seed}: {status}" + (f", at step {last_step}" if status == "unfinished" and last_step else "")


def _note(ranked: Sequence[Row]) -> str:
    counts = sorted({len(row.finished) for row in ranked})
    if not counts:
        return "No run of this group has finished."
    if counts == [1]:
        return "One seed per row, so no spread is given. Best in bold. State: bytes carried per sequence."
    seeds = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return f"Mean ± sample standard deviation over {seeds} seeds. Best in bold. State: bytes carried per sequence."
