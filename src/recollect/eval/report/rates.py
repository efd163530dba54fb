"""The learning rates that a face-off tried, as a small table for each group, as JSON data and in words."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from recollect.eval.report.data import FaceOff, Row, Trial
from recollect.eval.report.metrics import is_share
from recollect.eval.report.read import load_faceoff
from recollect.eval.report.text import ABSENT, Cell, Table, TableRow, score_text

PLAIN = {"recall": "words", "world": "worlds", "language": "text"}
"""What the groups of these names are called."""

NOTE = (
    "Mean validation score over seeds{unit}, and the test score beside it. Bold: the rate with the best validation, at "
    "which the backbone is reported; test scores take no part in the choice."
)


def rate_tables(face: FaceOff) -> list[Table]:
    """A table for each group whose rows tried several rates: backbones by rates."""
    return [_table(group, rows) for group, rows in face.groups.items() if any(len(row.trials) > 1 for row in rows)]


def rate_data(row: Row) -> dict[str, Any]:
    """A row's choice and what it was chosen from, as JSON data; nothing where no rates were tried."""
    if not row.trials:
        return {}
    trials = [
        {
            "lr": trial.lr,
            "validation": trial.validation and asdict(trial.validation),
            "test": trial.test and asdict(trial.test),
            "runs": [{"seed": run.seed, "status": run.status, "last_step": run.last_step} for run in trial.runs],
        }
        for trial in row.trials
    ]
    return {"lr": row.lr, "provisional": row.provisional, "trials": trials}


def undecided(directory: Path) -> list[str]:
    """One line for every row that may yet be reported at another rate. Raises as ``load_faceoff`` does."""
    return [f"{row.group}/{row.name}: {_standing(row)}" for row in load_faceoff(directory).provisional]


def _table(group: str, rows: tuple[Row, ...]) -> Table:
    rates = list(dict.fromkeys(trial.lr for row in rows for trial in row.trials))
    lines: list[TableRow] = []
    for row in rows:
        trials = {trial.lr: trial for trial in row.trials}
        cells = [Cell(_cell(trials[lr]), lr == row.lr) if lr in trials else Cell(ABSENT) for lr in rates]
        lines.append(TableRow(row.name, tuple(cells)))
    pending = [f" {row.name}: {_standing(row)}." for row in rows if row.provisional]
    title = f"Learning rates tried: {PLAIN.get(group, group)}"
    note = NOTE.format(unit=", %" if is_share(rows[0].headline) else "") + "".join(pending)
    return Table(f"{group}-rates", title, tuple(f"{lr:g}" for lr in rates), tuple(lines), note)


def _standing(row: Row) -> str:
    done = ", ".join(f"{trial.finished} of {len(trial.runs)} at {trial.lr:g}" for trial in row.trials)
    if row.lr is None:
        return f"no learning rate has a validation score yet ({done} seeds finished)"
    return f"learning rate {row.lr:g} is provisional ({done} seeds finished)"


def _cell(trial: Trial) -> str:
    metric = next((run.headline for run in trial.runs if run.status == "finished"), "")
    family = trial.runs[0].family
    parts = [] if trial.validation is None else [score_text(family, metric, trial.validation)]
    if trial.test is not None:
        parts.append(f"(test {score_text(family, metric, replace(trial.test, std=None))})")
    if trial.diverged:
        parts.append("diverged")
    elif trial.finished < len(trial.runs):
        parts.append(f"{trial.finished} of {len(trial.runs)} seeds")
    return "\u00a0".join(parts) or ABSENT
