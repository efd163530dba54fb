"""The tables of a report; the HTML page, the terminal and the README all print the same ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from recollect.eval.report.columns import PARAMETERS, SPEED, STATE, STEPS, Column, spread_note, waiting_rows
from recollect.eval.report.data import FaceOff, Row, Stat
from recollect.eval.report.language_tables import language_tables
from recollect.eval.report.metrics import (
    ERRORS,
    FRAMES,
    REWARDS,
    beyond,
    compares,
    explained,
    label,
    lower_is_better,
    shown,
)
from recollect.eval.report.published import published_for, published_note, published_worlds
from recollect.eval.report.text import (
    ABSENT,
    Cell,
    Table,
    TableRow,
    group_title,
    human_count,
    metric_text,
    steps_to,
)

LEVELS = (0.5, 0.9)
"""Accuracies on held-out data whose first step is tabulated."""

SUMMARY = "all-worlds"
"""The name of the table over all environments."""


def tables(face: FaceOff) -> list[Table]:
    """The results table of every group, before them one over all environments, after them what is beyond training."""
    over_all = [] if (found := all_worlds(face)) is None else [found]
    own = [found for group in face.groups for found in group_tables(face, group)]
    return [*over_all, *own, *longer_tables(face)]


def group_tables(face: FaceOff, group: str) -> list[Table]:
    """The results of a group; of a language group, those of every task of the suite too."""
    return language_tables(face, group) if face.family(group) == "language" else [table(face, group)]


def table(face: FaceOff, group: str) -> Table:
    """The results table of a recall or world group: rows best first, reference lines, then rows without results."""
    ranked, family = face.ranked(group), face.family(group)
    metrics = shown(family, face.headline(group), {m for row in ranked for m in row.reported if row.metric(m)})
    bests = {metric: _best(ranked, metric) for metric in metrics}
    published, note_on_published = _published(face, group, metrics)
    costs: list[Column] = [
        *published,
        PARAMETERS,
        STATE,
        *([("keys per query", _budget)] if any(_budget(row) != ABSENT for row in ranked) else []),
        STEPS,
        *_reached(ranked),
        *SPEED,
    ]
    rows: list[TableRow] = []
    for row in ranked:
        cells = _cells(row, metrics, bests)
        rows.append(TableRow(row.name, (*cells, *(Cell(text(row)) for _, text in costs))))
    blank = len(metrics) + len(costs)
    for name, values in _lines(face, group):
        cells = [Cell(metric_text(m, Stat.of([values[m]])) if m in values else "") for m in metrics]
        rows.append(TableRow(name, (*cells, *[Cell()] * (blank - len(cells))), "line"))
    rows += waiting_rows(face.waiting(group), blank)
    note = spread_note(ranked) + (f"{ERRORS}{explained(metrics)}" if family == "world" else "")
    if note_on_published:
        note += f" {note_on_published}"
    if any(name.startswith("steps to") for name, _ in costs):
        note += (
            " Steps to: first evaluation during training at or above that accuracy, mean of the seeds that got there."
        )
    columns = (*map(label, metrics), *(name for name, _ in costs))
    return Table(group, group_title(face, group), columns, tuple(rows), note)


def all_worlds(face: FaceOff) -> Table | None:
    """Backbones by environments, each cell the metric that ranks there; None for a single environment.

    Rows are in the order of their mean rank over all environments; those that lack one come last, without a rank.
    """
    groups = [group for group in face.groups_of("world") if face.ranked(group)]
    if len(groups) < 2:
        return None
    found = {group: {row.name: row for row in face.ranked(group)} for group in groups}
    bests = {group: _best(list(rows.values()), face.headline(group)) for group, rows in found.items()}
    ranks = mean_ranks({group: places(face, group) for group in groups})
    lines: list[TableRow] = []
    for name, rank in ranks.items():
        cells: list[Cell] = []
        for group in groups:
            row = found[group].get(name)
            stat = None if row is None else row.score
            cells.append(Cell(metric_text(face.headline(group), stat), _same(stat, bests[group])))
        lines.append(TableRow(name, (*cells, Cell(ABSENT if rank is None else f"{rank:.1f}"))))
    columns = (*(f"{group}: {label(face.headline(group))}" for group in groups), "mean rank")
    note = "What ranks the rows of each environment. Best in bold. Mean rank: of the places in all of them; 1 is first."
    without = {group: next((v for _, v in _lines(face, group)), {}).get(face.headline(group)) for group in groups}
    if any(value is not None for value in without.values()):
        cells = [
            Cell("" if (value := without[group]) is None else metric_text(face.headline(group), Stat.of([value])))
            for group in groups
        ]
        lines.append(TableRow("no memory", (*cells, Cell()), "line"))
        note += " No memory: chance, or the error of the mean picture."
    return Table(SUMMARY, "Worlds: every backbone in every environment", columns, tuple(lines), note + ERRORS)


def places(face: FaceOff, group: str) -> dict[str, float]:
    """Name -> its place in a group, 1 for the first; rows of one and the same score share the mean of their places."""
    ranked = [(row.name, score.mean) for row in face.ranked(group) if (score := row.score)]
    shared: dict[float, list[int]] = {}
    for place, (_, score) in enumerate(ranked, start=1):
        shared.setdefault(score, []).append(place)
    return {name: sum(shared[score]) / len(shared[score]) for name, score in ranked}


def mean_ranks(found: Mapping[str, Mapping[str, float]]) -> dict[str, float | None]:
    """Name -> mean of its places in all groups, best first; None, and last, for one that some group lacks."""
    names = list(dict.fromkeys(name for group in found.values() for name in group))
    own = {name: [group[name] for group in found.values() if name in group] for name in names}
    ranks = {name: sum(p) / len(p) if len(p) == len(found) else None for name, p in own.items()}
    return dict(sorted(ranks.items(), key=lambda item: (item[1] is None, item[1] or 0.0)))


def longer_tables(face: FaceOff) -> list[Table]:
    """For every world group that was tested on a larger size as well: what becomes of its metrics there."""
    found: list[Table] = []
    for group in face.groups_of("world"):
        ranked = face.ranked(group)
        metrics = beyond(m for row in ranked for m in row.reported if row.metric(m))
        note = "The same weights on longer episodes than they were trained on. Best in bold."
        if metrics:
            found.append(
                _plain(f"{group}-longer", f"Beyond the trained horizon: {group}", ranked, metrics, note + ERRORS)
            )
    return found


def frame_tables(face: FaceOff) -> list[Table]:
    """For every world group: how frames of the context and of the query are rebuilt, and dreamed."""
    found: list[Table] = []
    for group in face.groups_of("world"):
        ranked = face.ranked(group)
        metrics = [m for m in FRAMES if any(row.metric(m) for row in ranked)]
        note = (
            "Rebuilt: decoded from what was understood of the frame itself. Dreamed: after the context, from actions "
            f"alone.{ERRORS}{explained(metrics)}"
        )
        if any(metric.startswith("reconstruction") for metric in metrics):
            found.append(_plain(f"{group}-frames", f"Frames, rebuilt and dreamed: {group}", ranked, metrics, note))
    return found


def _plain(name: str, title: str, ranked: Sequence[Row], metrics: Sequence[str], note: str) -> Table:
    """Rows by metrics, without costs or lines."""
    bests = {metric: _best(ranked, metric) for metric in metrics}
    rows = tuple(TableRow(row.name, tuple(_cells(row, metrics, bests))) for row in ranked)
    return Table(name, title, tuple(map(label, metrics)), rows, note)


def _cells(row: Row, metrics: Sequence[str], bests: Mapping[str, float | None]) -> list[Cell]:
    return [Cell(metric_text(metric, stat := row.metric(metric)), _same(stat, bests[metric])) for metric in metrics]


def _published(face: FaceOff, group: str, metrics: Sequence[str]) -> tuple[list[Column], str]:
    """Columns with what others have published, and the note that says how to read them."""

    def column(metric: str, values: Mapping[str, float]) -> Callable[[Row], str]:
        return lambda row: metric_text(metric, Stat(values[row.name], None, 1)) if row.name in values else ABSENT

    if face.family(group) == "recall":
        table_of = published_for(face.name)
        found = [] if table_of is None else [("published, %", column("accuracy", table_of.values))]
        return found, published_note(face.name)
    beside = published_worlds(face.environment(group))
    if beside is None:
        return [], ""
    ours = {row.name for row in face.groups[group]}
    tables_of = {m: t for m, t in beside.tables.items() if m in metrics and ours & t.values.keys()}
    columns = [(f"published: {label(m)}", column(m, tables_of[m].values)) for m in metrics if m in tables_of]
    return columns, beside.note if columns else ""


def _best(rows: Sequence[Row], metric: str) -> float | None:
    means = [stat.mean for row in rows if (stat := row.metric(metric))]
    if len(means) < 2 or not compares(metric):
        return None
    return min(means) if lower_is_better(metric) else max(means)


def _same(stat: Stat | None, best: float | None) -> bool:
    return stat is not None and best is not None and stat.equals(best)


def _lines(face: FaceOff, group: str) -> list[tuple[str, dict[str, float]]]:
    """Reference lines under a table: the oracles of recall, the chance of rewards, the mean picture of frames."""
    if face.family(group) == "recall":
        return [(name, {"accuracy": value}) for name, value in face.oracles(group).items()]
    if (blank := face.blank(group)) is not None:
        return [("mean picture", {"generation_mse": blank, "expectation_mse": blank})]
    chance = face.line(group)
    return [] if chance is None else [("chance", dict.fromkeys(REWARDS, chance))]


def _budget(row: Row) -> str:
    """Most keys one query may read: "all" without a bound (null in the results), a dash without any attention (0)."""
    found = [run.results["details"]["key_budget"] for run in row.finished if "key_budget" in run.results["details"]]
    return (
        ", ".join(dict.fromkeys("all" if keys is None else str(keys) if keys else ABSENT for keys in found)) or ABSENT
    )


def _reached(ranked: Sequence[Row]) -> list[Column]:
    """A column for every level that some row of recall reached."""
    if not ranked or ranked[0].family != "recall":
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
