"""The tables of a language group: losses, answers found and costs by row; and the suite by task and by place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from recollect.eval.report.columns import PARAMETERS, SPEED, STATE, STEPS, Column, spread_note, waiting_rows
from recollect.eval.report.data import FaceOff, Row, Stat
from recollect.eval.report.language import (
    Asked,
    asked,
    depths,
    found_at,
    loss_lengths,
    share_found,
    suite_lengths,
    task_found,
    told,
)
from recollect.eval.report.metrics import LOSS
from recollect.eval.report.text import (
    Cell,
    Table,
    TableRow,
    chapter_title,
    group_title,
    human_count,
    loss_text,
    number,
    share_text,
)

SUITE = "-suite"
"""After a group's name: the table of its tasks."""

PLACES = "-places"
"""After a group's name: the table of where in the text answers stood."""

PLACE_NAMES = {0.0: "beginning", 0.5: "middle", 1.0: "end"}

REFERENCES = ("guesser", "chance")

REFERENCES_SAID = {
    "guesser": "Guesser: has read what could be an answer, and binds none to what is asked.",
    "chance": "Chance: knows only the form of the answers.",
}


class _Score(NamedTuple):
    """A column of numbers, the best of which is bold."""

    name: str
    value: Callable[[Row], Stat | None]
    text: Callable[[Stat | None], str]
    better: Callable[..., float]


def language_tables(face: FaceOff, group: str) -> list[Table]:
    """The results of a language group and, where the suite was asked, what was found by place and by task."""
    suite = (places_table(face, group), suite_table(face, group))
    return [language_table(face, group), *(table for table in suite if table is not None)]


def language_table(face: FaceOff, group: str) -> Table:
    """Rows by loss, best first: loss, loss and share found by length, then what each cost."""
    ranked = face.ranked(group)
    losses, lengths = loss_lengths(ranked), suite_lengths(ranked)
    scores = [
        _Score(LOSS, lambda row: row.score, loss_text, min),
        *(_Score(f"loss at\u00a0{n:,}", lambda row, n=n: row.metric(f"{LOSS}_{n}"), loss_text, min) for n in losses),
        *(
            _Score(f"found at\u00a0{n:,},\u00a0%", lambda row, n=n: share_found(row, n), share_text, max)
            for n in lengths
        ),
    ]
    costs: list[Column] = [
        PARAMETERS,
        ("trained", lambda row: human_count(row.field("trained_params"))),
        STATE,
        STEPS,
        *SPEED,
    ]
    bests = [_best(ranked, score) for score in scores]
    rows = [
        TableRow(
            row.name,
            (
                *(_cell(score, score.value(row), best) for score, best in zip(scores, bests, strict=True)),
                *(Cell(text(row)) for _, text in costs),
            ),
        )
        for row in ranked
    ]
    columns = (*(score.name for score in scores), *(name for name, _ in costs))
    rows += waiting_rows(face.waiting(group), len(columns))
    kept = [
        LOSS,
        *(f"loss at\u00a0{n:,}" for n in losses[-1:]),
        *(f"found at\u00a0{n:,},\u00a0%" for n in lengths[-1:]),
    ]
    terminal = tuple(columns.index(name) for name in (*kept, "state"))
    return Table(group, group_title(face, group), columns, tuple(rows), _note(face, group), terminal=terminal)


def places_table(face: FaceOff, group: str) -> Table | None:
    """What is found by length and by place, all tasks together, by rows; None where one place alone was asked about."""
    ranked = face.ranked(group)
    lines: list[TableRow] = []
    places = depths(ranked)
    if len({depth for _, depth in places}) < 2:
        return None
    for length, depth in places:
        score = _Score("", lambda row, at=(length, depth): found_at(row, *at), share_text, max)
        best = _best(ranked, score)
        name = PLACE_NAMES.get(depth, f"{100 * depth:.0f} %")
        lines.append(TableRow(f"{length:,}, {name}", tuple(_cell(score, score.value(row), best) for row in ranked)))
    note = (
        "Share of answers found by where in the text they stand, %, tasks weighing alike; best in bold. A share by "
        "length alone also favours a row that keeps the first tokens whatever they are."
    )
    title = chapter_title(face, group)
    title += f"{',' if ':' in title else ':'} what is found where"
    columns = tuple(row.name for row in ranked)
    return Table(f"{group}{PLACES}", title, columns, tuple(lines), note, corner="tokens, place", terminal=())


def suite_table(face: FaceOff, group: str) -> Table | None:
    """Tasks and lengths by rows, with what can be found without reading; None where nothing was asked."""
    ranked = face.ranked(group)
    lines: list[TableRow] = []
    cases = asked(ranked)
    beside = [name for name in REFERENCES if any(told(ranked, name, at) is not None for at in cases)]
    for at in cases:
        score = _Score("", lambda row, at=at: task_found(row, at), share_text, max)
        best = _best(ranked, score)
        known = [told(ranked, name, at) for name in beside]
        cells = [_cell(score, score.value(row), best) for row in ranked]
        cells += [Cell("" if value is None else number(100 * value, 1)) for value in known]
        lines.append(TableRow(f"{at.task}, {at.length:,}", tuple(cells)))
    if not lines:
        return None
    explained = "".join(f" {REFERENCES_SAID[name]}" for name in beside)
    prompts = _prompts(ranked, cases)
    note = (
        f"Share of answers in the greedy continuation, %{prompts}; best in bold. The tasks are this library's own, "
        f"comparable with no other suite's.{explained}"
    )
    title = chapter_title(face, group)
    title += f"{',' if ':' in title else ':'} every task of the long-context suite"
    columns = (*(row.name for row in ranked), *beside)
    return Table(f"{group}{SUITE}", title, columns, tuple(lines), note, corner="task, tokens", terminal=())


def _note(face: FaceOff, group: str) -> str:
    """What the columns are."""
    ranked = face.ranked(group)
    said = f"{spread_note(ranked)} Loss: nats per token on held-out documents"
    said += "; at a length, of the last quarter of documents so long." if loss_lengths(ranked) else "."
    cases = asked(ranked)
    n_tasks = len({at.task for at in cases})
    if cases:
        said += " Found: answers of the long-context suite, tasks weighing alike"
        for length in suite_lengths(ranked):
            if (fit := sum(at.length == length for at in cases)) < n_tasks:
                said += f"; at {length:,} the {fit} of {n_tasks} tasks that fit"
        said += "."
    trained = face.trained.get(group)
    return said + (f" Trained on rows of {trained:,} tokens." if trained else "")


def _prompts(rows: Sequence[Row], cases: Sequence[Asked]) -> str:
    asked_of = {case["n"] for row in rows for suite in row.detail("suite") for case in suite["rows"] if "n" in case}
    if not cases or len(asked_of) != 1:
        return ""
    n = asked_of.pop()
    return f" of {n} {'prompt' if n == 1 else 'prompts'} at each depth and seed"


def _cell(score: _Score, stat: Stat | None, best: float | None) -> Cell:
    return Cell(score.text(stat), stat is not None and best is not None and stat.equals(best))


def _best(rows: Sequence[Row], score: _Score) -> float | None:
    means = [stat.mean for row in rows if (stat := score.value(row))]
    return score.better(means) if len(means) > 1 and len(set(means)) > 1 else None
