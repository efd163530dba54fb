"""What a face-off directory holds, read strictly: runs, rows (one backbone over its seeds), curves and spreads.

A face-off directory is ``DIR/faceoff.json`` and, for every run, ``DIR/<group>/<row>/seed<k>/`` with ``results.json``
(only once the run has finished), ``metrics.jsonl``, ``arrays.npz``, ``config.json`` and ``environment.json``. Runs that
have not started or not finished are kept as such; a file that is damaged is an error that names it.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from recollect.core.errors import RunError, nearest

Status = Literal["finished", "unfinished", "not started"]
Axis = Literal["step", "seconds"]
Floats = npt.NDArray[np.float64]

METRICS: dict[str, tuple[str, ...]] = {
    "recall": ("accuracy", "accuracy_largest", "all_correct", "binding_gap"),
    "world": ("imagination_accuracy", "inference_accuracy", "reconstruction_mse", "generation_mse"),
}
"""Groups and the metrics each reports; the first one ranks the rows."""

ORACLE_NAMES = {"key-majority": "context-blind", "context-majority": "key-blind"}
"""What an oracle is called here, where its name in ``recollect.tasks`` says how it guesses."""

LOWER_IS_BETTER = frozenset({"reconstruction_mse", "generation_mse"})


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

    @property
    def low(self) -> float:
        """One standard deviation below the mean (the mean itself for a single seed)."""
        return self.mean - (self.std or 0.0)


@dataclass(frozen=True)
class Run:
    """One training run: a backbone, a group and a seed. ``results`` is empty unless ``status`` is "finished"."""

    group: str
    row: str
    seed: int
    folder: Path
    status: Status
    results: dict[str, Any]
    log: tuple[dict[str, Any], ...]
    environment: dict[str, Any]

    @property
    def last_step(self) -> int:
        """The last step that was logged; 0 when nothing was."""
        return int(self.log[-1]["step"]) if self.log else 0

    def curve(self, name: str, axis: Axis, *, evaluation: bool = False) -> tuple[Floats, Floats]:
        """(x, y) of a logged number, or of one under ``"eval"``; x is training steps or seconds of training so far."""
        clock = self._clock if axis == "seconds" else [float(line["step"]) for line in self.log]
        points: list[tuple[float, float]] = []
        for x, line in zip(clock, self.log, strict=True):
            value = (line.get("eval") or {}).get(name) if evaluation else line.get(name)
            if isinstance(value, (int, float)) and math.isfinite(value):
                points.append((x, float(value)))
        xs, ys = zip(*points, strict=True) if points else ((), ())
        return np.array(xs, dtype=np.float64), np.array(ys, dtype=np.float64)

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
class Row:
    """One backbone in one group, over its seeds."""

    group: str
    name: str
    runs: tuple[Run, ...]

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
        return self.metric(METRICS[self.group][0])

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
    tasks: tuple[str, ...] = ()
    """The kinds of task that its recall runs are trained on."""

    @cached_property
    def row_names(self) -> list[str]:
        """Every backbone once, in the order of ``faceoff.json``: fixes its colour in every figure."""
        return list(dict.fromkeys(row.name for rows in self.groups.values() for row in rows))

    @property
    def runs(self) -> list[Run]:
        """Every run that ``faceoff.json`` asks for."""
        return [run for rows in self.groups.values() for row in rows for run in row.runs]

    def ranked(self, group: str) -> list[Row]:
        """The rows with results, best first."""
        scored = [(score.mean, row) for row in self.groups.get(group, ()) if (score := row.score)]
        return [row for _, row in sorted(scored, key=lambda pair: -pair[0])]

    def waiting(self, group: str) -> list[Row]:
        """The rows without any result yet."""
        return [row for row in self.groups.get(group, ()) if row.score is None]

    def oracles(self) -> dict[str, float]:
        """Accuracy of the guessers that the recall evaluations name, highest first; without the perfect solver."""
        found: dict[str, list[float]] = {}
        for row in self.groups.get("recall", ()):
            blind = next(iter(row.detail("blind")), "key-majority")
            names = {**ORACLE_NAMES, "key-majority": "key-majority", blind: "context-blind"}
            for oracles in row.detail("oracles"):
                for name, value in oracles.items():
                    if name != "perfect":
                        found.setdefault(names.get(name, str(name)), []).append(float(value))
        means = {name: sum(values) / len(values) for name, values in found.items()}
        return dict(sorted(means.items(), key=lambda item: -item[1]))

    @cached_property
    def guesser(self) -> tuple[str, float] | None:
        """The guesser that a recall row must beat: the context-blind one, or the best where a task has none."""
        found = self.oracles()
        name = "context-blind" if "context-blind" in found else next(iter(found), None)
        return None if name is None else (name, found[name])

    def line(self, group: str) -> float | None:
        """What a row must beat: the guesser's score for recall, chance for worlds."""
        if group == "recall":
            return None if self.guesser is None else self.guesser[1]
        chances = [float(c) for row in self.groups.get(group, ()) for c in row.detail("chance")]
        return chances[0] if chances else 0.5


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


def load_faceoff(directory: Path) -> FaceOff:
    """Read a face-off directory.

    Raises RunError naming the file when the directory or ``faceoff.json`` is missing, a file is damaged, or no run at
    all has finished.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise RunError(f"face-off directory '{directory}' does not exist")
    path = directory / "faceoff.json"
    if not path.is_file():
        raise RunError(f"'{directory}' holds no faceoff.json: it is not a face-off directory")
    config = _read_object(path)
    planned = _planned(config, path)
    rows = {key: Row(*key, tuple(_read_run(directory, *key, seed) for seed in seeds)) for key, seeds in planned.items()}
    groups: dict[str, tuple[Row, ...]] = {}
    for (group, _), row in rows.items():
        groups[group] = (*groups.get(group, ()), row)
    ordered = {group: groups[group] for group in METRICS if group in groups}
    name = str(config.get("name") or directory.name)
    face = FaceOff(directory, name, str(config.get("title") or name), ordered, _tasks(config))
    if not any(run.status == "finished" for run in face.runs):
        raise RunError(f"no run of '{path}' has finished: no results.json below '{directory}'")
    return face


def result_rows(directory: Path) -> list[dict[str, Any]]:
    """The published form of the results, one dict per backbone and group.

    Keys: recipe, row, group, metrics {name: mean}, spread {name: sample std; empty for one seed}, n_seeds, params,
    state_bytes, commit, device, wall_s (mean over seeds).
    """
    return rows_of(load_faceoff(directory))


def rows_of(face: FaceOff) -> list[dict[str, Any]]:
    """``result_rows`` of a face-off that has been read."""
    rows: list[dict[str, Any]] = []
    for row in (row for group in face.groups.values() for row in group if row.finished):
        names = dict.fromkeys(name for run in row.finished for name in run.results["metrics"])
        stats = {name: stat for name in names if (stat := row.metric(name))}
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
            }
        )
    return rows


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)


def _planned(config: dict[str, Any], path: Path) -> dict[tuple[str, str], list[int]]:
    """(group, row) -> seeds. A row listed once runs on every seed of the face-off; listed again, on its own seeds."""
    runs = config.get("runs")
    if not isinstance(runs, list) or not runs:
        raise RunError(f"'{path}' lists no runs")
    own: dict[tuple[str, str], list[int]] = {}
    for i, run in enumerate(runs):
        if not isinstance(run, dict) or not {"group", "row"} <= run.keys():
            raise RunError(f"'{path}': run {i} names no group and row")
        group, row = str(run["group"]), str(run["row"])
        if group not in METRICS:
            raise RunError(f"'{path}': run {i} has unknown group '{group}'{nearest(group, METRICS)}")
        own.setdefault((group, row), []).append(_seed(run.get("seed", 0), path))
    shared = [_seed(seed, path) for seed in config.get("seeds") or ()]
    times = Counter({key: len(seeds) for key, seeds in own.items()})
    return {key: shared if shared and times[key] == 1 else list(dict.fromkeys(own[key])) for key in own}


def _tasks(config: dict[str, Any]) -> tuple[str, ...]:
    problems = [run.get("problem") or {} for run in config["runs"] if run["group"] == "recall"]
    return tuple(dict.fromkeys(str(p["task"]["kind"]) for p in problems if "kind" in (p.get("task") or {})))


def _seed(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RunError(f"'{path}': seed {value!r} is not a whole number")
    return value


def _read_run(directory: Path, group: str, row: str, seed: int) -> Run:
    folder = directory / group / row / f"seed{seed}"
    path = folder / "results.json"
    log = _read_log(folder / "metrics.jsonl")
    status: Status = "finished" if path.is_file() else "unfinished" if log else "not started"
    results = _read_results(path, group, row, seed) if status == "finished" else {}
    environment = folder / "environment.json"
    found = _read_object(environment) if environment.is_file() else {}
    return Run(group, row, seed, folder, status, results, log, found)


def _read_results(path: Path, group: str, row: str, seed: int) -> dict[str, Any]:
    results = _read_object(path)
    metrics = results.get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(v, (int, float)) or v is None for v in metrics.values()):
        raise RunError(f"'{path}' is damaged: 'metrics' is not a mapping of names to numbers")
    if not isinstance(results.setdefault("details", {}), dict):
        raise RunError(f"'{path}' is damaged: 'details' is not a mapping")
    for key, expected in (("group", group), ("row", row), ("seed", seed)):
        if results.get(key, expected) != expected:
            raise RunError(f"'{path}' belongs to another run: its {key} is {results[key]!r}, not {expected!r}")
    if METRICS[group][0] not in metrics:
        raise RunError(f"'{path}' is damaged: metric '{METRICS[group][0]}' is missing")
    return results


def _read_log(path: Path) -> tuple[dict[str, Any], ...]:
    """Log lines in the order of their steps; a step logged again after a resume counts once, the later one."""
    if not path.is_file():
        return ()
    lines = _read_text(path).split("\n")
    by_step: dict[int, dict[str, Any]] = {}
    for number, text in enumerate(lines, start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
            by_step[int(line["step"])] = {**by_step.get(int(line["step"]), {}), **line}
        except (ValueError, TypeError, KeyError):
            # A run that was killed may leave its last line half-written (no newline at its end); any other is damage.
            if number < len(lines):
                raise RunError(f"'{path}' is damaged: line {number} is not a JSON object with a step") from None
    return tuple(by_step[step] for step in sorted(by_step))


def _read_object(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise RunError(f"'{path}' is damaged: not JSON ({error.msg}, line {error.lineno})") from None
    if not isinstance(data, dict):
        raise RunError(f"'{path}' is damaged: not a JSON object")
    return data


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"'{path}' cannot be read: {type(error).__name__}") from None


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
