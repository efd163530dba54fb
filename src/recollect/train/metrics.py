"""``metrics.jsonl``: one JSON object per line, in order of step, each step once however often the run was resumed."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from recollect.core.files import write_atomically


def finite(value: Any) -> Any:
    """The same JSON data with NaN and infinities as null, which JSON has no other word for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return value


def read_metrics(path: Path, tail_bytes: int | None = None) -> list[dict[str, Any]]:
    """Every whole line, or those in the last ``tail_bytes``; a killed process may leave a torn one."""
    try:
        with path.open("rb") as file:
            start = max(0, file.seek(0, os.SEEK_END) - tail_bytes) if tail_bytes else 0
            file.seek(start)
            lines = file.read().splitlines()[1 if start else 0 :]
    except FileNotFoundError:
        return []
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


class MetricsLog:
    """Appends records; opening it drops the lines after ``last_step``, which the resumed run will write again."""

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [record for record in read_metrics(path) if record["step"] <= last_step]
        write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
        self._file = path.open("a")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one record; it survives the death of this process."""
        self._file.write(json.dumps(finite(record)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Wait until what was written survives a power cut: done before every checkpoint that relies on it."""
        os.fsync(self._file.fileno())
