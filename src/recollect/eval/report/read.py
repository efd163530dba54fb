"""Reading a face-off directory, strictly: what has not finished is kept as such, what is damaged is an error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recollect.core.errors import RunError, nearest
from recollect.eval.report.data import FaceOff, Row, Run, Status, Trial, rows_of
from recollect.eval.report.metrics import headline_of
from recollect.train.run import FAMILIES, PLAIN_NAME, group_family, rate_name


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
    families = _families(config, path)
    lrs = _rates(config, path)
    groups: dict[str, tuple[Row, ...]] = {}
    for (group, name), seeds in planned.items():
        row = _read_row(directory, group, families[group], name, seeds, lrs)
        groups[group] = (*groups.get(group, ()), row)
    ordered = {group: rows for family in FAMILIES for group, rows in groups.items() if families[group] == family}
    name = str(config.get("name") or directory.name)
    face = FaceOff(
        directory, name, str(config.get("title") or name), ordered, _tasks(config, families), _trained(config)
    )
    if not any(row.finished for rows in ordered.values() for row in rows):
        raise RunError(f"no run of '{path}' has finished: no results.json below '{directory}'")
    for group, rows in ordered.items():
        asked = sorted({run.headline for row in rows for run in row.finished})
        if len(asked) > 1:
            raise RunError(
                f"'{path}': group '{group}' has no one metric to rank its rows by, but {' and '.join(asked)}; give "
                f"each environment a group of its own"
            )
    return face


def result_rows(directory: Path) -> list[dict[str, Any]]:
    """The published form of the results, one dict per backbone and group.

    Keys: recipe, row, group, metrics {name: mean}, spread {name: sample std; empty for one seed}, n_seeds, params,
    state_bytes, commit, device, wall_s (mean over seeds), lr (the chosen learning rate; null where none were tried).
    """
    return rows_of(load_faceoff(directory))


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
        if not PLAIN_NAME.fullmatch(group):
            raise RunError(f"'{path}': run {i} has group '{group}', which is no folder's name")
        own.setdefault((group, row), []).append(_seed(run.get("seed", 0), path))
    shared = [_seed(seed, path) for seed in config.get("seeds") or ()]
    times = Counter({key: len(seeds) for key, seeds in own.items()})
    return {key: shared if shared and times[key] == 1 else list(dict.fromkeys(own[key])) for key in own}


def _families(config: dict[str, Any], path: Path) -> dict[str, str]:
    """Group -> the one of ``FAMILIES`` that its problems are of."""
    families: dict[str, str] = {}
    for i, run in enumerate(config["runs"]):
        group = str(run["group"])
        family = group_family(str((run.get("problem") or {}).get("kind", "")), group)
        if family is None:
            raise RunError(f"'{path}': run {i} has unknown group '{group}'{nearest(group, FAMILIES)}")
        if families.setdefault(group, family) != family:
            both = " and ".join(sorted({family, families[group]}))
            raise RunError(f"'{path}': group '{group}' holds {both} problems, which cannot be compared")
    return families


def _tasks(config: dict[str, Any], families: dict[str, str]) -> dict[str, tuple[str, ...]]:
    kinds: dict[str, dict[str, None]] = {group: {} for group in families}
    for run in config["runs"]:
        task = (run.get("problem") or {}).get("task") or {}
        if "kind" in task:
            kinds[str(run["group"])][str(task["kind"])] = None
    return {group: tuple(found) for group, found in kinds.items() if families[group] == "recall"}


def _trained(config: dict[str, Any]) -> dict[str, int]:
    """Group -> tokens of the rows that its models are trained on, where all of them agree."""
    found: dict[str, dict[int, None]] = {}
    for run in config["runs"]:
        length = (run.get("problem") or {}).get("row_length")
        if isinstance(length, int):
            found.setdefault(str(run["group"]), {})[length] = None
    return {group: next(iter(lengths)) for group, lengths in found.items() if len(lengths) == 1}


def _seed(value: Any, path: Path) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RunError(f"'{path}': seed {value!r} is not a whole number")
    return value


def _rates(config: dict[str, Any], path: Path) -> list[float]:
    lrs = config.get("lrs") or []
    if not isinstance(lrs, list) or not all(isinstance(lr, (int, float)) and lr > 0 for lr in lrs):
        raise RunError(f"'{path}': 'lrs' is not a list of learning rates")
    return [float(lr) for lr in lrs]


def _read_row(directory: Path, group: str, family: str, name: str, seeds: Sequence[int], lrs: Sequence[float]) -> Row:
    place = directory / group / name
    if not lrs:
        return Row(group, name, tuple(_read_run(place, group, family, name, seed) for seed in seeds))
    runs = {lr: tuple(_read_run(place / rate_name(lr), group, family, name, seed) for seed in seeds) for lr in lrs}
    return Row.chosen(group, name, tuple(Trial.of(lr, found) for lr, found in runs.items()))


def _read_run(place: Path, group: str, family: str, row: str, seed: int) -> Run:
    folder = place / f"seed{seed}"
    path = folder / "results.json"
    log = _read_log(folder / "metrics.jsonl")
    status: Status = "finished" if path.is_file() else "unfinished" if log else "not started"
    if status == "unfinished" and any(folder.glob("bad_batch-*.safetensors")):
        status = "diverged"
    results = _read_results(path, group, family, row, seed) if status == "finished" else {}
    environment = folder / "environment.json"
    found = _read_object(environment) if environment.is_file() else {}
    return Run(group, family, row, seed, folder, status, results, log, found)


def _read_results(path: Path, group: str, family: str, row: str, seed: int) -> dict[str, Any]:
    results = _read_object(path)
    metrics = results.get("metrics")
    if not isinstance(metrics, dict) or not all(isinstance(v, (int, float)) or v is None for v in metrics.values()):
        raise RunError(f"'{path}' is damaged: 'metrics' is not a mapping of names to numbers")
    if not isinstance(results.setdefault("details", {}), dict):
        raise RunError(f"'{path}' is damaged: 'details' is not a mapping")
    for key, expected in (("group", group), ("row", row), ("seed", seed)):
        if results.get(key, expected) != expected:
            raise RunError(f"'{path}' belongs to another run: its {key} is {results[key]!r}, not {expected!r}")
    if (headline := headline_of(family, results)) not in metrics:
        raise RunError(f"'{path}' is damaged: metric '{headline}' is missing")
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
            earlier = by_step.get(int(line["step"]), {})
            # A curve is of validations: the test of the last step does not take the place of its validation.
            tested = line.get("split") == "test" and earlier.get("split") == "valid"
            by_step[int(line["step"])] = {**line, **earlier} if tested else {**earlier, **line}
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
