"""What a face-off directory holds, read strictly: runs, rows (one backbone over its seeds), curves and spreads.

A face-off directory is ``DIR/faceoff.json`` and, for every run, ``DIR/<group>/<row>/seed<k>/`` with ``results.json``
(only once the run has finished), ``metrics.jsonl``, ``arrays.npz``, ``config.json`` and ``environment.json``. Runs that
have not started or not finished are kept as such; a file that is damaged is an error that names it.

Where the face-off tries several learning rates a run lies in ``DIR/<group>/<row>/lr<rate>/seed<k>/``, and a row is its
runs at the rate that validates best (``recollect.eval.report.selection``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from recollect.eval.report.metrics import REWARDS, headline_of, lower_is_better
from recollect.eval.report.selection import Tried, choose, validation_score

Status = Literal["finished", "unfinished", "not started", "diverged"]
Axis = Literal["step", "seconds"]
Floats = npt.NDArray[np.float64]

ORACLE_NAMES = {"key-majority": "context-blind", "context-majority": "key-blind"}
"""What an oracle is called here, where its name in ``recollect.tasks`` says how it guesses."""


@dataclass(frozen=True)
class Stat:
    """Mean over n seeds and the sample standard deviation (n - 1 in the denominator; None for a single seed)."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Stat:
        """The statistic of at least one value."""
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        return cls(float(np.mean(values)), std, len(values))

    def equals(self, mean: float) -> bool:
        """Whether this is that mean but for the order in which it was summed."""
        return math.isclose(self.mean, mean, rel_tol=1e-9)

    @property
    def low(self) -> float:
        """One standard deviation below the mean (the mean itself for a single seed)."""
        return self.mean - (self.std or 0.0)

    @property
    def high(self) -> float:
        """One standard deviation above the mean."""
        return self.mean + (self.std or 0.0)


@dataclass(frozen=True)
class Run:
    """One training run: a backbone, a group and a seed. ``results`` is empty unless ``status`` is "finished"."""

    group: str
    family: str
    """What the group asks: one of ``recollect.train.run.FAMILIES``."""
    row: str
    seed: int
    folder: Path
    status: Status
    results: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    environment: dict[str, Any]

    @cached_property
    def headline(self) -> str:
        """The metric that its group is ranked by."""
        return headline_of(self.family, self.results)

    @cached_property
    def validation(self) -> tuple[str, float] | None:
        """Name and value of the score of the tested weights on validation data; None where there is none."""
        return validation_score(self.results, self.log)

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 when nothing was."""
        return int(self.log[-1]["step"]) if self.log else 0

    def curve(self, name: str, axis: Axis, *, evaluation: bool = False) -> tuple[Floats, Floats]:
        """(x, y) of a logged number, or of one under ``"eval"``; x is training steps or seconds of training so far.

        Evaluations are those on validation data; the final test stands in for them where there was none.
        """
        clock = self._clock if axis == "seconds" else [float(line["step"]) for line in self.log]
        points: list[tuple[float, float]] = []
        for x, line in zip(clock, self.log, strict=True):
            if evaluation and self._validated and line.get("split") == "test":
                continue
            value = (line.get("eval") or {}).get(name) if evaluation else line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((x, float(value)))
        xs, ys = zip(*points, strict=True) if points else ((), ())
        return np.array(xs, dtype=np.float64), np.array(ys, dtype=np.float64)

    @property
    def _validated(self) -> bool:
        return any(line.get("split") == "valid" for line in self.log)

    @cached_property
    def _clock(self) -> list[float]:
        """Training seconds at every log line: as logged, else steps divided by the speed logged for them."""
        seconds, previous, clock = 0.0, 0, []
        for line in self.log:
            elapsed, speed = line.get("elapsed_s"), line.get("steps_per_s")
            if isinstance(elapsed, (int, float)):
                seconds = float(elapsed)
            elif isinstance(speed, (int, float)) and speed > 0:
                seconds += (line["step"] - previous) / speed
            previous = line["step"]
            clock.append(seconds)
        return clock


@dataclass(frozen=True)
class Trial:
    """One backbone at one learning rate, over its seeds."""

    lr: float
    validation: Stat | None
    """Over the seeds that have finished; what the rate is chosen by."""
    test: Stat | None
    """The metric that ranks the group, over the same seeds; shown, never chosen by."""
    finished: int
    runs: tuple[Run, ...]

    @classmethod
    def of(cls, lr: float, runs: tuple[Run, ...]) -> Trial:
        """The trial that these runs make up."""
        done = [run for run in runs if run.status == "finished"]
        validation = [run.validation[1] for run in done if run.validation is not None]
        tested = [run.results["metrics"].get(run.headline) for run in done]
        test = [float(value) for value in tested if value is not None and math.isfinite(value)]
        return cls(lr, Stat.of(validation) if validation else None, Stat.of(test) if test else None, len(done), runs)

    @property
    def diverged(self) -> bool:
        """Whether a seed's loss stopped being finite, which it would do again."""
        return any(run.status == "diverged" for run in self.runs)


@dataclass(frozen=True)
class Row:
    """One backbone in one group, over its seeds: at its one learning rate, or at the one chosen among ``trials``."""

    group: str
    name: str
    runs: tuple[Run, ...]
    lr: float | None = None
    """The rate that was chosen; None where none were tried, or none has a score yet."""
    trials: tuple[Trial, ...] = ()
    provisional: bool = False
    """A rate has not finished on every seed: another one may be chosen yet."""

    @classmethod
    def chosen(cls, group: str, name: str, trials: tuple[Trial, ...]) -> Row:
        """The row at the rate with the best mean validation score."""
        scored = [run.validation[0] for trial in trials for run in trial.runs if run.validation is not None]
        picked = choose(
            [
                Tried(
                    None if trial.validation is None else trial.validation.mean,
                    complete=trial.validation is not None and trial.validation.n == len(trial.runs),
                    settled=trial.finished == len(trial.runs) or trial.diverged,
                )
                for trial in trials
            ],
            higher_is_better=not (scored and lower_is_better(scored[0])),
        )
        if picked.index is None:
            furthest = max(trials, key=lambda trial: trial.finished)
            return cls(group, name, furthest.runs, None, trials, picked.provisional)
        trial = trials[picked.index]
        return cls(group, name, trial.runs, trial.lr, trials, picked.provisional)

    @property
    def family(self) -> str:
        """What its group asks: one of ``recollect.train.run.FAMILIES``."""
        return self.runs[0].family

    @property
    def headline(self) -> str:
        """The metric that ranks its group."""
        return next(iter(self.finished), self.runs[0]).headline

    @property
    def reported(self) -> dict[str, None]:
        """The metrics that a finished seed reports, in their order."""
        return dict.fromkeys(name for run in self.finished for name in run.results["metrics"])

    @cached_property
    def finished(self) -> tuple[Run, ...]:
        """The runs that have results."""
        return tuple(run for run in self.runs if run.status == "finished")

    def metric(self, name: str) -> Stat | None:
        """A metric over the finished seeds; None where no seed has a finite value."""
        values = [float(v) for run in self.finished if (v := run.results["metrics"].get(name)) is not None]
        values = [value for value in values if math.isfinite(value)]
        return Stat.of(values) if values else None

    @property
    def score(self) -> Stat | None:
        """The metric that ranks this group."""
        return self.metric(self.headline)

    def field(self, name: str) -> float | None:
        """A number of ``results.json`` outside ``metrics`` (params, state_bytes, wall_s, steps), mean over seeds."""
        values = [float(v) for run in self.finished if isinstance(v := run.results.get(name), (int, float))]
        return sum(values) / len(values) if values else None

    def texts(self, name: str) -> list[str]:
        """The distinct values of a text field of ``results.json``, in the order of the seeds."""
        return list(dict.fromkeys(str(v) for run in self.finished if (v := run.results.get(name)) is not None))

    @property
    def steps_per_s(self) -> float | None:
        """Median of the training speeds that were logged, else steps over wall seconds."""
        logged = [line.get("steps_per_s") for run in self.finished for line in run.log]
        speeds = [value for value in logged if isinstance(value, (int, float))]
        if speeds:
            return float(np.median(speeds))
        steps, wall_s = self.field("steps"), self.field("wall_s")
        return steps / wall_s if steps and wall_s else None

    def detail(self, name: str) -> list[Any]:
        """A key of ``details`` for each finished seed that has it."""
        return [v for run in self.finished if (v := run.results.get("details", {}).get(name)) is not None]

    def mean_curve(self, name: str, axis: Axis, *, evaluation: bool = False) -> tuple[Floats, Floats]:
        """Mean over the finished seeds, interpolated onto common x values in the range all of them cover."""
        curves = [run.curve(name, axis, evaluation=evaluation) for run in self.finished]
        return mean_of_curves([curve for curve in curves if curve[0].size])


@dataclass(frozen=True)
class FaceOff:
    """Everything a report is made from."""

    directory: Path
    name: str
    title: str
    groups: dict[str, tuple[Row, ...]]
    tasks: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    """The kinds of task that the recall runs of a group are trained on."""
    trained: dict[str, int] = field(default_factory=dict[str, int])
    """Tokens of the rows that a language group is trained on, where all its runs agree."""

    @cached_property
    def row_names(self) -> list[str]:
        """Every backbone once, in the order of ``faceoff.json``: fixes its colour in every figure."""
        return list(dict.fromkeys(row.name for rows in self.groups.values() for row in rows))

    @property
    def runs(self) -> list[Run]:
        """Every run of every row, at the learning rate that its row is reported at."""
        return [run for rows in self.groups.values() for row in rows for run in row.runs]

    @property
    def provisional(self) -> list[Row]:
        """The rows that may yet be reported at another learning rate."""
        return [row for rows in self.groups.values() for row in rows if row.provisional]

    def family(self, group: str) -> str:
        """What a group asks: one of ``recollect.train.run.FAMILIES``."""
        return self.groups[group][0].family

    def groups_of(self, family: str) -> list[str]:
        """The groups of a family, in the order of ``faceoff.json``."""
        return [group for group in self.groups if self.family(group) == family]

    def headline(self, group: str) -> str:
        """The metric that ranks a group."""
        rows = self.groups[group]
        return next((row for row in rows if row.finished), rows[0]).headline

    def ranked(self, group: str) -> list[Row]:
        """The rows with results, best first."""
        scored = [(score.mean, row) for row in self.groups.get(group, ()) if (score := row.score)]
        sign = 1 if scored and lower_is_better(self.headline(group)) else -1
        return [row for _, row in sorted(scored, key=lambda pair: sign * pair[0])]

    def environment(self, group: str) -> dict[str, Any] | None:
        """The config of the environment that a world group was trained on, where its runs say so."""
        return next((found for row in self.groups[group] for found in row.detail("env")), None)

    def waiting(self, group: str) -> list[Row]:
        """The rows without any result yet."""
        return [row for row in self.groups.get(group, ()) if row.score is None]

    def oracles(self, group: str | None = None) -> dict[str, float]:
        """Accuracy of the guessers that a recall group's evaluations name, highest first; without the perfect solver.

        None: the first recall group's, or nothing.
        """
        group = group or next(iter(self.groups_of("recall")), "")
        found: dict[str, list[float]] = {}
        for row in self.groups.get(group, ()):
            blind = next(iter(row.detail("blind")), "key-majority")
            names = {**ORACLE_NAMES, "key-majority": "key-majority", blind: "context-blind"}
            for oracles in row.detail("oracles"):
                for name, value in oracles.items():
                    if name != "perfect":
                        found.setdefault(names.get(name, str(name)), []).append(float(value))
        means = {name: sum(values) / len(values) for name, values in found.items()}
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    @property
    def guesser(self) -> tuple[str, float] | None:
        """``guesser_of`` the first recall group."""
        return self.guesser_of(None)

    def guesser_of(self, group: str | None) -> tuple[str, float] | None:
        """The guesser that a recall row must beat: the context-blind one, or the best where a task has none."""
        found = self.oracles(group)
        name = "context-blind" if "context-blind" in found else next(iter(found), None)
        return None if name is None else (name, found[name])

    def line(self, group: str) -> float | None:
        """What a row must beat: the guesser's score for recall, chance for rewards; nothing for frames or text."""
        if self.family(group) == "recall":
            guesser = self.guesser_of(group)
            return None if guesser is None else guesser[1]
        if self.family(group) != "world" or self.headline(group) not in REWARDS:
            return None
        chances = [float(c) for row in self.groups.get(group, ()) for c in row.detail("chance")]
        return chances[0] if chances else 0.5

    def blank(self, group: str) -> float | None:
        """The error of the mean picture, where dreamed frames rank the rows and their runs recorded it."""
        if self.family(group) != "world" or self.headline(group) != "generation_mse":
            return None
        errors = [float(e) for row in self.groups.get(group, ()) for e in row.detail("mean_picture_mse")]
        return errors[0] if errors else None


def mean_of_curves(curves: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Mean of several (x, y) with increasing x: on the union of their x inside the range that all of them cover."""
    if not curves:
        return np.empty(0), np.empty(0)
    low, high = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    xs = np.unique(np.concatenate([x for x, _ in curves]))
    xs = xs[(xs >= low) & (xs <= high)]
    return xs, np.mean([np.interp(xs, x, y) for x, y in curves], axis=0) if xs.size else xs


def binned(x: Floats, y: Floats, n_bins: int = 120) -> tuple[Floats, Floats]:
    """Means over at most ``n_bins`` runs of neighbouring points: a noisy loss made readable without a lag."""
    if x.size <= n_bins:
        return x, y
    edges = np.linspace(0, x.size, n_bins + 1).astype(int)[:-1]
    counts = np.diff(np.append(edges, x.size))
    return np.add.reduceat(x, edges) / counts, np.add.reduceat(y, edges) / counts


def rows_of(face: FaceOff) -> list[dict[str, Any]]:
    """``result_rows`` of a face-off that has been read."""
    rows: list[dict[str, Any]] = []
    for row in (row for group in face.groups.values() for row in group if row.finished):
        stats = {name: stat for name in row.reported if (stat := row.metric(name))}
        rows.append(
            {
                "recipe": ", ".join(row.texts("recipe")),
                "row": row.name,
                "group": row.group,
                "metrics": {name: stat.mean for name, stat in stats.items()},
                "spread": {name: stat.std for name, stat in stats.items() if stat.std is not None},
                "n_seeds": len(row.finished),
                "params": _whole(row.field("params")),
                "state_bytes": _whole(row.field("state_bytes")),
                "commit": ", ".join(row.texts("commit")),
                "device": ", ".join(row.texts("device")),
                "wall_s": row.field("wall_s"),
                "lr": row.lr,
            }
        )
    return rows


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def plain(value: Any) -> Any:
    """JSON data without NaN or infinity (they become None) and without numpy types."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def mean_table(rows: Iterable[dict[str, Any]]) -> dict[str, Any] | None:
    """Mean of accuracies by size over the same sizes; None when there is none.

    Takes what ``RecallScores.cells`` gives and lays it out over its last two axes: {"axes", "rows", "columns",
    "accuracy" (rows, columns)}, NaN where a size was not asked for.
    """
    tables = list(rows)
    if not tables:
        return None
    first = tables[0]
    same = [t for t in tables if t["sizes"] == first["sizes"]]
    accuracy = np.mean([np.array(t["accuracy"], dtype=np.float64) for t in same], axis=0)
    outer = [tuple(size[:-1]) for size in first["sizes"]]
    rows_, columns = list(dict.fromkeys(outer)), sorted({int(size[-1]) for size in first["sizes"]})
    laid = np.full((len(rows_), len(columns)), np.nan)
    for before, size, value in zip(outer, first["sizes"], accuracy, strict=True):
        laid[rows_.index(before), columns.index(size[-1])] = value
    names = [" x ".join(map(str, before)) for before in rows_]
    return {"axes": list(first["axes"]), "rows": names, "columns": columns, "accuracy": laid}
