"""Carrying out a list of cases: in what order, what is skipped and why, and a record that is whole after every case.

The record is one JSON file. The same command reads it back and measures only what is missing, as long as the code, the
versions, the machine and the settings are those it was begun with; otherwise it stops and says what differs. A case is
skipped, with its reason in the row, when its row's shorter cases foretell more time than the budget or more memory than
is free, and when it ran over in fact.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import recollect
from recollect.core.config import differences
from recollect.core.errors import RecollectError
from recollect.core.files import locked, write_atomically
from recollect.eval.bench.measure import LONG_S, MIN_REPEATS, available_bytes
from recollect.eval.bench.process import Worker
from recollect.train.runtime import ALLOCATOR_ENV, allocator_env, environment, git_state, package_version

SCHEMA = 1

Row = dict[str, Any]

PACKAGES = ("numba", "transformers", "s5-pytorch")
"""Versions that matter here besides those of every run."""

MEASURED_ROOMS = ("core", "ops", "layers")
MEASURING_FILES = ("layers", "attention", "decode", "measure", "peers", "rows")
"""Of ``eval``, after ``bench_``. How cases are ordered and drawn changes no number."""

SPARE = 0.9
"""The part of the free memory that a case may be expected to take."""

GRACE_S = 60.0
"""A case is stopped after twice its budget and this much, which is for compiling."""


@dataclass(frozen=True)
class Case:
    """One measurement: a row at a size, and the call that measures it."""

    row: str
    size: int
    call: str
    arguments: Mapping[str, Any]
    preload: tuple[str, ...] = ()
    refusal: str = ""
    """Why it cannot be measured here at all; empty when it can."""

    @property
    def key(self) -> tuple[str, int]:
        return self.row, self.size


@dataclass
class Record:
    """What was measured so far: the file ``path``."""

    path: Path
    size_name: str
    head: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    derived: dict[str, Any] = field(default_factory=dict)
    newly: int = 0
    """Cases that this command measured itself."""

    def of(self, case: Case) -> Row | None:
        """The row of a case, if it is there."""
        return next((row for row in self.rows if (row["row"], row[self.size_name]) == case.key), None)

    def put(self, row: Row) -> None:
        """Add a row in place of an earlier one of the same case."""
        key = (row["row"], row[self.size_name])
        self.rows = [each for each in self.rows if (each["row"], each[self.size_name]) != key] + [row]

    def order(self, names: Sequence[str]) -> None:
        """Sort by the order of ``names``, then by size; rows of other commands come last."""
        place = {name: i for i, name in enumerate(names)}
        self.rows.sort(key=lambda row: (place.get(row["row"], len(place)), row["row"], row[self.size_name]))

    def save(self) -> None:
        """Write the file; it is never met half-written."""
        data = {**self.head, **self.derived, "rows": self.rows}
        write_atomically(self.path, (json.dumps(data, indent=1, default=str) + "\n").encode())

    def measured(self) -> list[Row]:
        """The rows that hold numbers."""
        return [row for row in self.rows if row["status"] == "measured"]


def run_cases(
    name: str,
    cases: Sequence[Case],
    *,
    size_name: str,
    settings: Mapping[str, Any],
    out: Path,
    budget_s: float,
    device: torch.device,
    fresh: bool = False,
    say: Callable[[str], None] = lambda _: None,
    derive: Callable[[list[Row]], dict[str, Any]] = lambda _: {},
    also: Sequence[str] = (),
) -> Record:
    """Measure what ``out/name.json`` does not hold yet. ``say`` is told of every case as it ends.

    ``also`` names folders and files of the package whose source decides these numbers, besides that of every bench.

    Raises RecollectError when the file cannot be written, is damaged, belongs to other code or settings (unless
    ``fresh``), or another command is writing it.
    """
    if not budget_s > 0:
        raise RecollectError(f"bench: budget-seconds must be positive, got {budget_s:g}")
    record = Record(out / f"{name}.json", size_name, _head(name, settings, device, also))
    if not record.path.exists():
        record.save()
    try:
        with locked(record.path.with_name(f".{name}.lock"), wait=False), Worker() as worker:
            if not fresh:
                record.rows = _earlier(record)
            # Shorter cases first, all rows side by side: what is compared is measured at about the same time.
            waiting = sorted(cases, key=lambda case: case.size)
            names = list(dict.fromkeys(case.row for case in cases))
            refusals: set[str] = set()
            for done, case in enumerate(waiting):
                row = _settle(case, record, worker, budget_s, device)
                if row is not None:
                    record.put({"row": case.row, size_name: case.size, **row, "commit": record.head["commit"]})
                    record.order(names)
                    record.derived = derive(record.rows)
                    record.save()
                    left = _left_s(waiting[done + 1 :], record, budget_s)
                    if case.refusal in refusals:
                        continue
                    refusals.update({case.refusal} - {""})
                    where = f"[{done + 1}/{len(waiting)}] {case.row} at {case.size:,}"
                    say(f"{where}: {_said(row)}; {_duration(left)} left")
            record.order(names)
            record.derived = derive(record.rows)
            record.save()
    except BlockingIOError:
        raise RecollectError(f"another command is writing {record.path}; wait for it or give another --out") from None
    except OSError as error:
        raise RecollectError(f"'{record.path}' cannot be written: {error.strerror}") from None
    return record


def _settle(case: Case, record: Record, worker: Worker, budget_s: float, device: torch.device) -> Row | None:
    """The row of a case; None when the record holds it already."""
    there = record.of(case)
    if there is not None and there["status"] == "measured":
        return None
    if case.refusal:
        return {"status": "skipped", "why": case.refusal}
    ran_over = there is not None and there.get("ran_over", False)
    if there is not None and ran_over and there["budget_s"] >= budget_s:
        return None
    if why := _foretold(case, record, budget_s, device):
        return {"status": "skipped", "why": why}
    started = time.perf_counter()
    row = worker.run(case.call, case.arguments, limit_s=2 * budget_s + GRACE_S, preload=case.preload)
    record.newly += 1
    return {**row, "case_s": round(time.perf_counter() - started, 3), "budget_s": budget_s}


def _foretold(case: Case, record: Record, budget_s: float, device: torch.device) -> str:
    """Why the case is not worth starting, from the shorter cases of its row; empty when it is."""
    shorter = [row for row in record.rows if row["row"] == case.row and row[record.size_name] < case.size]
    over = [row[record.size_name] for row in shorter if row.get("ran_over") and row["budget_s"] >= budget_s]
    if over:
        return f"{min(over):,} was too much already"
    seconds = forecast(_points(shorter, record.size_name, "pass_s"), case.size)
    if seconds is not None:
        needed = seconds * (1 if seconds > LONG_S else 1 + MIN_REPEATS)
        if needed > budget_s:
            return f"about {_duration(needed)} expected, {_duration(budget_s)} allowed"
    n_bytes, free = forecast(_points(shorter, record.size_name, "peak_bytes"), case.size), available_bytes(device)
    if n_bytes is not None and free is not None and n_bytes > SPARE * free:
        return f"about {n_bytes / 2**30:.1f} GiB expected, {free / 2**30:.1f} GiB free"
    return ""


def forecast(points: Sequence[tuple[int, float]], size: int) -> float | None:
    """The value at ``size`` from values at smaller sizes: the growth between the last two goes on, linear at least.

    None without points. The exponent of the growth is at most 3.

    >>> forecast([(256, 1.0), (512, 4.0)], 1024)
    16.0
    """
    points = [point for point in sorted(points) if point[1] > 0]
    if not points:
        return None
    last_size, last = points[-1]
    exponent = 1.0
    if len(points) > 1:
        before_size, before = points[-2]
        exponent = min(3.0, max(1.0, math.log(last / before) / math.log(last_size / before_size)))
    return last * (size / last_size) ** exponent


def _points(rows: Sequence[Row], size_name: str, name: str) -> list[tuple[int, float]]:
    return [(row[size_name], row[name]) for row in rows if row["status"] == "measured"]


def _left_s(cases: Sequence[Case], record: Record, budget_s: float) -> float:
    took = [row["case_s"] for row in record.measured()]
    typical = statistics.median(took) if took else 0.0
    left = 0.0
    for case in cases:
        if case.refusal or record.of(case) is not None:
            continue
        shorter = [row for row in record.measured() if row["row"] == case.row]
        expected = forecast(_points(shorter, record.size_name, "case_s"), case.size)
        if expected is None:
            left += min(typical, budget_s)
        elif not _foretold_in_time(case, shorter, record.size_name, budget_s):
            left += min(expected, budget_s)
    return left


def _foretold_in_time(case: Case, shorter: Sequence[Row], size_name: str, budget_s: float) -> bool:
    seconds = forecast(_points(shorter, size_name, "pass_s"), case.size)
    return seconds is not None and seconds > budget_s


def _head(name: str, settings: Mapping[str, Any], device: torch.device, also: Sequence[str]) -> dict[str, Any]:
    """Everything but rows: what must be the same for results to stand beside each other, and where they come from."""
    facts = environment(device)
    versions = {**facts["packages"], **{package: package_version(package) for package in PACKAGES}}
    variables = {**os.environ, **allocator_env(os.environ)}  # as the measuring processes get them
    return {
        "bench": name,
        "schema": SCHEMA,
        "commit": git_state(Path(recollect.__file__).parent)["commit"],
        "code": code_digest(also),
        "settings": json.loads(json.dumps(dict(settings))),
        "environment": {
            **{key: facts[key] for key in ("started", "python", "platform", "device", "cuda")},
            "packages": versions,
            "allocator": {name: variables.get(name) for name in ALLOCATOR_ENV},
        },
    }


def code_digest(also: Sequence[str] = ()) -> str:
    """Twelve digits of the source that decides what is measured: the layers, what they stand on, and the cases;
    ``also`` adds folders and files of the package.
    """
    root = Path(recollect.__file__).parent
    paths = [path for room in MEASURED_ROOMS for path in (root / room).rglob("*.py")]
    paths += [root / "eval" / "bench" / f"{name}.py" for name in MEASURING_FILES]
    paths += [
        path for name in also for path in ((root / name).rglob("*.py") if (root / name).is_dir() else [root / name])
    ]
    text = b"".join(path.relative_to(root).as_posix().encode() + path.read_bytes() for path in sorted(paths))
    return hashlib.sha256(text).hexdigest()[:12]


def _identity(head: Mapping[str, Any]) -> dict[str, Any]:
    facts = head["environment"]
    return {
        **{key: head[key] for key in ("bench", "schema", "code", "settings")},
        **{key: facts[key] for key in ("python", "device", "packages")},
    }


def _earlier(record: Record) -> list[Row]:
    """The rows of the file, if they may stand beside new ones."""
    try:
        data: dict[str, Any] = json.loads(record.path.read_text())
        rows, changed = data["rows"], differences(_identity(data), _identity(record.head))
    except (OSError, ValueError, KeyError, TypeError):
        raise RecollectError(f"{record.path} is not a record of this bench; give another --out, or --fresh") from None
    if changed and rows:
        raise RecollectError(
            f"{record.path} holds results of something else ({'; '.join(changed)}); "
            "keep it and give another --out, or start it over with --fresh"
        )
    return rows


def note(row: Row) -> str:
    """Why a case has no numbers; empty when it has."""
    return "" if row["status"] == "measured" else f"{row['status']}: {row['why']}"


def _said(row: Row) -> str:
    return note(row) or f"one pass {row['pass_s']:.3g} s, {row['peak_bytes'] / 2**20:,.0f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"
