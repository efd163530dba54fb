"""One run of a face-off as its directory shows it, and what it takes to carry it out somewhere.

An executor is told to start jobs and is asked how they stand; which job comes next, what is finished already and what
is shown is decided by ``recollect.train.sweep``, the same for all of them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from recollect.train.directory import RunDirectory
from recollect.train.metrics import read_metrics
from recollect.train.run import RunConfig

POLL_S = 0.25
"""Seconds between two looks at what is running."""

GRACE_S = 30.0
"""How long a run may take to finish its step and write a checkpoint when the face-off is stopped."""

Status = Literal["waiting", "queued", "running", "finished", "failed"]
"""``queued``: handed to a cluster that has no room for it yet."""


@dataclass
class Job:
    """One run of a face-off; ``name`` is its place below the face-off's directory."""

    run: RunConfig
    where: RunDirectory
    name: str
    status: Status = "waiting"
    error: str = ""
    step: int = 0
    loss: float | None = None
    headline: float | None = None
    steps_per_s: float | None = None
    elapsed_s: float = 0.0

    @property
    def log(self) -> Path:
        """What the run printed where it has a process of its own, and the traceback of what ended it."""
        return self.where.log

    @property
    def under_way(self) -> bool:
        """Started and not ended."""
        return self.status in ("queued", "running")

    @property
    def left_s(self) -> float | None:
        """Seconds of training left: by the speed of the last steps, and no more than the time limit allows."""
        if self.steps_per_s is None or self.steps_per_s <= 0:
            return None
        left = (self.run.train.steps - self.step) / self.steps_per_s
        limit = self.run.train.time_limit_s
        return max(0.0, left if limit is None else min(left, limit - self.elapsed_s))

    def refresh(self) -> None:
        """Read the newest lines of ``metrics.jsonl``; what cannot be read is left as it was."""
        with suppress(OSError, TypeError):
            for record in read_metrics(self.where.metrics, tail_bytes=8192):
                self.step = max(self.step, record["step"])
                self.loss = record.get("loss", self.loss)
                self.headline = record.get("headline", self.headline)
                self.steps_per_s = record.get("steps_per_s", self.steps_per_s)
                self.elapsed_s = record.get("elapsed_s", self.elapsed_s)

    def fail(self, error: str) -> None:
        """End the job with one line that says why."""
        self.status, self.error = "failed", " ".join(error.split())


class Executor(Protocol):
    """Carries out jobs. One that fails is marked so and costs the others nothing.

    A run that is stopped or killed leaves its checkpoints, and is started again like any other.
    """

    slots: int | None
    """How many jobs may be under way together; None: all of them, they queue elsewhere."""

    def start(self, job: Job) -> None:
        """Begin ``job`` and mark it ``running`` or ``queued``."""
        ...

    def poll(self, tick: Callable[[], None]) -> None:
        """Bring every job that was started up to date, at latest when one of them has ended.

        Whoever does not return within ``POLL_S`` seconds calls ``tick`` that often.
        """
        ...

    def stop(self) -> None:
        """End what is under way, with a checkpoint where that is possible; also called when nothing is."""
        ...


def log_traceback(where: RunDirectory, error: BaseException) -> None:
    """Append the traceback of what ended a run to its ``log.txt``, if that can be written at all."""
    with suppress(OSError), where.log.open("a") as log:
        log.write("".join(traceback.format_exception(error)))
